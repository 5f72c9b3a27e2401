"""Quantize a whole model in one forward pass over the calibration data.

Every batch's forward runs as a task in lockstep. When all tasks stand in front of a linear layer, their inputs make its
Hessian, the layer is quantized, and the tasks go on with the quantized weight. Arguments that the model hands to each
block (masks, rotary embeddings) need no capturing or replaying, because the model's own forward passes them. Token
weights (sensitivity.py) add a pass through each block's attention and back.
"""

from __future__ import annotations

import contextvars
import dataclasses
import logging
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..algorithm.gptq import quantize_weight
from ..algorithm.refine import Step
from ..config import QuantizeConfig
from ..errors import ConfigError
from ..format import packing
from ..format.weight import QuantizedWeight
from ..linear import QuantLinear
from ..model import lockstep
from ..model.calibration import Batch, calling, check_fits, make_batches, model_inputs
from ..model.joint_rounding import Stacks
from ..model.layer_inputs import Factors, LayerInput, Shared
from ..model.placement import Placement, tensors_of
from ..model.progress import Progress, digest
from ..model.structure import (
    Block,
    Target,
    dense_weight,
    evaluating,
    find_structure,
    is_conv1d,
    linear_shapes,
    replace_module,
    special_linears,
    untie,
)
from ..model.token_weights import Sensitivity
from ..timing import timed
from ..training.blocks import BlockReport, Example, output_tensor, train_block
from ..training.distill import distill
from ..training.scales import judges
from .report import LayerReport, QuantizeReport

logger = logging.getLogger(__name__)


_MASK: contextvars.ContextVar[Tensor | None] = contextvars.ContextVar("attention_mask")  # of the running task
_WEIGHTS: contextvars.ContextVar[dict[nn.Module, Tensor]] = contextvars.ContextVar("token_weights")  # likewise
_NUMBER: contextvars.ContextVar[int] = contextvars.ContextVar("batch")  # likewise
_ORIGINAL: contextvars.ContextVar[bool] = contextvars.ContextVar("original", default=False)  # likewise: see _Run.task
_ENTRY = ("words", "scales", "zeros", "g_idx")  # of a layer in the progress
OnLayer = Callable[[LayerReport, int, int], None]


def quantize_model(
    model: nn.Module,
    config: QuantizeConfig,
    calibration: Sequence[Any] | None = None,
    *,
    batch_size: int | None = None,
    block_name: str | None = None,
    backend: str | None = None,
    on_layer: OnLayer | None = None,
    on_block: Callable[[nn.Module], None] | None = None,
    on_done: Callable[[str, nn.Module], None] | None = None,
    on_step: Callable[[int, int, float], None] | None = None,
    teacher: Callable[[], nn.Module] | None = None,
    progress: Progress | None = None,
    device: torch.device | str | None = None,
) -> QuantizeReport:
    """Replace the linear layers of ``model``'s blocks by :class:`QuantLinear`, in place.

    Args:
        model: called as ``model(input_ids=..., attention_mask=...)``.
        config: what to quantize and how.
        calibration: token id samples (see :func:`calibration.make_batches`); None rounds to nearest.
        batch_size: sequences per forward pass; None aims at about 2048 tokens.
        block_name: name of the list of blocks, where :func:`structure.find_structure` would choose another.
        backend: kernel of the resulting layers.
        on_layer: called with each layer's report, how many are done, and how many there are.
        on_block: called with each block before it is first used, to bring its weights.
        on_done: called with name and module of each block when its layers are quantized and nothing reads it any more.
        on_step: for :func:`distill.distill`.
        teacher: gives the original model, for ``config.distill_epochs``; called after everything else is done.
        progress: where an interrupted run finds the blocks that it has done, and the state of its distillation; removed
            by whoever made it.
        device: where to compute, e.g. ``cuda``: blocks are moved there for their turn and back; a distillation moves
            both models there as a whole. None computes where the weights are.

    Raises:
        ConfigError, CalibrationError: see their messages. The model is then partly quantized: load it again.
    """
    batches = None if calibration is None else make_batches(calibration, batch_size)
    epochs = config.tier.distill_epochs
    if epochs and teacher is None:
        raise ConfigError(
            f"distill_epochs={epochs} (quality={config.quality!r}) needs the original model beside the quantized one; "
            "pass teacher=, use gptq_transformers.quantize, or set distill_epochs=0"
        )
    if config.tier.trains:  # what would fail after the work
        _check_trainable(model, config, batches)
    progress = progress or Progress(None)
    run = _Run(model, config, batches, block_name, backend, on_layer, on_block, on_done, device, progress)
    report = run.run()
    if epochs and teacher is not None and calibration is not None:
        start = time.perf_counter()
        home = next(model.parameters()).device
        with torch.inference_mode(False):  # a caller's would leave no derivatives to take
            report.distillation = distill(
                model.to(device or home),
                teacher().to(device or home),
                calibration,
                epochs=epochs,
                batch_size=batch_size,
                progress=progress,
                identity=run.identity,
                on_step=on_step,
            )
        model.to(home)
        report.seconds += time.perf_counter() - start
    return report


class _Run:
    def __init__(
        self,
        model: nn.Module,
        config: QuantizeConfig,
        batches: list[Batch] | None,
        block_name: str | None,
        backend: str | None,
        on_layer: OnLayer | None,
        on_block: Callable[[nn.Module], None] | None,
        on_done: Callable[[str, nn.Module], None] | None,
        device: torch.device | str | None,
        progress: Progress,
    ) -> None:
        self.model, self.config, self.batches, self.backend = model, config, batches, backend
        self.on_layer, self.on_block, self.on_done = on_layer, on_block, on_done
        self.structure = find_structure(model, config, block_name)
        for sentence in config.vain_rules(linear_shapes(model)):
            logger.warning("dynamic: %s", sentence)
        if special := special_linears(self.structure):
            name, kind = next(iter(special.items()))
            logger.warning(
                "%s (%s) and %d layers like it stay in 16 bits: they do not compute a plain product",
                name,
                kind,
                len(special) - 1,
            )
        self.report = QuantizeReport(self.structure.describe(config))
        self.arrived: dict[Target, list[LayerInput]] = {}  # what the waiting tasks are about to feed each layer
        self.done: dict[nn.Module, QuantLinear] = {}
        self.pending: list[tuple[Target, Shared | None]] = []
        self.second_pass = False  # the current block runs again, quantized (true_sequential=False)
        self.current: Block | None = None
        self.entered: set[Block] = set()
        self.originals: dict[int, Tensor] = {}  # what the original block returned, by batch
        self.examples: dict[int, Example] = {}  # of the quantized block, likewise
        self.replaying = False  # for hooks that are to do nothing meanwhile
        self.progress, self.identity = progress, ""
        self.start = 0.0
        self.finished = False  # the current block was done by an earlier run, or before in the same forward pass
        self.placement = Placement(device)
        self.factors = Factors(self.placement)
        self.sensitivity = Sensitivity()
        self.stacks = Stacks()

    def run(self) -> QuantizeReport:
        self.start = time.perf_counter()
        if self.structure.head is not None:
            untie(self.structure.head.module)
        # A caller's inference mode would leave no derivatives to take; a model that was loaded in it works only there.
        inference = any(tensor.is_inference() for tensor in tensors_of(self.model))
        with torch.inference_mode(inference), torch.no_grad(), evaluating(self.model):
            if self.batches is None:
                self.round_to_nearest()
            else:
                self.calibrate(self.batches)
        wanted = [target.module for block in self.structure.blocks for target in block.targets]
        if wanted and not any(module in self.done for module in wanted):
            raise ConfigError(
                f"no layer was quantized: no calibration token reached one in {self.structure.blocks[0].name} to "
                f"{self.structure.blocks[-1].name}; name the blocks that read text with block_name (for GPTQConfig: "
                "block_name_to_quantize)"
            )
        self.report.seconds = time.perf_counter() - self.start
        return self.report

    def round_to_nearest(self) -> None:
        for block in self.structure.blocks:
            self.enter(block)
            self.leave()
        if self.structure.head is not None:
            self.placement.bring(tensors_of(self.structure.head.module))
            self.quantize(self.structure.head, None)
            self.install(self.structure.head)

    def calibrate(self, batches: list[Batch]) -> None:
        check_fits(self.model, batches)
        ranks: dict[Any, int] = {}
        for block in self.structure.blocks:
            for place in ("original", "start", *block.targets, "end", "train", "leave"):
                ranks[place if isinstance(place, Target) else (block, place)] = len(ranks)
        if self.structure.head is not None:
            ranks[self.structure.head] = len(ranks)
        inside = {id(tensor) for block in self.structure.blocks for tensor in tensors_of(block.module)}
        outside = [tensor for tensor in tensors_of(self.model) if id(tensor) not in inside]
        if self.progress.folder is not None:
            data = [tensor for batch in batches for tensor in batch.values()]
            constants: Any = getattr(self.model, "config", None)  # such as an epsilon, which is in no tensor
            described = constants.to_dict() if hasattr(constants, "to_dict") else None
            facts = [self.config.to_dict(), str(self.placement.device), described]
            self.identity = digest("", facts, [*data, *outside])
        self.placement.bring(outside)
        tasks = [self.task(i, batch) for i, batch in enumerate(batches)]
        if self.config.tier.block_epochs:
            tasks = [self.task(i, batch, original=True) for i, batch in enumerate(batches)] + tasks
        with self.hooks():
            lockstep.run(tasks, self.stage, ranks.__getitem__)
        self.leave()
        for block in self.structure.blocks:
            if block not in self.entered:  # no batch came by; its weights are wanted all the same
                self.enter(block)
                self.finished = True
                self.leave()
        if self.structure.head is not None:
            self.install(self.structure.head)
        self.placement.send_back(outside)

    def task(self, number: int, batch: Batch, original: bool = False) -> Callable[[], None]:
        """The forward pass of a batch through the blocks as they get quantized, or through the ``original`` ones.

        All of the latter pass a block before any of the former enters it, and wait behind it until those have passed
        too: what the model does to a block's output may not change the target.
        """
        inputs = model_inputs(self.model, batch, self.placement.device)

        def forward() -> None:
            _NUMBER.set(number)
            _ORIGINAL.set(original)
            _MASK.set(inputs.get("attention_mask"))
            with calling(self.model, lambda: bool(self.entered)):
                self.model(**inputs)

        return forward

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Make the forward passes wait at blocks and layers."""
        handles = []
        for block in self.structure.blocks:
            handles.append(self.hook_block(block))
            for target in block.targets:
                handles.append(self.hook_layer(target))
        last = self.structure.blocks[-1].module
        if self.structure.head is None:
            handles.append(last.register_forward_hook(_stop))
        else:
            handles.append(self.hook_layer(self.structure.head))
            handles.append(self.structure.head.module.register_forward_pre_hook(_stop))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def hook_block(self, block: Block) -> Any:
        original = block.module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            run = partial(original, *args, **kwargs)
            if _ORIGINAL.get():
                return self.run_original(block, run)
            lockstep.wait((block, "start"))
            if block.targets and not self.finished:
                self.quantize_block(block, run)
            return run()

        restore = _Restore(block.module, vars(block.module).get("forward"))
        block.module.forward = forward
        return restore

    def run_original(self, block: Block, run: Callable[[], Any]) -> Any:
        """Keep what the block returns before it is quantized."""
        lockstep.wait((block, "original"))
        output = run()
        self.originals[_NUMBER.get()] = output_tensor(output)
        if block is self.structure.blocks[-1]:
            raise lockstep.Stop
        lockstep.wait((block, "leave"))
        return output

    def quantize_block(self, block: Block, run: Callable[[], Any]) -> None:
        """Run the block as often as it takes until all its weights are final."""
        if self.config.token_weights:
            layers = [target.module for target in block.targets]
            _WEIGHTS.set(self.sensitivity.of(block.module, block.name, layers, run, _MASK.get()))
        if not self.config.true_sequential:
            run()  # all Hessians from the block as it was, then the block again, quantized
            lockstep.wait((block, "end"))
        if (original := self.originals.get(_NUMBER.get())) is not None:
            run()
            self.examples[_NUMBER.get()] = Example(run, original, _MASK.get())
            lockstep.wait((block, "train"))

    def hook_layer(self, target: Target) -> Any:
        def wait(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.sensitivity.running or self.replaying or _ORIGINAL.get():
                return
            if module not in self.done and not any(target is waiting for waiting, _ in self.pending):
                x = next(iter((*args, *kwargs.values())))
                weights = _WEIGHTS.get({}).get(module)
                self.arrived.setdefault(target, []).append(LayerInput(x, _MASK.get(), weights))
                lockstep.wait(target)
                self.placement.fetch(x)

        return target.module.register_forward_pre_hook(wait, with_kwargs=True)

    @timed("other")
    def stage(self, key: Target | tuple[Block, str]) -> None:
        if isinstance(key, Target):
            shared = self.factors.of(key, self.arrived.pop(key))
            # An expert may get its first tokens in the second pass: the quantized block routes otherwise.
            if self.config.true_sequential or self.second_pass or key is self.structure.head:
                self.quantize(key, shared)
            else:
                self.pending.append((key, shared))
            return
        block, place = key
        if place in ("original", "start") and block is not self.current:
            self.leave()
            self.enter(block)
        if place == "start":
            self.finished = any(target.module in self.done for target in block.targets) or self.restore(block)
        elif place == "end":
            for target, shared in self.pending:
                self.quantize(target, shared)
            self.pending.clear()
            self.second_pass = True
        elif place == "train":
            self.train(block)

    def enter(self, block: Block) -> None:
        if self.on_block is not None:
            self.on_block(block.module)
        if self.progress.folder is not None:
            self.identity = digest(self.identity, block.name, tensors_of(block.module))
        self.placement.bring(tensors_of(block.module))
        self.stacks.enter(block)
        self.current, self.second_pass = block, False
        self.entered.add(block)

    def train(self, block: Block) -> None:
        targets = {
            target.name.removeprefix(f"{block.name}."): target for target in block.targets if target.module in self.done
        }
        weights = {name: self.done[target.module].quantized_weight() for name, target in targets.items()}
        examples = [self.examples.pop(number) for number in sorted(self.examples)]
        self.replaying = True
        entry, trained = train_block(
            block.module,
            block.name,
            weights,
            self.vectors(block).values(),
            examples,
            self.config.tier.block_epochs,
            lambda parameter: self.placement.home(parameter)[1],
        )
        self.replaying = False
        self.report.blocks.append(entry)
        for name, weight in trained.items():
            self.settle(targets[name], weight)

    def vectors(self, block: Block) -> dict[str, nn.Parameter]:
        """What is trained beside quantized layers, by full names: no bias of theirs, nothing that blocks share."""
        uses = Counter(id(parameter) for _, parameter in self.model.named_parameters(remove_duplicate=False))
        linear = {id(parameter) for target in block.targets for parameter in target.module.parameters()}
        return {
            name: parameter
            for name, parameter in block.module.named_parameters(prefix=block.name)
            if parameter.dim() == 1
            and parameter.is_floating_point()
            and uses[id(parameter)] == 1
            and id(parameter) not in linear
        }

    def restore(self, block: Block) -> bool:
        """Whether an earlier run has done the block; then take its results."""
        entry = self.progress.load(block.name, self.identity)
        if entry is None:
            return False
        tensors, facts = entry
        for target in block.targets:
            if f"{target.name}.words" in tensors:
                words, scales, zeros, g_idx = (tensors[f"{target.name}.{key}"] for key in _ENTRY)
                codes = packing.unpack(words, target.config.bits, len(g_idx))
                self.settle(target, QuantizedWeight(codes, scales, zeros, g_idx, target.config.bits))
        for name, vector in self.vectors(block).items():
            vector.data.copy_(tensors[name])
        self.start = time.perf_counter() - facts["seconds"]  # as if the earlier run went on
        self.report.blocks += [BlockReport(**each) for each in facts["blocks"]]
        for each in facts["layers"]:
            self.add_report(LayerReport(**each | {"steps": tuple(Step(**step) for step in each["steps"])}))
        return True

    def save(self, block: Block) -> None:
        """Keep the results of a finished block for :meth:`restore`."""
        tensors: dict[str, Tensor] = dict(self.vectors(block))
        for target in block.targets:
            if target.module in self.done:
                weight = self.done[target.module].quantized_weight()
                fields = packing.pack(weight.codes, weight.bits), weight.scales, weight.zeros, weight.g_idx
                tensors |= {f"{target.name}.{key}": field for key, field in zip(_ENTRY, fields, strict=True)}
        layers = [dataclasses.asdict(each) for each in self.report.layers if each.name.startswith(f"{block.name}.")]
        blocks = [dataclasses.asdict(each) for each in self.report.blocks if each.name == block.name]
        facts = {"layers": layers, "blocks": blocks, "seconds": time.perf_counter() - self.start}
        self.progress.save(block.name, self.identity, tensors, facts)

    def leave(self) -> None:
        """Swap the finished block's layers.

        Experts that no calibration token reached are rounded to nearest. Another layer that was never called may be one
        whose weight the model's code reads, which a quantized layer does not have: it stays.
        """
        if self.current is None:
            return
        for target in self.current.targets:
            if target.module not in self.done:
                if self.batches is not None and not target.may_be_idle:
                    self.keep(target)
                    continue
                if self.batches is not None:
                    logger.warning("%s: no calibration token reached it; rounded to nearest", target.name)
                self.quantize(target, None)
        if self.progress.folder is not None and not self.finished and self.current.targets:
            self.save(self.current)
        for target in self.current.targets:
            if target.module in self.done:
                self.install(target)
        self.originals.clear()
        self.placement.send_back(tensors_of(self.current.module))
        self.factors.clear()
        if self.on_done is not None:
            self.on_done(self.current.name, self.current.module)
        self.current = None

    def keep(self, target: Target) -> None:
        """Leave a layer in 16 bits, and let the resulting settings say so."""
        logger.warning("%s: never called with a calibration token; kept in 16 bits", target.name)
        rules: dict[str, Mapping[str, Any]] = {f"-:{re.escape(target.name)}$": {}}  # the first match wins
        config = self.report.config
        self.report.config = dataclasses.replace(config, dynamic={**rules, **(config.dynamic or {})})

    def quantize(self, target: Target, shared: Shared | None) -> None:
        """Quantize one layer and leave the dequantized weight in the module for the passes under way."""
        start = time.perf_counter()
        module, config = target.module, target.config
        weight = dense_weight(module).detach()
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        tokens = shared.hessian.tokens if shared else 0
        rounded = self.stacks.take(target, weight, shared.factor) if shared else None
        factor = shared.factor if shared else None
        layer = quantize_weight(weight, factor, config, tokens, name=target.name, rounded=rounded)
        self.settle(target, layer.weight)
        entry = LayerReport(
            name=target.name,
            bits=config.bits,
            group_size=config.group_size,
            loss=layer.loss,
            relative_loss=layer.relative_loss,
            method=shared.factor.factor.method if shared else "rtn",
            damp_percent=shared.factor.factor.damp_percent if shared else 0.0,
            tokens=tokens,
            dropped_tokens=shared.hessian.dropped if shared else 0,
            seconds=time.perf_counter() - start,
            steps=layer.steps,
        )
        if shared and entry.method != "cholesky":
            logger.warning(
                "%s: the Hessian could not be factored as it was; used %s with a damping of %g",
                target.name,
                entry.method,
                entry.damp_percent,
            )
        self.add_report(entry)

    def settle(self, target: Target, quantized: QuantizedWeight) -> None:
        """Take a layer's quantized weight: packed for the result, dequantized for the passes under way."""
        module, config = target.module, target.config
        old: Tensor = module.weight  # type: ignore[assignment]
        weight = quantized.to(old.device)
        dense = weight.dequantize(torch.promote_types(old.dtype, torch.float32)).to(old.dtype)
        module.weight.data = dense.t().contiguous() if is_conv1d(module) else dense
        bias = module.bias
        if bias is not None:
            bias = bias.detach().to(self.placement.home(bias)[1])  # type: ignore[operator,arg-type]
        words = getattr(torch, config.pack_dtype)
        home, _ = self.placement.home(module.weight)  # type: ignore[arg-type]
        self.done[module] = QuantLinear.from_weight(
            weight, bias, config.checkpoint_format, words, target.name, self.backend, home, old.dtype
        )

    def add_report(self, entry: LayerReport) -> None:
        self.report.layers.append(entry)
        if self.on_layer is not None:
            self.on_layer(entry, len(self.report.layers), len(self.structure.targets))

    def install(self, target: Target) -> None:
        replace_module(self.model, target.name, self.done[target.module])
        self.placement.forget(target.module.parameters())  # hooks hold the module


@dataclass
class _Restore:
    """Undo a change of an instance's ``forward``: accelerate, too, gives instances one of their own."""

    module: nn.Module
    before: Callable[..., Any] | None

    def remove(self) -> None:
        if self.before is None:
            del self.module.forward
        else:
            self.module.forward = self.before


def _check_trainable(model: nn.Module, config: QuantizeConfig, batches: list[Batch] | None) -> None:
    """Raises ConfigError or CalibrationError where the training that ``config`` asks for cannot be."""
    tier = config.tier
    asked = f"block_epochs={tier.block_epochs}, distill_epochs={tier.distill_epochs} (quality={config.quality!r})"
    if batches is None:
        raise ConfigError(
            f"{asked}: training needs calibration data, but none was given; pass calibration, or set both to 0"
        )
    judges(len(batches))
    getter = getattr(model, "get_output_embeddings", None)
    if tier.distill_epochs and getter is not None and getter() is None:
        raise ConfigError(
            f"{asked}: a distillation compares predictions of tokens, which {type(model).__name__} does not make; set "
            "distill_epochs=0"
        )
    if any(tensor.is_inference() for tensor in tensors_of(model)):
        raise ConfigError(
            f"{asked}: the model was loaded in torch.inference_mode and cannot be trained; load it outside of it"
        )


def _stop(*_: Any) -> None:
    raise lockstep.Stop
