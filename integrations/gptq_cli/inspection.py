"""What a checkpoint holds, what is odd about it and which kernels would serve it, from its files alone.

Reads headers, and of the values only scales, zeros and ``g_idx``; no model is loaded.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from gptq_backend import GPTQError, kernel_report
from gptq_backend.kernels import fastest

from . import checkpoint_warnings
from .checkpoint import Layer, read_checkpoint
from .formatting import megabytes


def inspect_checkpoint(path: str | Path, devices: Sequence[str] | None = None) -> dict[str, Any]:
    """Everything about the checkpoint in folder ``path``, as JSON values.

    Args:
        devices: to choose kernels for, as ``torch.device`` takes them; None: all of this machine.

    Returns:
        Among others ``modules``: one entry per quantized module; ``layouts``: of other tools, in which they are stored;
        ``odd``: sentences; ``damaged``: reasons by module;
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
    total = sum(info.nbytes for info in checkpoint.manifest.values())
    return {
        "path": str(path),
        "files": [file.name for file in checkpoint.files],
        "settings": checkpoint.config.to_dict(),
        "layouts": checkpoint.layouts,
        "quantized_modules": len(modules),
        "quantized_weights": quantized,
        "bits_per_weight": 8 * packed / quantized if quantized else None,
        "bytes_quantized": packed,
        "bytes_other": total - packed,
        "modules": modules,
        "odd": checkpoint_warnings.find(checkpoint),
        "damaged": checkpoint.damaged,
        "kernels": {str(device): _kernels(checkpoint.layers, device) for device in chosen},
    }


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
        raise GPTQError(f"--device {name} is not a device; expected one like cpu, cuda or cuda:0") from None


def _kernels(layers: Sequence[Layer], device: torch.device) -> list[dict[str, Any]]:
    """Chosen rows, most used first: ``{"kernel", "modules", "declined": {row: {reason: modules}}}``."""
    used: Counter[str] = Counter()
    declined: dict[str, dict[str, Counter[str]]] = {}
    # A mixture has thousands of layers of few specs.
    # As wide as in memory, where kernels meet them.
    specs = Counter((layer.spec.weight, "experts" in layer.name.split(".")) for layer in layers)
    for (spec, expert), count in specs.items():
        report = kernel_report(spec, device)  # fastest first
        chosen = fastest(report, expert).name
        used[chosen] += count
        for row in itertools.takewhile(chosen.__ne__, report):
            reason = report[row] or "has no grouped product for experts"
            declined.setdefault(chosen, {}).setdefault(row, Counter())[reason] += count
    return [{"kernel": row, "modules": n, "declined": declined.get(row, {})} for row, n in used.most_common()]


def _describe(layer: Layer) -> dict[str, Any]:
    spec = layer.spec
    return {
        "name": layer.name,
        "bits": spec.bits,
        "group_size": -1 if spec.groups == 1 else spec.group_size,
        **{key: getattr(spec, key) for key in ("sym", "act_order", "in_features", "out_features", "groups")},
        "bias": spec.has_bias,
        "scales_dtype": str(spec.scales_dtype).removeprefix("torch."),
        "bytes": spec.nbytes,
    }


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    """For people: modules, then warnings, then kernels."""
    width = max([len("module"), *(len(module["name"]) for module in found["modules"])])
    yield f"{'module':<{width}}  bits  group  grid  act-order     in    out"
    for module in found["modules"]:
        grid, order = "sym" if module["sym"] else "asym", "yes" if module["act_order"] else "no"
        yield (
            f"{module['name']:<{width}}  {module['bits']:>4}  {module['group_size']:>5}  {grid:>4}  {order:>9}  "
            f"{module['in_features']:>5}  {module['out_features']:>5}"
        )
    per_weight = "" if found["bits_per_weight"] is None else f", {found['bits_per_weight']:.2f} bits per weight"
    rest = f"{megabytes(found['bytes_quantized'])} packed, {megabytes(found['bytes_other'])} other tensors"
    yield f"\n{found['quantized_modules']} quantized modules{per_weight}; {rest}"
    if found["layouts"]:
        yield f"stored in the layout of {', '.join(found['layouts'])}; gptq-backend convert writes others"
    yield "\nodd:" + ("" if found["odd"] else " nothing")
    yield from (f"  - {sentence}" for sentence in found["odd"])
    if found["damaged"]:
        yield "\ndamaged:"
        yield from (f"  - {reason}" for reason in found["damaged"].values())
    yield "\nkernels:"
    for device, rows in found["kernels"].items():
        for row in rows:
            yield f"  {device}: {row['kernel']} serves {row['modules']} modules"
            for other, reasons in row["declined"].items():
                yield from (f"    not {other} ({count} modules): {reason}" for reason, count in reasons.items())
