"""Decoder layers of vLLM's models in two calls of the CPU kernels, beside vLLM's own attention."""

from .layers import FusedLayers

__all__ = ["FusedLayers"]
