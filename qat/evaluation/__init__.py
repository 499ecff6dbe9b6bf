"""Windows, bits per byte, and opening what is scored."""
