"""The byte limit: search, solver, and the controller of training to a number of bytes."""
