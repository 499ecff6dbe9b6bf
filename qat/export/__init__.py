"""Files that other programs open: Hugging Face, safetensors, GGUF, the challenge's .ptz."""
