"""``convert``: a quantized checkpoint in another format, and the largest difference between the weights of both."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptq_backend import CheckpointError, ConfigError
from gptq_backend.format import Shards, checkpoint_files, read_manifest, read_tensor
from gptq_backend.output_folder import atomic_folder, check_spared

from ..merging.base import Base
from .plain_names import PlainNames, check_plain
from .source import Source, StoredSource
from .targets import TARGETS, Kind

logger = logging.getLogger(__name__)

_DTYPE_KEYS = ("dtype", "torch_dtype")
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
    embed_bits: int | None = None,
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
        embed_bits: 16 writes quantized embeddings of tokens, and a head that is tied to them, in 16 bits; None leaves
            them as they are.
        overwrite: let ``output`` replace a folder that exists.
        on_layer: called with each layer's name, how many are done, and of how many.

    Raises:
        ConfigError: no such format, ``model`` is not quantized, or the format cannot hold a layer. CheckpointError:
            damaged files. Nothing was written.
    """
    if to not in TARGETS:
        raise ConfigError(f"to={to!r} is not a format that can be written; choose one of {tuple(TARGETS)}")
    if embed_bits not in (None, 16):
        raise ConfigError(
            f"embed_bits={embed_bits!r} is not supported; pass 16, or None to leave embeddings as they are"
        )
    check_spared(output, model, "the checkpoint")
    source = opened(model)
    dense_embeddings = embed_bits == 16 or to == "bf16"
    if source.embeddings and not dense_embeddings and not TARGETS[to].embeddings:
        raise ConfigError(
            f"{source.embeddings[0]} is a quantized embedding, which {to} cannot hold; write it in 16 bits with "
            "--embed-bits 16 (embed_bits=16 in Python), or convert to gptq"
        )
    layers = [name for name in source.layers if not (dense_embeddings and name in source.embeddings)]
    work = _Work(source, layers, to, source.plain_names() if to == "bf16" else PlainNames())
    with atomic_folder(output, overwrite) as folder:
        work.write(folder, on_layer or (lambda name, done, total: None))
        source.copy_files(folder)
        work.write_config(folder)
        if to == "bf16":
            check_plain(folder)
        return work.compared(folder)


def is_gguf(model: str | Path) -> bool:
    """Whether that is a file in GGUF's format, by its name."""
    return Path(model).suffix.lower() == ".gguf" and Path(model).is_file()


def opened(model: str | Path) -> Source:
    """Raises ConfigError, CheckpointError: it cannot be read, or is not quantized."""
    if is_gguf(model):
        from .gguf_source import GGUFSource  # needs the package gguf

        return GGUFSource(Path(model))
    return StoredSource(model)


@dataclass
class _Work:
    """One conversion.

    Args:
        source, layers, to: what is converted, which of its layers, and to which format.
        names: where its dense layers go.
        kinds, notes, dense: of what was written: quantized layers, sentences for the report, and what was rounded
            though it is not quantized.
    """

    source: Source
    layers: list[str]
    to: str
    names: PlainNames
    kinds: dict[str, Kind] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    dense: dict[str, float] = field(default_factory=dict)

    def write(self, folder: Path, told: Callable[[str, int, int], None]) -> None:
        """All tensors."""
        source, shards = self.source, Shards(folder, _SHARD_BYTES)
        parts_of = {part: parts for parts in self.names.joined.values() for part in parts}
        wrapping, widened = 0, Counter[int]()
        for done, name in enumerate(self.layers, start=1):
            if name not in parts_of:
                weight, bias = source.quantized(name), source.bias(name)
                if TARGETS[self.to].widens and weight.held().bits > weight.bits:
                    widened[weight.bits] += 1
                    weight = weight.held()
                _check_finite(name, weight.scales)
                wrapping += self.to == "gptq" and bool((weight.zeros == 0).any())
                parts = TARGETS[self.to].encode(name, weight) | ({} if bias is None else {"bias": bias})
                new = self.names.of.get(name, name)
                shards.add({f"{new}.{part}": tensor.clone() for part, tensor in parts.items()})
                self.kinds[name] = Kind.of(weight)
            told(name, done, len(self.layers))
        for new, joined in self.names.joined.items():
            shards.add({f"{new}.weight": torch.cat([source.dense(part) for part in joined]).to(torch.bfloat16)})
            biases = [bias for part in joined if (bias := source.bias(part)) is not None]
            shards.add({f"{new}.bias": torch.cat(biases)} if biases else {})
        if len(self.layers) < len(source.layers):
            self._add_embeddings(shards)
        for key, tensor in source.others():
            layer, _, part = key.rpartition(".")
            if layer not in parts_of:
                shards.add({f"{self.names.of[layer]}.{part}" if layer in self.names.of else key: tensor})
        shards.flush()
        shards.finish()
        self.notes += [] if source.lossy is None or self.to == "bf16" else [source.lossy]
        self.dense |= source.rounded
        self.notes += [f"{count} layers of {bits} bits became 8 bits wide" for bits, count in sorted(widened.items())]
        if wrapping:
            self.notes.append(
                f"{wrapping} layers have zeros of 0, which format gptq stores as the largest number; other readers may "
                "not take it back: gptq_v2 is safe for them"
            )

    def _add_embeddings(self, shards: Shards) -> None:
        config = self.source.model_config
        sections = [config, config.get("text_config")]
        said = {str(section.get(key)) for section in sections if isinstance(section, dict) for key in _DTYPE_KEYS}
        dtype = torch.bfloat16 if self.to == "bf16" or "bfloat16" in said else torch.float16
        for key, exact in self.source.dense_embeddings():
            rounded = exact.to(dtype)
            _check_finite(key, rounded)
            if difference := float((rounded.float() - exact).abs().max()):
                self.dense[key] = difference
            shards.add({key: rounded})

    def write_config(self, folder: Path) -> None:
        """``config.json``."""
        config = dict(self.source.model_config)
        settings = TARGETS[self.to].settings(self.kinds, self.source.dense_layers(), self.source.settings)
        if settings is not None:
            config["quantization_config"] = settings
        else:
            for section in (config, config.get("text_config")):
                if isinstance(section, dict):
                    section |= {key: "bfloat16" for key in _DTYPE_KEYS if key in section}
        if "lm_head" in self.kinds:
            config["tie_word_embeddings"] = False
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def compared(self, folder: Path) -> ConvertReport:
        """Read the new files as anybody would."""
        differences, relative = {}, 0.0
        for name, weight in self._written(folder):
            original = self.source.dense(name)
            differences[name] = difference = float((weight.float() - original).abs().max())
            relative = max(relative, difference / max(float(original.abs().max()), 1e-30))
        return ConvertReport(differences, relative, self.dense, self.notes)

    def _written(self, folder: Path) -> Iterator[tuple[str, Tensor]]:
        if self.to != "bf16":
            base: Any = Base(folder)
            yield from ((name, base.quantized(name).dequantize(torch.float32)) for name in self.layers)
            return
        manifest = read_manifest(checkpoint_files(folder))
        parts_of = {part for parts in self.names.joined.values() for part in parts}
        for name in self.layers:
            if name not in parts_of:
                yield name, read_tensor(manifest[f"{self.names.of.get(name, name)}.weight"])
        for new, joined in self.names.joined.items():
            rows = read_tensor(manifest[f"{new}.weight"])
            yield from zip(joined, rows.chunk(len(joined)), strict=True)  # parts of equal size


def _check_finite(name: str, values: Tensor) -> None:
    """Raises CheckpointError."""
    if not bool(values.isfinite().all()):
        raise CheckpointError(
            f"{name}: {int((~values.isfinite()).sum())} of its scales or values are NaN or infinite; the file is "
            "damaged, fetch it again"
        )
