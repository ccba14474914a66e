"""One file per family of models that can be written as GGUF."""
