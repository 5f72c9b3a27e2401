"""How fast is a quantized product, measured so that the figure means something. Commands: ``gptq-backend bench``.

``timing`` interleaves what is compared, ``machine`` says what the hardware allows, ``gemm`` does one layer's product,
``plans`` finds the fastest way to cut it on a GPU.
"""

from . import gemm, machine, plans, products
from .gemm import Row
from .layers import DTYPES, Problem, Weight
from .machine import describe_machine
from .products import Peer
from .timing import Candidate, interleave, quartiles, synchronize, threads

__all__ = [
    "DTYPES", "Candidate", "Peer", "Problem", "Row", "Weight", "describe_machine", "gemm", "interleave", "machine",
    "plans", "products", "quartiles", "synchronize", "threads",
]  # fmt: skip
