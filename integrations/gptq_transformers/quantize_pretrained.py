"""The Python API: quantize a model."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers import GPTQConfig as StockGPTQConfig

from gptq_backend import QuantizeConfig, QuantizeReport, quantize_model
from gptq_backend.errors import CalibrationError, ConfigError
from gptq_backend.locks import scratch_folder
from gptq_backend.model import Progress
from gptq_backend.output import atomic_folder, check_spared
from gptq_backend.pipeline import OnLayer

from .auto_calibration import AUTO, Choice, choose
from .calibration_input import given, is_text, load_tokenizer, token_ids
from .companions import copy_companions
from .completeness import keep_all_tensors
from .config import GPTQConfig
from .dispatch import keeping_hooks
from .experts.unfuse import unfuse_experts
from .hf_quantizer import attach
from .streaming import BlockWriter, detach_offloading, load_streamed, load_whole

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
    on_layer: OnLayer | None = None,
    on_step: Callable[[int, int, float], None] | None = None,
    on_choice: Callable[[Choice], None] | None = None,
    device: str | torch.device | None = None,
    block_name: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, QuantizeReport]:
    """Quantize a model that reads token ids: a language model, a classifier, an embedding model.

    Args:
        model_or_path: a loaded model, which is changed in place, or a model folder or name. From a folder the class in
            ``architectures`` is loaded (a causal language model if there is none), the blocks' 16-bit weights are read
            one block at a time, and written, if there is an ``output``, a file at a time.
        config: what to quantize and how; also a dictionary or a ``GPTQConfig``.
        calibration: one text, texts, or token id samples (a tensor [B, T], lists, tensors [T] or [B, T], mappings with
            ``input_ids`` and ``attention_mask``); None rounds to nearest (and cannot train); ``"auto"`` chooses
            windows of packaged text, the model's own and ``text``, see :func:`auto_calibration.choose`.
        text: what the model will read, if there is some; only for ``calibration="auto"``.
        tokenizer: for texts; default: the one in the model's folder.
        output: write the checkpoint, with the tokenizer, to this folder; it appears whole or not at all. A run that
            trains (``quality="best"``) keeps what it has done in ``OUTPUT.progress`` beside it, and goes on from there
            if it is begun again; that folder is removed at the end.
        seqlen: cut texts, joined, into windows of this many tokens; None keeps each text as one sample, and is 512
            for "auto".
        samples: use this many windows, texts or token id samples, drawn with ``seed``; for "auto" the most it may
            choose, by default 64.
        batch_size: sequences per forward pass; None aims at about 2048 tokens.
        backend: kernel of the resulting layers.
        overwrite: let ``output`` replace a folder that exists.
        on_layer: called with each layer's report, how many are done, and how many there are.
        on_step: called in a distillation with the steps done, the steps in all, and the divergence on the batch.
        on_choice: called with what "auto" chose, before the work.
        device: where to compute, e.g. ``cuda``; blocks are there for their turn only. None: where the weights are.
        block_name: full name of the list of blocks to quantize, like ``model.language_model.layers``; None chooses, see
            :func:`gptq_backend.model.structure.find_blocks`.
        trust_remote_code: let code that comes with the model run.

    Returns:
        The quantized model and the report.

    Raises:
        ConfigError, CalibrationError, CheckpointError: the message says what to do; nothing was written. GPTQError: the
            model cannot be loaded.
    """
    block_name = block_name or _block_name(config)
    config = _as_config(config)
    if text is not None and not (isinstance(calibration, str) and calibration == AUTO):
        raise CalibrationError("text= goes with calibration='auto'; to calibrate on it alone, pass calibration=text")
    path = model_or_path if isinstance(model_or_path, str | Path) else model_or_path.config._name_or_path
    if output is not None and str(path):
        check_spared(output, path, "the original model")
    with ExitStack() as stack:
        # Made before the work, so that an output that cannot be written is found out at once.
        folder = None if output is None else stack.enter_context(atomic_folder(output, overwrite))
        progress = Progress(None if output is None or not config.tier.trains else _progress_folder(output))
        stack.enter_context(_telling_of(progress))
        scratch = stack.enter_context(scratch_folder("offload"))
        calibration = given(calibration)
        if tokenizer is None and (output is not None or is_text(calibration)):
            tokenizer = load_tokenizer(path, is_text(calibration), trust_remote_code)
        if calibration == AUTO:
            own = text if text is None or isinstance(text, str) else list(text)
            choice = choose(
                model_or_path,
                tokenizer,
                own,
                samples=64 if samples is None else samples,
                seqlen=512 if seqlen is None else seqlen,
                seed=seed,
                device=device,
                block_name=block_name,
                trust_remote_code=trust_remote_code,
            )
            logger.info("calibration='auto' uses %s", choice.summary())
            if on_choice is not None:
                on_choice(choice)
            calibration = choice.samples
        else:
            calibration = token_ids(calibration, tokenizer, seqlen, samples, seed)
        from_folder = isinstance(model_or_path, str | Path)
        if from_folder:
            model = load_streamed(path, scratch, config, block_name, trust_remote_code)
        else:
            model = model_or_path
        if getattr(model.config, "quantization_config", None) is not None:
            raise ConfigError(f"{path} is quantized already; pass the original 16-bit model")
        if device is not None:
            _check_in_one_place(model, device)
        with keeping_hooks(model):
            unfuse_experts(model)
        original = None
        if calibration is not None and config.tier.distill_epochs and not from_folder:
            original = copy.deepcopy(model)
        writer = None
        if folder is not None and from_folder and not config.tier.distill_epochs:
            writer = BlockWriter.of(model, folder, block_name)
        bring = detach_offloading(model, block_name)
        with keeping_hooks(model):
            report = quantize_model(
                model,
                config,
                calibration,  # type: ignore[arg-type]
                batch_size=batch_size,
                block_name=block_name,
                backend=backend,
                on_layer=on_layer,
                on_step=on_step,
                on_block=bring,
                on_done=None if writer is None else writer.add,
                teacher=lambda: original or load_whole(path, trust_remote_code=trust_remote_code),
                progress=progress,
                device=device,
            )
        attach(model, report.config)
        if folder is not None:
            _write(model, folder, writer, path if from_folder else None, tokenizer)
    progress.remove()
    return model, report


def _write(
    model: PreTrainedModel, folder: Path, writer: BlockWriter | None, original: str | Path | None, tokenizer: Any
) -> None:
    """All files of the checkpoint; ``original`` is the folder that no tensor may be lost of."""
    with _generation_settings_as_they_are(model, folder):
        if writer is None:
            model.save_pretrained(folder)
        else:
            writer.save()
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
            logger.warning(
                "%s keeps what was done: the same run, begun again, goes on from there; otherwise remove it",
                progress.folder,
            )
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


def _block_name(config: Any) -> str | None:
    """``block_name_to_quantize`` of a dictionary or a ``GPTQConfig``."""
    if isinstance(config, Mapping):
        return config.get("block_name_to_quantize")
    return getattr(config, "block_name_to_quantize", None)
