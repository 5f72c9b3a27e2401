"""Quantize a whole model in one forward pass over the calibration data: the order in which everything happens.

Every batch's forward pass waits where a block begins and in front of each linear layer (passes.py). When all passes
stand in front of a layer, their inputs make its Hessian, the layer is quantized (layers.py), and the passes go on with
the quantized weight. Token weights (token_weights.py) add a pass through each block's attention and back.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..config import QuantizeConfig
from ..distributed.team import Team
from ..errors import ConfigError
from ..float32_products import fast_products
from ..format.weight import QuantizedWeight
from ..model.calibration import Batch, check_fits, make_batches
from ..model.layer_inputs import Factors, InputFactor, LayerInput
from ..model.placement import tensors_of
from ..model.progress import Progress
from ..model.structure import Block, Structure, Target, dense_weight, evaluating, linear_shapes, special_linears, untie
from ..model.unquantized import unquantized
from ..timing import timed
from ..training.blocks import train_block, trainable_vectors
from ..training.distill import DistillReport, distill
from ..training.scales import validation_batches
from .layers import Layers
from .options import Events, RunOptions
from .outside import Outside
from .owned_experts import ExpertInput, Round, gather_names, send_to_owners
from .passes import BlockState, Passes, Phase, Place
from .report import LayerReport, QuantizeReport
from .resume import Resume

logger = logging.getLogger(__name__)


@fast_products()
def quantize_model(
    model: nn.Module,
    config: QuantizeConfig,
    calibration: Sequence[Any] | Tensor | None = None,
    *,
    options: RunOptions | None = None,
    events: Events | None = None,
    teacher: Callable[[], nn.Module] | None = None,
    progress: Progress | None = None,
    team: Team | None = None,
) -> QuantizeReport:
    """Replace the linear layers of ``model``'s blocks by :class:`QuantLinear`, in place.

    Args:
        model: called as ``model(input_ids=..., attention_mask=...)``.
        config: what to quantize and how.
        calibration: token id samples (see :func:`calibration.make_batches`); None rounds to nearest.
        options: how to run.
        events: told what happens.
        teacher: gives the original model, for ``config.distill_epochs``; called after everything else is done.
        progress: where an interrupted run finds the blocks that it has done, and the state of its distillation; removed
            by whoever made it. Of a team, the first rank's counts.
        team: the processes that quantize together, which all pass the same; None: this one alone. The result is the
            same to the bit on all ranks, and for any number of them with as many threads each, but for a distillation,
            which only the first rank does, and gets.

    Raises:
        ConfigError, CalibrationError: see their messages. The model is then partly quantized: load it again.
    """
    options, events, progress = options or RunOptions(), events or Events(), progress or Progress(None)
    batches = None if calibration is None else make_batches(calibration, options.batch_size)
    epochs = config.preset.distill_epochs
    if epochs and teacher is None:
        raise ConfigError(
            f"distill_epochs={epochs} (quality={config.quality!r}) needs the original model beside the quantized one; "
            "pass teacher=, use gptq_transformers.quantize, or set distill_epochs=0"
        )
    if config.preset.trains:  # what would fail after the work
        _check_trainable(model, config, batches)
    team = team or Team()
    run = _Run(model, config, options, events, progress, team)
    report = run.quantize(batches)
    if epochs and team.first and teacher is not None and batches is not None:
        start = time.perf_counter()
        report.distillation = run.distill(teacher, batches)
        report.seconds += time.perf_counter() - start
    return report


class _Run:
    """Gives each block its turn, and does what is to be done where the passes wait."""

    def __init__(
        self,
        model: nn.Module,
        config: QuantizeConfig,
        options: RunOptions,
        events: Events,
        progress: Progress,
        team: Team,
    ) -> None:
        self.model, self.config, self.events, self.team = model, config, events, team
        self.layers = Layers(model, config, options, events, team)
        self.structure, self.placement = self.layers.structure, self.layers.placement
        _warn_of_exceptions(model, self.structure, config)
        self.factors, self.own_factors = Factors(self.placement, team), Factors(self.placement, Team())
        self.passes = Passes(self.layers, config, team)
        self.resume = Resume(progress, self.layers, team)

    def quantize(self, batches: list[Batch] | None) -> QuantizeReport:
        """The whole model but for a distillation; without ``batches`` by rounding to nearest."""
        if self.structure.head is not None:
            untie(self.structure.head.module)
        self.events.structure_found(len(self.structure.blocks), self.layers.count)
        # A caller's inference mode would leave no derivatives to take; a model that was loaded in it works only there.
        inference = any(tensor.is_inference() for tensor in tensors_of(self.model))
        with torch.inference_mode(inference), torch.no_grad(), evaluating(self.model):
            self.layers.quantize_embedding()
            self.outside = Outside(self.model, self.structure, self.placement)
            if batches is None:
                self.round_to_nearest()
            else:
                self.calibrate(batches)
            self.layers.install_embedding()
        blocks, done = self.structure.blocks, self.layers.done
        wanted = [target.module for block in blocks for target in block.targets]
        if wanted and not any(module in done for module in wanted):
            raise ConfigError(
                f"no layer was quantized: no calibration token reached one in {blocks[0].name} to {blocks[-1].name}; "
                "name the blocks that read text with block_name (for GPTQConfig: block_name_to_quantize)"
            )
        self.layers.report.seconds, self.layers.report.kept = self.resume.seconds, unquantized(self.model)
        return self.layers.report

    def round_to_nearest(self) -> None:
        self.resume.begin(self.config, [], self.outside.tensors)
        for block in self.structure.blocks:
            self.begin_block(block)
            if not self.resume.restore(block):
                for target in block.targets:
                    self.layers.quantize(target, None)
            self.finish_block()
        if (head := self.structure.head) is not None:
            self.placement.bring(tensors_of(head.module))
            self.layers.quantize(head, None)
            self.layers.install(head)

    def calibrate(self, batches: list[Batch]) -> None:
        check_fits(self.model, batches)
        self.resume.begin(self.config, batches, self.outside.tensors)
        with self.outside:
            self.passes.run(batches, self.serve_place, self.serve_layer, self.serve_experts)
            self.finish_block()
        for block in self.structure.blocks:
            if block not in self.passes.reached:  # no batch came by; its weights are wanted all the same
                self.begin_block(block).phase = Phase.FINAL_BEFORE
                self.finish_block()
        if self.structure.head is not None:
            self.layers.install(self.structure.head)

    @timed("other")
    def serve_place(self, block: Block, place: Place) -> None:
        """All passes wait at a place of ``block``."""
        state = self.passes.state
        if state is None or (place in (Place.ORIGINAL, Place.START) and block is not state.block):
            self.outside.rest()
            self.finish_block()
            state = self.begin_block(block, self.passes.ownership.elsewhere(block))
        if place is Place.START:
            if any(target.module in self.layers.done for target in block.targets) or self.resume.restore(block):
                state.phase = Phase.FINAL_BEFORE
            elif self.config.true_sequential or not block.targets:
                state.phase = Phase.QUANTIZING
            else:
                state.phase = Phase.MEASURING
        elif place is Place.MEASURED:
            for target, source in state.measured:
                self._quantize(target, source)
            own = [(target, *self.layers.make(target, source, Team())) for target, source in state.owned]
            self.layers.share(own, block)
            for measured in (state.measured, state.owned):
                measured.clear()
            state.known.clear()
            state.phase = Phase.QUANTIZING
        elif place is Place.TRAIN:
            self.train(state)

    @timed("other")
    def serve_layer(self, target: Target, inputs: list[LayerInput]) -> None:
        """All passes wait in front of a layer, with ``inputs`` for it."""
        state = self.passes.state
        if state is not None and self.passes.ownership.is_divided(target, state.block):
            raise ConfigError(
                f"{target.name} is called otherwise than by its mixture's forward, so ranks cannot share experts out; "
                "quantize this model in one process, or with true_sequential=False"
            )
        source = self.factors.of(target, inputs)
        # An expert may get its first tokens only after MEASURING: the quantized block routes otherwise.
        if state is not None and state.phase is Phase.MEASURING:
            state.measured.append((target, source))
            state.known.add(target.name)
        else:
            self._quantize(target, source)

    def _quantize(self, target: Target, source: InputFactor | None) -> None:
        # Rows that make up for others would leave the grid that most of an earlier result is on.
        anew = source is not None and self.layers.before(target.name) is None
        feedback = self.config.preset.row_feedback and anew
        rows = self.passes.row_moments.factor(target.module, dense_weight(target.module)) if feedback else None
        self.layers.quantize(target, source, rows)

    @timed("other")
    def serve_experts(self, block: Block, each: Round, inputs: list[ExpertInput]) -> None:
        """All passes wait in front of some experts, with ``inputs`` for them."""
        state = self.passes.state
        assert state is not None, "experts are in a block"
        made: list[tuple[Target, QuantizedWeight, LayerReport]] = []

        def serve(target: Target, inputs: list[LayerInput]) -> None:
            source = self.own_factors.of(target, inputs)
            if state.phase is Phase.MEASURING:
                state.owned.append((target, source))
            else:
                weight, entry = self.layers.make(target, source, Team())
                self.layers.store(target, weight)
                made.append((target, weight, entry))

        for own in send_to_owners(self.team, each, inputs).values():
            if own:
                self.passes.run_expert(each, own, serve)
        self.layers.share(made, block)
        state.known |= gather_names(self.team, [target for target, _ in state.owned])

    def distill(self, teacher: Callable[[], nn.Module], batches: list[Batch]) -> DistillReport:
        """Train the whole quantized model towards the original."""
        home = next(self.model.parameters()).device
        where = self.placement.device or home
        with torch.inference_mode(False):  # a caller's would leave no derivatives to take
            report = distill(
                self.model.to(where),
                teacher().to(where),
                batches,
                epochs=self.config.preset.distill_epochs,
                progress=self.resume.progress,
                identity=self.resume.identity,
                on_step=self.events.training_step,
            )
        self.model.to(home)
        return report

    def begin_block(self, block: Block, elsewhere: frozenset[nn.Module] | None = None) -> BlockState:
        """Give a block its turn; ``elsewhere`` as of :meth:`Ownership.elsewhere`."""
        if elsewhere:
            self.events.weights_elsewhere(block.name, elsewhere)
        self.events.block_needed(block.name, block.module)
        self.resume.begin_block(block, elsewhere)
        others = {id(layer.weight) for layer in elsewhere or ()}
        self.placement.bring([tensor for tensor in tensors_of(block.module) if id(tensor) not in others])
        self.layers.joint.begin_block(block)
        self.passes.row_moments.clear()
        self.passes.state = BlockState(block)
        return self.passes.state

    def train(self, state: BlockState) -> None:
        """Train a block's scales and norms towards what the original block returned."""
        block = state.block
        weights = self.layers.weights(block)
        targets = {target.name.removeprefix(f"{block.name}."): target for target in weights}
        state.phase = Phase.TRAINING
        entry, trained = train_block(
            block.module,
            block.name,
            {name: weights[target] for name, target in targets.items()},
            trainable_vectors(self.model, block).values(),
            state.examples,
            self.config.preset.block_epochs,
            lambda parameter: self.placement.home(parameter)[1],
            self.team,
        )
        state.examples.clear()
        state.phase = Phase.QUANTIZING
        self.layers.report.blocks.append(entry)
        for name, weight in trained.items():
            self.layers.store(targets[name], weight)

    def finish_block(self) -> None:
        """End a block's turn: see to the layers that no pass came to, and put the quantized ones in place.

        Experts that no calibration token reached are rounded to nearest. Another layer that was never called may be one
        whose weight the model's code reads, which a quantized layer does not have: it stays.
        """
        state, self.passes.state = self.passes.state, None
        if state is None:
            return
        block, idle = state.block, list[Target]()
        for target in block.targets:
            if target.module in self.layers.done:
                continue
            if target.may_be_idle:
                idle.append(target)
            else:
                self.layers.keep_dense(target)
        if idle:
            self._round_idle(idle, block)
            text = "%s: no calibration token reached %d layers of its experts (%s, ...), which are rounded to nearest; "
            logger.warning(
                f"{text}calibrate_all_experts sends all tokens through all of them", block.name, len(idle), idle[0].name
            )
        for target in block.targets:
            self.layers.install(target)
        self.layers.sort_reports(block)
        self.placement.send_back(tensors_of(block.module))
        self.resume.save(block)
        self.factors.clear()
        self.own_factors.clear()
        self.events.block_done(block.name, block.module)

    def _round_idle(self, idle: list[Target], block: Block) -> None:
        """Round layers of experts to nearest, on the ranks that have their weights."""
        if (elsewhere := self.passes.ownership.elsewhere(block)) is None:
            for target in idle:
                self.layers.quantize(target, None)
            return
        own = [target for target in idle if target.module not in elsewhere]
        self.layers.share([(target, *self.layers.make(target, None, Team())) for target in own], block)


def _warn_of_exceptions(model: nn.Module, structure: Structure, config: QuantizeConfig) -> None:
    """Tell of rules without effect, and of layers that stay in 16 bits although they look linear."""
    for sentence in config.unused_rules(linear_shapes(model)):
        logger.warning("dynamic: %s", sentence)
    if special := special_linears(structure):
        name, kind = next(iter(special.items()))
        text = "%s (%s) and %d layers like it stay in 16 bits: they do not compute a plain product"
        logger.warning(text, name, kind, len(special) - 1)


def _check_trainable(model: nn.Module, config: QuantizeConfig, batches: list[Batch] | None) -> None:
    """Raises ConfigError or CalibrationError where the training that ``config`` asks for cannot be."""
    preset = config.preset
    asked = f"block_epochs={preset.block_epochs}, distill_epochs={preset.distill_epochs} (quality={config.quality!r})"
    if batches is None:
        raise ConfigError(
            f"{asked}: training needs calibration data, but none was given; pass calibration, or set both to 0"
        )
    validation_batches(len(batches))
    getter = getattr(model, "get_output_embeddings", None)
    if preset.distill_epochs and getter is not None and getter() is None:
        raise ConfigError(
            f"{asked}: a distillation compares predicted tokens, but {type(model).__name__} predicts none; set "
            "distill_epochs=0"
        )
    if any(tensor.is_inference() for tensor in tensors_of(model)):
        raise ConfigError(
            f"{asked}: the model was loaded in torch.inference_mode and cannot be trained; load it outside of it"
        )
