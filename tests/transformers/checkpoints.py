"""Checkpoints for the tests: those of a peer, and tiny ones made here and then bent into the dialects in the wild."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import gptq_transformers
from gptq_backend import QuantizeConfig, QuantLinear, quantize_model
from gptq_backend.model.structure import replace_module

PEERS = Path(__file__).parents[1] / "data" / "checkpoints"
NAMES = sorted(path.name for path in PEERS.iterdir() if path.is_dir())
VERSION_4 = transformers.__version__.startswith("4.")
VOCABULARY = 259
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def load_peer(name: str, **kwargs: Any) -> nn.Module:
    """A peer's checkpoint through plain ``from_pretrained``."""
    return AutoModelForCausalLM.from_pretrained(PEERS / name, **kwargs)


def peer_error(model: nn.Module, name: str) -> float:
    """Distance of the model's logits from the peer's."""
    expected = load_file(PEERS / f"{name}.expected.safetensors")
    return distance(logits(model, expected["input_ids"]), expected["logits"])


def ids(length: int = 24) -> Tensor:
    return torch.randint(3, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: nn.Module, input_ids: Tensor | None = None) -> Tensor:
    return model(input_ids=ids() if input_ids is None else input_ids).logits.float()


def distance(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm; NaN counts as infinitely far."""
    value = float((found - expected).norm() / expected.norm())
    return value if value == value else float("inf")


def tiny(model_type: str = "llama", **changes: Any) -> nn.Module:
    """An unquantized model with random weights; a change of ``...`` removes the key."""
    torch.manual_seed(0)
    if model_type == "gpt2":
        config = AutoConfig.for_model(
            "gpt2",
            vocab_size=VOCABULARY,
            n_embd=64,
            n_layer=2,
            n_head=2,
            n_positions=128,
            bos_token_id=1,
            eos_token_id=2,
        )
    else:
        extra = {"num_local_experts": 4, "num_experts_per_tok": 2} if model_type == "mixtral" else {}
        model_type = {"gemma3": "gemma3_text"}.get(model_type, model_type)
        sizes = {key: value for key, value in {**SIZES, **extra, **changes}.items() if value is not ...}
        config = AutoConfig.for_model(model_type, **sizes)
    return AutoModelForCausalLM.from_config(config).eval()


def write(folder: Path, model: nn.Module, config: QuantizeConfig) -> Tensor:
    """Quantize ``model``, save it, and return the logits of its dequantized weights."""
    from gptq_transformers.experts.unfuse import unfuse_experts
    from gptq_transformers.hf_quantizer import attach

    unfuse_experts(model)
    quantize_model(model, config, [ids(64)])
    expected = logits(dense(model))
    attach(model, config)
    model.save_pretrained(folder)
    return expected


def dense(model: nn.Module) -> nn.Module:
    """A copy with ordinary linear layers, dequantized by the definition and nothing else."""
    plain = copy.deepcopy(model)
    for name, layer in list(plain.named_modules()):
        if isinstance(layer, QuantLinear):
            hub = layer.quantized_weight()
            index = hub.g_idx.long()
            weight = ((hub.codes.float() - hub.zeros.float()[index]) * hub.scales.float()[index]).t()
            linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
            linear.weight = nn.Parameter(weight.contiguous())
            linear.bias = None if layer.bias is None else nn.Parameter(layer.bias.float())
            replace_module(plain, name, linear)
    return plain


def load(folder: Path, **kwargs: Any) -> nn.Module:
    kwargs.setdefault("dtype", torch.float32)
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs)


def rewrite(
    folder: Path,
    tensors: Callable[[dict[str, Tensor]], dict[str, Tensor] | None] | None = None,
    **settings: Any,
) -> None:
    """Change a checkpoint's tensors and its ``quantization_config``; a setting of ``...`` removes the key."""
    if tensors is not None:
        content = load_file(folder / "model.safetensors")
        changed = tensors(content)
        content = content if changed is None else changed
        content = {key: value.contiguous() for key, value in content.items()}
        save_file(content, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    for key, value in settings.items():
        if value is ...:
            config["quantization_config"].pop(key, None)
        else:
            config["quantization_config"][key] = value
    (folder / "config.json").write_text(json.dumps(config))


def stored(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors files."""
    content: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        content.update(load_file(file))
    return content


gptq_transformers.register()
