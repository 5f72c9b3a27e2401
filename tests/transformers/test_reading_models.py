"""Models whose code reads the weight of linear layers, and a hybrid of Mamba: what is saved gives the same logits."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

import gptq_transformers
from gptq_backend import QuantizeConfig, QuantLinear
from tests.transformers.checkpoints import distance

_SCRIPT = Path(__file__).parents[2] / "docs" / "benchmarks" / "small_models.py"
_spec: Any = importlib.util.spec_from_file_location("small_models", _SCRIPT)
architectures = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(architectures)

READERS = ["deepseek_v32", "glm_moe_dsa", "hy_v4", "axk2", "qwen3_5_text", "gemma4_text", "rwkv"]
HYBRIDS = ["granitemoehybrid", "jamba", "zamba2"]


def samples() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 200, (24,), generator=generator) for _ in range(8)]


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=torch.stack(samples()[:2])).logits.float()


@pytest.mark.parametrize("name", READERS + HYBRIDS)
def test_a_saved_model_gives_the_logits_it_gave_before_and_those_of_its_dense_twin(name: str, tmp_path: Path) -> None:
    if name not in NAMES:
        pytest.skip(f"this version of transformers has no {name}")
    try:
        model = architectures.build(name)
    except (TypeError, ValueError, AttributeError, KeyError, StopIteration) as error:
        pytest.skip(f"the small config of {name} is for another version of transformers: {error}")
    config = QuantizeConfig(bits=4, group_size=16, quality="fast", dynamic=architectures.RULES.get(name))
    quantized, _ = gptq_transformers.quantize(model, config, samples(), output=tmp_path)
    before = logits(quantized)
    kind = (
        AutoModelForCausalLM
        if type(AutoConfig.from_pretrained(tmp_path)) in AutoModelForCausalLM._model_mapping
        else type(model)
    )
    loaded = kind.from_pretrained(tmp_path, dtype=torch.float32).eval()
    layers = [module for module in loaded.modules() if isinstance(module, QuantLinear)]
    assert len(layers) > 5
    assert distance(logits(loaded), before) < 1e-5
    # Mixed precision: what the code does with the dtypes it reads must not fail either.
    half = kind.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert logits(half).isfinite().all()
    dense = copy.deepcopy(loaded).dequantize()
    assert not any(isinstance(module, QuantLinear) for module in dense.modules())
    assert distance(logits(dense), before) < 1e-4
