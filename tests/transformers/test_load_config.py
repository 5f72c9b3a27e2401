"""``GPTQConfig`` as users build it, and the choice of a kernel by it."""

from __future__ import annotations

import copy
import inspect
import json
import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.quantizers import auto

import gptq_transformers
from gptq_backend import ConfigError, QuantizeConfig, QuantLinear, RunOptions
from gptq_transformers.config import GPTQConfig, _warn_foreign
from gptq_transformers.hf_quantizer import _LOCALS, GPTQBackendQuantizer
from tests.transformers.checkpoints import (
    NAMES,
    PEERS,
    VERSION_4,
    distance,
    load,
    load_peer,
    logits,
    peer_error,
    tiny,
    write,
)


def test_registering_twice_is_registering_once() -> None:
    gptq_transformers.register()
    gptq_transformers.register()
    assert auto.AUTO_QUANTIZER_MAPPING["gptq"] is GPTQBackendQuantizer
    assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["gptq"] is GPTQConfig


def test_the_stock_class_takes_module_lists_without_optimum() -> None:
    modules = [["self_attn.q_proj"], ["mlp.up_proj"]]
    config = transformers.GPTQConfig(bits=4, dataset=["x"], modules_in_block_to_quantize=modules)
    assert config.modules_in_block_to_quantize == modules
    assert GPTQConfig.adopt(config).to_quantize_config().modules_in_block_to_quantize == (
        "self_attn.q_proj",
        "mlp.up_proj",
    )


def test_options_that_the_stock_class_does_not_know_are_adopted() -> None:
    config = transformers.GPTQConfig(bits=4, lm_head=True, dynamic={"-:x": {}}, static_groups=True, dataset=["a"])
    for settings in (GPTQConfig.adopt(config).to_quantize_config(), GPTQConfig.adopt(copy.deepcopy(config))):
        assert (settings.lm_head, settings.static_groups, settings.dynamic) == (True, True, {"-:x": {}})


@pytest.mark.parametrize(
    ("alias", "key", "value"),
    [("wbits", "bits", 3), ("groupsize", "group_size", 64), ("percdamp", "damp_percent", 0.05)],
)
def test_older_spellings_are_understood(alias: str, key: str, value: Any) -> None:
    assert getattr(GPTQConfig(**{alias: value}), key) == value
    assert GPTQConfig(**{"bits": 4, alias: value}).bits == 4


@pytest.mark.parametrize("name", NAMES)
def test_saving_keeps_the_keys_of_a_peer_and_adds_none_of_a_run(name: str) -> None:
    source = json.loads((PEERS / name / "config.json").read_text())["quantization_config"]
    written = GPTQConfig.from_dict(source | {"batch_size": 4}).to_dict()
    assert {key for key, value in source.items() if value is not None} - {"method"} <= written.keys()
    assert written["batch_size"] == 4
    run = {"cache_block_outputs", "model_seqlen", "pad_token_id", "block_name_to_quantize", "keep_edge_blocks"}
    assert not (run - source.keys()) & written.keys()


def test_what_only_a_run_needed_does_not_reach_the_file() -> None:
    config = GPTQConfig.adopt(transformers.GPTQConfig(bits=4, dataset=["a"], model_seqlen=32, batch_size=2))
    assert (config.model_seqlen, config.batch_size) == (32, 2)
    config.forget_run()
    assert not {"model_seqlen", "batch_size", "cache_block_outputs", "dataset"} & config.to_dict().keys()


def test_transformers_has_the_locals_that_we_read() -> None:
    """Where this fails, tp_plan is no longer refused, or files and key_mapping are no longer found."""
    code = inspect.unwrap(transformers.PreTrainedModel.from_pretrained.__func__).__code__
    assert (code.co_name, Path(code.co_filename).name) == ("from_pretrained", "modeling_utils.py")
    newer = set() if not VERSION_4 else {"distributed_config"}
    assert set(_LOCALS) - newer <= {*code.co_varnames, *code.co_cellvars}


def test_a_stock_config_passed_at_loading_chooses_the_backend(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        model = load_peer(
            "llama-4-32-sym",
            dtype=torch.float32,
            quantization_config=transformers.GPTQConfig(bits=4, backend="reference"),
        )
    layer = next(module for module in model.modules() if isinstance(module, QuantLinear))
    assert layer.backend == "reference"
    assert peer_error(model, "llama-4-32-sym") < 1e-3


@pytest.mark.parametrize("backend", ["marlin", "exllama_v2", "torch", "IPEX"])
def test_a_kernel_of_another_library_means_auto_with_one_warning(
    backend: str, caplog: pytest.LogCaptureFixture
) -> None:
    _warn_foreign.cache_clear()
    config = GPTQConfig(bits=4, backend=backend)
    with caplog.at_level(logging.WARNING):
        assert (config.kernel, config.kernel) == (None, None)
    assert caplog.text.count("is a kernel of another library") == 1


@pytest.mark.parametrize("backend", [None, "auto", "auto_trainable"])
def test_auto_names_no_kernel(backend: str | None) -> None:
    assert GPTQConfig(bits=4, backend=backend).kernel is None


def test_an_unknown_kernel_is_refused() -> None:
    config = transformers.GPTQConfig(bits=4, backend="fastest")
    with (
        pytest.warns(UserWarning, match="already has"),
        pytest.raises(ConfigError, match=r"backend='fastest' is not a kernel; choose 'auto'"),
    ):
        load_peer("llama-4-32-sym", quantization_config=config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 9}, "bits=9"),
        ({"bits": 4, "checkpoint_format": "marlin"}, "the settings of marlin, expected those of GPTQ"),
        ({"bits": 4, "quant_method": "awq"}, "the settings of awq, expected those of GPTQ"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GPTQConfig(**settings)


def test_a_checkpoints_dictionary_is_kept_as_it_is() -> None:
    source = json.loads((PEERS / "llama-dynamic" / "config.json").read_text())["quantization_config"]
    config = GPTQConfig.from_dict(source)
    assert {key: config.to_dict().get(key) for key in source if key not in ("method",)} == {
        key: value for key, value in source.items() if key not in ("method",)
    }
    assert config.to_quantize_config().for_module("model.layers.1.mlp.up_proj").bits == 8


def test_the_core_config_comes_back_from_transformers_unchanged() -> None:
    config = QuantizeConfig(
        bits=3, group_size=40, sym=False, desc_act=True, lm_head=True, dynamic={"-:x": {}}, keep_edge_blocks=1,
        modules_in_block_to_quantize=("a", "b"), checkpoint_format="gptq_p", damp_percent=0.05, true_sequential=False,
    )  # fmt: skip
    again = GPTQConfig.from_dict(json.loads(json.dumps(GPTQConfig.from_quantize_config(config).to_dict())))
    assert again.to_quantize_config() == QuantizeConfig(**{**vars(config), "act_group_aware": False})


def test_objects_and_choices_of_a_run_do_not_reach_the_file() -> None:
    config = GPTQConfig(bits=4, tokenizer=object(), dataset=["a"], backend="reference")
    assert not {"tokenizer", "dataset", "backend"} & config.to_dict().keys()
    json.loads(config.to_json_string())


def test_copies_of_the_config_are_equal() -> None:
    config = GPTQConfig(bits=4, dynamic={"-:x": {}}, novel=1)
    for other in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert other.to_dict() == config.to_dict()


@pytest.mark.parametrize("inside_text_config", [False, True])
def test_the_language_model_of_a_vision_language_model_loads_quantized(
    inside_text_config: bool, tmp_path: Path
) -> None:
    if VERSION_4 and inside_text_config:
        pytest.skip("transformers 4 looks for settings at the top level of config.json only")
    from transformers import AutoModelForImageTextToText, CLIPVisionConfig, LlavaConfig

    from gptq_backend import quantize_model
    from gptq_transformers.hf_quantizer import attach

    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = LlavaConfig(vision_config=vision, text_config=tiny().config, image_token_index=5)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    language = next(name for name, module in model.named_modules() if name.endswith("language_model.layers"))
    settings = QuantizeConfig(group_size=32)
    quantize_model(model, settings, None, options=RunOptions(block_name=language))
    expected = logits(model)
    attach(model, settings)
    model.save_pretrained(tmp_path)
    if inside_text_config:
        content = json.loads((tmp_path / "config.json").read_text())
        content["text_config"]["quantization_config"] = content.pop("quantization_config")
        (tmp_path / "config.json").write_text(json.dumps(content))
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32)
    names = [name for name, module in loaded.named_modules() if isinstance(module, QuantLinear)]
    assert len(names) == 14
    assert all("language_model" in name for name in names)
    assert distance(logits(loaded), expected) < 1e-5


_TENSOR_PARALLEL = """
import gptq_transformers
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained({path!r}, tp_plan="auto")
except ValueError as error:
    print(type(error).__name__, error)
"""


@pytest.mark.skipif(VERSION_4, reason="transformers 4 needs more than one process to come that far")
def test_a_tensor_parallel_plan_is_refused() -> None:
    environment = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "29571",
    }
    done = subprocess.run(
        [sys.executable, "-c", _TENSOR_PARALLEL.format(path=str(PEERS / "llama-4-32-sym"))],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert "ConfigError tp_plan is not supported" in done.stdout, done.stderr


def test_an_attached_model_is_a_quantized_one(tmp_path: Path) -> None:
    model = tiny()
    write(tmp_path, model, QuantizeConfig(group_size=32))
    assert model.is_quantized
    assert model.hf_quantizer.is_serializable()
    assert model.config.quantization_config.group_size == 32
    assert distance(logits(model.half().float()), logits(load(tmp_path))) < 1e-2
