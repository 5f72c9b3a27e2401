"""Which weights of a quantized model stay in 16 bits, in a few lines: whole towers, heads, routers of all blocks."""

from __future__ import annotations

import re
from collections import Counter

from torch import nn


def unquantized(model: nn.Module) -> dict[str, int]:
    """The number of weights (of vectors none) by where they are, the most first.

    A place is the outermost module without quantized layers, with ``*`` for the numbers of blocks and experts:
    ``model.visual``, ``model.layers.*.mlp.gate``.
    """
    quantized = {name for name, module in model.named_modules() if "qweight" in module._parameters}
    mixed = {""} | {name[:end] for name in quantized for end in [*_dots(name), len(name)]}
    found: Counter[str] = Counter()
    for key, parameter in model.named_parameters():
        owner = key.rpartition(".")[0]
        if parameter.dim() < 2 or owner in quantized:
            continue
        ends = [*_dots(key), len(key)]
        place = next((key[:end] for end in ends if key[:end] not in mixed), key)
        found[re.sub(r"(?<=\.)\d+(?=\.|$)", "*", place)] += parameter.numel()
    return dict(found.most_common())


def _dots(name: str) -> list[int]:
    return [match.start() for match in re.finditer(r"\.", name)]
