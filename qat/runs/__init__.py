"""One run's life: its folder, its result row, its provenance, storing and storing again."""
