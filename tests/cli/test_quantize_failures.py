"""What the command ``quantize`` says and leaves when it fails: one line, an exit code, nothing half-written."""

from __future__ import annotations

import errno
import json
import shutil
import signal
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from gptq_backend import CheckpointError, LayerReport
from gptq_cli import quantize_command as quantizing
from gptq_cli import run_progress
from tests.cli.command import SMALL, TEXT, error, run
from tests.transformers.checkpoints import VERSION_4


def test_user_errors_are_one_line_and_leave_nothing(original: Path, quantized: Path, tmp_path: Path) -> None:
    out, short = tmp_path / "out", tmp_path / "short.txt"
    short.write_text("too short")
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe\x00\x81")
    bad_lines = tmp_path / "bad.jsonl"
    bad_lines.write_text('{"text": "fine"}\n{"other": 1}\n')
    with_text = ["--calibration", TEXT]
    gguf = tmp_path / "gguf" / "model.gguf"
    gguf.parent.mkdir()
    gguf.write_bytes(b"GGUF")
    other = shutil.copytree(quantized, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors", "format": "float-quantized"}
    (other / "config.json").write_text(json.dumps(config))
    expected = [
        (["quantize", original, out, *with_text, "--bits", "9"], "bits=9 is not supported"),
        (["quantize", original, out, *with_text, "--group-size", "0"], "group_size=0"),
        (["quantize", original, out, *with_text, "--dynamic", "{"], "--dynamic is not valid JSON"),
        (["quantize", original, out, *with_text, "--dynamic", "[" * 20_000], "--dynamic is not valid JSON"),
        (["quantize", original, out, "--calibration", short], "fewer than one window of seqlen=512"),
        (["quantize", original, out, "--calibration", tmp_path / "none.txt"], "is not a file"),
        (["quantize", original, out, "--calibration", "wikitext2"], "save some of its text to a file, or pass --calib"),
        (["quantize", original, out, "--calibration", tmp_path], "is a folder; expected a text file"),
        (["eval", original, "--text", "wikitext2"], "save some of its text to a file"),
        (["quantize", gguf, out, *with_text], "model.gguf FOLDER, or to quantize it, add --to bf16"),
        (["eval", gguf.parent, "--text", TEXT], "model.gguf FOLDER, or to quantize it, add --to bf16"),
        (["quantize", original / "model.safetensors", out, *with_text], "expected the folder that holds the weights"),
        (["inspect", other], "load it with vLLM, or with transformers and the package compressed-tensors"),
        (["quantize", original, out, "--calibration", binary], "is not UTF-8 text"),
        (["quantize", original, out, "--calibration", bad_lines], "line 2: expected a JSON string"),
        (["quantize", tmp_path / "none", out, *with_text], "does not exist"),
        (["quantize", tmp_path, out, *with_text], "holds no config.json"),
        (["quantize", quantized, out, *with_text], "is quantized already"),
        (["quantize", original, tmp_path, "--overwrite", "--calibration", short], "is or holds the text"),
        (["quantize", original, original.parent, "--overwrite", "--rtn"], "is or holds the original model"),
        (["quantize", original, quantized, *SMALL, *with_text], "replace it with --overwrite"),
        (["quantize", original, out, *with_text, "--json", tmp_path / "none" / "x.json"], "its folder does not exist"),
        (["quantize", original, out, *with_text, "--json", tmp_path], "is a folder; expected a file"),
        (["eval", original, "--text", short], "fewer than one window of seqlen=1024"),
        (["eval", original, "--text", TEXT, "--seqlen", "65"], "exceed the model's 64 positions"),
        (["eval", quantized, "--text", TEXT, "--seqlen", "32", "--backend", "nothing"], "nothing"),
        (["eval", original, "--text", TEXT, "--device", "abacus"], "device 'abacus' cannot be used here"),
        (["quantize", original, out, "--rtn", "--device", "abacus"], "device 'abacus' cannot be used here"),
        (["eval", original, "--text", TEXT, "--device", "cuda:99"], "device 'cuda:99' cannot be used here"),
        (["inspect", original], "no quantization settings"),
        (["inspect", tmp_path / "none"], "is not a folder"),
        (["inspect", quantized, "--device", "abacus"], "--device abacus is not a device"),
    ]
    for command, message in expected:
        assert message in error(run(*command)), command
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl", "binary.txt", "gguf", "other", "short.txt"]


def test_ctrl_c_in_the_middle_exits_130_and_leaves_nothing(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = run_progress.RunProgress.layer_done

    def interrupt(self: run_progress.RunProgress, layer: LayerReport, done: int, total: int) -> None:
        shown(self, layer, done, total)
        if done == 5:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(run_progress.RunProgress, "layer_done", interrupt)
    result = run("quantize", original, tmp_path / "out", *SMALL, "--calibration", TEXT)
    assert result.exit_code == 130
    assert "interrupted" in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_while_overwriting_keeps_the_old_checkpoint(
    original: Path, quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shutil.copytree(quantized, tmp_path / "out")
    before = (out / "model.safetensors").read_bytes()

    def interrupt(self: LlamaForCausalLM, folder: Path, **_: object) -> None:
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", interrupt)
    result = run("quantize", original, out, "--rtn", "--group-size", "32", "--overwrite")
    assert result.exit_code == 130
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.progress"}
    assert (out / "model.safetensors").read_bytes() == before


def test_a_full_disk_is_one_sentence(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: LlamaForCausalLM, folder: Path, **_: object) -> None:
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", full)
    result = run("quantize", original, tmp_path / "out", "--rtn", "--group-size", "32")
    assert result.exit_code == 1
    assert "no space left on the disk" in result.stderr.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["out.progress"]


def test_a_report_that_cannot_be_written_leaves_the_checkpoint(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(quantizing, "write_reports", full)
    result = run("quantize", original, tmp_path / "out", "--rtn", "--group-size", "32")
    assert result.exit_code == 1
    last = result.stderr.splitlines()[-1]
    assert f"the checkpoint in {tmp_path / 'out'} is complete, but a report could not be written: no space" in last
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize("kind", ["error of ours", "GPU memory", "CPU memory"])
def test_a_comparison_that_fails_is_a_warning_and_the_reports_are_there(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    def fail(*_: object) -> None:
        assert (tmp_path / "out" / "quantize_report.json").is_file(), "an interruption would leave no report"
        if kind == "CPU memory":
            torch.empty(10**15)
        raise CheckpointError("no logits") if kind == "error of ours" else torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("gptq_cli.evaluate.evaluate", fail)
    command = ["quantize", original, tmp_path / "out", *SMALL, "--calibration", TEXT, "--quality", "fast"]
    result = run(*command, "--json", tmp_path / "result.json")
    assert result.exit_code == 0, result.output
    warning = " ".join(result.stderr.split())  # lines are wrapped
    assert "could not be compared" in warning
    assert ("no logits" if kind == "error of ours" else "out of memory; use a smaller") in warning
    assert "14 modules in" in result.stdout
    for file in (tmp_path / "result.json", tmp_path / "out" / "quantize_report.json"):
        assert json.loads(file.read_text())["evaluation"] is None


def test_a_bug_is_not_taken_for_a_damaged_model(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("shapes do not match")

    places = (
        "gptq_transformers.quantize_pretrained.quantize_model",
        "gptq_transformers.calibration_input.tokenize",
        "gptq_cli.evaluate.evaluate",
    )
    for place in places:
        with monkeypatch.context() as patch:
            patch.setattr(place, fail)
            result = run("quantize", original, tmp_path / "out", *SMALL, "--calibration", TEXT, "--overwrite")
            assert isinstance(result.exception, RuntimeError), f"{place}: {result.output}"
            assert "cannot be loaded" not in result.stderr
            result = run("eval", original, "--text", TEXT, "--seqlen", "32", "--windows", "2")
            assert isinstance(result.exception, RuntimeError) == ("evaluate" in place), place


@pytest.mark.parametrize("damage", ["config", "model type", "no weights", "cut weights", "no tensor", "shape"])
def test_a_model_that_cannot_be_loaded_is_named(original: Path, tmp_path: Path, damage: str) -> None:
    model = shutil.copytree(original, tmp_path / "model")
    weights, config = model / "model.safetensors", json.loads((model / "config.json").read_text())
    name = "model.layers.1.mlp.up_proj.weight"
    if damage == "config":
        (model / "config.json").write_text("{")
    elif damage == "model type":
        (model / "config.json").write_text(json.dumps({**config, "model_type": "abacus"}))
    elif damage == "no weights":
        weights.unlink()
    elif damage == "cut weights":
        weights.write_bytes(weights.read_bytes()[:-100])
    else:
        tensors = load_file(weights)
        tensor = tensors.pop(name)
        if damage == "shape":
            tensors[name] = tensor[:50].clone()
        save_file(tensors, weights, {"format": "pt"})
    for options in (["--rtn"], [*SMALL, "--calibration", TEXT]):
        result = run("quantize", model, tmp_path / "out", "--group-size", "32", *options)
        assert result.exit_code == 1, result.output
        last = result.stderr.splitlines()[-1]  # before it, blocks may have been quantized
        found = (
            f"error: {model} cannot be loaded: ",
            f"error: the files of {model} lack 1 weights",
            f"error: no tokenizer could be loaded from {model} (",
        )
        assert last.startswith(found), last
    # transformers 4 meets a wrong shape when the block's turn comes; finished blocks are kept.
    kept = {"out.progress"} if VERSION_4 and damage == "shape" else set()
    assert {path.name for path in tmp_path.iterdir()} == {"model"} | kept
