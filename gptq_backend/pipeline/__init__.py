"""A whole model quantized, block by block."""

from .embeddings import find_embedding
from .options import Events, RunOptions
from .quantize import quantize_model
from .report import LayerReport, QuantizeReport

__all__ = ["Events", "LayerReport", "QuantizeReport", "RunOptions", "find_embedding", "quantize_model"]
