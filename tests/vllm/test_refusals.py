"""What cannot be served stops vLLM at the start, with one sentence that says what is wrong and what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gptq_backend import ConfigError
from tests.transformers.checkpoints import PEERS, rewrite
from tests.vllm.engine import Engine, EngineError

LAYER = "model.layers.1.self_attn.k_proj"
Tensors = dict[str, Tensor]


def _without(part: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: value for key, value in tensors.items() if not key.startswith(f"{LAYER}{part}")}


def _changed(part: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], Tensors]:
    key = f"{LAYER}.{part}"
    return lambda tensors: {**tensors, key: change(tensors[key])}


def _infinite(scales: Tensor) -> Tensor:
    scales = scales.clone()
    scales[0, 0] = torch.inf
    return scales


DAMAGES: dict[str, tuple[Callable[[Tensors], Tensors] | None, dict[str, object], str]] = {
    "a part of a layer is missing": (_without(".scales"), {}, f"{LAYER}: scales is missing, expected"),
    "a layer is missing": (_without(""), {}, f"{LAYER} is not in the checkpoint, neither quantized nor dense"),
    "infinite scales": (_changed("scales", _infinite), {}, rf"{LAYER}\.scales: 1 values are NaN or infinite"),
    "groups out of range": (_changed("g_idx", lambda g: g + 7), {}, rf"{LAYER}\.g_idx: values span 7\.\.\d+, expected"),
    "another size": (
        _changed("qweight", lambda w: w[:, :32]),
        {},
        f"{LAYER}: the checkpoint has 128 inputs, 32 outputs and 64 columns of scales, the model 128 inputs and 64",
    ),
    "nothing is quantized": (lambda tensors: {"model.norm.weight": tensors["model.norm.weight"]}, {}, "no tensor is"),
    "9 bits": (None, {"bits": 9}, "bits=9 is not supported; choose one of"),
    "a fixed unknown format": (None, {"checkpoint_format": "x9", "format": "x9"}, "checkpoint_format='x9' is not"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused(engine: Engine, damage: str, tmp_path: Path) -> None:
    change, settings, message = DAMAGES[damage]
    folder = tmp_path / "model"
    shutil.copytree(PEERS / "llama-4-64-actorder", folder)
    rewrite(folder, change, **settings)
    with pytest.raises(EngineError, match=message) as refusal:
        engine.logprobs(folder, [1, 2, 3])
    assert len(str(refusal.value)) < 700


def test_a_missing_shard_is_named(engine: Engine, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(PEERS / "llama-4-32-sym", folder)
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    half, files = len(names) // 2, ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    save_file({name: tensors[name] for name in names[:half]}, folder / files[0])
    index = {"metadata": {}, "weight_map": {name: files[i >= half] for i, name in enumerate(names)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        EngineError, match=f"1 of 2 shards named in model.safetensors.index.json are missing.*{files[1]}"
    ):
        engine.logprobs(folder, [1, 2, 3])


def test_bloom_with_a_quantized_qkv_is_refused(tmp_path: Path) -> None:
    from gptq_vllm.config import GPTQBackendConfig

    folder = tmp_path / "model"
    shutil.copytree(PEERS / "llama-4-32-sym", folder)
    name = "h.0.self_attention.query_key_value"
    rewrite(folder, lambda tensors: {key.replace(LAYER, name): value for key, value in tensors.items()})
    config = GPTQBackendConfig({"quant_method": "gptq", "bits": 4, "group_size": 32})
    with pytest.raises(ConfigError, match=f"{name}.qweight: vLLM's Bloom sorts the rows"):
        config.maybe_update_config(str(folder), SimpleNamespace(model_type="bloom"))


def test_a_missing_expert_is_named(engine: Engine, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(PEERS / "qwen3_moe-4-32", folder)
    name = "model.layers.0.mlp.experts.2.up_proj"
    rewrite(folder, lambda tensors: {key: value for key, value in tensors.items() if not key.startswith(name)})
    with pytest.raises(EngineError, match=f"{name} is not in the checkpoint"):
        engine.logprobs(folder, [1, 2, 3])


def test_adapters_on_quantized_experts_are_refused(engine: Engine) -> None:
    with pytest.raises(EngineError, match="LoRA on a mixture of experts whose experts are quantized is not supported"):
        engine.logprobs(PEERS / "qwen3_moe-4-32", [1, 2, 3], enable_lora=True, max_lora_rank=8)


@pytest.mark.parametrize("load_format", ["dummy", "sharded_state"])
def test_load_formats_without_a_checkpoints_tensors_are_refused_by_name(engine: Engine, load_format: str) -> None:
    with pytest.raises(EngineError, match=f"--load-format {load_format} does not load a checkpoint's own tensors"):
        engine.logprobs(PEERS / "llama-4-32-sym", [1, 2, 3], load_format=load_format)


@pytest.mark.slow
def test_an_unknown_kernel_is_refused(start_engine: Callable[..., Engine]) -> None:
    engine = start_engine(GPTQ_BACKEND_KERNEL="fast")
    with pytest.raises(EngineError, match=r"GPTQ_BACKEND_KERNEL=fast is not a kernel; choose 'auto' or one of \["):
        engine.logprobs(PEERS / "llama-4-32-sym", [1, 2, 3])
