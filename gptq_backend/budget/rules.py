"""``dynamic`` rules for layers that are stored in several ways, which readers that join layers can use, too.

vLLM asks for the settings of ``self_attn.qkv_proj`` where the file has ``q_proj``, ``k_proj`` and ``v_proj``, and of
``mlp.experts`` where it has those of each expert. So the rule of several layers matches all below their common parent
but the other layers there, and needs no table of such names.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .storage import Storage


def dynamic_rules(
    groups: Sequence[tuple[str, Sequence[str], Storage]], others: Iterable[str] = ()
) -> dict[str, Mapping[str, Any]]:
    """A rule for all layers of each storage and place in a block; the layer's name decides, whatever their order.

    Args:
        groups: full name of the block, full names of the layers in it that are stored alike, and how.
        others: full names of quantized layers that have rules of their own.
    """
    names = [*itertools.chain.from_iterable(each for _, each, _ in groups), *others]
    blocks: dict[tuple[Storage, str], list[str]] = {}
    for block, members, storage in groups:
        inside = [name.removeprefix(f"{block}.") for name in names if name.startswith(f"{block}.")]
        own = [name.removeprefix(f"{block}.") for name in members]
        blocks.setdefault((storage, _pattern(own, inside)), []).append(block)
    # The first match wins: a name that only a reader has matches the rule of the innermost parent. What follows
    # "(?!" are the names that a rule leaves out, which say nothing of its depth.
    ordered = sorted(blocks.items(), key=lambda item: -item[0][1].partition("(?!")[0].count("."))
    return {f"+:^{_any_of(found)}\\.{pattern}": storage.settings for (storage, pattern), found in ordered}


def _pattern(members: Sequence[str], inside: Sequence[str]) -> str:
    """For names in a block: all ``members``, and none other of those ``inside`` it."""
    if len(members) == 1:
        return f"{re.escape(members[0])}$"
    same = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*(name.split(".")[:-1] for name in members)))
    parent = ".".join(parts[0] for parts in same)
    prefix = f"{parent}." if parent else ""
    strangers = [name.removeprefix(prefix) for name in inside if name.startswith(prefix) and name not in members]
    but = f"(?!(?:{'|'.join(map(re.escape, strangers))})$)" if strangers else ""
    # The parent itself is how a mixture of experts is asked for.
    return f"{re.escape(parent)}(?:$|\\.{but})" if parent else but


def _any_of(blocks: Sequence[str]) -> str:
    """A pattern for full names of blocks, most of which differ in their number only."""
    by_list: dict[str, list[str]] = {}
    for name in blocks:
        stem, _, number = name.rpartition(".")
        by_list.setdefault(stem, []).append(re.escape(number))
    found = []
    for stem, numbers in by_list.items():
        last = numbers[0] if len(numbers) == 1 else f"(?:{'|'.join(numbers)})"
        found.append(f"{re.escape(stem)}\\.{last}" if stem else last)
    return found[0] if len(found) == 1 else f"(?:{'|'.join(found)})"
