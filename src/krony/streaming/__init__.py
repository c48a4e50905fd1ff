"""Compression of models that are larger than memory, layer by layer from file to file."""
