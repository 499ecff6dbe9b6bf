"""Bytes: the artifact file, its coder, and what counts against the byte limit."""
