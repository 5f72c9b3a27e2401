"""A whole model quantized, block by block."""
