"""Small damages of a checkpoint, each a function of a seed."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]
WEIRD: list[Any] = [
    None, True, 0, -1, 3, 8, 0.5, 4.0, "4", "x", "true", "\0", [], [4], {}, {"bits": 4}, float("inf"), 2**70, "../x",
]  # fmt: skip
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8]
PATTERNS = [".*", "(a+)+$", "[", "(" * 600, r"(.*?,?){60}[!?]", "-:.*q_proj", "x"]
RULES: list[Any] = [{}, {"bits": 8}, {"bits": 5}, {"dynamic": {}}, None, 5, {"sym": False}, {"group_size": 0}]


def mutated(source: Path, folder: Path, seed: int) -> str:
    """Copy ``source`` to ``folder`` with one damage -> what was done."""
    rng = random.Random(seed)
    shutil.copytree(source, folder)
    change = rng.choice(_CHANGES)
    return f"{change.__name__}: {change(folder, rng)}"


def _tensors(change: Callable[[Tensors, random.Random], str]) -> Callable[[Path, random.Random], str]:
    def changed(folder: Path, rng: random.Random) -> str:
        file = folder / "model.safetensors"
        tensors = load_file(file)
        what = change(tensors, rng)
        save_file({key: value.contiguous().clone() for key, value in tensors.items()}, file, {"format": "pt"})
        return what

    changed.__name__ = change.__name__
    return changed


def _config(change: Callable[[dict[str, Any], random.Random], str]) -> Callable[[Path, random.Random], str]:
    def changed(folder: Path, rng: random.Random) -> str:
        content = json.loads((folder / "config.json").read_text())
        what = change(content, rng)
        (folder / "config.json").write_text(json.dumps(content))
        return what

    changed.__name__ = change.__name__
    return changed


@_tensors
def drop(tensors: Tensors, rng: random.Random) -> str:
    del tensors[key := rng.choice(list(tensors))]
    return key


@_tensors
def cast(tensors: Tensors, rng: random.Random) -> str:
    key, dtype = rng.choice(list(tensors)), rng.choice(DTYPES)
    tensors[key] = tensors[key].to(dtype)
    return f"{key} to {dtype}"


@_tensors
def cut(tensors: Tensors, rng: random.Random) -> str:
    key = rng.choice(list(tensors))
    tensors[key] = rng.choice([lambda x: x[:-1], lambda x: x[:0], lambda x: x[..., :-1], lambda x: x.flatten()])(
        tensors[key]
    )
    return key


@_tensors
def poison(tensors: Tensors, rng: random.Random) -> str:
    key = rng.choice([key for key in tensors if not key.endswith("qweight")])
    flat = tensors[key].flatten().clone()
    bad = [float("nan"), float("inf")] if flat.is_floating_point() else [-1, 2**20]
    flat[rng.randrange(flat.numel())] = rng.choice(bad)
    tensors[key] = flat.view(tensors[key].shape)
    return key


@_tensors
def rename(tensors: Tensors, rng: random.Random) -> str:
    key = rng.choice(list(tensors))
    new = rng.choice([f"module.{key}", key.replace("0", "9"), f"{key}.x", "a.qweight", key.upper()])
    tensors[new] = tensors.pop(key)
    return f"{key} -> {new}"


@_config
def setting(content: dict[str, Any], rng: random.Random) -> str:
    settings = content["quantization_config"]
    key = rng.choice(
        ["bits", "group_size", "sym", "desc_act", "checkpoint_format", "format", "damp_percent", "lm_head", "dynamic",
         "pack_dtype", "modules_in_block_to_quantize", "dataset", "static_groups", "backend"]
    )  # fmt: skip
    settings[key] = rng.choice(WEIRD)
    return f"{key}={settings[key]!r}"


@_config
def rule(content: dict[str, Any], rng: random.Random) -> str:
    content["quantization_config"]["dynamic"] = {rng.choice(PATTERNS): rng.choice(RULES)}
    return str(content["quantization_config"]["dynamic"])[:80]


@_config
def structure(content: dict[str, Any], rng: random.Random) -> str:
    key = rng.choice(["num_hidden_layers", "hidden_size", "vocab_size", "num_key_value_heads", "architectures",
                      "tie_word_embeddings", "intermediate_size", "head_dim", "text_config"])  # fmt: skip
    content[key] = rng.choice(WEIRD)
    return f"{key}={content[key]!r}"


def file(folder: Path, rng: random.Random) -> str:
    path = folder / rng.choice(["config.json", "model.safetensors"])
    data = path.read_bytes()
    kind = rng.choice(["cut", "empty", "list", "deep", "bytes", "gone"])
    if kind == "gone":
        path.unlink()
        return f"{path.name} gone"
    at = rng.randrange(min(len(data), 2000))
    path.write_bytes(
        {"cut": data[: rng.randrange(len(data))], "empty": b"", "list": b"[" + data + b"]", "deep": b"[" * 90_000,
         "bytes": data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]}[kind]
    )  # fmt: skip
    return f"{path.name} {kind}"


def index(folder: Path, rng: random.Random) -> str:
    tensors = load_file(folder / "model.safetensors")
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    keys = sorted(tensors)
    parts = [keys[::2], keys[1::2]]
    for name, part in zip(names, parts, strict=True):
        save_file({key: tensors[key] for key in part}, folder / name, {"format": "pt"})
    where: dict[str, Any] = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    kind = rng.choice(["good", "both", "outside", "missing", "number", "metadata", "shard"])
    if kind != "both":
        (folder / "model.safetensors").unlink()
    if kind in ("outside", "missing", "number"):
        where[keys[0]] = {"outside": "../x.safetensors", "missing": "x.safetensors", "number": 5}[kind]
    if kind == "shard":
        (folder / names[0]).write_bytes(b"PK")
    content = {"weight_map": where, "metadata": [] if kind == "metadata" else {}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    return kind


_CHANGES: list[Callable[[Path, random.Random], str]] = [
    drop, cast, cut, poison, rename, setting, setting, rule, structure, file, index,
]  # fmt: skip
