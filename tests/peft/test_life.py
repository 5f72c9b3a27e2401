"""The life of adapters on a quantized model: several of them, switched, mixed, deleted; and how memory is saved."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftMixedModel, PeftModel, get_peft_model, prepare_model_for_kbit_training

from tests.peft.training import EXPERTS, TARGETS, loss_of, quantized, saved_tensors, train
from tests.transformers.checkpoints import distance, ids, load, logits


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **options})


@pytest.fixture
def two(checkpoint: Callable[..., Path]) -> PeftModel:
    """A model with the adapters "one" and "two", both trained."""
    model = get_peft_model(load(checkpoint()), lora(), adapter_name="one")
    train(model, steps=3)
    model.add_adapter("two", lora(target_modules=["q_proj", "up_proj"], r=2))
    model.set_adapter("two")
    train(model, steps=5)
    return model


def test_adapters_are_switched_deleted_and_loaded_beside_each_other(
    two: PeftModel, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    expected = {}
    for name in ("one", "two"):
        two.set_adapter(name)
        expected[name] = logits(two)
    assert distance(expected["one"], expected["two"]) > 0.01
    two.save_pretrained(tmp_path)
    base = load(checkpoint())
    plain = logits(base)
    again = PeftModel.from_pretrained(base, tmp_path / "one", adapter_name="one")
    again.load_adapter(tmp_path / "two", adapter_name="two")
    for name in ("one", "two", "one"):
        again.set_adapter(name)
        assert torch.equal(logits(again.eval()), expected[name])
    again.delete_adapter("one")
    again.set_adapter("two")
    assert torch.equal(logits(again), expected["two"])
    assert torch.equal(logits(again.unload()), plain)


def test_rows_of_a_batch_may_have_different_adapters(two: PeftModel) -> None:
    rows = ids()[:1].repeat(3, 1)
    with torch.no_grad():
        mixed = two.eval()(input_ids=rows, adapter_names=["one", "two", "__base__"]).logits
    for row, name in enumerate(("one", "two")):
        two.set_adapter(name)
        assert distance(mixed[row], logits(two, rows[:1])[0]) < 1e-5
    with two.disable_adapter():
        assert distance(mixed[2], logits(two, rows[:1])[0]) < 1e-5


@pytest.mark.parametrize("how", ["linear", "svd", "cat", "ties"])
def test_adapters_are_combined_as_in_a_dense_model(how: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    found = []
    for dense in (False, True):
        base = load(checkpoint())
        if dense:
            base.dequantize()
        torch.manual_seed(0)
        model = get_peft_model(base, lora(init_lora_weights=False), adapter_name="one")
        model.add_adapter("two", lora(init_lora_weights=False))
        options = {"density": 0.5} if how == "ties" else {}
        model.add_weighted_adapter(["one", "two"], [0.7, 0.6], "both", combination_type=how, **options)
        model.set_adapter("both")
        found.append(logits(model.eval()))
    assert distance(*found) < 1e-5


def test_kinds_of_adapters_are_mixed_and_merged(checkpoint: Callable[..., Path]) -> None:
    base = load(checkpoint())
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    model = PeftMixedModel(base, config, "lora")
    model.add_adapter("loha", LoHaConfig(r=4, target_modules=["q_proj", "up_proj"], init_weights=False))
    model.set_adapter(["lora", "loha"])
    expected = logits(model.eval())
    merged = model.merge_and_unload()
    assert distance(logits(merged), expected) < 1e-5


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("prepare", [True, False])
def test_checkpointing_gives_the_same_gradients(
    reentrant: bool, prepare: bool, checkpoint: Callable[..., Path]
) -> None:
    def gradients(checkpointed: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        base = load(checkpoint())
        kwargs = {"use_reentrant": reentrant}
        if checkpointed and prepare:
            base = prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs=kwargs)
        model = get_peft_model(base, lora(init_lora_weights=False)).train()
        if checkpointed and not prepare:
            base.enable_input_require_grads()
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
        model(input_ids=ids(), labels=ids()).loss.backward()
        return [parameter.grad for parameter in model.parameters() if parameter.requires_grad]

    plain, saved = gradients(False), gradients(True)
    assert all(gradient is not None for gradient in plain)
    for a, b in zip(plain, saved, strict=True):
        torch.testing.assert_close(a, b)


def test_preparing_leaves_the_stored_tensors_alone(checkpoint: Callable[..., Path]) -> None:
    base = load(checkpoint(), dtype=torch.bfloat16)
    before = {key: value.clone() for key, value in base.state_dict().items()}
    prepare_model_for_kbit_training(base)
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())
    assert not any(parameter.requires_grad for parameter in base.parameters())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_model_with_adapters_is_copied(copied: Callable[..., Any], two: PeftModel) -> None:
    other = copied(two)
    assert torch.equal(logits(other), logits(two))
    assert train(other, steps=2) > 0


def test_an_adapter_file_holds_nothing_of_the_base(two: PeftModel, tmp_path: Path) -> None:
    two.save_pretrained(tmp_path)
    assert all("lora_" in key for key in saved_tensors(tmp_path / "one"))


def test_a_model_is_saved_below_its_adapters(two: PeftModel, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    two.unload().save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(load(checkpoint())))


@pytest.mark.parametrize(
    ("family", "sizes", "targets"), [("llama", {}, TARGETS), (EXPERTS[0], EXPERTS[1], [*EXPERTS[2], "q_proj"])]
)
def test_transformers_own_adapter_methods_work(
    family: str, sizes: dict[str, int], targets: list[str], checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = checkpoint(family, **sizes)
    model = load(folder)
    plain, trained = logits(model), {}
    for name, config in {"one": lora(target_modules=targets), "two": lora(target_modules=["o_proj"], r=2)}.items():
        model.add_adapter(config, name)
        model.set_adapter(name)
        assert train(model, steps=2) > 0
        trained[name] = logits(model)
        model.save_pretrained(tmp_path / name)
    model.disable_adapters()
    assert distance(logits(model), plain) < 1e-6
    model.enable_adapters()
    model.set_adapter("one")
    assert torch.equal(logits(model), trained["one"])

    again = load(folder)
    for name in trained:
        again.load_adapter(str(tmp_path / name), name)
    for name, expected in trained.items():
        again.set_adapter(name)
        assert torch.equal(logits(again.eval()), expected)
    again.delete_adapter("two")
    again.set_adapter("one")
    assert torch.equal(logits(again), trained["one"])
    assert len(again.get_adapter_state_dict("one")) == len(saved_tensors(tmp_path / "one"))
    assert torch.equal(logits(PeftModel.from_pretrained(load(folder), tmp_path / "one").eval()), trained["one"])


def test_the_folder_of_an_adapter_loads_as_a_model(two: PeftModel, tmp_path: Path) -> None:
    two.save_pretrained(tmp_path)  # it names the folder of the base
    assert torch.equal(logits(load(tmp_path / "two").eval()), logits(two))


def test_casts_and_generation_follow(two: PeftModel) -> None:
    expected = two.generate(input_ids=ids(8), max_new_tokens=4, do_sample=False)
    assert loss_of(two.to(torch.bfloat16)) == pytest.approx(loss_of(two.to(torch.float32)), abs=0.05)
    assert expected.shape == (2, 12)
    assert quantized(two)


def test_reading_weights_in_every_step_is_said_once(
    checkpoint: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    model = get_peft_model(load(checkpoint()), lora(use_dora=True))
    with caplog.at_level(logging.WARNING):
        train(model, steps=3)
    assert sum("reads the weight of quantized layers" in each.message for each in caplog.records) == 1
