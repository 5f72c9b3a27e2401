"""Experts that transformers fuses into one tensor, as the separate layers that checkpoints store."""
