"""Which experts of a mixture a token is given to, and what their results count, on a CPU (csrc/cpu/router.h)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .cpu import _cpu
from .cpu_dense import Dense
from .cpu_tensors import address, dtype_code, vector_code


@dataclass(frozen=True)
class Rule:
    """What experts are chosen, and what they count, from the logits of a token.

    Args:
        top_k: how many are chosen.
        sigmoid: scores are the sigmoid of each logit; else the softmax of all.
        rounded: whether logits are rounded to the dtype of x.
        groups, chosen_groups: neighbouring experts form so many groups, and only those of the best can be chosen.
        best: of a group so many of the highest scores count, in sum.
        normalized: the counts, which are the scores, are divided by their sum.
        scale: and multiplied by this.
    """

    top_k: int
    sigmoid: bool = False
    rounded: bool = False
    groups: int = 1
    chosen_groups: int = 1
    best: int = 1
    normalized: bool = False
    scale: float = 1.0


@dataclass(frozen=True)
class RouterParts:
    """A product for the logits, and a rule.

    Args:
        gate: [experts, K].
        correction: float [experts], added to the scores in the choice only, or None.
    """

    gate: Dense
    rule: Rule
    correction: Tensor | None = None


class Router:
    """Runs :class:`RouterParts`.

    Raises:
        ValueError: sizes do not fit together.
    """

    def __init__(self, parts: RouterParts) -> None:
        rule, correction = parts.rule, parts.correction
        outputs, self.width = parts.gate.weight.shape
        self.top_k = rule.top_k
        gate = parts.gate.native
        code = 0 if correction is None else vector_code(correction, outputs, "a router's correction")
        self._kept = parts, gate
        self.native = _cpu.Router(
            gate,
            rule.rounded,
            rule.sigmoid,
            address(correction),
            code,
            rule.groups,
            rule.chosen_groups,
            rule.best,
            rule.top_k,
            rule.normalized,
            rule.scale,
        )

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: 16 bits or float32 [T, K] -> the experts, int32 [T, top_k], and what they count, float32 [T, top_k].

        Of equal scores the same are chosen as by ``torch.topk`` on a CPU; their order is any.
        """
        code = dtype_code(x, self.width, "x")
        x = x.contiguous()
        rows = x.numel() // self.width
        ids = torch.empty(rows, self.top_k, dtype=torch.int32)
        factors = torch.empty(rows, self.top_k)
        _cpu.route(self.native, code, rows, x.data_ptr(), ids.data_ptr(), factors.data_ptr(), torch.get_num_threads())
        return ids, factors
