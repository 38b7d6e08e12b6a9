"""Models read from Hugging Face directories and GGUF files."""
