"""How checkpoints spell the layers of a mixture's experts: one table, read against what the model needs.

Tools name the same three matrices in many ways: ``experts.0.w1`` or ``experts.0.gate_proj``, one list per projection
(``experts.gate_projs.0``), gate and up apart or in one matrix, in a ``block_sparse_moe`` or in an ``mlp``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..config import QuantizeConfig
from ..errors import CheckpointError
from .foreign import MARKS

# Names of gate, up and down.
_APART = (
    ("gate_proj", "up_proj", "down_proj"),  # transformers 5, GPTQModel, Qwen, DeepSeek
    ("w1", "w3", "w2"),  # Mixtral
    ("w1", "v1", "w2"),  # DBRX
    ("gate_projs", "up_projs", "down_projs"),
    ("gate", "up", "down"),
    ("wi_0", "wi_1", "wo"),  # T5 kinds
    ("linear", "linear_v", "linear_1"),  # Grok-1
)
# Gate and up in one matrix, in the model's own order of rows, and down.
_JOINED = (
    ("gate_up_proj", "down_proj"),
    ("gate_up_projs", "down_projs"),  # gpt-oss with its experts apart
    ("input_linear", "output_linear"),  # Granite
    ("w13", "w2"),
    ("gate_up", "down"),
)
# Experts without a gate: up and down.
_UNGATED = (
    ("up_proj", "down_proj"),
    ("up_projs", "down_projs"),
    ("w1", "w2"),
    ("fc1", "fc2"),
    ("wi", "wo"),
    ("up", "down"),
)
_EXPERTS = "experts"


@dataclass(frozen=True)
class ExpertLayout:
    """Where the layers of a module's experts are.

    ``paths`` are those of gate, up and down; of both in one and down; or, without a gate, of up and down.
    """

    paths: tuple[str, ...]  # below the module, with {} for the expert's number
    joined: bool = False  # gate and up are one matrix
    # What is called gate and up is the first and the second half of the rows of the model's one matrix, even where the
    # rows of its gate and up alternate. GPTQModel cuts the experts of gpt-oss so.
    halves: bool = False

    def path(self, projection: int, expert: int) -> str:
        """Of one layer, below the module."""
        return self.paths[projection].format(expert)


def default_layout(gated: bool) -> ExpertLayout:
    """What transformers 5 and most checkpoints have."""
    return ExpertLayout(tuple(f"{{}}.{name}" for name in (_APART if gated else _UNGATED)[0]))


def by_gptqmodel(config: QuantizeConfig) -> bool:
    """Whether GPTQModel says that it made the checkpoint: see :attr:`ExpertLayout.halves`."""
    meta = config.extra.get("meta")
    makers = meta.get("quantizer") if isinstance(meta, Mapping) else None
    makers = makers if isinstance(makers, list | tuple) else [makers]
    return any(str(maker).partition(":")[0].lower() == "gptqmodel" for maker in makers)


def expert_layout(module: str, names: Iterable[str], gated: bool) -> ExpertLayout | None:
    """The layout of the experts of ``module``; None if none of ``names`` is an expert's layer.

    Args:
        module: full name, as the checkpoint has it.
        names: full names of the checkpoint's layers, with or without those of other modules.
        gated: whether the model's experts have a gate.

    Raises:
        CheckpointError: there are such layers, but nothing known is called so.
    """
    found = _paths(module, names)
    if not found:
        return None
    apart, joined = (_APART, _JOINED) if gated else (_UNGATED, ())
    for spelling in (*apart, *joined):
        if found.keys() <= set(spelling):  # one that is missing is for whoever reads it to miss
            called, path = next(iter(found.items()))
            paths = (found.get(name, re.sub(rf"\b{called}\b", name, path)) for name in spelling)
            return ExpertLayout(tuple(paths), spelling in joined)
    example = ", ".join(default_layout(gated).paths)
    raise CheckpointError(
        f"{module}: the checkpoint calls the layers of its experts {', '.join(sorted(found.values()))} ({{}} is a "
        f"number), expected a layout known here, such as {example}; export the checkpoint with such names"
    )


def stored_place(module: str, names: Iterable[str], places: Iterable[str]) -> str:
    """What the checkpoint calls the model's module of experts ``module``: usually the same.

    Otherwise the only module called ``experts`` in the same block, unless it is another one of the model's.

    Args:
        module: full name in the model, for example ``model.layers.0.mlp.experts``.
        names: full names of the checkpoint's layers.
        places: full names of all the model's modules of experts.
    """
    block = _block(module)
    found = set()
    for name in names:
        if name.startswith(f"{module}."):
            return module
        if name.startswith(block) and f".{_EXPERTS}." in name:
            found.add(name[: name.index(f".{_EXPERTS}.", len(block) - 1)] + f".{_EXPERTS}")
    others = found - set(places)
    return others.pop() if len(others) == 1 else module


def expert_renaming(names: Iterable[str], layouts: Mapping[str, ExpertLayout | None]) -> dict[str, str]:
    """What turns a checkpoint's names of experts into a model's, for :func:`renamed`.

    Args:
        names: full names of the checkpoint's layers, as far as the framework renames them by itself.
        layouts: of the model's experts, by the full name of their module; None for those that take the layout that the
            checkpoint has.

    Returns:
        Beginnings of names, with what to put instead, both with ``{}`` for the expert's number, which is the last one.
        {} if nothing differs. Exchanging the two undoes it.

    Raises:
        CheckpointError: an unknown layout, or one that has other matrices than the model.
    """
    renaming: dict[str, str] = {}
    inside = _by_block(names, layouts)
    for module, layout in layouts.items():
        near = inside[_block(module)]
        place = stored_place(module, near, layouts)
        if place != module:
            renaming[f"{place}."] = f"{module}."
            around = (f"{name.rpartition('.')[0]}." for name in (place, module))  # the router beside them
            renaming.setdefault(*around)
        if layout is not None:
            renaming |= {
                f"{place}.{own}.": f"{module}.{wanted}." for own, wanted in _differing(place, near, layout).items()
            }
    return {own: wanted for own, wanted in renaming.items() if own != wanted}


def _differing(place: str, names: Iterable[str], layout: ExpertLayout) -> dict[str, str]:
    """Paths of the layers of the experts at ``place``, with those in ``layout``; {} if these are the same."""
    if set(_paths(place, names).values()) <= set(layout.paths):
        return {}
    stored = expert_layout(place, names, gated=layout.joined or len(layout.paths) == 3)
    assert stored is not None
    if stored.joined != layout.joined:
        raise CheckpointError(
            f"{place}: the checkpoint's experts have the matrices {', '.join(stored.paths)}, the model's "
            f"{', '.join(layout.paths)}; export the checkpoint with the same"
        )
    return dict(zip(stored.paths, layout.paths, strict=True))


def renamed(name: str, renaming: Mapping[str, str]) -> str:
    """A tensor's full name after :func:`expert_renaming`; the longest beginning counts."""
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdecimal()]
    for end in range(len(parts) - 1, 0, -1):
        while numbers and numbers[-1] >= end:
            numbers.pop()
        head, rest = parts[:end], ".".join(parts[end:])
        if (wanted := renaming.get(f"{'.'.join(head)}.")) is not None:
            return wanted + rest
        if numbers:
            number, head[numbers[-1]] = head[numbers[-1]], "{}"
            if (wanted := renaming.get(f"{'.'.join(head)}.")) is not None:
                return wanted.replace("{}", number) + rest
    return name


def layer_names(keys: Iterable[str]) -> list[str]:
    """The names of layers that have a weight, quantized or not, each once."""
    layers = (key.rpartition(".") for key in keys)
    return list(dict.fromkeys(layer for layer, _, part in layers if part in (*MARKS, "weight")))


def _paths(module: str, names: Iterable[str]) -> dict[str, str]:
    """Paths below ``module`` with ``{}`` for the expert's number, by what the layer is called."""
    start = f"{module}."
    found = {}
    for name in names:
        parts = name.removeprefix(start).split(".") if name.startswith(start) else []
        numbers = [i for i, part in enumerate(parts) if part.isdecimal()]
        if len(numbers) == 1 and len(parts) > 1:
            called = parts[-1] if numbers[0] < len(parts) - 1 else parts[-2]
            parts[numbers[0]] = "{}"
            found[called] = ".".join(parts)
    return found


def _by_block(names: Iterable[str], modules: Iterable[str]) -> dict[str, list[str]]:
    """The names in the block of each module: large mixtures have too many to look through all for each."""
    found: dict[str, list[str]] = {_block(module): [] for module in modules}
    for name in names:
        parts = name.split(".")
        ends = [0, *(i + 1 for i, part in enumerate(parts) if part.isdecimal())]
        for block in (".".join(parts[:end]) + "." * bool(end) for end in ends):
            if block in found:
                found[block].append(name)
    return found


def _block(module: str) -> str:
    """``model.layers.0.`` of ``model.layers.0.mlp.experts``."""
    parts = module.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdecimal()]
    return ".".join(parts[: numbers[-1] + 1]) + "." if numbers else ""
