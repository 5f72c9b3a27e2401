"""Every kind of adapter on quantized layers: it trains, alone, it can be saved, disabled and merged."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from gptq_backend import ConfigError, QuantLinear
from tests.peft.training import TARGETS, quantized, reloaded, train
from tests.transformers.checkpoints import VERSION_4, distance, ids, load, logits

CAUSAL = {"task_type": "CAUSAL_LM"}
SQUARE = ["q_proj", "o_proj"]
LORA = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS}
# name: (class of the configuration, its arguments)
TUNERS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA": ("LoraConfig", LORA),
    "rsLoRA": ("LoraConfig", {**LORA, "use_rslora": True}),
    "DoRA": ("LoraConfig", {**LORA, "use_dora": True}),
    "DoRA with dropout": ("LoraConfig", {**LORA, "use_dora": True, "lora_dropout": 0.1}),
    "LoRA with biases": ("LoraConfig", {**LORA, "bias": "all"}),
    "LoRA, orthogonal": ("LoraConfig", {**LORA, "init_lora_weights": "orthogonal"}),
    "all-linear": ("LoraConfig", {**LORA, "target_modules": "all-linear"}),
    "AdaLoRA": ("AdaLoraConfig", {**LORA, "total_step": 20, "tinit": 2, "tfinal": 5}),
    "IA3": ("IA3Config", {"target_modules": TARGETS, "feedforward_modules": ["down_proj"]}),
    "LoHa": ("LoHaConfig", {"r": 4, "alpha": 8, "target_modules": TARGETS}),
    "LoKr": ("LoKrConfig", {"r": 4, "alpha": 8, "target_modules": TARGETS}),
    "OFT": ("OFTConfig", {"r": 0, "oft_block_size": 8, "target_modules": TARGETS}),
    "BOFT": ("BOFTConfig", {"boft_block_size": 8, "target_modules": TARGETS}),
    "VeRA": ("VeraConfig", {"r": 8, "target_modules": SQUARE}),
    "VB-LoRA": ("VBLoRAConfig", {"r": 2, "num_vectors": 16, "vector_length": 32, "target_modules": TARGETS}),
    "FourierFT": ("FourierFTConfig", {"n_frequency": 64, "target_modules": TARGETS}),
    "HRA": ("HRAConfig", {"r": 4, "target_modules": TARGETS}),
    "MiSS": ("MissConfig", {"r": 4, "target_modules": TARGETS}),
    "SHiRA": ("ShiraConfig", {"r": 4, "target_modules": TARGETS}),
    "C3A": ("C3AConfig", {"block_size": 32, "target_modules": TARGETS}),
    "RandLoRA": ("RandLoraConfig", {"r": 4, "target_modules": SQUARE}),
    "RoAd": ("RoadConfig", {"group_size": 32, "target_modules": TARGETS}),
    "DeLoRA": ("DeloraConfig", {"r": 4, "target_modules": TARGETS}),
    "WaveFT": ("WaveFTConfig", {"n_frequency": 64, "target_modules": TARGETS}),
    "GraLoRA": ("GraloraConfig", {"r": 4, "target_modules": TARGETS}),
    "OSF": ("OSFConfig", {"target_modules": TARGETS}),
    "PSOFT": ("PsoftConfig", {"r": 4, "target_modules": TARGETS}),
    "PVeRA": ("PveraConfig", {"r": 4, "target_modules": SQUARE}),
    "TinyLoRA": ("TinyLoraConfig", {"target_modules": TARGETS}),
    "DEFT": ("DeftConfig", {"target_modules": TARGETS}),
    "HiRA": ("HiraConfig", {"r": 4, "target_modules": TARGETS}),
    "UniLoRA": ("UniLoraConfig", {"r": 4, "target_modules": TARGETS}),
    "PEANuT": ("PeanutConfig", {"target_modules": TARGETS}),
    "norms": ("LNTuningConfig", {"target_modules": ["input_layernorm"]}),
    "tokens": ("TrainableTokensConfig", {"token_indices": ids()[0].tolist(), "target_modules": ["embed_tokens"]}),
    # without layers to merge into
    "BEFT": ("BeftConfig", {"target_modules": TARGETS}),
    "Lily": ("LilyConfig", {"r": 4, "target_modules": TARGETS}),
    "prompt tuning": ("PromptTuningConfig", {"num_virtual_tokens": 4}),
    "p-tuning": ("PromptEncoderConfig", {"num_virtual_tokens": 4, "encoder_hidden_size": 16}),
    "prefix tuning": ("PrefixTuningConfig", {"num_virtual_tokens": 4}),
    "adaption prompt": ("AdaptionPromptConfig", {"adapter_len": 4, "adapter_layers": 1}),
}  # fmt: skip
UNMERGED = ("BEFT", "Lily", "prompt tuning", "p-tuning", "prefix tuning", "adaption prompt")


def configuration(name: str) -> Any:
    kind, arguments = TUNERS[name]
    if not hasattr(peft, kind):
        pytest.skip(f"peft {peft.__version__} has no {kind}")
    return getattr(peft, kind)(**arguments, **CAUSAL)


@pytest.mark.parametrize("name", TUNERS)
def test_an_adapter_trains_alone_and_is_saved_disabled_and_merged(
    name: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = checkpoint()
    base = load(folder)
    bits, expected = {key: value.clone() for key, value in base.state_dict().items()}, logits(base)
    model = peft.get_peft_model(base, configuration(name))
    assert train(model) > 0
    for key, value in model.state_dict().items():  # only the adapter has changed
        plain = key.replace("base_model.model.", "").replace(".base_layer", "")
        assert plain not in bits or torch.equal(value, bits[plain]), key
    trained = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), trained)
    assert distance(trained[:, -24:], expected) > 1e-3
    again = reloaded(model, folder, tmp_path)
    assert torch.equal(logits(again), trained)
    if name not in UNMERGED:
        merged = again.merge_and_unload()
        assert distance(logits(merged), trained) < 1e-5
        assert not any(type(module).__module__.startswith("peft") for module in merged.modules())


def test_eva_begins_with_what_it_saw_in_data(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = checkpoint()
    base = load(folder)
    expected = logits(base)
    config = peft.LoraConfig(**LORA, init_lora_weights="eva", eva_config=peft.EvaConfig(rho=1.0), **CAUSAL)
    model = peft.get_peft_model(base, config)
    peft.initialize_lora_eva_weights(model, [{"input_ids": ids()}] * 4)
    assert distance(logits(model), expected) < 1e-5
    assert train(model) > 0.1
    trained = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(reloaded(model, folder, tmp_path)), trained)


def test_poly_trains_for_several_tasks(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    def of_two_tasks(model: Any) -> Any:
        model.forward = functools.partial(model.forward, task_ids=torch.tensor([0, 1]))
        return model

    folder = checkpoint()
    base = load(folder)
    expected = logits(base)
    config = peft.PolyConfig(r=4, n_tasks=2, n_skills=2, n_splits=2, target_modules=TARGETS, **CAUSAL)
    model = of_two_tasks(peft.get_peft_model(base, config))
    assert train(model) > 0.02
    trained = logits(model)
    with model.disable_adapter():  # its hooks, which hand tasks on, keep layers from running in few calls
        assert distance(logits(model), expected) < 1e-6
    assert torch.equal(logits(of_two_tasks(reloaded(model, folder, tmp_path))), trained)


def test_xlora_learns_to_mix_adapters(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    base = load(checkpoint())
    base.config.use_cache = False
    expected = logits(base)
    names = ("0", "1")  # with others peft 0.21 raises a KeyError, on dense models too
    for seed, name in enumerate(names):
        torch.manual_seed(seed)
        adapter = peft.LoraConfig(**LORA, init_lora_weights=False, **CAUSAL)
        peft.get_peft_model(load(checkpoint()), adapter).save_pretrained(tmp_path / name)
    folders = {name: str(tmp_path / name) for name in names}
    model = peft.get_peft_model(base, peft.XLoraConfig(hidden_size=64, xlora_depth=1, adapters=folders, **CAUSAL))
    assert train(model) > 0
    if not VERSION_4:  # peft 0.17 goes on with the adapters
        with model.disable_adapter():
            assert distance(logits(model), expected) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("bits", "desc_act"), [(2, False), (3, True), (4, True), (8, False)])
@pytest.mark.parametrize("name", ["LoRA", "DoRA"])
def test_adapters_train_on_every_width_and_dtype(
    name: str, bits: int, desc_act: bool, dtype: torch.dtype, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = checkpoint(bits=bits, desc_act=desc_act)
    base = load(folder, dtype=dtype)
    expected = logits(base)
    model = peft.get_peft_model(base, configuration(name))
    assert train(model) > 0.02
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters() if parameter.requires_grad)
    trained = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    again = reloaded(model, folder, tmp_path, dtype=dtype)
    assert torch.equal(logits(again), trained)
    merged = again.merge_and_unload()
    assert distance(logits(merged), trained) < (1e-5 if dtype == torch.float32 else 0.02)
    assert {p.dtype for p in merged.parameters() if p.is_floating_point() and p.dim() == 2} <= {dtype, torch.float16}


@pytest.mark.parametrize("name", ["LoRA", "DoRA", "LoHa", "OFT", "BOFT", "VeRA", "HRA"])
def test_no_dense_weight_outlives_a_step(name: str, checkpoint: Callable[..., Path]) -> None:
    model = peft.get_peft_model(load(checkpoint(intermediate_size=352)), configuration(name))
    train(model, steps=2)
    gc.collect()
    dense = {(layer.out_features, layer.in_features) for layer in quantized(model)} - {(64, 64), (32, 64)}
    held = [
        each for each in gc.get_objects() if type(each) in (torch.Tensor, nn.Parameter) and tuple(each.shape) in dense
    ]
    assert not held


@pytest.mark.parametrize("how", ["pissa", "olora"])
def test_initializations_that_change_the_base_are_refused(how: str, checkpoint: Callable[..., Path]) -> None:
    config = peft.LoraConfig(**LORA, init_lora_weights=how, **CAUSAL)
    with pytest.raises(ConfigError, match=r"q_proj.weight is quantized and cannot be written to; .* nn.Linear"):
        peft.get_peft_model(load(checkpoint()), config)


def test_what_peft_would_ignore_is_refused(checkpoint: Callable[..., Path]) -> None:
    if "use_qalora" not in peft.LoraConfig.__dataclass_fields__:
        pytest.skip(f"peft {peft.__version__} has none")
    with pytest.raises(ConfigError, match="use_qalora=True works with gptqmodel's layers only"):
        peft.get_peft_model(load(checkpoint()), peft.LoraConfig(**LORA, use_qalora=True, **CAUSAL))


def test_layers_have_their_class_again_after_adapters_were_put_on(checkpoint: Callable[..., Path]) -> None:
    model = peft.get_peft_model(load(checkpoint()), configuration("LoRA"))
    assert quantized(model)
    assert all(type(layer) is QuantLinear for layer in quantized(model))
    assert not any(isinstance(layer, nn.Linear) for layer in quantized(model))
