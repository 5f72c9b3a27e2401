"""The command ``quantize`` as a user types it: what it writes, prints and reports."""

from __future__ import annotations

import errno
import json
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from gptq_backend import LayerReport
from gptq_backend.kernels import reference
from gptq_backend.kernels import table as kernels
from gptq_cli import run_progress, terminal
from gptq_cli.formatting import percent, significant
from tests.cli.command import SMALL, TEXT, error, run


def test_quantize_writes_a_checkpoint_that_loads_and_both_reports(original: Path, quantized: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(quantized)
    assert type(model.model.layers[1].mlp.down_proj).__name__ == "QuantLinear"
    report = json.loads((quantized / "quantize_report.json").read_text())
    assert report == json.loads((original.parent / "result.json").read_text())
    assert len(report["layers"]) == report["modules"] == 14
    assert {layer["method"] for layer in report["layers"]} == {"cholesky"}
    assert report["calibration"] == {"file": str(TEXT), "samples": 4, "seqlen": 32, "seed": 0, "tokens": 128}
    assert 0 < report["bytes_after"] < report["bytes_before"]
    assert report["evaluation"]["windows"] == 4
    assert 0 < report["evaluation"]["kld"] < 0.1
    assert all(layer["steps"][0]["name"] == "loop" for layer in report["layers"])
    assert AutoTokenizer.from_pretrained(quantized)("x") == AutoTokenizer.from_pretrained(original)("x")


def test_the_page_shows_every_module_and_fetches_nothing(quantized: Path) -> None:
    page = (quantized / "quantize_report.html").read_text()
    report = json.loads((quantized / "quantize_report.json").read_text())
    bars = re.findall(r"<rect[^>]*><title>([^:]+):", page)
    assert sorted(bars) == sorted(layer["name"] for layer in report["layers"])
    assert not re.search(r"https?://|<script|<link|@import|src=", page)
    assert "nan" not in page.lower().replace("finance", "")


def test_json_on_stdout_is_alone_there(original: Path, quantized: Path, tmp_path: Path) -> None:
    commands = [
        ["quantize", original, tmp_path / "out", "--rtn", "--group-size", "32"],
        ["eval", quantized, "--reference", original, "--text", TEXT, "--seqlen", "32", "--windows", "2"],
        ["inspect", quantized],
    ]
    for command in commands:
        result = run(*command, "--json", "-")
        assert result.exit_code == 0, result.output
        assert isinstance(json.loads(result.stdout), dict)


def test_rtn_takes_no_text_and_says_so(original: Path, tmp_path: Path) -> None:
    result = run("quantize", original, tmp_path / "out", "--rtn", "--group-size", "32", "--asym", "--bits", "8")
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out" / "quantize_report.json").read_text())
    assert report["calibration"] is None
    assert {layer["method"] for layer in report["layers"]} == {"rtn"}
    assert (report["settings"]["bits"], report["settings"]["sym"]) == (8, False)


def test_options_reach_the_checkpoint(original: Path, tmp_path: Path) -> None:
    rules = json.dumps({"-:.*o_proj": {}, ".*up_proj": {"bits": 8}})
    options = ["--desc-act", "--format", "gptq_v2", "--dynamic", rules, "--damp-percent", "0.02", "--lm-head"]
    result = run("quantize", original, tmp_path / "out", *SMALL, "--calibration", TEXT, *options)
    assert result.exit_code == 0, result.output
    found = json.loads(run("inspect", tmp_path / "out", "--json", "-").stdout)
    modules = {module["name"]: module for module in found["modules"]}
    assert len(modules) == 13
    assert modules["lm_head"]["act_order"]
    assert modules["model.layers.1.mlp.up_proj"]["bits"] == 8
    assert not any("o_proj" in name for name in modules)
    assert found["settings"]["checkpoint_format"] == "gptq_v2"
    assert found["odd"] == []


def test_quantize_without_calibration_names_both_ways_out(original: Path, tmp_path: Path) -> None:
    for options in ([], ["--calibration", TEXT, "--rtn"]):
        result = run("quantize", original, tmp_path / "out", *options)
        assert result.exit_code == 2
        assert "--calibration" in result.stderr
        assert "--rtn" in result.stderr
    assert run("eval", original).exit_code == 2


def test_the_folder_that_the_user_stands_in_can_be_written(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    shutil.copytree(original, tmp_path / "model")
    for again in ([], ["--overwrite"]):
        monkeypatch.chdir(out)
        result = run("quantize", "../model", ".", *SMALL, "--calibration", TEXT, "--json", "result.json", *again)
        assert result.exit_code == 0, result.output
        assert Path.cwd() == out.resolve()
        assert json.loads((out / "result.json").read_text())["evaluation"]["windows"] == 4
        assert (out / "quantize_report.html").is_file()


def test_an_output_without_a_name_is_wrong_usage(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").touch()
    monkeypatch.chdir(tmp_path)
    result = run("quantize", original, "", "--rtn", "--overwrite")
    assert result.exit_code == 2
    assert "OUT is empty" in result.stderr
    assert (tmp_path / "mine").exists()


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_that_torch_would_not_take_is_wrong_usage(original: Path, tmp_path: Path, seed: int) -> None:
    result = run("quantize", original, tmp_path / "out", "--calibration", TEXT, "--seed", seed)
    assert result.exit_code == 2
    assert "--seed" in result.stderr


def test_calibration_lines_are_json_lines_and_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    lines, whole = tmp_path / "x.jsonl", tmp_path / "x.txt"
    texts = ["one\u2028two", "three\u2029", "\u0085four", "five \N{GRINNING FACE}"]
    entries = [json.dumps(text, ensure_ascii=False) for text in texts] + [r'{"text": "\ud83d\ude00"}']
    for end, mark in (("\n", ""), ("\r\n", "\ufeff")):
        lines.write_bytes((mark + end.join([*entries, ""])).encode())
        assert terminal.read_calibration(lines) == [*texts, "\N{GRINNING FACE}"]
    whole.write_bytes("\ufefftext".encode())
    assert terminal.read_calibration(whole) == ["text"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "x.jsonl has no text in it"),
        ("\n \n", "x.jsonl has no text in it"),
        ('"fine"\n{"text": "\\ud800"}\n', "x.jsonl, line 2: half of a surrogate pair"),
        ('"fine"\n' + "[" * 200_000, "x.jsonl, line 2: expected a JSON string"),
    ],
)
def test_calibration_lines_without_usable_text_are_refused_by_name(
    original: Path, tmp_path: Path, content: str, message: str
) -> None:
    (tmp_path / "x.jsonl").write_text(content)
    for options in (["--calibration", tmp_path / "x.jsonl"], ["--calibration", "auto", "--text", tmp_path / "x.jsonl"]):
        assert message in error(run("quantize", original, tmp_path / "out", *options))


def test_the_reports_tell_how_the_training_went(original: Path, tmp_path: Path) -> None:
    options = ["--quality", "best", "--distill-epochs", "1", "--batch-size", "1", "--kld-windows", "0"]
    result = run("quantize", original, tmp_path / "out", *SMALL, "--calibration", TEXT, *options)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out" / "quantize_report.json").read_text())
    page = (tmp_path / "out" / "quantize_report.html").read_text()
    for found in (*report["blocks"], report["distillation"]):
        assert found["kept"] == (found["after"] < found["before"])
    for block in report["blocks"]:
        assert f"<td>{block['name']}</td><td>{percent(block['before'])}</td><td>{percent(block['after'])}</td>" in page
    assert f"training of blocks: {sum(block['kept'] for block in report['blocks'])} of 2 are nearer" in result.stdout
    found = report["distillation"]
    assert re.search(r"(\d+)/\1 distillation: divergence \d\S*[1-9]\S*, 0\.0 s left", result.stderr)
    shown = f"{significant(found['before'])} -> {significant(found['after'])}"
    assert f"distillation: held-out KL divergence {shown}" in result.stdout
    assert shown.replace("->", "→") in page
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "no progress is left"


def test_an_interrupted_training_says_that_it_can_go_on_and_does(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--quality", "best", "--distill-epochs", "1", "--batch-size", "1", "--kld-windows", "0"]
    command = ["quantize", original, tmp_path / "out", *SMALL, "--calibration", TEXT, *options]

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_progress.RunProgress, "training_step", interrupt)
        result = run(*command)
    assert result.exit_code == 130
    said = "".join(result.stderr.split())
    assert f"{tmp_path}/out.progresskeepswhatwasdone" in said
    assert [path.name for path in tmp_path.iterdir()] == ["out.progress"]
    resumed = run(*command)
    assert resumed.exit_code == 0, resumed.output
    assert "going on with what an earlier run kept" in " ".join(resumed.stderr.split())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert run(*command[:2], tmp_path / "whole", *command[3:]).exit_code == 0
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "whole"))
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())


@pytest.mark.parametrize("options", [["--quality", "best"], ["--block-epochs", "1"], ["--distill-epochs", "1"]])
def test_rounding_to_nearest_refuses_to_be_distilled(original: Path, tmp_path: Path, options: list[str]) -> None:
    result = run("quantize", original, tmp_path / "out", "--rtn", *options)
    assert result.exit_code == 2
    assert "--rtn has none" in " ".join(result.stderr.split())


def test_quantize_does_not_warn_of_slow_kernels(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "KERNELS", [reference.KERNEL])
    kernels._warn_once.cache_clear()
    result = run("quantize", original, tmp_path / "out", "--rtn", "--group-size", "32")
    assert result.exit_code == 0, result.output
    assert "reference kernel" not in result.stderr
    kernels._warn_once.cache_clear()
    result = run("eval", tmp_path / "out", "--text", TEXT, "--seqlen", "32", "--windows", "1")
    assert "reference kernel" in result.stderr


def test_only_errors_of_the_user_are_explained() -> None:
    assert terminal.explain(FileNotFoundError(errno.ENOENT, "No such file or directory", "x")) == (
        "x: No such file or directory"
    )
    assert "no space left" in str(terminal.explain(OSError(errno.ENOSPC, "No space left on device")))
    assert terminal.explain(BrokenPipeError(errno.EPIPE, "Broken pipe")) is None
    assert terminal.explain(AssertionError("a bug")) is None


def test_tools_are_told_what_happens_one_object_per_line(original: Path, tmp_path: Path) -> None:
    command = ["quantize", original, tmp_path / "out", *SMALL, "--calibration", TEXT, "--quality", "fast"]
    result = run(*command, "--json-lines", "--kld-windows", 0)
    assert result.exit_code == 0, result.output
    told = [json.loads(line) for line in result.stdout.splitlines()]
    kinds = [each["event"] for each in told]
    assert kinds == ["start", *(["layer"] * 7 + ["block"]) * 2, "result"]
    assert told[0] == {"event": "start", "blocks": 2, "layers": 14}
    blocks = [each for each in told if each["event"] == "block"]
    assert [each["blocks_done"] for each in blocks] == [1, 2]
    assert [each["layers_done"] for each in blocks] == [7, 14]
    assert blocks[0]["seconds_left"] > 0
    assert blocks[1]["seconds_left"] == 0
    assert all(0 < each["memory_bytes"] <= each["peak_memory_bytes"] for each in blocks)
    assert told[-1]["report"]["modules"] == 14
    assert "14 modules in" in result.stderr
    assert re.search(r"block 1/2 \S+ done, 7/14 layers, \S+ s left, memory \S+ [MG]B \(at most", result.stderr)


def test_json_lines_and_json_do_not_share_stdout(original: Path, tmp_path: Path) -> None:
    result = run("quantize", original, tmp_path / "out", "--rtn", "--json-lines", "--json", "-")
    assert result.exit_code == 2
    assert "both write to stdout" in result.stderr


def test_an_interrupted_command_goes_on_or_begins_anew(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["quantize", original, tmp_path / "out", *SMALL, "--calibration", TEXT, "--quality", "fast"]
    command += ["--kld-windows", 0, "--json-lines", "--overwrite"]
    shown = run_progress.RunProgress.layer_done

    def interrupt(self: run_progress.RunProgress, layer: LayerReport, done: int, total: int) -> None:
        shown(self, layer, done, total)
        if done == 9:
            signal.raise_signal(signal.SIGINT)

    for options, expected in (([], [True, False]), (["--no-resume"], [False, False])):
        with monkeypatch.context() as patch:
            patch.setattr(run_progress.RunProgress, "layer_done", interrupt)
            assert run(*command).exit_code == 130
        result = run(*command, *options)
        assert result.exit_code == 0, result.output
        told = [json.loads(line) for line in result.stdout.splitlines()]
        blocks = [each for each in told if each["event"] == "block"]
        assert [each["restored"] for each in blocks] == expected
        if expected[0]:
            assert blocks[0]["seconds_left"] is None  # this run has done nothing yet
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
