"""Measures models: bits per byte, samples. Knows how to open an artifact, not how to train."""
