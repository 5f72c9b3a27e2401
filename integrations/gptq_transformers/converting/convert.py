"""``convert``: a quantized checkpoint in another format, and the largest difference between the weights of both."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptq_backend import ConfigError
from gptq_backend.format import Shards, checkpoint_files, read_manifest, read_tensor
from gptq_backend.output_folder import atomic_folder, check_spared

from ..merging.base import Base
from .source import Source, StoredSource
from .targets import TARGETS, Kind

logger = logging.getLogger(__name__)

_SHARD_BYTES = 2 * 10**9  # what is in memory at most, beside a layer


@dataclass(frozen=True)
class ConvertReport:
    """What :func:`convert` did.

    Args:
        differences: by layer, the largest difference between a weight that was read and what the new files hold.
        largest: of all.
        relative: that, of the largest weight in its layer.
        dense: tensors that were rounded though they are not quantized in the new files, with their largest difference.
        notes: sentences on what was lost and why, and what readers may stumble over.
    """

    differences: dict[str, float]
    relative: float
    dense: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def largest(self) -> float:
        return max([*self.differences.values(), *self.dense.values()], default=0.0)

    @property
    def exact(self) -> bool:
        """Whether all weights are the same numbers."""
        return self.largest == 0


def convert(
    model: str | Path,
    output: str | Path,
    to: str = "gptq",
    *,
    overwrite: bool = False,
    on_layer: Callable[[str, int, int], None] | None = None,
) -> ConvertReport:
    """Write a quantized checkpoint in another format, and compare what was written with what was read.

    Codes, zeros and scales stay what they are wherever the new format can hold them. One layer is in memory at a time,
    and what is pending for the next file.

    Args:
        model: folder or name of a checkpoint in any format that can be read, or a ``.gguf`` file.
        output: folder to write; it appears whole or not at all.
        to: a key of ``TARGETS``.
        overwrite: let ``output`` replace a folder that exists.
        on_layer: called with each layer's name, how many are done, and of how many.

    Raises:
        ConfigError: no such format, ``model`` is not quantized, or the format cannot hold a layer. CheckpointError:
            damaged files. Nothing was written.
    """
    if to not in TARGETS:
        raise ConfigError(f"to={to!r} is not a format that can be written; choose one of {tuple(TARGETS)}")
    check_spared(output, model, "the checkpoint")
    source = _opened(model)
    told = on_layer or (lambda name, done, total: None)
    with atomic_folder(output, overwrite) as folder:
        kinds, notes, dense = _write(source, folder, to, told)
        source.copy_files(folder)
        _write_config(source, folder, to, kinds)
        return _compared(source, folder, to, notes, dense)


def _opened(model: str | Path) -> Source:
    if Path(model).suffix == ".gguf":
        from .gguf_source import GGUFSource  # needs the package gguf

        return GGUFSource(Path(model))
    return StoredSource(model)


def _write(
    source: Source, folder: Path, to: str, told: Callable[[str, int, int], None]
) -> tuple[dict[str, Kind], list[str], dict[str, float]]:
    """All tensors. Returns the kinds of the layers, notes, and what was rounded though it is not quantized."""
    shards, kinds = Shards(folder, _SHARD_BYTES), {}
    wrapping = 0
    for done, name in enumerate(source.layers, start=1):
        weight, bias = source.quantized(name), source.bias(name)
        wrapping += to == "gptq" and bool((weight.zeros == 0).any())
        parts = TARGETS[to].encode(name, weight) | ({} if bias is None else {"bias": bias})
        shards.add({f"{name}.{part}": tensor.clone() for part, tensor in parts.items()})
        kinds[name] = Kind.of(weight)
        told(name, done, len(source.layers))
    for key, tensor in source.others():
        shards.add({key: tensor})
    shards.flush()
    shards.finish()
    notes = [] if source.lossy is None or to == "bf16" else [source.lossy]
    if wrapping:
        notes.append(
            f"{wrapping} layers have zeros of 0, which format gptq stores as the largest number; other readers may not "
            "take it back: gptq_v2 is safe for them"
        )
    return kinds, notes, dict(source.rounded)


def _write_config(source: Source, folder: Path, to: str, kinds: dict[str, Kind]) -> None:
    config = dict(source.model_config)
    settings = TARGETS[to].settings(kinds, source.dense_layers(), source.settings)
    if settings is not None:
        config["quantization_config"] = settings
    else:
        for section in (config, config.get("text_config")):
            if isinstance(section, dict):
                section |= {key: "bfloat16" for key in ("dtype", "torch_dtype") if key in section}
    if "lm_head" in kinds:
        config["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _compared(source: Source, folder: Path, to: str, notes: list[str], dense: dict[str, float]) -> ConvertReport:
    """Read the new files as anybody would."""
    differences, relative = {}, 0.0
    for name, weight in _written(folder, to, source.layers):
        original = source.dense(name)
        differences[name] = difference = float((weight.float() - original).abs().max())
        relative = max(relative, difference / max(float(original.abs().max()), 1e-30))
    return ConvertReport(differences, relative, dense, notes)


def _written(folder: Path, to: str, layers: list[str]) -> Iterator[tuple[str, Tensor]]:
    if to == "bf16":
        manifest = read_manifest(checkpoint_files(folder))
        yield from ((name, read_tensor(manifest[f"{name}.weight"])) for name in layers)
        return
    base: Any = Base(folder)
    yield from ((name, base.quantized(name).dequantize(torch.float32)) for name in layers)
