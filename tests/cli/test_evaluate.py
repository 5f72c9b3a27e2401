"""Evaluation: figures against plain formulas, and inputs that would end in an index error or in NaN."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from huggingface_hub import HfApi
from torch import nn

from gptq_backend import GPTQError
from gptq_cli import evaluate as module
from gptq_cli.evaluate import cut_windows, evaluate
from gptq_cli.models import is_quantized, load_model, require_device, require_model
from tests.cli.tiny_models import tiny_llama


def _perturbed(model: nn.Module) -> nn.Module:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1 + 0.5 * torch.randn_like(parameter))
    return other


def test_figures_equal_the_plain_formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ROWS", 5)  # windows of 16 then end in the middle of a chunk
    reference = tiny_llama()
    model = _perturbed(reference)
    ids = torch.randint(64, (3, 16))
    result = evaluate(model, ids, reference)

    with torch.no_grad():
        ours = model(ids).logits.double().log_softmax(-1)
        theirs = reference(ids).logits.double().log_softmax(-1)
    nll = -ours[:, :-1].gather(-1, ids[:, 1:, None]).mean()
    kld = torch.nn.functional.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)  # [W, T]
    assert result.perplexity == pytest.approx(nll.exp().item(), rel=1e-5)
    assert result.kld == pytest.approx(kld.mean().item(), rel=1e-4)
    assert result.kld_stderr == pytest.approx((kld.mean(1).std() / 3**0.5).item(), rel=1e-3)
    assert result.kld_p99 == pytest.approx(kld.flatten().quantile(0.99).item(), rel=1e-4)
    assert result.top1_agreement == pytest.approx((ours.argmax(-1) == theirs.argmax(-1)).double().mean().item())
    assert (result.tokens, result.windows, result.seqlen) == (48, 3, 16)
    assert result.reference_perplexity != result.perplexity


def test_a_model_does_not_diverge_from_itself() -> None:
    model = tiny_llama()
    result = evaluate(model, torch.randint(64, (2, 16)), model)
    assert result.kld == pytest.approx(0, abs=1e-7)
    assert result.kld_p99 == pytest.approx(0, abs=1e-6)
    assert result.top1_agreement == 1
    assert result.perplexity == result.reference_perplexity


def test_without_reference_there_is_no_divergence_and_one_window_has_no_error() -> None:
    model = tiny_llama()
    ids = torch.randint(64, (1, 16))
    alone = evaluate(model, ids)
    assert (alone.kld, alone.kld_stderr, alone.kld_p99, alone.top1_agreement) == (None, None, None, None)
    assert evaluate(model, ids, _perturbed(model)).kld_stderr is None


def test_tokens_that_the_reference_rules_out_do_not_make_nan() -> None:
    reference = tiny_llama()
    model = _perturbed(reference)

    def forbid(module: torch.nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        return output.index_fill(-1, torch.tensor([3]), -math.inf)

    for either in (reference, model):
        either.lm_head.register_forward_hook(forbid)
    ids = torch.randint(4, 64, (2, 16))
    result = evaluate(model, ids, reference)
    assert result.kld is not None
    assert math.isfinite(result.kld)


def test_nan_logits_are_named_not_averaged() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    with pytest.raises(GPTQError, match="the model's logits are NaN"):
        evaluate(model, torch.randint(64, (1, 16)))


def test_windows_longer_than_the_model_can_read_are_refused() -> None:
    with pytest.raises(GPTQError, match="exceed the model's 32 positions; use a smaller seqlen"):
        evaluate(tiny_llama(), torch.randint(64, (1, 33)))


def test_a_reference_with_another_vocabulary_is_refused() -> None:
    with pytest.raises(GPTQError, match="must have the same vocabulary"):
        evaluate(tiny_llama(), torch.randint(64, (1, 16)), tiny_llama(vocab_size=96))
    with pytest.raises(GPTQError, match="outside the model's vocabulary of 64"):
        evaluate(tiny_llama(), torch.full((1, 16), 64))


def test_windows_come_from_the_start_of_the_text_and_a_short_text_is_refused() -> None:
    def tokenizer(text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}

    assert cut_windows("abcdefghij", tokenizer, 4, 1).tolist() == [[97, 98, 99, 100]]
    assert cut_windows("abcdefghij", tokenizer, 4, 9).shape == (2, 4)
    with pytest.raises(GPTQError, match="3 tokens, fewer than one window of seqlen=4"):
        cut_windows("abc", tokenizer, 4, 1)
    with pytest.raises(GPTQError, match="nothing to predict"):
        cut_windows("abc", tokenizer, 1, 1)


def test_a_missing_folder_is_not_taken_for_a_name_on_a_hub(tmp_path: Path) -> None:
    for name in (f"{tmp_path}/nowhere", "./nowhere", "~/nowhere", "some/where/else"):
        with pytest.raises(GPTQError, match="does not exist"):
            require_model(name)
    with pytest.raises(GPTQError, match=r"no config\.json"):
        require_model(str(tmp_path))


def test_what_could_be_a_name_is_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def model_info(self: HfApi, name: str, **_: object) -> None:
        asked.append(name)
        if name == "nobody/nothing":
            raise ConnectionError("no route")

    monkeypatch.setattr(HfApi, "model_info", model_info)
    require_model("owner/name")
    with pytest.raises(GPTQError, match="no folder nobody/nothing exists, and the hub could not be reached: no route"):
        require_model("nobody/nothing")
    assert asked == ["owner/name", "nobody/nothing"]
    monkeypatch.undo()
    with pytest.raises(GPTQError, match="no folder not a name exists, and the hub has no model of that name"):
        require_model("not a name")


def test_a_device_that_torch_cannot_use_is_refused() -> None:
    require_device("cpu")
    for name in ("abacus", "cuda:99", "meta", ""):
        with pytest.raises(GPTQError, match=f"device '{name}' cannot be used here"):
            require_device(name)


def test_quantized_is_what_any_of_the_config_files_says(tmp_path: Path) -> None:
    folder = tmp_path
    (folder / "config.json").write_text("{}")
    assert not is_quantized(folder)
    (folder / "config.json").write_text('{"quantization_config": null, "text_config": {"quantization_config": null}}')
    assert not is_quantized(folder), "a key without settings counts"
    (folder / "config.json").write_text('{"text_config": {"quantization_config": {"bits": 4}}}')
    assert is_quantized(folder)
    (folder / "config.json").write_text("{}")
    (folder / "quantize_config.json").write_text("{}")
    assert is_quantized(folder)
    (folder / "quantize_config.json").unlink()
    (folder / "config.json").write_text("{")
    with pytest.raises(GPTQError, match="not valid JSON"):
        is_quantized(folder)


def test_evaluating_a_folder_with_only_an_adapter_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "x"}')
    with pytest.raises(GPTQError, match=r"holds an adapter .* merge_and_unload"):
        load_model(tmp_path)
