"""A whole model quantized, block by block."""

from .quantize import OnLayer, quantize_model
from .report import LayerReport, QuantizeReport

__all__ = ["LayerReport", "OnLayer", "QuantizeReport", "quantize_model"]
