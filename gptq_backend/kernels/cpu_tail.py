"""All that follows the attention of a decoder layer in one call: an MLP, a mixture, or both (csrc/cpu/tail.h)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .cpu import _cpu
from .cpu_block import ACTIVATIONS, AfterAttention, Linear, Norm, Output, OutputParts, check_norm
from .cpu_dense import Dense
from .cpu_experts import MOST_ROWS, ExpertMLPs
from .cpu_router import Router, RouterParts


@dataclass(frozen=True)
class MLP:
    """``down(activation(gate(x)) * up(x))``.

    Args:
        gate_up: gate and up, or one weight with the outputs of both; or, unless ``gated``, the only one.
        activation: one of ``cpu_block.ACTIVATIONS``.
    """

    gate_up: tuple[Linear, ...]
    down: Linear
    activation: str
    gated: bool = True

    @property
    def native(self) -> tuple[Any, Any]:
        """What the call reads, and what to keep as long as that."""
        gate_up, down = [each.native for each in self.gate_up], self.down.native
        return _cpu.MLP(gate_up, self.gated, ACTIVATIONS[self.activation], down), (gate_up, down)

    def check(self, hidden: int) -> None:
        """Raise unless it maps ``hidden`` channels to as many."""
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation={self.activation!r}; expected one of {', '.join(ACTIVATIONS)}")
        inner = self.down.in_features
        shapes = [(each.in_features, each.out_features) for each in (*self.gate_up, self.down)]
        expected = [[(hidden, inner)]]
        if self.gated:
            expected = [[(hidden, inner)] * 2, [(hidden, 2 * inner)]]
        if shapes not in [[*each, (inner, hidden)] for each in expected]:
            raise ValueError(
                f"gate_up and down map {shapes} channels; expected {' or '.join(map(str, expected))} and "
                f"{(inner, hidden)}"
            )


@dataclass(frozen=True)
class Mixture:
    """The weighted sum of what the experts chosen by a router make of x.

    Args:
        mlp_gate: [1, hidden]: an MLP beside the experts counts ``sigmoid(mlp_gate(x))``; None: it counts 1.
    """

    router: RouterParts
    experts: ExpertMLPs
    mlp_gate: Dense | None = None


@dataclass(frozen=True)
class TailParts:
    """``y = h + factor * after_mlp(mixture(n) + mlp(n))``, with h, n and factor of ``output``.

    Args:
        mlp, mixture: one of them may be None.
    """

    output: OutputParts
    mlp: MLP | None
    mixture: Mixture | None = None
    after_mlp: Norm | None = None


class Tail(AfterAttention):
    """Runs :class:`TailParts`.

    Attributes:
        top_k: how many experts a row chooses; 0 without a mixture.
        most_rows: that should be computed at a time; the memory between the steps is kept.

    Raises:
        ValueError: sizes do not fit together.
    """

    def __init__(self, parts: TailParts) -> None:
        super().__init__(parts.output.o)
        output = Output(parts.output)
        if parts.mlp is not None:
            parts.mlp.check(parts.output.o.out_features)
        check_norm(parts.after_mlp, parts.output.o.out_features)
        after_mlp = None if parts.after_mlp is None else parts.after_mlp.native
        mlp, of_mlp = (None, None) if parts.mlp is None else parts.mlp.native
        mixture, of_mixture, self.top_k, self.most_rows = None, None, 0, None
        if (mix := parts.mixture) is not None:
            router, mlp_gate = Router(mix.router), None if mix.mlp_gate is None else mix.mlp_gate.native
            mixture, of_mixture = _cpu.Mixture(router.native, mix.experts.native, mlp_gate), (router, mlp_gate)
            self.top_k, self.most_rows = router.top_k, max(1, MOST_ROWS // router.top_k)
        self._kept = parts, output, after_mlp, mlp, of_mlp, mixture, of_mixture
        self.native = _cpu.Tail(output.native, mlp, mixture, after_mlp)

    def __call__(self, x: Tensor, residual: Tensor) -> Tensor:
        """x: [..., o's K]; residual: [..., hidden] of the same dtype -> [..., hidden]."""
        return self.with_choice(x, residual)[0]

    def with_choice(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """What calling it gives, and which experts were chosen, int32 [rows, top_k]."""
        y = torch.empty_like(residual, memory_format=torch.contiguous_format)
        ids = torch.empty((residual.numel() // residual.shape[-1], self.top_k), dtype=torch.int32)
        self._call(_cpu.finish_layer, x, residual, y, ids)
        return y, ids
