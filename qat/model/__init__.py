"""Architectures, attention and losses: they know nothing of quantization."""
