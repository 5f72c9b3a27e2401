"""Multiplying by a packed weight: one table of kernels, one folder or file per kind of device."""

from . import (
    cpu_attention,
    cpu_block,
    cpu_dense,
    cpu_experts,
    cpu_layer_halves,
    cpu_layers,
    cpu_router,
    cpu_tail,
    places,
)
from .expert_routing import Routing
from .experts import Grouped, one_by_one, why_not_groupable
from .interface import ExpertKernel, Kernel, PreparedWeight
from .operators import operators_are_seen
from .table import EXPERT_KERNELS, KERNELS, expert_kernel, fastest, kernel_report, select_kernel

__all__ = [
    "EXPERT_KERNELS", "KERNELS", "ExpertKernel", "Grouped", "Kernel", "PreparedWeight", "Routing", "cpu_attention",
    "cpu_block", "cpu_dense", "cpu_experts", "cpu_layer_halves", "cpu_layers", "cpu_router", "cpu_tail",
    "expert_kernel", "fastest", "kernel_report", "one_by_one", "operators_are_seen", "places", "select_kernel",
    "why_not_groupable",
]  # fmt: skip
