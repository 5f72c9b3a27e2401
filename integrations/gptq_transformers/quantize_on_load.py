"""Quantize a model that ``from_pretrained(..., quantization_config=GPTQConfig(dataset=...))`` has just loaded."""

from __future__ import annotations

import itertools
import logging
from typing import Any

from transformers.utils import logging as transformers_logging

from gptq_backend import CalibrationError, ConfigError, Events, LayerReport, RunOptions, quantize_model
from gptq_backend.model import tokenize

from .calibration_input import given, is_text, load_tokenizer
from .config import DATASETS, GPTQConfig
from .dispatch import keeping_hooks
from .errors import first_line
from .experts.unfuse import group_experts, unfuse_experts
from .quantized_layers import untie_quantized
from .whole_samples import whole_samples

logger = logging.getLogger(__name__)

# As optimum does it for the same arguments: 128 windows of 2048 tokens, shorter where the model is.
_SAMPLES = 128
_SEQLEN = 2048
# Rows that surely make 128 windows.
_ROWS = {"wikitext2": 20_000, "c4": 2048, "c4-new": 2048}


def quantize_loaded(model: Any, config: GPTQConfig) -> None:
    """Calibrate and quantize ``model`` in place.

    Raises:
        CalibrationError: the data set or the tokenizer cannot be had, or the data are unusable.
        ConfigError: the weights are offloaded.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ConfigError(
            "device_map puts part of the model on disk or offloads it; to quantize while loading it has to be in "
            "memory: leave device_map out, or use gptq_transformers.quantize(), which reads one block at a time"
        )
    samples = calibration_samples(model, config)
    with keeping_hooks(model):
        unfuse_experts(model)
    settings = config.to_quantize_config()
    options = RunOptions(
        batch_size=config.batch_size if (config.batch_size or 1) > 1 else None,
        block_name=config.block_name_to_quantize,
        backend=config.kernel,
    )
    with transformers_logging.tqdm(desc="Quantizing", unit="layer") as bar, keeping_hooks(model):
        report = quantize_model(model, settings, samples, options=options, events=_Shown(bar))
    # Blocks kept in 16 bits are described by rules now, for other readers of the checkpoint.
    config.dynamic, config.keep_edge_blocks = report.config.dynamic, report.config.keep_edge_blocks
    config.checkpoint_format = report.config.checkpoint_format  # which some layers' bits may have changed
    if hasattr(config, "format"):  # transformers 5's name for it
        config.format = config.checkpoint_format
    untie_quantized(model)
    group_experts(model)


class _Shown(Events):
    """Moves a progress bar."""

    def __init__(self, bar: Any) -> None:
        self.bar = bar

    def layer_done(self, layer: LayerReport, done: int, total: int) -> None:
        self.bar.total = total
        self.bar.set_postfix_str(f"{layer.name} error {layer.relative_loss:.2e}", refresh=False)
        self.bar.update(1)


def calibration_samples(model: Any, config: GPTQConfig) -> list[Any]:
    """Token ids from ``config.dataset``: texts (each one sample, cut to the model's length), ids, or a known name."""
    dataset = config.dataset
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or _SEQLEN
    seqlen = config.model_seqlen or (min(limit, _SEQLEN) if limit > 0 else _SEQLEN)  # -1: any length
    named = isinstance(config.tokenizer, str)
    source, tool = (config.tokenizer, None) if named else (model.name_or_path, config.tokenizer)
    if isinstance(dataset, str):
        samples: Any = tokenize("\n\n".join(_named_texts(dataset)), _tokenizer(model, config), seqlen, _SAMPLES)
    elif is_text(samples := given(dataset)):
        samples = [ids[:seqlen] for ids in tokenize(samples, _tokenizer(model, config))]
    return whole_samples(samples, model, source, tool)


def _tokenizer(model: Any, config: GPTQConfig) -> Any:
    tokenizer = config.tokenizer if config.tokenizer is not None else model.name_or_path
    if not isinstance(tokenizer, str):
        return tokenizer
    return load_tokenizer(tokenizer, True)


def _named_texts(name: str) -> list[str]:
    alternative = "pass dataset=[texts] of your own instead, for example the lines of a text file"
    try:
        import datasets
    except ImportError as error:
        raise CalibrationError(
            f"dataset={name!r} needs the package datasets, which cannot be imported ({first_line(error)}): "
            f"`pip install datasets`, or {alternative}"
        ) from None
    positional, keywords = DATASETS[name]
    try:
        rows = datasets.load_dataset(*positional, **keywords)
        return [row["text"] for row in itertools.islice(rows, _ROWS[name])]
    except Exception as error:  # whatever the hub client, its HTTP library and the file readers raise
        raise CalibrationError(f"dataset={name!r} cannot be fetched ({first_line(error)}); {alternative}") from error
