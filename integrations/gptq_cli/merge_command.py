"""The work of ``gptq-backend merge``."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gptq_backend.model import held_out_windows, tokenize
from gptq_backend.output_folder import check_spared
from gptq_transformers.auto_calibration import packaged_texts
from gptq_transformers.calibration_input import load_tokenizer
from gptq_transformers.memory import free_bytes
from gptq_transformers.merging import Base, MergeReport, merge_adapter, plainly_rounded, with_adapter
from gptq_transformers.model_class import predicts_next_token, read_config

from . import evaluate, models, terminal
from .formatting import duration, megabytes, percent, with_error
from .quantize_command import Source
from .report import weights_size
from .run_progress import RunProgress

logger = logging.getLogger(__name__)

_SHARE = 0.9  # of the free memory may be the models


@dataclass(frozen=True)
class Merge:
    """The command's arguments and options."""

    model: str
    adapter: Path
    out: Path
    to: str
    source: Source  # calibration None: round to nearest
    kld_windows: int
    device: str
    trust_remote_code: bool

    def run(self, options: Mapping[str, Any], json_target: str | None) -> None:
        """Merge, compare and print. options: ``batch_size``, ``block_name`` and ``overwrite``.

        Raises:
            GPTQError: something cannot be used; the message says what to do.
        """
        console, say = terminal.start(json_target, ignore="gptq_backend.kernels.table")
        models.require_model(self.model)
        models.require_device(self.device)
        for file in (self.source.calibration, self.source.text):
            if file not in (None, "auto"):
                check_spared(self.out, str(file), "the text")
        texts, own = self.source.read()
        automatic = self.source.calibration == "auto"
        start = time.perf_counter()
        with RunProgress(console, "reading the adapter") as progress:
            found = merge_adapter(
                self.model,
                self.adapter,
                self.out,
                texts,
                to=self.to,
                text=own if automatic else None,
                **(dict(self.source.window) if texts is not None else {}),
                **options,
                events=progress,
                device=self.device,
                trust_remote_code=self.trust_remote_code,
            )
        report = self._report(found, time.perf_counter() - start)
        if self.kld_windows:
            with console.status("comparing", spinner="line"):
                report["evaluation"] = self._compare(found, texts, own)
        terminal.write_json(json_target, report)
        say("\n".join(_lines(report)))

    def _report(self, found: MergeReport, seconds: float) -> dict[str, Any]:
        return {
            "model": self.model,
            "adapter": str(self.adapter),
            "out": str(self.out),
            "to": self.to,
            "calibration": None if self.to != "gptq" else self.source.calibration,
            "seconds": seconds,
            "bytes_before": weights_size(self.model),
            "bytes_after": weights_size(self.out),
            "layers": [dataclasses.asdict(layer) for layer in found.layers],
            "dense": found.dense,
            "evaluation": None,
        }

    def _compare(self, found: MergeReport, texts: Any, own: Any) -> dict[str, Any] | None:
        """KL divergences from the model with the adapter on top: of the result, of plain rounding, and of no adapter.

        None, with a warning, where there is none to measure, or if it fails: the checkpoint is complete.
        """
        try:
            if not predicts_next_token(read_config(self.model, self.trust_remote_code), self.model):
                return None
            windows = self._windows(found, texts, own)
            dtype = self._dtype_that_fits()
            if not windows or dtype is None:
                return None
            arguments = self.model, self.adapter, getattr(torch, dtype), self.trust_remote_code
            reference = with_adapter(*arguments).to(self.device)
            load: dict[str, Any] = {"dtype": dtype, "device": self.device, "trust_remote_code": self.trust_remote_code}
            merged = evaluate.evaluate(models.load_model(self.out, **load), windows, reference)
            others: dict[str, Any] = {"plain_rounding": None, "without_adapter": None}
            if self.to == "gptq" and found.layers:
                rivals = plainly_rounded(*arguments).to(self.device), models.load_model(self.model, **load)
                compared = [evaluate.evaluate(rival, windows, reference) for rival in rivals]
                others = dict(zip(others, map(dataclasses.asdict, compared)))
            return {"dtype": dtype, **dataclasses.asdict(merged), **others}
        except Exception as error:
            if (reason := terminal.explain(error)) is None:
                raise
            logger.warning("the checkpoint is complete, but it could not be compared: %s", reason)
            return None

    def _windows(self, found: MergeReport, texts: Any, own: Any) -> list[Any]:
        """What was not calibrated on: of the same text, or without calibration of ``--text`` or packaged text."""
        if found.choice is not None:
            return list(found.choice.held_out[: self.kld_windows])
        tokenizer = load_tokenizer(self.out, True, self.trust_remote_code)
        if self.source.calibration is None:
            windows = tokenize(own or list(packaged_texts().values()), tokenizer, self.source.window["seqlen"])
            windows = windows[:: -(-len(windows) // self.kld_windows)]  # evenly spread
        else:
            windows = held_out_windows(texts, tokenizer, **self.source.window, count=self.kld_windows)
        if not windows or len(windows[0]) < 2:
            logger.warning("no window of text was left to measure the KL divergence on")
            return []
        return windows

    def _dtype_that_fits(self) -> str | None:
        """float32 if both models fit, else bfloat16; None, with a warning, if neither does."""
        base = Base(self.model)
        packed = {f"{name}.{part}" for name in base.specs for part in ("qweight", "qzeros", "scales", "g_idx")}
        elements = sum(info.numel for key, info in base.manifest.items() if key not in packed)
        quantized = sum(spec.in_features * spec.out_features for spec in base.specs.values())
        free = free_bytes(torch.device(self.device))
        for name, size in (("float32", 4), ("bfloat16", 2)):
            needed = 2 * size * (elements + quantized)
            if needed <= _SHARE * free:
                return name
        text = "the checkpoint is complete, but it was not compared: both models may take %s of memory, and %s are free"
        logger.warning(text, megabytes(needed), megabytes(free))
        return None


def _lines(report: Mapping[str, Any]) -> list[str]:
    size = megabytes(report["bytes_after"])
    if report["bytes_before"]:
        size = f"{megabytes(report['bytes_before'])} -> {size}"
    made = f"{len(report['layers'])} layers rounded again" if report["to"] == "gptq" else "all layers made dense"
    found = [f"{made} in {duration(report['seconds'])}, weights on disk {size}"]
    if layers := report["layers"]:
        worst = max(layers, key=lambda layer: layer["relative_loss"])
        mean = sum(layer["relative_loss"] for layer in layers) / len(layers)
        found.append(f"mean error {percent(mean)}, worst in {worst['name']}")
    if (result := report["evaluation"]) is not None:
        text = f"KL divergence from the model with the adapter on top {with_error(result['kld'], result['kld_stderr'])}"
        if (plain := result["plain_rounding"]) is not None:
            text += f"; plain rounding: {with_error(plain['kld'], plain['kld_stderr'])}"
            text += f"; without the adapter: {with_error(result['without_adapter']['kld'], None)}"
        found.append(f"{text} ({result['windows']} windows that were not calibrated on)")
    return found
