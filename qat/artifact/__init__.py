"""The file: its container, its coders, and a model of what bits cost."""
