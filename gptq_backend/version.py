"""The version, in a file of its own: what only wants to know it need not import torch."""

__version__ = "0.1.0"
