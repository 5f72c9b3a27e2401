"""Spend a budget where it lowers the divergence most: bits and group size of each layer, and bits of the embedding."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..config import QuantizeConfig
from ..errors import ConfigError
from ..float32_products import fast_products
from ..model.progress import Progress
from ..model.structure import Structure, dense_weight, find_structure
from ..pipeline.options import Events, RunOptions
from .embedding import embedding_targets
from .frontier import Frontier, find_frontier
from .goal import Goal
from .rules import dynamic_rules
from .sensitivity import GroupCosts, Sensitivity, measure_sensitivity
from .storage import Storage, StoredTensor, file_bytes, stored_bytes, stored_tensors

_DENSE = 16  # bits, as a name for an embedding that stays as it is
_CURVE = 100  # points to draw


@dataclass(frozen=True)
class GroupChoice:
    """What was chosen for layers that are stored alike."""

    layers: tuple[str, ...]
    bits: int
    group_size: int
    divergence: float  # that it is predicted to cause by itself, nats per token


@dataclass(frozen=True)
class BudgetPlan:
    """How a budget is spent.

    Args:
        config: of the run: the settings that were given, and rules.
        goal: the budget, in words.
        embed_bits: of the embedding; 16 if it stays.
        divergence: predicted KL divergence in nats per token: the sum of all that the choices cause by themselves.
        nbytes: predicted bytes of all weight files.
        layer_bits: of the quantized layers' codes, scales and zeros, per weight.
        curve: (bytes of all weight files, predicted divergence) of what other budgets would get.
    """

    config: QuantizeConfig
    goal: str
    groups: tuple[GroupChoice, ...]
    embed_bits: int
    divergence: float
    nbytes: int
    layer_bits: float
    curve: tuple[tuple[int, float], ...]

    def report(self) -> dict[str, Any]:
        """As JSON values; the settings are elsewhere in a report."""
        found = {item.name: getattr(self, item.name) for item in dataclasses.fields(self) if item.name != "config"}
        return {**found, "groups": [dataclasses.asdict(each) for each in self.groups]}

    def summary(self) -> str:
        """What was chosen, for people."""
        counts = Counter({(each.bits, each.group_size): 0 for each in self.groups})
        for each in self.groups:
            counts[each.bits, each.group_size] += len(each.layers)
        layers = ", ".join(
            f"{count} of {bits} bits in groups of {size}" for (bits, size), count in sorted(counts.items())
        )
        return f"layers: {layers}; embedding: {self.embed_bits} bits"


@fast_products()
def plan_budget(
    model: nn.Module,
    config: QuantizeConfig,
    calibration: Sequence[Any] | Tensor | None,
    goal: Goal,
    *,
    options: RunOptions | None = None,
    events: Events | None = None,
    progress: Progress | None = None,
    stored_names: Callable[[list[str]], Mapping[str, str]] | None = None,
) -> BudgetPlan:
    """Choose bits and group sizes for a budget.

    Args:
        model: in memory as a whole; it is as before afterwards.
        config: other settings; layers that its ``dynamic`` rules name keep those, and so does the embedding that
            ``embed_bits`` names.
        calibration: token id samples; the first are used.
        options: how the run goes: its device, its blocks, the sequences per pass.
        progress: where an interrupted run has left what it measured.
        stored_names: gives what the files will call tensors of these names; None: the same.

    Raises:
        ConfigError: nothing fits into the budget, there is no calibration text, or the model cannot be measured.
    """
    if calibration is None:
        raise ConfigError(
            f"a budget of {goal} is spent by measured sensitivity, which takes calibration text; pass calibration, or "
            "choose bits yourself"
        )
    options, events, progress = options or RunOptions(), events or Events(), progress or Progress(None)
    structure = find_structure(model, config, options.block_name)
    free = goal.nbytes is not None and config.embed_bits is None  # to choose the embedding's bits, too
    found = measure_sensitivity(model, config, calibration, free, options, events, progress)
    plan = _Chooser(model, config, structure, found, stored_names).plan(goal)
    events.budget_planned(plan)
    return plan


class _Chooser:
    """Adds up bytes and divergences of one model."""

    def __init__(
        self,
        model: nn.Module,
        config: QuantizeConfig,
        structure: Structure,
        found: Sensitivity,
        stored_names: Callable[[list[str]], Mapping[str, str]] | None,
    ) -> None:
        self.model, self.config, self.found = model, config, found
        self.stored_names, self.files = stored_names, len(structure.blocks) + 1
        self.shapes = {target.name: tuple(dense_weight(target.module).shape) for target in structure.targets}
        grouped = {name for group in found.groups for name in group.layers}
        # What has a rule of its own; but a layer that no token reached and that is no expert stays in 16 bits.
        self.others = {
            target.name: Storage(target.config.group_size, target.config.bits)
            for target in structure.targets
            if target.name not in grouped
            and (target.may_be_idle or target is structure.head or config.for_module(target.name) is not config)
        }
        self.embeddings = embedding_targets(model, config)

    def plan(self, goal: Goal) -> BudgetPlan:
        groups = list(self.found.groups)
        choices = [list(each.costs) for each in groups]
        frontier, widths = self._frontier(choices)
        fixed = self._fixed_bytes(widths)
        point = frontier.within(self._budget(goal, fixed))
        if point is None:
            raise ConfigError(self._unreachable(goal, int(frontier.nbytes[0]), fixed))
        picked = frontier.choices(point)
        chosen = [each[index] for each, index in zip(choices, picked)]
        embed_bits = widths[picked[-1]] if len(picked) > len(groups) else self._embed_bits
        config = self._config(chosen, embed_bits)
        step = max(1, len(frontier.nbytes) // _CURVE)
        points = [*range(0, len(frontier.nbytes), step), len(frontier.nbytes) - 1]
        return BudgetPlan(
            config=config,
            goal=str(goal),
            groups=tuple(
                GroupChoice(group.layers, storage.bits, storage.group_size, group.costs[storage])
                for group, storage in zip(groups, chosen)
            ),
            embed_bits=embed_bits,
            divergence=float(frontier.divergence[point]),
            nbytes=file_bytes(self._tensors(chosen, embed_bits)),
            layer_bits=self._layer_bits(sum(map(self._bytes, groups, chosen))),
            curve=tuple((int(frontier.nbytes[i]) + fixed, float(frontier.divergence[i])) for i in points),
        )

    @property
    def _embed_bits(self) -> int:
        """Where it is not to be chosen."""
        return _DENSE if self.config.embed_bits is None else self.config.embed_bits

    def _frontier(self, choices: Sequence[Sequence[Storage]]) -> tuple[Frontier, list[int]]:
        """Of the groups, and last of the embedding if its bits are to be chosen -> it, and those bits."""
        table = [
            [(self._bytes(group, storage), group.costs[storage]) for storage in each]
            for group, each in zip(self.found.groups, choices)
        ]
        widths = [_DENSE, *self.found.embedding] if self.found.embedding else []
        if widths:
            costs = {_DENSE: 0.0, **self.found.embedding}
            table.append([(sum(t.nbytes for t in self._embedding(bits)), costs[bits]) for bits in widths])
        return find_frontier(table), widths

    def _bytes(self, group: GroupCosts, storage: Storage) -> int:
        return sum(stored_bytes(self.shapes[name], storage, self.config) for name in group.layers)

    def _embedding(self, bits: int) -> list[StoredTensor]:
        """The tensors of the embedding."""
        target = next(iter(self.embeddings.values()), None)
        if target is None:
            return []
        dense = target.module.weight
        if bits == _DENSE:
            return [StoredTensor(f"{target.name}.weight", dense.dtype, tuple(dense.shape))]
        own = self.embeddings[bits].config
        shape = tuple(dense.shape) if target.head is not None else tuple(dense.shape)[::-1]
        return stored_tensors(target.name, shape, Storage(own.group_size, own.bits), own)

    def _tensors(self, chosen: Sequence[Storage], embed_bits: int) -> list[StoredTensor]:
        """All that will be in the files."""
        storages = dict(self.others)
        for group, storage in zip(self.found.groups, chosen):
            storages |= dict.fromkeys(group.layers, storage)
        found = self._rest(storages)
        for name, storage in storages.items():
            found += stored_tensors(name, self.shapes[name], storage, self.config)
        found += self._embedding(embed_bits)
        names = self.stored_names([each.name for each in found]) if self.stored_names is not None else {}
        return [each._replace(name=names.get(each.name, each.name)) for each in found]

    def _rest(self, quantized: Mapping[str, Storage]) -> list[StoredTensor]:
        """Tensors that stay as they are, each once, without the embedding if its bits can be chosen."""
        replaced = {f"{name}.weight" for name in quantized}
        target = next(iter(self.embeddings.values()), None)
        seen = {target.module.weight.data_ptr()} if target is not None else set()
        found = []
        for name, tensor in self.model.state_dict().items():
            if name in replaced or not tensor.numel() or tensor.data_ptr() in seen:
                continue
            seen.add(tensor.data_ptr())
            found.append(StoredTensor(name, tensor.dtype, tuple(tensor.shape)))
        return found

    def _fixed_bytes(self, widths: Sequence[int]) -> int:
        """Of the files at most, whatever is chosen: with the longest header, which names the largest sizes and most
        tensors, and with a file for each block.
        """
        largest = [max(each.costs, key=lambda storage: self._bytes(each, storage)) for each in self.found.groups]
        variable = sum(map(self._bytes, self.found.groups, largest))

        def rest(embed_bits: int) -> int:
            own = sum(each.nbytes for each in self._embedding(embed_bits)) if widths else 0
            return file_bytes(self._tensors(largest, embed_bits)) - variable - own

        return max(map(rest, widths or [self._embed_bits])) + file_bytes([]) * self.files

    def _budget(self, goal: Goal, fixed: int) -> float:
        """Bytes of the goal that are left to choose with."""
        if goal.nbytes is not None:
            return goal.nbytes - fixed
        assert goal.layer_bits is not None
        return goal.layer_bits / 8 * self._weights + self._uncounted

    @property
    def _weights(self) -> int:
        return sum(math.prod(self.shapes[name]) for group in self.found.groups for name in group.layers)

    @property
    def _uncounted(self) -> int:
        """Bytes of g_idx, which is the same for all ways to store a layer and no part of its bits."""
        tensors = [
            each
            for group in self.found.groups
            for name in group.layers
            for each in stored_tensors(name, self.shapes[name], next(iter(group.costs)), self.config)
        ]
        return sum(each.nbytes for each in tensors if each.name.endswith(".g_idx"))

    def _layer_bits(self, nbytes: float) -> float:
        return 8 * (nbytes - self._uncounted) / self._weights

    def _unreachable(self, goal: Goal, least: int, fixed: int) -> str:
        if goal.nbytes is not None:
            return (
                f"a budget of {goal} cannot be met: the weight files take {least + fixed} bytes at least; ask for more"
            )
        bits = math.ceil(self._layer_bits(least) * 1000) / 1000  # so that asking for what is printed works
        return f"a budget of {goal} cannot be met: layers take {bits:.3f} bits at least; ask for more"

    def _config(self, chosen: Sequence[Storage], embed_bits: int) -> QuantizeConfig:
        """The settings that say all that."""
        groups = [(group.block, group.layers, storage) for group, storage in zip(self.found.groups, chosen)]
        rules = dynamic_rules(groups, self.others)
        changes: dict[str, Any] = {"dynamic": {**(self.config.dynamic or {}), **rules}}
        if not self.others:  # nothing else needs the settings that were given
            counts: Counter[Storage] = Counter()
            for group, storage in zip(self.found.groups, chosen):
                counts[storage] += sum(math.prod(self.shapes[name]) for name in group.layers)
            changes |= counts.most_common(1)[0][0].settings
        if embed_bits != _DENSE:
            changes |= {"embed_bits": embed_bits, "embed_group_size": self.embeddings[embed_bits].config.group_size}
        return dataclasses.replace(self.config, **changes)
