"""Multiplying by a packed weight: one table of kernels, one folder or file per kind of device."""

from .experts import Grouped, Routing, obstacle, one_by_one
from .table import KERNELS, Kernel, fastest, kernel_report, select_kernel

__all__ = [
    "KERNELS",
    "Grouped",
    "Kernel",
    "Routing",
    "fastest",
    "kernel_report",
    "obstacle",
    "one_by_one",
    "select_kernel",
]
