"""Corpora, tokenizers, shards, batches, bytes per token, and the audit of a split."""
