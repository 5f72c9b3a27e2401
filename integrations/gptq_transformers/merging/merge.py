"""``merge_adapter``: what an adapter learned becomes part of a GPTQ checkpoint's weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptq_backend import CalibrationError, ConfigError, Events, LayerReport, QuantizedWeight, RunOptions
from gptq_backend.algorithm import quantize_weight, round_changed
from gptq_backend.foreign_settings import method_of
from gptq_backend.format import INDEX, Shards, encode, read_json, read_tensor
from gptq_backend.model import BlockNames
from gptq_backend.output_folder import atomic_folder, check_spared

from ..auto_calibration import AUTO, choose
from ..calibration_input import given, is_text, load_tokenizer, token_ids
from ..converting.plain_names import check_plain
from .adapter import Adapter
from .base import Base

TARGETS = {"gptq": None, "bf16": torch.bfloat16, "fp16": torch.float16}
_SETTINGS_FILES = ("quantize_config.json", "quant_config.json")


@dataclass(frozen=True)
class MergeReport:
    """What :func:`merge_adapter` did.

    Args:
        layers: of each quantized layer that the adapter changes, what rounding it again cost; empty for a dense result.
        dense: tensors that are not quantized and that it changes.
        choice: what ``calibration="auto"`` chose, or None.
    """

    layers: list[LayerReport]
    dense: list[str]
    choice: Any = None


def merge_adapter(
    model: str | Path,
    adapter: str | Path,
    output: str | Path,
    calibration: str | Iterable[Any] | None = None,
    *,
    to: str = "gptq",
    text: str | Iterable[str] | None = None,
    tokenizer: Any = None,
    seqlen: int | None = None,
    samples: int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    overwrite: bool = False,
    events: Events | None = None,
    device: str | torch.device | None = None,
    block_name: BlockNames = None,
    trust_remote_code: bool = False,
) -> MergeReport:
    """Merge a peft adapter into the GPTQ checkpoint that it was trained on, and write the result.

    Only what the adapter changes is made anew. All other tensors, packed words included, are those of ``model``, and so
    are its other files.

    Args:
        model: folder or name of a GPTQ checkpoint.
        adapter: folder as ``PeftModel.save_pretrained`` writes it: LoRA, DoRA and whatever else peft can merge.
        output: folder to write; it appears whole or not at all.
        calibration: what to calibrate on, see :func:`gptq_transformers.quantize`: the changed layers are then quantized
            by GPTQ. None rounds each changed weight to nearest, under its old grid where that costs it less.
        to: "gptq": each layer with its bits, group size and symmetry again. "bf16" or "fp16": a dense checkpoint.
        text, tokenizer, seqlen, samples, seed, batch_size, device, block_name: see :func:`gptq_transformers.quantize`.
        overwrite: let ``output`` replace a folder that exists.
        events: told what happens.
        trust_remote_code: let code that comes with the model run.

    Raises:
        ConfigError: ``model`` is not quantized, peft is missing, or the adapter cannot be merged. CheckpointError: a
            folder holds no such thing, or the adapter is of another model. CalibrationError: see ``quantize``.
            GPTQError: peft refuses, or the model cannot be loaded. Nothing was written.
    """
    if to not in TARGETS:
        raise ConfigError(f"to={to!r} is not supported; choose one of {tuple(TARGETS)}")
    if text is not None and not (isinstance(calibration, str) and calibration == AUTO):
        raise CalibrationError("text= goes with calibration='auto'; to calibrate on it alone, pass calibration=text")
    for source, what in ((model, "the quantized model"), (adapter, "the adapter")):
        check_spared(output, source, what)
    base = Base(model)
    if (method := method_of(base.settings)) != "gptq":
        raise ConfigError(
            f"{model} is a checkpoint of {method}, expected one of GPTQ; convert it first (gptq-backend convert)"
        )
    learned = Adapter(Path(adapter), base.manifest, base.shapes)
    window: Any = {"seqlen": seqlen, "samples": samples, "seed": seed}
    options = RunOptions(batch_size, block_name, None, device)
    with atomic_folder(output, overwrite) as folder:
        writer = _Writer(base, learned, folder)
        report = MergeReport([], base.dense_names(learned))
        if (dtype := TARGETS[to]) is not None:
            writer.write_dense(dtype)
        elif calibration is None:
            touched = base.touched(learned)
            for name in touched:
                report.layers.append(writer.round(name, events or Events(), len(touched)))
        else:
            found = given(calibration)
            if tokenizer is None and is_text(found):
                tokenizer = load_tokenizer(base.folder, True, trust_remote_code)
            data = _Calibration(found, text, tokenizer, window)
            report = data.run(base, learned, writer, report, options, events or Events(), trust_remote_code)
        writer.finish(dtype)
    return report


@dataclass(frozen=True)
class _Calibration:
    """Text or token ids to calibrate on."""

    data: Any
    text: Any
    tokenizer: Any
    window: Mapping[str, Any]

    def run(
        self,
        base: Base,
        adapter: Adapter,
        writer: _Writer,
        report: MergeReport,
        options: RunOptions,
        events: Events,
        trust_remote_code: bool,
    ) -> MergeReport:
        from .calibrated import open_model, quantize_again  # needs all of transformers' modelling code

        layers = base.touched(adapter)
        if not layers:
            return report
        opened, choice = open_model(base, layers, trust_remote_code), None
        if isinstance(self.data, str) and self.data == AUTO:
            choice = choose(
                opened, self.tokenizer, self.text, options, **self.window, trust_remote_code=trust_remote_code
            )
            events.calibration_chosen(choice)
            samples: Any = choice.samples
        else:
            samples = token_ids(self.data, self.tokenizer, **self.window)
        found = quantize_again(opened, base, adapter, layers, samples, options, events, writer.add)
        return MergeReport(found.layers, report.dense, choice)


class _Writer:
    """The new checkpoint: changed layers as they come, then everything else from the old one."""

    def __init__(self, base: Base, adapter: Adapter, folder: Path) -> None:
        self.base, self.adapter, self.folder, self.shards = base, adapter, folder, Shards(folder)
        self._done: set[str] = set()  # layers

    def add(self, layer: str, parts: Mapping[str, Tensor]) -> None:
        """Take a layer's tensors in the place of the old ones."""
        self.shards.add({f"{layer}.{key}": tensor.clone() for key, tensor in parts.items()})
        self._done.add(layer)

    def round(self, layer: str, events: Events, total: int) -> LayerReport:
        """Round a changed layer without calibration."""
        weight, bias = self.base.merged(layer, self.adapter)
        config = self.base.config.for_module(layer) or self.base.config
        rounded = round_changed(weight, self.base.quantized(layer), config)
        found = quantize_weight(weight, None, config, name=layer, rounded=rounded)
        self.add(layer, self.encoded(layer, found.weight, bias))
        bits, size = self.base.specs[layer].bits, self.base.specs[layer].group_size
        entry = LayerReport(layer, bits, size, found.loss, found.relative_loss)
        events.layer_done(entry, len(self._done), total)
        return entry

    def encoded(self, layer: str, weight: QuantizedWeight, bias: Tensor | None) -> dict[str, Tensor]:
        """A weight's tensors in the format of the checkpoint."""
        _, parts = encode(weight, self.base.config.checkpoint_format, self.base.specs[layer].word_dtype)
        return parts if bias is None else {**parts, "bias": bias}

    def write_dense(self, dtype: torch.dtype) -> None:
        """All quantized layers as 16-bit weights."""
        for layer in self.base.specs:
            weight, bias = self.base.merged(layer, self.adapter)
            parts = {"weight": weight.to(dtype)} | ({} if bias is None else {"bias": bias.to(dtype)})
            self.add(layer, parts)

    def finish(self, dense: torch.dtype | None) -> None:
        """All that is not changed: tensors and files. dense: dtype of a result that is not quantized.

        Raises:
            ConfigError: plain transformers would not find all dense weights by the names that the layers have.
        """
        changes = dict(self.base.dense_changes(self.adapter))
        for key, info in self.base.manifest.items():
            if key.rpartition(".")[0] not in self._done:
                self.shards.add({key: changes[key] if key in changes else read_tensor(info)})
        self.shards.flush()
        self.shards.finish()
        self._copy_files(dense)
        if dense is not None:
            check_plain(self.folder)

    def _copy_files(self, dense: torch.dtype | None) -> None:
        weights = {path.name for path in self.base.files}
        for path in self.base.folder.iterdir():
            outdated = path.name in weights or path.name.endswith(INDEX) or path.name.startswith("quantize_report")
            outdated = outdated or (dense is not None and path.name in _SETTINGS_FILES)
            if path.is_file() and not outdated:
                shutil.copyfile(path, self.folder / path.name)
        if dense is not None:
            config = read_json(self.base.folder / "config.json")
            for section in (config, config.get("text_config")):
                if isinstance(section, dict):
                    section.pop("quantization_config", None)
                    section |= {key: str(dense).removeprefix("torch.") for key in ("dtype", "torch_dtype")}
            text = json.dumps(config, indent=2, sort_keys=True) + "\n"
            (self.folder / "config.json").write_text(text, encoding="utf-8")
