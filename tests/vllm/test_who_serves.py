"""Who serves a checkpoint, and how vLLM finds the plugin."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import gptq_vllm
from tests.transformers.checkpoints import PEERS

pytest.importorskip("vllm")

STOCK = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}


@pytest.fixture(params=["cpu", "gpu"])
def platform(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """vLLM's platform says what it is asked to say; nothing else depends on it here."""
    from gptq_vllm.who_serves import current_platform

    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: request.param == "cpu")
    return request.param


@pytest.mark.parametrize(
    ("settings", "requested", "on_cpu", "elsewhere"),
    [
        ({}, None, True, False),
        ({}, "gptq", True, True),
        ({}, "gptq_backend", True, True),
        ({}, "auto_gptq", False, False),
        ({}, "gptq_marlin", False, False),
        ({"quant_method": "awq"}, "gptq", True, True),
        ({"quant_method": "awq"}, "awq", False, False),
        ({"quant_method": "awq"}, None, True, False),
        ({"quant_method": "awq", "version": "llm-awq"}, None, False, False),
        ({"quant_method": "intel/auto-round"}, None, True, False),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, None, False, False),
        ({"quant_method": "hqq"}, "gptq", False, False),
        ({"quant_method": ""}, "gptq", True, True),  # as AutoGPTQ wrote it at first, filled in by vLLM
        ({"quant_method": ""}, None, False, False),
        ({"desc_act": True}, None, True, True),
        ({"desc_act": True, "group_size": -1}, None, True, False),
        ({"sym": False}, None, True, True),
        ({"bits": 3}, None, True, True),
        ({"bits": 8}, None, True, False),
        ({"group_size": 48}, None, True, True),
        ({"dynamic": {"a": {"bits": 2}}}, None, True, True),
        ({"dynamic": {"-:a": {}, "b": {"bits": 8}}}, None, True, False),
    ],
)
def test_the_settings_and_the_request_decide_who_serves(
    platform: str, settings: dict[str, Any], requested: str | None, on_cpu: bool, elsewhere: bool
) -> None:
    from gptq_vllm.registration import GPTQMethod

    found = GPTQMethod.override_quantization_method({**STOCK, **settings}, requested)
    assert found == ("gptq" if (on_cpu if platform == "cpu" else elsewhere) else None)


def test_a_config_can_be_pickled() -> None:
    """vLLM pickles its config for every worker, on this machine or, by way of Ray, on others."""
    from gptq_vllm.config import GPTQBackendConfig

    config = GPTQBackendConfig({**STOCK, "group_size": 64, "desc_act": True})
    config.maybe_update_config(str(PEERS / "llama-4-64-actorder"))
    again = pickle.loads(pickle.dumps(config))
    assert again.settings == config.settings
    assert again.stored.checkpoint.manifest == config.stored.checkpoint.manifest
    assert again.stored.checkpoint.is_quantized("model.layers.0.self_attn.q_proj")


def test_registering_twice_changes_nothing() -> None:
    from vllm.model_executor.layers.quantization import get_quantization_config

    gptq_vllm.register()
    gptq_vllm.register()
    assert get_quantization_config("gptq").__module__ == "gptq_vllm.registration"
    assert get_quantization_config("gptq_backend").__module__ == "gptq_vllm.registration"
    assert get_quantization_config("auto_gptq").__module__.startswith("vllm.")


def test_importing_the_plugin_does_not_import_vllm() -> None:
    code = "import sys, gptq_vllm; print([m for m in ('vllm', 'torch', 'transformers') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path.cwd())
    assert result.stdout.strip().endswith("[]")
