"""What a study found, for readers: page, tables, plots, W&B."""
