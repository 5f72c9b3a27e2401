"""GPTQ of one weight: tensors in, tensors out."""

from .gptq import prepare_factor, quantize_weight
from .hessian import Hessian

__all__ = ["Hessian", "prepare_factor", "quantize_weight"]
