"""GPTQ quantization and quantized linear layers for PyTorch. Imports torch and safetensors, no framework."""

from .config import QuantizeConfig
from .embedding import QuantEmbedding, TiedHead
from .errors import CalibrationError, CheckpointError, ConfigError, GPTQError
from .format.stored_tensors import StoredSpec
from .format.weight import PackedWeight, QuantizedWeight, WeightSpec
from .kernels.interface import Kernel
from .kernels.table import KERNELS, kernel_report, select_kernel
from .linear import QuantLinear
from .pipeline import Events, LayerReport, QuantizeReport, RunOptions, quantize_model
from .version import __version__ as __version__

__all__ = [
    "KERNELS", "CalibrationError", "CheckpointError", "ConfigError", "Events", "GPTQError", "Kernel", "LayerReport",
    "PackedWeight", "QuantEmbedding", "QuantLinear", "QuantizeConfig", "QuantizeReport", "QuantizedWeight",
    "RunOptions", "StoredSpec", "TiedHead", "WeightSpec", "kernel_report", "quantize_model", "select_kernel",
]  # fmt: skip
