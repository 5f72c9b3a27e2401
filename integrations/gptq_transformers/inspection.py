"""What a checkpoint holds, what is odd about it and which kernels would serve it, from its files alone.

Reads headers, and of the values only scales, zeros and ``g_idx``; no model is loaded.
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from gptq_backend import CheckpointError, GPTQError, LinearSpec, QuantizeConfig, kernel_report
from gptq_backend.kernels import fastest
from gptq_backend.manifest import Manifest, read_manifest, read_tensor
from gptq_backend.reader import checkpoint_files, read_settings, resolve_specs
from gptq_backend.weight import resolve

from . import oddities
from .report import megabytes


@dataclass
class Layer:
    """One quantized module. ``claimed`` is its spec by headers and config, ``spec`` also by its values."""

    name: str
    claimed: LinearSpec
    spec: LinearSpec


@dataclass
class Checkpoint:
    """A checkpoint's files, read as far as :func:`inspect_checkpoint` needs them.

    Args:
        damaged: what is wrong with modules that cannot be used, by name.
        unbiased: linear layers that the model has without a bias, where its config names a known architecture.
    """

    folder: Path
    settings: Mapping[str, Any]
    config: QuantizeConfig
    files: Sequence[Path]
    manifest: Manifest
    unbiased: Collection[str] = ()
    layers: list[Layer] = field(default_factory=list)
    damaged: dict[str, str] = field(default_factory=dict)


def inspect_checkpoint(path: str | Path, devices: Sequence[str] | None = None) -> dict[str, Any]:
    """Everything about the checkpoint in folder ``path``, as JSON values.

    Args:
        devices: to choose kernels for, as ``torch.device`` takes them; None: all of this machine.

    Returns:
        Among others ``modules``: one entry per quantized module; ``odd``: sentences; ``damaged``: reasons by module;
        ``kernels``: per device, rows of the kernel table that would be used, for how many modules, and why faster rows
        declined.

    Raises:
        GPTQError: no such folder, no settings, unreadable files, or a format that is refused by name.
    """
    chosen = [_device(name) for name in devices] if devices else local_devices()
    checkpoint = read_checkpoint(path)
    modules = [_describe(layer) for layer in checkpoint.layers]
    quantized = sum(layer.spec.in_features * layer.spec.out_features for layer in checkpoint.layers)
    packed = sum(layer.spec.nbytes for layer in checkpoint.layers)
    total = sum(info.numel * info.dtype.itemsize for info in checkpoint.manifest.values() if info.dtype)
    return {
        "path": str(path),
        "files": [file.name for file in checkpoint.files],
        "settings": checkpoint.config.to_dict(),
        "quantized_modules": len(modules),
        "quantized_weights": quantized,
        "bits_per_weight": 8 * packed / quantized if quantized else None,
        "bytes_quantized": packed,
        "bytes_other": total - packed,
        "modules": modules,
        "odd": oddities.find(checkpoint),
        "damaged": checkpoint.damaged,
        "kernels": {str(device): _kernels(checkpoint.layers, device) for device in chosen},
    }


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Settings, headers and the small tensors of the checkpoint in folder ``path``."""
    folder = Path(path)
    if not folder.is_dir():
        raise GPTQError(f"{path} is not a folder; expected one with a quantized checkpoint")
    settings = read_settings(folder)
    config = QuantizeConfig.from_dict(settings)
    files = checkpoint_files(folder, settings)
    manifest = read_manifest(files)
    checkpoint = Checkpoint(folder, settings, config, files, manifest, unbiased_layers(folder))
    logger = logging.getLogger("gptq_backend")
    level = logger.level
    logger.setLevel(logging.ERROR)  # its warnings, one per module, are what `odd` sums up
    try:
        for name, tensors in _by_module(manifest).items():
            _read_module(checkpoint, name, tensors)
    finally:
        logger.setLevel(level)
    if not checkpoint.layers and not checkpoint.damaged:
        raise CheckpointError(
            f"{path} has quantization settings, but none of its {len(manifest)} tensors is a qweight; it is not "
            "quantized, or in another format"
        )
    return checkpoint


def _by_module(manifest: Manifest) -> dict[str, Manifest]:
    modules: dict[str, Manifest] = {}
    for name, info in manifest.items():
        modules.setdefault(name.rpartition(".")[0], {})[name] = info
    return modules


def _read_module(checkpoint: Checkpoint, name: str, tensors: Manifest) -> None:
    """Add the module to ``layers`` or, one bad module hiding no other, to ``damaged``."""
    try:
        for claimed in resolve_specs(tensors, checkpoint.config).values():
            wanted = ("scales", "qzeros", "g_idx") if claimed.has_g_idx else ("scales", "qzeros")
            values = {part: read_tensor(tensors[f"{name}.{part}"]) for part in wanted}
            checkpoint.layers.append(Layer(name, claimed, resolve(claimed, values, name)))
    except CheckpointError as error:
        checkpoint.damaged[name] = str(error)


def unbiased_layers(folder: Path) -> set[str]:
    """Names of linear layers without bias in the model that ``config.json`` describes; empty if nobody knows it.

    Only the structure is built, without weights.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from gptq_backend.structure import is_linear

    if not (folder / "config.json").is_file():
        return set()
    try:
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError, OSError, AttributeError, TypeError):  # custom code, or newer than this transformers
        return set()
    return {name for name, module in model.named_modules() if is_linear(module) and module.bias is None}


def local_devices() -> list[torch.device]:
    """The CPU, and every accelerator that torch can use here."""
    found = [torch.device("cpu")]
    for kind in ("cuda", "xpu"):
        backend = getattr(torch, kind)
        if backend.is_available():
            found += [torch.device(kind, index) for index in range(backend.device_count())]
    if torch.backends.mps.is_available():
        found.append(torch.device("mps"))
    return found


def _device(name: str) -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError:
        raise GPTQError(f"--device {name} is no device; expected one like cpu, cuda or cuda:0") from None


def _kernels(layers: Sequence[Layer], device: torch.device) -> list[dict[str, Any]]:
    """Chosen rows, most used first: ``{"kernel", "modules", "declined": {row: {reason: modules}}}``."""
    used: Counter[str] = Counter()
    declined: dict[str, dict[str, Counter[str]]] = {}
    for layer in layers:
        expert = "experts" in layer.name.split(".")
        report = kernel_report(layer.spec, device)  # fastest first
        chosen = fastest(report, expert).name
        used[chosen] += 1
        for row in itertools.takewhile(chosen.__ne__, report):
            reason = report[row] or "has no grouped product for experts"
            declined.setdefault(chosen, {}).setdefault(row, Counter())[reason] += 1
    return [
        {
            "kernel": row,
            "modules": count,
            "declined": {other: dict(reasons) for other, reasons in declined.get(row, {}).items()},
        }
        for row, count in used.most_common()
    ]


def _describe(layer: Layer) -> dict[str, Any]:
    spec = layer.spec
    return {
        "name": layer.name,
        "bits": spec.bits,
        "group_size": -1 if spec.groups == 1 else spec.group_size,
        "sym": spec.sym,
        "act_order": spec.act_order,
        "in_features": spec.in_features,
        "out_features": spec.out_features,
        "groups": spec.groups,
        "bias": spec.has_bias,
        "scales_dtype": str(spec.scales_dtype).removeprefix("torch."),
        "bytes": spec.nbytes,
    }


def print_inspection(found: Mapping[str, Any], console: Any) -> None:
    """For people: modules, then what is odd, then kernels."""
    width = max([len("module"), *(len(module["name"]) for module in found["modules"])])
    _print(console, f"{'module':<{width}}  bits  group  grid  act-order     in    out")
    for module in found["modules"]:
        grid, order = "sym" if module["sym"] else "asym", "yes" if module["act_order"] else "no"
        _print(
            console,
            f"{module['name']:<{width}}  {module['bits']:>4}  {module['group_size']:>5}  {grid:>4}  {order:>9}  "
            f"{module['in_features']:>5}  {module['out_features']:>5}",
        )
    _print(console, "")
    per_weight = "" if found["bits_per_weight"] is None else f", {found['bits_per_weight']:.2f} bits per weight"
    rest = f"{megabytes(found['bytes_quantized'])} packed, {megabytes(found['bytes_other'])} other tensors"
    _print(console, f"{found['quantized_modules']} quantized modules{per_weight}; {rest}")
    _print(console, "\nodd:" + ("" if found["odd"] else " nothing"))
    for sentence in found["odd"]:
        _print(console, f"  - {sentence}")
    if found["damaged"]:
        _print(console, "\ndamaged:")
        for reason in found["damaged"].values():
            _print(console, f"  - {reason}")
    _print(console, "\nkernels:")
    for device, rows in found["kernels"].items():
        for row in rows:
            _print(console, f"  {device}: {row['kernel']} serves {row['modules']} modules")
            for other, reasons in row["declined"].items():
                for reason, count in reasons.items():
                    _print(console, f"    not {other} ({count} modules): {reason}")


def _print(console: Any, text: str) -> None:
    """Text as it is: no markup, and whole lines also in a narrow window or a pipe."""
    console.print(text, markup=False, soft_wrap=True)
