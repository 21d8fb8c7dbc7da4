"""GGUF files: read, described as a Hugging Face model, converted once into a cached folder."""
