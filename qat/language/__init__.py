"""Text and GPT: corpora, tokenizer, shards, batches, bits per byte. Knows no quantization."""
