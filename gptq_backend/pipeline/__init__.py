"""A whole model quantized, block by block."""

from .options import Events, RunOptions
from .quantize import quantize_model
from .report import LayerReport, QuantizeReport

__all__ = ["Events", "LayerReport", "QuantizeReport", "RunOptions", "quantize_model"]
