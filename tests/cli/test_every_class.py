"""Models of every kind: quantized by the command, loaded by the plain auto class, compared with the original."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from torch import nn
from transformers import AutoModel, PreTrainedTokenizerFast

import gptq_transformers
from gptq_backend import QuantizeConfig, QuantLinear
from gptq_backend.model import find_blocks
from tests.cli.command import CHECKPOINTS, TEXT, run

VOCABULARY = 320  # the tokenizer's 259, and marks of pictures
IMAGE = 300
PLACE = slice(5, 9)  # of the marks in ids [1, 20]
TEXT_PART: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
STACKS = {f"{side}_{key}": value for side in ("encoder", "decoder")
          for key, value in {"layers": 2, "attention_heads": 4, "ffn_dim": 96}.items()}  # fmt: skip
MROPE = {"rope_type": "default", "type": "mrope", "mrope_section": [2, 3, 3]}


def ids(with_image: bool = False) -> torch.Tensor:
    found = torch.randint(3, 250, (1, 20), generator=torch.Generator().manual_seed(9))
    if with_image:
        found[0, PLACE] = IMAGE
    return found


def config_of(name: str, **settings: Any) -> Any:
    kind = getattr(transformers, name, None)
    if kind is None:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    return kind(**settings)


def qwen_vl(name: str, vision: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    marks = {"image_token_id": IMAGE, "video_token_id": 301, "vision_start_token_id": 302, "vision_end_token_id": 303}
    text = {**TEXT_PART, "rope_scaling": MROPE, "rope_theta": 10000.0}
    read = ids(True)
    read[0, 4], read[0, 9] = 302, 303
    call = {"input_ids": read, "image_grid_thw": torch.tensor([[1, 4, 4]]), "mm_token_type_ids": (read == IMAGE).int()}
    config = config_of(f"{name}Config", text_config=text, vision_config=vision, **marks)
    patch = config.vision_config.patch_size
    return config, {**call, "pixel_values": torch.randn(16, 3 * 2 * patch * patch)}


def qwen2_5_vl() -> tuple[Any, dict[str, Any]]:
    sizes = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64}
    return qwen_vl("Qwen2_5_VL", {**sizes, "patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1]})


def qwen3_vl() -> tuple[Any, dict[str, Any]]:
    sizes = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64}
    more = {"patch_size": 8, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    return qwen_vl("Qwen3VL", {**sizes, **more})


def seen(config: Any, **more: torch.Tensor) -> tuple[Any, dict[str, Any]]:
    return config, {"input_ids": ids(True), "pixel_values": torch.randn(1, 3, 28, 28), **more}


def gemma3() -> tuple[Any, dict[str, Any]]:
    marks = {"image_token_index": IMAGE, "image_token_id": IMAGE, "boi_token_index": 301, "eoi_token_index": 302}
    text = {**TEXT_PART, "sliding_window": 16}
    config = config_of("Gemma3Config", text_config=text, vision_config=VISION, mm_tokens_per_image=4, **marks)
    return seen(config, token_type_ids=(ids(True) == IMAGE).long())


def gemma4() -> tuple[Any, dict[str, Any]]:
    kinds = ["sliding_attention", "full_attention"]
    text = {**TEXT_PART, "sliding_window": 16, "layer_types": kinds, "hidden_size_per_layer_input": 0}
    text |= {"num_kv_shared_layers": 0, "global_head_dim": 16}
    return config_of("Gemma4TextConfig", **text), {"input_ids": ids()}


def llava_onevision() -> tuple[Any, dict[str, Any]]:
    """Shaped like the 0.5B: the tower that sees is the heavier one."""
    vision = config_of("SiglipVisionConfig", **{**VISION, "hidden_size": 96, "intermediate_size": 384})
    text = config_of("Qwen2Config", **TEXT_PART)
    more = {"image_token_index": IMAGE, "image_token_id": IMAGE, "vision_feature_layer": -1}
    return config_of("LlavaOnevisionConfig", vision_config=vision, text_config=text, **more), {"input_ids": ids()}


def whisper() -> tuple[Any, dict[str, Any]]:
    sizes = {"d_model": 64, "num_mel_bins": 16, "max_source_positions": 30, "max_target_positions": 40}
    marks = {"pad_token_id": 0, "bos_token_id": 1, "decoder_start_token_id": 1, "eos_token_id": 2}
    config = config_of("WhisperConfig", vocab_size=VOCABULARY, **sizes, **marks, **STACKS)
    return config, {"input_features": torch.randn(1, 16, 60), "decoder_input_ids": ids()[:, :7]}


def t5() -> tuple[Any, dict[str, Any]]:
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
    return config_of("T5Config", vocab_size=VOCABULARY, **sizes), both()


def bart() -> tuple[Any, dict[str, Any]]:
    return config_of("BartConfig", vocab_size=VOCABULARY, d_model=64, max_position_embeddings=64, **STACKS), both()


def both() -> dict[str, Any]:
    return {"input_ids": ids(), "decoder_input_ids": ids()[:, :7]}


def qwen3(labels: int = 3) -> tuple[Any, dict[str, Any]]:
    several = torch.cat([ids().roll(i, 1) for i in range(8)])
    return config_of("Qwen3Config", **TEXT_PART, num_labels=labels), {"input_ids": several}


# class; its configuration and a call; the auto class that loads it; layers to quantize
KINDS: dict[str, tuple[str, Callable[[], Any], str, int]] = {
    "qwen2.5-vl": ("Qwen2_5_VLForConditionalGeneration", qwen2_5_vl, "AutoModelForImageTextToText", 14),
    "qwen3-vl": ("Qwen3VLForConditionalGeneration", qwen3_vl, "AutoModelForImageTextToText", 14),
    "gemma3": ("Gemma3ForConditionalGeneration", gemma3, "AutoModelForImageTextToText", 14),
    "gemma4": ("Gemma4ForCausalLM", gemma4, "AutoModelForCausalLM", 14),
    "llava-onevision": ("LlavaOnevisionForConditionalGeneration", llava_onevision, "AutoModelForImageTextToText", 14),
    "whisper": ("WhisperForConditionalGeneration", whisper, "AutoModelForSpeechSeq2Seq", 32),
    "t5": ("T5ForConditionalGeneration", t5, "AutoModelForSeq2SeqLM", 32),
    "bart": ("BartForConditionalGeneration", bart, "AutoModelForSeq2SeqLM", 32),
    "classifier": ("Qwen3ForSequenceClassification", qwen3, "AutoModelForSequenceClassification", 14),
    "reward": ("Qwen3ForSequenceClassification", lambda: qwen3(1), "AutoModelForSequenceClassification", 14),
    "embedding": ("Qwen3Model", qwen3, "AutoModel", 14),
}


def save(folder: Path, model: nn.Module) -> Path:
    """The model, with weights that all matter, and a tokenizer."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.08)
    model.save_pretrained(folder)  # type: ignore[operator]
    file = str(CHECKPOINTS / "llama-4-32-sym" / "tokenizer.json")
    PreTrainedTokenizerFast(tokenizer_file=file).save_pretrained(folder)
    return folder


@torch.no_grad()
def output(model: nn.Module, call: dict[str, Any]) -> torch.Tensor:
    found = model.eval()(**{key: value for key, value in call.items() if takes(model, key)})
    return (found.logits if hasattr(found, "logits") else found.last_hidden_state).float()


def takes(model: nn.Module, key: str) -> bool:
    return key in inspect.signature(model.forward).parameters


def layers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, QuantLinear)]


def folder_of(kind: str, tmp_path: Path) -> tuple[nn.Module, dict[str, Any], Path]:
    """A model of the kind, what to call it with, and its folder."""
    name, build, *_ = KINDS[kind]
    torch.manual_seed(0)
    config, call = build()
    original = getattr(transformers, name)(config)
    return original, call, save(tmp_path / "source", original)


@pytest.mark.parametrize("kind", KINDS)
def test_quantized_by_the_command_and_loaded_by_its_auto_class(kind: str, tmp_path: Path) -> None:
    name, _, auto, expected = KINDS[kind]
    original, call, source = folder_of(kind, tmp_path)
    samples = ["--samples", "8", "--seqlen", "32", "--kld-windows", "0"]
    options = ["--bits", "8", "--group-size", "32", "--quality", "fast", *samples]
    result = run("quantize", source, tmp_path / "out", *options, "--calibration", TEXT)
    assert result.exit_code == 0, result.output
    loaded = getattr(transformers, auto).from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert type(loaded).__name__ == name
    assert len(layers(loaded)) == expected
    assert not any("vision" in layer or "visual" in layer for layer in layers(loaded))
    before, after = output(original, call), output(loaded, call)
    assert (after - before).norm() < 0.03 * before.norm()
    settings = QuantizeConfig(bits=8, group_size=32, quality="fast")
    made, _ = gptq_transformers.quantize(source, settings, TEXT.read_text(), samples=8, seqlen=32)
    torch.testing.assert_close(output(made, call), after, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["t5", "whisper", "qwen2.5-vl", "bart", "classifier"])
def test_quantized_while_it_is_loaded_and_saved(kind: str, tmp_path: Path) -> None:
    _, _, auto, expected = KINDS[kind]
    original, call, source = folder_of(kind, tmp_path)
    settings = transformers.GPTQConfig(
        bits=8, group_size=32, dataset=[TEXT.read_text()[:600]], tokenizer=str(source), model_seqlen=32
    )
    load = getattr(transformers, auto).from_pretrained
    made = load(source, quantization_config=settings, dtype=torch.float32)
    assert len(layers(made)) == expected
    before, after = output(original, call), output(made, call)
    assert (after - before).norm() < 0.03 * before.norm()
    made.save_pretrained(tmp_path / "out")
    torch.testing.assert_close(output(load(tmp_path / "out", dtype=torch.float32), call), after, rtol=1e-4, atol=1e-4)


def test_the_tower_that_reads_is_chosen_at_the_sizes_of_llava_onevision_0_5b() -> None:
    """Its tower that sees has 396 million linear weights, the one that reads 358 million."""
    sizes = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14}
    text = config_of("Qwen2Config", **sizes, num_key_value_heads=2, vocab_size=152_000)
    sizes = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 26, "num_attention_heads": 16}
    vision = config_of("SiglipVisionConfig", **sizes, image_size=384, patch_size=14)
    with torch.device("meta"):
        kind = transformers.LlavaOnevisionForConditionalGeneration
        model = kind(config_of("LlavaOnevisionConfig", text_config=text, vision_config=vision))
    assert all(".language_model." in name for name in find_blocks(model))


def test_lists_of_blocks_may_be_named_by_the_command(tmp_path: Path) -> None:
    name, build, *_ = KINDS["whisper"]
    source = save(tmp_path / "source", getattr(transformers, name)(build()[0]))
    lists = ["--block-name", "model.decoder.layers", "--block-name", "model.encoder.layers"]
    options = ["--group-size", "32", "--samples", "4", "--seqlen", "16", "--quality", "fast"]
    result = run("quantize", source, tmp_path / "out", *lists, *options, "--calibration", TEXT)
    assert result.exit_code == 0, result.output
    loaded = AutoModel.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert len(layers(loaded)) == 32
