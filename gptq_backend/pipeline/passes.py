"""Forward passes over the calibration data that wait at a model's blocks and layers until those are quantized.

Each batch's pass is a task in lockstep. Arguments that the model hands to each block (masks, rotary embeddings) need no
capturing or replaying, because the model's own forward passes them.
"""

from __future__ import annotations

import contextvars
import copy
import itertools
import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..config import QuantizeConfig
from ..distributed.team import Team
from ..model import lockstep
from ..model.calibration import Batch, call_model, count_sequences, masks_of, model_inputs
from ..model.layer_inputs import InputFactor, LayerInput, tells
from ..model.mixtures import find_mixture
from ..model.row_moments import RowMoments
from ..model.structure import Block, Target
from ..model.token_weights import Sensitivity
from ..training.blocks import Example, output_tensor
from .drifts import Drifts
from .layers import Layers
from .owned_experts import ExpertInput, Ownership, Recording, Round

logger = logging.getLogger(__name__)


class Place(Enum):
    """Where passes wait at a block, in the order in which these places are served. Between START and MEASURED they
    wait at each of the block's layers.
    """

    ORIGINAL = auto()  # passes through the original blocks: before the block
    START = auto()  # passes through the quantized blocks: before the block
    MEASURED = auto()  # the block has run as it was, all Hessians are there (true_sequential=False)
    TRAIN = auto()  # all layers are quantized, what the block makes of each batch can be trained
    LEAVE = auto()  # passes through the original blocks: behind the block


class Phase(Enum):
    """How far the block has come whose turn it is."""

    ENTERED = auto()  # its weights are in place; passes through the original may be running
    MEASURING = auto()  # it runs as it was, and its layers are quantized afterwards (true_sequential=False)
    QUANTIZING = auto()  # a layer is quantized as soon as all passes stand in front of it
    TRAINING = auto()  # its training runs it, and no pass waits in it
    FINAL_BEFORE = auto()  # quantized by an earlier run, or by an earlier call in the same forward pass


@dataclass(eq=False)
class BlockState:
    """The block whose turn it is."""

    block: Block
    phase: Phase = Phase.ENTERED
    measured: list[tuple[Target, InputFactor | None]] = field(default_factory=list)  # to quantize when MEASURING ends
    owned: list[tuple[Target, InputFactor | None]] = field(default_factory=list)  # likewise, by this rank alone
    known: set[str] = field(default_factory=set)  # names of what any rank has in those
    originals: dict[int, Tensor] = field(default_factory=dict)  # what the original block returned, by batch
    examples: dict[int, Example] = field(default_factory=dict)  # of the quantized block, likewise


@dataclass(eq=False)
class _Task:
    """The forward pass of one batch.

    ``original`` ones go through the original blocks. All of these pass a block before any of the others enters it, and
    wait behind it until those have passed too: what the model does to a block's output may not change the target.
    """

    number: int  # of the batch
    first: int  # of its sequences among those of all batches
    inputs: dict[str, Any]  # of the model
    masks: list[Tensor]  # [B, T] of each stack of the model, 0 marks padding
    original: bool
    inside: bool = False  # whether it is in a block
    left: set[Block] = field(default_factory=set)  # blocks that it has passed
    weights: dict[nn.Module, Tensor] = field(default_factory=dict)  # of tokens, for the layers of the block it is in
    recording: Recording | None = None  # while experts are not called

    def mask(self, x: Tensor) -> Tensor | None:
        """Which rows of x [..., K] are padding (0): the mask of their shape."""
        return next((mask for mask in self.masks if tells(mask, x.shape[:-1])), None)


_TASK: contextvars.ContextVar[_Task] = contextvars.ContextVar("task")  # the running one


class Passes:
    """The passes of one run, in which more and more of ``layers`` get done."""

    def __init__(self, layers: Layers, config: QuantizeConfig, team: Team) -> None:
        self.layers, self.model, self.structure, self.config = layers, layers.model, layers.structure, config
        self.team = team
        owned = () if layers.calibrate_all_experts else self.structure.blocks  # else each expert has all tokens
        self.ownership = Ownership(owned, config.true_sequential and not config.preset.block_epochs, team)
        self._recorded: dict[Round, list[ExpertInput]] = {}
        self.state: BlockState | None = None  # set by whoever serves the places
        self.reached: set[Block] = set()
        self._drifts: Drifts | None = None  # of the run
        self._arrived: dict[Target, list[LayerInput]] = {}  # what the waiting passes are about to feed each layer
        self._sensitivity = Sensitivity()
        self.row_moments = RowMoments(team)

    def run(
        self,
        batches: list[Batch],
        serve_place: Callable[[Block, Place], None],
        serve_layer: Callable[[Target, list[LayerInput]], None],
        serve_experts: Callable[[Block, Round, list[ExpertInput]], None],
    ) -> None:
        """Pass all batches through the model, which is unchanged afterwards but for what the callbacks do to it.

        Args:
            batches: the calibration data, of which this rank takes its share.
            serve_place: called on all ranks when all passes that come to it wait at a place of a block.
            serve_layer: likewise in front of a layer, with what those of this rank are about to feed it.
            serve_experts: likewise, on several ranks, in front of some experts of a block, which are then quantized
                without that the passes wait at their layers.
        """
        keys = self._keys()
        order = {key: i for i, key in enumerate(keys)}

        def serve(key: Target | tuple[Block, Place | Round]) -> None:
            if isinstance(key, Target):
                serve_layer(key, self._arrivals(key))
                return
            block, place = key
            self.reached.add(block)
            if isinstance(place, Round):
                serve_experts(block, place, self._recorded.pop(place, []))
            else:
                serve_place(block, place)

        def agree(key: Any) -> Any:
            return keys[self.team.least(order[key])]

        kinds = (True, False) if self._corrects_drift or self.config.preset.block_epochs else (False,)
        mine = self.team.share(len(batches))
        inputs = [model_inputs(self.model, batches[i], self.layers.placement.device) for i in mine]
        firsts = [0, *itertools.accumulate(max(1, count_sequences(batch)) for batch in batches)]
        numbered = [(i, firsts[i], each, masks_of(each)) for i, each in zip(mine, inputs)]
        tasks = [_Task(*batch, original) for original in kinds for batch in numbered]
        with ExitStack() as hooks:
            if self._corrects_drift:
                self._drifts = Drifts(hooks, self._here, self.layers.placement.aside)
            self._set_hooks(hooks)
            lockstep.run([partial(self._forward, task) for task in tasks], serve, order.__getitem__, agree)
        self._drifts = None  # its activations of the last block

    def _arrivals(self, target: Target) -> list[LayerInput]:
        """What passes are about to feed a layer, by batch; they may have come one before the other."""
        return sorted(self._arrived.pop(target, []), key=lambda arrived: arrived.number)

    def _keys(self) -> list[Any]:
        """All that passes wait for, in the order in which it is served."""
        keys: list[Any] = []
        for block in self.structure.blocks:
            before = {next(iter(each.targets.values()))[0]: each for each in self.ownership.rounds(block)}
            keys += [(block, Place.ORIGINAL), (block, Place.START)]
            for target in block.targets:
                keys += [(block, before[target])] if target in before else []
                keys.append(target)
            keys += [(block, place) for place in (Place.MEASURED, Place.TRAIN, Place.LEAVE)]
        return [*keys, self.structure.head, None]  # in the end there is nothing to be served

    def run_expert(
        self, each: Round, inputs: list[ExpertInput], serve_layer: Callable[[Target, list[LayerInput]], None]
    ) -> None:
        """Pass what all batches feed one expert through it, as :meth:`run` does through the model, on this rank."""
        targets = each.targets[inputs[0].expert]

        def forward(given: ExpertInput) -> None:
            masks = [] if given.mask is None else [given.mask]
            _TASK.set(_Task(given.number, 0, {}, masks, False, inside=True, weights=given.weights))
            each.mixture.call(given.expert, given.x)

        def serve(target: Target) -> None:
            serve_layer(target, self._arrivals(target))

        lockstep.run([partial(forward, given) for given in inputs], serve, targets.index)

    @property
    def _corrects_drift(self) -> bool:
        """Not of mixtures: where a token comes by other experts, what it lacks to the original is no drift. A few such
        tokens outweigh all the others.
        """
        routed = any(target.may_be_idle for block in self.structure.blocks for target in block.targets)
        return self.config.preset.correct_drift and not routed

    def _forward(self, task: _Task) -> None:
        _TASK.set(task)
        blocks = len(self.structure.blocks)
        call_model(self.model, task.inputs, lambda: task.inside or len(self.reached) == blocks)

    def _set_hooks(self, hooks: ExitStack) -> None:
        """Make the passes wait at blocks and layers, and end them behind the last, until ``hooks`` is closed."""
        for block in self.structure.blocks:
            # accelerate, too, gives instances a forward of their own.
            own = vars(block.module).get("forward")
            restore = (setattr, block.module, "forward", own) if own else (delattr, block.module, "forward")
            block.module.forward = self._waiting_forward(block)
            hooks.callback(*restore)
            for target in block.targets:
                self._hook_layer(target, hooks)
            if self.layers.calibrate_all_experts:
                self._hook_mixtures(block, hooks)
            for each in self.ownership.rounds(block):
                hook = partial(self._before_experts, block, each)
                hooks.callback(each.mixture.module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            for mixture in {each.mixture for each in self.ownership.rounds(block)}:
                hooks.enter_context(mixture.replaced(self._record_or_call))
        head = self.structure.head
        if head is None:
            for block in self.structure.blocks:
                hooks.callback(block.module.register_forward_hook(partial(self._leave, block)).remove)
        else:
            self._hook_layer(head, hooks)
            hooks.callback(head.module.register_forward_pre_hook(_stop).remove)

    def _leave(self, block: Block, *_: Any) -> None:
        """End a pass that has been through all blocks."""
        left = _TASK.get().left
        left.add(block)
        if len(left) == len(self.structure.blocks):
            raise lockstep.Stop

    def _waiting_forward(self, block: Block) -> Callable[..., Any]:
        forward = block.module.forward

        def waiting_forward(*args: Any, **kwargs: Any) -> Any:
            task = _TASK.get()
            task.inside = True
            output = wait_and_run(*args, **kwargs)
            task.inside = False  # not after an error: it tells where that was
            return output

        def wait_and_run(*args: Any, **kwargs: Any) -> Any:
            run = partial(forward, *args, **kwargs)
            self.reached.add(block)
            x = next(iter((*args, *kwargs.values())), None)
            if _TASK.get().original:
                return self._run_original(block, x, run)
            lockstep.wait((block, Place.START))
            state = self._current()
            if block.targets and state.phase is not Phase.FINAL_BEFORE:
                if self._drifts is not None:
                    self._drifts.enter(block, _TASK.get().number, x)

                def trial() -> Any:
                    return forward(*map(_own_cache, args), **{key: _own_cache(value) for key, value in kwargs.items()})

                self._run_until_final(state, trial, _TASK.get().mask(x) if isinstance(x, Tensor) else None)
            return run()

        return waiting_forward

    def _run_original(self, block: Block, x: Any, run: Callable[[], Any]) -> Any:
        """Keep what is needed of the block as it is before it is quantized."""
        lockstep.wait((block, Place.ORIGINAL))
        state, number = self._current(), _TASK.get().number
        output = self._drifts.original(block, number, x, run) if self._drifts is not None else run()
        if self.config.preset.block_epochs:
            state.originals[number] = output_tensor(output)
        self._leave(block)
        lockstep.wait((block, Place.LEAVE))
        return output

    def _run_until_final(self, state: BlockState, run: Callable[[], Any], mask: Tensor | None) -> None:
        """Run the block as often as it takes until all its weights are final; ``mask`` is that of its input.

        ``run`` leaves no keys and values behind, which a model without ``use_cache`` would find in its next call.
        """
        block, task = state.block, _TASK.get()
        if self.config.token_weights:
            layers = [target.module for target in block.targets]
            tell = partial(self.row_moments.add, task.number) if self.config.preset.row_feedback else None
            task.weights = self._sensitivity.of(block.module, block.name, layers, run, mask, task.first, tell)
        if not self.config.true_sequential:
            run()  # all Hessians from the block as it was, then the block again, quantized
            lockstep.wait((block, Place.MEASURED))
        if (original := state.originals.get(task.number)) is not None:
            run()
            state.examples[task.number] = Example(run, original, mask)
            lockstep.wait((block, Place.TRAIN))

    def _hook_mixtures(self, block: Block, hooks: ExitStack) -> None:
        reached: set[nn.Module] = set()
        for module in block.module.modules():
            if (mixture := find_mixture(module)) is not None:
                hook = partial(self._before_mixture, block, mixture.call_all)
                hooks.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
                reached.update(module.modules())
        apart = [target.name for target in block.targets if target.may_be_idle and target.module not in reached]
        if apart:
            text = "calibrate_all_experts: %s and %d layers like it only get the tokens that their router sends to them"
            logger.warning(text, apart[0], len(apart) - 1)

    def _before_mixture(
        self, block: Block, call: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Call each expert with all tokens once; afterwards their layers are done."""
        inside = set(module.modules())
        waiting = (target.module for target in block.targets if target.module in inside and target.may_be_idle)
        # A training calls the block outside of any pass, so it is asked for first.
        if self._busy() or _TASK.get().original or all(each in self.layers.done for each in waiting):
            return
        call(*args, **kwargs)

    def _before_experts(
        self, block: Block, each: Round, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Wait until the ranks that own the experts of a round have quantized those that get tokens."""
        if self._busy() or (task := _TASK.get()).original or task.recording is not None:
            return
        done, known = self.layers.done, self._current().known
        wanted = {
            expert
            for expert, targets in each.targets.items()
            if not all(target.module in done or target.name in known for target in targets)
        }
        if not wanted:
            return
        task.recording = Recording(wanted)
        module.forward(*args, **kwargs)
        self._recorded.setdefault(each, []).extend(task.recording.inputs)
        task.recording = None
        lockstep.wait((block, each))

    def _record_or_call(self, expert: int, x: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
        if self._sensitivity.running and self.ownership.elsewhere(self._current().block) is not None:
            self._sensitivity.end()  # the expert may be on another rank, and attention comes before experts
        task = _TASK.get(None)
        if task is None or task.recording is None or self._busy():
            return call(x)
        if expert in task.recording.wanted:
            task.recording.wanted.remove(expert)  # a layer is quantized for the first call
            given = ExpertInput(task.number, expert, x.detach().clone(), task.mask(x), task.weights)
            task.recording.inputs.append(given)
        return torch.zeros_like(x)

    def _busy(self) -> bool:
        """Whether the block runs for another reason than to be quantized."""
        training = self.state is not None and self.state.phase is Phase.TRAINING
        return self._sensitivity.running or training

    def _hook_layer(self, target: Target, hooks: ExitStack) -> None:
        def wait(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            state = self.state
            if module in self.layers.done or self._busy():
                return
            task = _TASK.get()
            if task.original or (state and target.name in state.known):
                return
            x = next(iter((*args, *kwargs.values())))
            there = (None, None) if self._drifts is None else self._drifts.of(module, task.number)
            self._arrived.setdefault(target, []).append(
                LayerInput(task.number, x, task.mask(x), task.weights.get(module), *there)
            )
            lockstep.wait(target)
            self.layers.placement.fetch(x)

        hooks.callback(target.module.register_forward_pre_hook(wait, with_kwargs=True).remove)
        if self.layers.packs(target):
            hooks.callback(target.module.register_forward_pre_hook(self.layers.bring_packed).remove)
            hooks.callback(target.module.register_forward_hook(self.layers.free_packed, always_call=True).remove)

    def _here(self) -> int | None:
        """The batch whose pass through the quantized blocks is running; None of any other call of a block."""
        return None if self._busy() or _TASK.get().original else _TASK.get().number

    def _current(self) -> BlockState:
        assert self.state is not None, "a block was passed without its turn"
        return self.state


def _own_cache(value: Any) -> Any:
    """A copy of a cache of keys and values; anything else as it is."""
    return copy.deepcopy(value) if hasattr(value, "get_seq_length") else value


def _stop(*_: Any) -> None:
    raise lockstep.Stop
