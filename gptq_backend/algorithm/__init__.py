"""GPTQ of one weight: tensors in, tensors out."""

from .gptq import prepare_factor, quantize_weight
from .hessian import Hessian
from .nearest import round_to_nearest
from .requantize import round_changed

__all__ = ["Hessian", "prepare_factor", "quantize_weight", "round_changed", "round_to_nearest"]
