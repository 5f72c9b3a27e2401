"""What is compared: each kernel as a product on so many copies of a weight that none is timed from a cache."""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import math
import operator
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..errors import ConfigError
from ..linear import QuantLinear
from .layers import DTYPES, Weight
from .machine import last_level_cache, read_once
from .timing import explain

_MIN_ROTATED = 160_000_000
_MAX_COPIES = 4096  # of a layer so small that its Python objects outweigh its words

Product = Callable[[Tensor], Any]  # x [M, K] -> y [M, N]


@dataclass(frozen=True)
class Rotation:
    """A kernel on copies of one weight."""

    name: str  # of the kernel
    nbytes: int  # what one product reads of one copy
    products: list[Product]  # one for each copy; empty when there is a ``reason``
    reason: str | None = None  # why it cannot serve the layer
    computes: bool = True  # False for what only reads and returns nothing


@dataclass(frozen=True)
class Peer:
    """A function from outside; its interface is described in docs/cli.md."""

    name: str  # MODULE:FUNCTION
    function: Callable[..., Any]  # f(x, q, scales, zeros, group_size) -> y; with an attribute "prepare", f(x, *state)

    @classmethod
    def load(cls, name: str) -> Peer:
        """Import it; the working directory counts, as for ``python -m``.

        Raises:
            ConfigError: there is no such function.
        """
        module, _, attribute = name.partition(":")
        if not module or not attribute:
            raise ConfigError(f"peer {name!r} is not MODULE:FUNCTION")
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        try:
            function = operator.attrgetter(attribute)(importlib.import_module(module))
        except (ImportError, AttributeError) as error:
            raise ConfigError(f"peer {name!r} cannot be imported: {error}") from error
        return cls(name, function)


def rotated_bytes(device: torch.device) -> int:
    """How much a kernel reads before it meets the same copy again."""
    if device.type == "cuda":
        return max(_MIN_ROTATED, 3 * torch.cuda.get_device_properties(device).L2_cache_size)
    return max(_MIN_ROTATED, 5 * last_level_cache())


def _rotation(name: str, weight: Weight, nbytes: int, build: Callable[[int], list[Product]]) -> Rotation:
    """``build`` makes so many products."""
    copies = weight.copies or min(_MAX_COPIES, math.ceil(rotated_bytes(weight.zeros.device) / nbytes))
    try:
        return Rotation(name, nbytes, build(copies))
    except Exception as error:  # a kernel that cannot serve the layer, or foreign code
        return Rotation(name, nbytes, [], explain(error))


def ours(weight: Weight, backend: str) -> Rotation:
    """``QuantLinear``, called as a model calls it."""
    return _rotation(
        backend, weight, weight.problem.nbytes, lambda copies: [layer(weight, backend) for _ in range(copies)]
    )


def layer(weight: Weight, backend: str | None) -> QuantLinear:
    """A prepared layer with its own copy of the weight."""
    made = QuantLinear(weight.problem.spec, backend=backend, device=weight.zeros.device)
    made.load_state_dict(weight.tensors)
    return made.prepare()


class _Reader(nn.Module):
    """As much of a layer as any must be: a module that reads its weight and makes room for the result."""

    def __init__(self, buffer: Tensor, out_features: int) -> None:
        super().__init__()
        self.buffer, self.out_features = buffer, out_features

    def forward(self, x: Tensor) -> Tensor:
        read_once(self.buffer)
        return x.new_empty((x.shape[0], self.out_features))


def reading(weight: Weight) -> list[Rotation]:
    """Reading as many bytes on a CPU, and nothing else: the roof of few rows, in the same minute as they. By itself,
    and in a module, which finds Python and torch evicted from the caches at each call as every layer does.
    """
    nbytes = weight.problem.nbytes

    def build(in_layer: bool, copies: int) -> list[Product]:
        # Written to, see machine.read_gbps.
        buffers = [torch.ones(nbytes, dtype=torch.uint8) for _ in range(copies)]
        read_once(buffers[0])
        if in_layer:
            return [_Reader(buffer, weight.problem.N) for buffer in buffers]
        return [lambda x, buffer=buffer: read_once(buffer) for buffer in buffers]  # type: ignore[misc]

    return [
        dataclasses.replace(_rotation(name, weight, nbytes, functools.partial(build, in_layer)), computes=False)
        for name, in_layer in (("reading alone", False), ("reading in a layer", True))
    ]


def dense(weight: Weight) -> Rotation:
    """``F.linear`` on the dequantized weight, in the dtype of the activations."""
    problem = weight.problem
    dtype = DTYPES[problem.dtype]

    def build(copies: int) -> list[Product]:
        matrix = torch.empty((problem.N, problem.K), dtype=dtype, device=weight.zeros.device)
        for index, part in weight.slices():
            matrix[index] = part.dequantize()
        matrices = [matrix, *(matrix.clone() for _ in range(copies - 1))]
        return [functools.partial(linear, weight=each) for each in matrices]

    return _rotation("F.linear", weight, problem.N * problem.K * dtype.itemsize, build)


def aten(weight: Weight) -> Rotation:
    """torch's own 4-bit product for CPUs. Its zeros are in the dtype of x: ``w = (q - 8) * scale + zero``."""
    problem = weight.problem

    def build(copies: int) -> list[Product]:
        if problem.bits != 4 or problem.act_order or weight.zeros.device.type != "cpu":
            raise ValueError("serves 4 bits without act-order on a CPU")
        # Blocks of up to 64 rows are packed one after another, so the slices' words are those of the whole.
        slices = (part.codes.t().int().contiguous() for _, part in weight.slices())
        packed = torch.cat([torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1) for codes in slices])
        scales = weight.tensors["scales"].float()
        both = torch.stack([scales, (8.0 - weight.zeros) * scales], dim=-1).to(DTYPES[problem.dtype])

        def product(x: Tensor, packed: Tensor, both: Tensor) -> Any:
            return torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, problem.group_size, both)

        return [functools.partial(product, packed=packed.clone(), both=both.clone()) for _ in range(copies)]

    return _rotation("aten int4pack", weight, problem.nbytes, build)


def peer(weight: Weight, foreign: Peer) -> Rotation:
    """A function from outside, its ``prepare`` done and its state copied before any clock runs."""
    problem = weight.problem

    def build(copies: int) -> list[Product]:
        if problem.act_order:
            raise ValueError("the interface for peers has no act-order")
        codes = torch.cat([part.codes for _, part in weight.slices()], dim=1)
        state: tuple[Any, ...] = (
            codes,
            weight.tensors["scales"].to(DTYPES[problem.dtype]),
            weight.zeros,
            problem.group_size,
        )
        prepare = getattr(foreign.function, "prepare", None)
        state = state if prepare is None else tuple(prepare(*state))
        states = [state, *(copy.deepcopy(state) for _ in range(copies - 1))]

        def product(x: Tensor, state: tuple[Any, ...]) -> Any:
            return foreign.function(x, *state)

        return [functools.partial(product, state=each) for each in states]

    return _rotation(foreign.name, weight, problem.nbytes, build)
