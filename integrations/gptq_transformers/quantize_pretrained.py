"""The Python API: quantize a model."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers import GPTQConfig as StockGPTQConfig

from gptq_backend import Events, QuantizeConfig, QuantizeReport, RunOptions, quantize_model
from gptq_backend.budget import read_goal
from gptq_backend.distributed import Team
from gptq_backend.errors import CalibrationError, ConfigError
from gptq_backend.locks import scratch_folder
from gptq_backend.model import BlockNames, Progress, find_structure
from gptq_backend.output_folder import atomic_folder, check_spared

from .auto_calibration import AUTO, choose
from .block_reader import Bring
from .budget import spend_budget
from .calibration_input import given, is_text, load_tokenizer, token_ids
from .completeness import keep_all_tensors
from .config import GPTQConfig
from .dispatch import keeping_hooks
from .experts.unfuse import unfuse_experts
from .hf_quantizer import attach, mark_quantized
from .model_files import copy_companions
from .streaming import BlockWriter, detach_offloading, load_streamed, load_whole
from .whole_samples import whole_samples

logger = logging.getLogger(__name__)


def quantize(
    model_or_path: PreTrainedModel | str | Path,
    config: QuantizeConfig | GPTQConfig | Mapping[str, Any],
    calibration: str | Iterable[Any] | None,
    *,
    text: str | Iterable[str] | None = None,
    tokenizer: Any = None,
    output: str | Path | None = None,
    seqlen: int | None = None,
    samples: int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    backend: str | None = None,
    overwrite: bool = False,
    events: Events | None = None,
    device: str | torch.device | None = None,
    block_name: BlockNames = None,
    trust_remote_code: bool = False,
    resume: bool = True,
    calibrate_all_experts: bool = False,
    target_size: str | int | None = None,
    target_bits: float | None = None,
    team: Team | None = None,
) -> tuple[PreTrainedModel, QuantizeReport]:
    """Quantize a model: language models with or without other senses, encoder-decoders, classifiers, embedding models.

    Args:
        model_or_path: a loaded model, which is changed in place, or a model folder or name. From a folder the class in
            ``architectures`` is loaded (a causal language model if there is none), the blocks' 16-bit weights are read
            one block at a time, and written, if there is an ``output``, a file at a time.
        config: what to quantize and how; also a dictionary or a ``GPTQConfig``.
        calibration: one text, texts, or token id samples (a tensor [B, T], lists, tensors [T] or [B, T]); mappings of
            all that the model takes (``input_ids``, ``pixel_values``, ``decoder_input_ids``, ...), or of what its
            processor takes (``text``, ``images``, ``audio``, ``text_target``); None rounds to nearest (and cannot
            train); ``"auto"`` chooses windows of packaged text, the model's own and ``text``, see
            :func:`auto_calibration.choose`. Text alone is completed: see :func:`whole_samples.whole_samples`.
        text: what the model will read, if there is some; only for ``calibration="auto"``.
        tokenizer: for texts; default: the one in the model's folder.
        output: write the checkpoint, with the tokenizer, to this folder; it appears whole or not at all. Finished
            blocks are kept in ``OUTPUT.progress`` beside it: a run that was interrupted goes on from there if it is
            begun again. That folder is removed at the end.
        seqlen: cut texts, joined, into windows of this many tokens; None keeps each text as one sample, and is 512
            for "auto".
        samples: use this many windows, texts or token id samples, drawn with ``seed``; for "auto" the most it may
            choose, by default 64.
        batch_size: sequences per forward pass; None aims at about 2048 tokens.
        backend: kernel of the resulting layers.
        overwrite: let ``output`` replace a folder that exists.
        events: told what happens: of each layer, block and training step, and what "auto" chose.
        device: where to compute, e.g. ``cuda``; blocks are there for their turn only. None: where the weights are.
        block_name: full name of the list of blocks to quantize, like ``model.language_model.layers``, or of several;
            None chooses, see :func:`gptq_backend.model.structure.find_blocks`.
        trust_remote_code: let code that comes with the model run.
        resume: False begins anew, and removes what earlier runs into ``output`` have kept.
        calibrate_all_experts: calibrate every expert of a mixture on all tokens, not only on those that its router
            sends to it.
        target_size: choose bits (2, 3, 4 or 8) and group size of each layer, and the embedding's bits, so that the
            weight files have at most this size: bytes, or text like ``800MB`` and ``1.5GiB``. They are chosen for the
            least divergence from the original, which is measured on the first 16 samples, with the model in memory as
            a whole (on a CPU in float32). Layers that ``dynamic`` rules name keep what those say.
        target_bits: likewise, for so many bits per weight in the layers' codes, scales and zeros; the embedding stays.
        team: the processes that quantize together, as ``gptq_backend.distributed.joined`` gives it under torchrun; all
            of them call this function with the same arguments. The first rank writes ``output``, chooses for "auto",
            and does the distillation.

    Returns:
        The quantized model and the report, which also says what stays in 16 bits (``report.kept``).

    Raises:
        ConfigError, CalibrationError, CheckpointError: the message says what to do; nothing was written. GPTQError: the
            model cannot be loaded.
    """
    if text is not None and not (isinstance(calibration, str) and calibration == AUTO):
        raise CalibrationError("text= goes with calibration='auto'; to calibrate on it alone, pass calibration=text")
    options = RunOptions(
        batch_size, block_name or _block_name(config), backend, device, calibrate_all_experts=calibrate_all_experts
    )
    settings, events, team = _as_config(config), events or Events(), team or Team()
    goal = read_goal(target_size, target_bits)
    from_folder = isinstance(model_or_path, str | Path)
    path = model_or_path if isinstance(model_or_path, str | Path) else model_or_path.config._name_or_path
    if output is not None and str(path):
        check_spared(output, path, "the original model")
    with ExitStack() as stack:
        # Made before the work, so that an output that cannot be written is found out at once.
        target = output if team.first else None
        folder = None if target is None else stack.enter_context(atomic_folder(target, overwrite))
        progress = Progress(None if target is None else _progress_folder(target))
        if not resume:
            progress.remove()
        stack.enter_context(_telling_of(progress))
        scratch = stack.enter_context(scratch_folder("offload"))
        calibration = given(calibration)
        if tokenizer is None and (output is not None or is_text(calibration)):
            tokenizer = load_tokenizer(path, is_text(calibration), trust_remote_code)
        if calibration == AUTO:
            window: Any = {"samples": samples, "seqlen": seqlen, "seed": seed}

            def chosen() -> list[torch.Tensor]:
                choice = choose(model_or_path, tokenizer, text, options, **window, trust_remote_code=trust_remote_code)
                events.calibration_chosen(choice)
                return [choice.samples]

            data: Any = team.broadcast(0, chosen)[0]
        else:
            data = token_ids(calibration, tokenizer, seqlen, samples, seed)
        model, bring, teacher = _open(model_or_path, scratch, settings, options, trust_remote_code, data is not None)
        if data is not None:
            data = whole_samples(data, model, path, tokenizer, trust_remote_code)
        if goal is not None:
            source = model_or_path if from_folder else None
            facts = goal, data, options, events, Progress(progress.folder), trust_remote_code
            settings = _chosen_by_first(team, settings, partial(spend_budget, model, bring, source, settings, *facts))
        writer = None
        if output is not None and from_folder and not settings.preset.distill_epochs:
            writer = BlockWriter.of(model, progress, find_structure(model, settings, options.block_name))
        streaming = _Streaming(events, bring, writer)
        with keeping_hooks(model):
            report = quantize_model(
                model, settings, data, options=options, events=streaming, teacher=teacher, progress=progress, team=team
            )
        (attach if writer is None else mark_quantized)(model, report.config)  # what is written stays in its files
        if folder is not None:
            _write(model, folder, writer, path if from_folder else None, tokenizer)
    progress.remove()
    return model, report


def _chosen_by_first(team: Team, settings: QuantizeConfig, choose: Callable[[], QuantizeConfig]) -> QuantizeConfig:
    """What the first rank makes of ``settings``."""

    def changes() -> dict[str, Any]:
        chosen = choose()
        values = {item.name: getattr(chosen, item.name) for item in dataclasses.fields(settings)}
        return {name: value for name, value in values.items() if value != getattr(settings, name)}

    return dataclasses.replace(settings, **team.told(0, changes))


def _open(
    model_or_path: Any,
    scratch: str,
    config: QuantizeConfig,
    options: RunOptions,
    trust_remote_code: bool,
    calibrated: bool,
) -> tuple[PreTrainedModel, Bring, Callable[[], PreTrainedModel]]:
    """The model with a layer for each expert, what brings the weights of a block, and what gives the original again,
    for a distillation.
    """
    from_folder = isinstance(model_or_path, str | Path)
    model: PreTrainedModel = model_or_path
    if from_folder:
        model, bring = load_streamed(model_or_path, scratch, config, options.block_name, trust_remote_code)
    if getattr(model.config, "quantization_config", None) is not None:
        raise ConfigError(f"{model.name_or_path} is quantized already; pass the original 16-bit model")
    if options.device is not None:
        _check_in_one_place(model, options.device)
    with keeping_hooks(model):
        unfuse_experts(model)
    if from_folder:
        return model, bring, lambda: load_whole(model_or_path, trust_remote_code=trust_remote_code)
    original = copy.deepcopy(model) if config.preset.distill_epochs and calibrated else model
    return model, detach_offloading(model, options.block_name), lambda: original


class _Streaming(Events):
    """Brings a block's weights when they are needed, writes them when they are done, and tells ``events`` of both."""

    def __init__(self, events: Events, bring: Bring, writer: BlockWriter | None) -> None:
        self.bring, self.writer, self.events = bring, writer, events
        self.elsewhere: frozenset[nn.Module] = frozenset()
        for name in ("structure_found", "block_restored", "layer_done", "training_step"):
            setattr(self, name, getattr(events, name))

    def weights_elsewhere(self, name: str, layers: frozenset[nn.Module]) -> None:
        self.elsewhere = layers
        self.events.weights_elsewhere(name, layers)

    def block_needed(self, name: str, block: nn.Module) -> None:
        self.bring(block, self.elsewhere)
        self.elsewhere = frozenset()
        self.events.block_needed(name, block)

    def block_done(self, name: str, block: nn.Module) -> None:
        if self.writer is not None:
            self.writer.add(name, block)
        self.events.block_done(name, block)


def _write(
    model: PreTrainedModel, folder: Path, writer: BlockWriter | None, original: str | Path | None, tokenizer: Any
) -> None:
    """All files of the checkpoint; ``original`` is the folder that no tensor may be lost of."""
    with _generation_settings_as_they_are(model, folder):
        if writer is None:
            model.save_pretrained(folder)
        else:
            writer.save(folder)
    if original is not None:
        keep_all_tensors(original, model, folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if original is not None:
        copy_companions(original, folder)


@contextmanager
def _generation_settings_as_they_are(model: PreTrainedModel, folder: Path) -> Iterator[None]:
    """Let settings be saved that ``save_pretrained`` refuses, like the temperature that many published models have
    without sampling; ``generate`` ignores it.
    """
    settings: Any = getattr(model, "generation_config", None)
    try:
        if settings is not None:
            settings.validate(strict=True)
    except ValueError:
        model.generation_config = GenerationConfig()
        try:
            yield
        finally:
            model.generation_config = settings
        (folder / "generation_config.json").write_text(settings.to_json_string(), encoding="utf-8")
    else:
        yield


@contextmanager
def _telling_of(progress: Progress) -> Iterator[None]:
    """Say what an interruption leaves."""
    try:
        yield
    except BaseException:
        if progress.kept():
            text = "%s keeps what was done: the same run, begun again, goes on from there; otherwise remove it"
            logger.warning(text, progress.folder)
        raise


def _check_in_one_place(model: PreTrainedModel, device: str | torch.device) -> None:
    """Raises ConfigError for a model spread over several accelerators, between which its own hooks move data."""
    places = set(getattr(model, "hf_device_map", {}).values()) - {"cpu", "disk"}
    if len(places) > 1:
        raise ConfigError(
            f"device={str(device)!r} is one place to compute, but the model's device_map spreads it over several; "
            "leave device out, or load the model without device_map"
        )


def _progress_folder(output: str | Path) -> Path:
    """``OUT.progress`` beside the folder OUT, which does not exist yet."""
    folder = Path(output).resolve()
    return folder.with_name(f"{folder.name}.progress")


def _as_config(config: Any) -> QuantizeConfig:
    """Our settings from ours, a dictionary, or a ``GPTQConfig`` of transformers."""
    if isinstance(config, QuantizeConfig):
        return config
    if not isinstance(config, Mapping):
        return QuantizeConfig.from_dict(GPTQConfig.adopt(config).to_dict())
    read = QuantizeConfig.from_dict(config)
    if unknown := sorted(set(read.extra) - set(inspect.signature(StockGPTQConfig).parameters)):
        logger.warning("unknown settings have no effect: %s", ", ".join(unknown))
    return read


def _block_name(config: Any) -> BlockNames:
    """``block_name_to_quantize`` of a dictionary or a ``GPTQConfig``."""
    if isinstance(config, Mapping):
        return config.get("block_name_to_quantize")
    return getattr(config, "block_name_to_quantize", None)
