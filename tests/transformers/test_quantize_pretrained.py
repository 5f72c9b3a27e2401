"""quantize() and from_quantized(): a folder in, a folder out, nothing half done."""

import gc
import json
import signal
import subprocess
import sys
import tempfile
import textwrap
import time

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BatchEncoding,
    BlenderbotSmallTokenizer,
    GPTQConfig,
    LlamaConfig,
)

from gptq_backend import CalibrationError, CheckpointError, ConfigError, QuantizeConfig, QuantLinear
from gptq_transformers import calibration_input, from_quantized, quantize
from gptq_transformers.quantize_pretrained import _progress_folder
from tests.toy import listener
from tests.transformers.checkpoints import distance

CONFIG = QuantizeConfig(group_size=32)


@pytest.fixture
def source(tmp_path):
    config = LlamaConfig(
        vocab_size=131, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def samples():
    return list(torch.randint(0, 131, (8, 32)))


def logits(model):
    with torch.no_grad():
        return model.float()(torch.arange(40)[None]).logits


def test_reading_block_by_block_gives_the_same_bits_as_a_model_in_memory(source, samples):
    streamed, _ = quantize(source, CONFIG, samples)
    in_memory, _ = quantize(AutoModelForCausalLM.from_pretrained(source, dtype="auto"), CONFIG, samples)
    expected = in_memory.state_dict()
    assert streamed.state_dict().keys() == expected.keys()
    for name, tensor in streamed.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_only_one_block_is_in_memory_at_a_time(source, samples):
    model = None

    def look(report, done, total):
        nonlocal model
        frame = sys._getframe()
        while "self" not in frame.f_locals or not hasattr(frame.f_locals["self"], "structure"):
            frame = frame.f_back
        blocks = frame.f_locals["self"].structure.blocks
        loaded = [i for i, block in enumerate(blocks) if any(t.module.weight.numel() and not t.module.weight.is_meta
                                                               for t in block.targets)]  # fmt: skip
        assert len(loaded) == 1, loaded

    quantize(source, CONFIG, samples, events=listener(layer_done=look))


def test_what_is_written_loads_and_agrees(source, samples, tmp_path):
    model, report = quantize(source, CONFIG, samples, output=tmp_path / "out")
    assert len(report.layers) == 21
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert distance(logits(again), logits(model)) < 1e-5


def test_blocks_kept_in_16_bits_are_named_for_other_readers(source, samples, tmp_path):
    config = QuantizeConfig(group_size=32, keep_edge_blocks=1)
    _, report = quantize(source, config, samples, output=tmp_path / "out")
    assert {layer.name.split(".")[2] for layer in report.layers} == {"1"}
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert list(written["dynamic"]) == [r"-:model\.layers\.0\.", r"-:model\.layers\.2\."]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert sum(isinstance(module, QuantLinear) for module in loaded.modules()) == 7


def test_an_existing_model_stops_the_run_before_it_starts(source, samples, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").write_text("precious")
    with pytest.raises(CheckpointError, match="not empty"):
        quantize(
            source,
            CONFIG,
            samples,
            output=tmp_path / "out",
            events=listener(layer_done=lambda *_: pytest.fail("it started")),
        )
    assert (tmp_path / "out" / "model.safetensors").read_text() == "precious"


def test_bad_calibration_is_named(source, samples):
    with pytest.raises(CalibrationError, match="empty"):
        quantize(source, CONFIG, [])
    with pytest.raises(CalibrationError, match="vocabulary has 131"):
        quantize(source, CONFIG, [torch.tensor([1, 2, 500])])
    with pytest.raises(CalibrationError, match="at most 64"):
        quantize(source, CONFIG, [torch.ones(65, dtype=torch.long)])
    with pytest.raises(CalibrationError, match="tokenizer"):
        quantize(source, CONFIG, "some text")


def test_a_quantized_model_is_not_quantized_again(source, samples, tmp_path):
    model, _ = quantize(source, CONFIG, samples, output=tmp_path / "out")
    for again in (model, tmp_path / "out"):
        with pytest.raises(ConfigError, match="quantized already"):
            quantize(again, CONFIG, samples)


def test_settings_and_weights_under_autogptq_names_are_found(source, samples, tmp_path):
    model, _ = quantize(source, CONFIG, samples, output=tmp_path / "out")
    folder = tmp_path / "out"
    config = json.loads((folder / "config.json").read_text())
    settings = config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "quantize_config.json").write_text(json.dumps({k: settings[k] for k in ("bits", "group_size", "sym")}))
    (folder / "model.safetensors").rename(folder / "gptq_model-4bit-32g.safetensors")
    loaded = from_quantized(folder, dtype="auto")
    assert loaded.config._name_or_path == str(folder)
    assert distance(logits(loaded), logits(model)) < 1e-5


def _under_old_names(folder, shards=1, suffix=".safetensors", index=False):
    """Give a checkpoint AutoGPTQ's names."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "quantize_config.json").write_text(json.dumps(config.pop("quantization_config")))
    (folder / "config.json").write_text(json.dumps(config))
    tensors = list(load_file(folder / "model.safetensors").items())
    (folder / "model.safetensors").unlink()
    where = {}
    for i in range(shards):
        part = f"-{i + 1:05d}-of-{shards:05d}" if shards > 1 else ""
        path = folder / f"gptq_model-4bit-32g{part}{suffix}"
        content = dict(tensors[i::shards])
        save_file(content, path, {"format": "pt"}) if suffix == ".safetensors" else torch.save(content, path)
        where |= dict.fromkeys(content, path.name)
    if index:
        (folder / f"gptq_model-4bit-32g{suffix}.index.json").write_text(json.dumps({"weight_map": where}))


@pytest.mark.parametrize(
    ("shards", "suffix", "index"), [(1, ".bin", False), (2, ".bin", False), (2, ".safetensors", False),
                                    (2, ".safetensors", True)],
)  # fmt: skip
def test_old_names_are_found_whole_and_in_shards(source, samples, tmp_path, shards, suffix, index):
    model, _ = quantize(source, CONFIG, samples, output=tmp_path / "out")
    _under_old_names(tmp_path / "out", shards, suffix, index)
    assert distance(logits(from_quantized(tmp_path / "out", dtype="auto")), logits(model)) < 1e-5


def test_weights_of_old_names_may_stay_on_disk(source, samples, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    quantize(source, CONFIG, samples, output=tmp_path / "out")
    _under_old_names(tmp_path / "out")
    device_map = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    device_map |= {f"model.layers.{i}": "disk" for i in range(3)}
    model = from_quantized(
        tmp_path / "out", dtype=torch.float32, device_map=device_map, offload_folder=tmp_path / "off"
    )
    whole = from_quantized(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(model(torch.arange(40)[None]).logits, whole(torch.arange(40)[None]).logits)
    del model
    gc.collect()
    assert not list((tmp_path / "temporary").glob("gptq-view-*"))


@pytest.mark.parametrize("method", [None, "GPTQ"])
def test_from_quantized_loads_settings_that_plain_loading_does_not_take_for_gptq(source, tmp_path, method):
    model, _ = quantize(source, CONFIG, None, output=tmp_path / "out")
    _set_method(tmp_path / "out", method)
    assert distance(logits(from_quantized(tmp_path / "out", dtype="auto")), logits(model)) < 1e-5


def test_another_method_is_refused(source, tmp_path):
    quantize(source, CONFIG, None, output=tmp_path / "out")
    _set_method(tmp_path / "out", "hqq")
    with pytest.raises(ConfigError, match="quant_method='hqq' is not supported"):
        from_quantized(tmp_path / "out")


def _set_method(folder, method):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["quant_method"] = method
    (folder / "config.json").write_text(json.dumps(config))


def test_a_model_without_settings_is_refused(source):
    with pytest.raises(ConfigError, match="quantization_config"):
        from_quantized(source)


def test_ctrl_c_leaves_nothing(source, tmp_path):
    script = f"""
        import torch
        from gptq_backend import Events, QuantizeConfig
        from gptq_transformers import quantize
        samples = list(torch.randint(0, 131, (512, 64)))
        events = Events()
        events.layer_done = lambda *_: print("layer", flush=True)
        quantize({str(source)!r}, QuantizeConfig(group_size=32), samples, output={str(tmp_path / "out")!r},
                 events=events)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "layer\n"
    process.send_signal(signal.SIGINT)
    start = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "KeyboardInterrupt" in errors
    assert time.monotonic() - start < 30
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_tensor_a_generator_and_a_stock_config_are_taken(source, samples):
    expected, _ = quantize(source, CONFIG, samples)
    for config, calibration in (
        ({"bits": 4, "group_size": 32}, torch.stack(samples)),
        (GPTQConfig(bits=4, group_size=32, damp_percent=0.15), (ids for ids in samples)),
    ):
        model, _ = quantize(source, config, calibration)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, expected.state_dict()[name]), name


def test_samples_are_drawn_from_token_ids_too(source, samples):
    _, report = quantize(source, CONFIG, samples, samples=2)
    assert {layer.tokens for layer in report.layers} == {64}
    with pytest.raises(CalibrationError, match="seqlen"):
        quantize(source, CONFIG, samples, seqlen=16)


def test_an_output_that_cannot_be_written_stops_the_run_before_it_starts(source, samples, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        quantize(
            source,
            CONFIG,
            samples,
            output=tmp_path / "file" / "out",
            events=listener(layer_done=lambda *_: pytest.fail("started")),
        )


@pytest.mark.parametrize("end", ["", "/", "/."])
def test_progress_lies_beside_the_output_however_it_is_spelled(tmp_path, end):
    assert _progress_folder(f"{tmp_path}/out{end}") == tmp_path.resolve() / "out.progress"


@pytest.mark.parametrize("where", ["source", "."])
@pytest.mark.parametrize("loaded", [True, False])
def test_an_output_that_would_remove_the_original_is_refused(source, samples, tmp_path, where, loaded):
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    model = AutoModelForCausalLM.from_pretrained(source) if loaded else source
    with pytest.raises(CheckpointError, match="the original model"):
        quantize(model, CONFIG, samples, output=tmp_path / where, overwrite=True)
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before


@pytest.mark.parametrize("loaded", [True, False])
def test_generation_settings_that_cannot_be_saved_do_not_lose_the_run(source, samples, tmp_path, loaded):
    given = {"temperature": 0.6, "do_sample": False, "eos_token_id": 7}
    (source / "generation_config.json").write_text(json.dumps(given))
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto") if loaded else source
    model, _ = quantize(model, CONFIG, samples, output=tmp_path / "out")
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert {key: written.get(key, False) for key in given} == given
    assert model.generation_config.temperature == 0.6
    assert from_quantized(tmp_path / "out").generation_config.eos_token_id == 7


def test_what_a_tokenizer_returns_is_calibration_data_and_not_the_words_in_it(source):
    encoded = BatchEncoding({"input_ids": torch.ones(3, 16, dtype=torch.long), "attention_mask": torch.ones(3, 16)})
    _, report = quantize(source, CONFIG, encoded)
    assert {layer.tokens for layer in report.layers} == {48}


@pytest.mark.parametrize("length", [1, 300, 5000])
def test_a_text_that_could_be_no_files_name_is_text(length):
    assert calibration_input.given("x" * length) == "x" * length
    assert calibration_input.given(["x" * length]) == ["x" * length]


def test_the_path_of_a_text_is_not_taken_for_text(source, tmp_path):
    (tmp_path / "text.txt").write_text("some text")
    name = str(tmp_path / "text.txt")
    for path in (tmp_path / "text.txt", name, [name], [name, name]):
        with pytest.raises(CalibrationError, match="is the path .*text.txt"):
            quantize(source, CONFIG, path)


@pytest.mark.parametrize(
    "flat",
    [
        torch.arange(32),
        torch.arange(32).numpy(),
        list(range(32)),
        tuple(range(32)),
        [np.int64(1), np.int64(2)],
        BatchEncoding({"input_ids": list(range(32))})["input_ids"],
        (number for number in range(32)),
        b"bytes",
    ],
)
def test_one_flat_sequence_of_ids_is_refused_before_the_model_is_read(flat, tmp_path):
    with pytest.raises(CalibrationError, match=r"sample 0 is one number .*\[ids\]"):
        quantize(tmp_path / "nowhere", CONFIG, flat)


@pytest.mark.parametrize("value", [5, torch.tensor(5), object()])
def test_what_is_no_sequence_at_all_is_refused(value, tmp_path):
    with pytest.raises(CalibrationError, match=f"calibration is a {type(value).__name__}; expected text"):
        quantize(tmp_path / "nowhere", CONFIG, value)


@pytest.mark.parametrize("error", [TypeError("no vocabulary"), IndexError(), OSError("line one\nline two")])
def test_a_tokenizer_that_cannot_be_made_is_one_sentence_or_no_matter(source, samples, tmp_path, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(calibration_input.AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(CalibrationError, match=r"no tokenizer could be loaded from .* pass tokenizer= or") as raised:
        quantize(source, CONFIG, "some text")
    assert "\n" not in str(raised.value)
    quantize(source, CONFIG, samples, output=tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.parametrize("kind", [BlenderbotSmallTokenizer, transformers.CTRLTokenizer])
def test_a_tokenizer_whose_vocabulary_is_missing_is_no_matter_for_token_ids(source, samples, tmp_path, kind):
    (source / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind.__name__}))
    with pytest.raises(CalibrationError, match="no tokenizer could be loaded from"):
        quantize(source, CONFIG, "some text")
    quantize(source, CONFIG, samples, output=tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.parametrize("kind", ["GPT2Config", "LlamaConfig", "T5Config", "CTRLConfig"])
def test_a_tokenizer_without_a_vocabulary_is_none(kind, tmp_path):
    """transformers 5 makes one up, to which all words are unknown."""
    getattr(transformers, kind)().save_pretrained(tmp_path)
    assert calibration_input.load_tokenizer(tmp_path, required=False) is None
    with pytest.raises(CalibrationError, match="no tokenizer could be loaded from .* pass tokenizer= or token ids"):
        calibration_input.load_tokenizer(tmp_path, required=True)


def test_a_tokenizer_of_bytes_needs_no_files(tmp_path):
    transformers.ByT5Tokenizer().save_pretrained(tmp_path)
    assert len(calibration_input.load_tokenizer(tmp_path, required=True)("some text")["input_ids"]) == 10


@pytest.mark.parametrize("how", ["argument", "dictionary", "GPTQConfig"])
def test_the_list_of_blocks_can_be_named(source, samples, how):
    model = AutoModelForCausalLM.from_pretrained(source)
    model.model.other = torch.nn.ModuleList([torch.nn.Linear(64, 64)])
    name, settings = "model.other", {"bits": 4, "group_size": 32}
    config = {"dictionary": settings | {"block_name_to_quantize": name}, "argument": settings}.get(how)
    config = config or GPTQConfig(**settings, block_name_to_quantize=name)
    named = {"block_name": name} if how == "argument" else {}
    # A list of layers instead of blocks.
    with pytest.raises(ConfigError, match=r"'model.other' is no list of blocks.*: ?.*model.layers"):
        quantize(model, config, samples, **named)


def test_misspelled_settings_are_named(source, samples, caplog):
    quantize(source, {"bits": 4, "group_sise": 32, "dataset": None, "dynamic": {"layers.0": {"bit": 8}}}, samples)
    assert "unknown settings have no effect: group_sise" in caplog.text
    assert "'layers.0' matches the beginning of no layer's full name" in caplog.text
    assert "'layers.0' has unknown settings: bit" in caplog.text


def test_weights_offloaded_beside_the_blocks_are_brought(source, samples, tmp_path):
    on_cpu = ("model.embed_tokens", "model.layers", "model.rotary_emb", "lm_head")
    device_map = {"model.norm": "disk", **dict.fromkeys(on_cpu, "cpu")}
    model = AutoModelForCausalLM.from_pretrained(source, device_map=device_map, offload_folder=tmp_path / "off")
    quantized, _ = quantize(model, CONFIG, samples, output=tmp_path / "out")
    expected, _ = quantize(source, CONFIG, samples)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(quantized.state_dict()[name], tensor), name
