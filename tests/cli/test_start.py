"""The command line starts at once, says what is missing, ends by signals in order, and prints only text."""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("transformers")

from rich.table import Table
from safetensors.torch import load_file, save_file

from gptq_backend import __version__
from gptq_cli import quantize_command as quantizing
from gptq_cli import terminal
from gptq_cli.command_group import unwinding_signals
from gptq_transformers import memory
from tests.cli.command import CHECKPOINTS, SMALL, TEXT, error, run

ROOT = Path(__file__).parents[2]


def python(code: str, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    path = os.pathsep.join([str(ROOT), str(ROOT / "integrations"), *sys.path[1:]])
    environment = os.environ | {"COLUMNS": "200", "PYTHONPATH": path, **variables}
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, cwd=ROOT)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--help"], 0, "Make, measure and examine GPTQ checkpoints"),
        (["--version"], 0, f"gptq-backend {__version__}"),
        (["quantize", "--help"], 0, "--trust-remote-code"),
        (["bench", "gemm", "--help"], 0, "Time y = x @ W.T"),
        (["quantize", "model"], 2, "Missing argument"),
        (["quantize", "model", "out"], 2, "--calibration"),
        (["eval", "model"], 2, "--text FILE"),
        (["nonsense"], 2, "No such command"),
        (["--show-completion"], 0, "gptq"),
    ],
)
def test_help_and_wrong_usage_need_neither_torch_nor_transformers(arguments: list[str], code: int, said: str) -> None:
    done = python(
        """
        import os, sys
        import gptq_cli
        os.environ["_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION"] = "1"
        sys.argv[0] = "gptq-backend"
        if sys.argv[-1] == "--show-completion":
            sys.argv.append("bash")
        try:
            gptq_cli.main()
        finally:
            print(sorted({"torch", "transformers", "safetensors", "numpy"} & set(sys.modules)), file=sys.stderr)
        """,
        *arguments,
    )
    assert done.returncode == code, done.stderr
    assert said in " ".join((done.stdout + done.stderr).split())
    assert done.stderr.splitlines()[-1] == "[]"


@pytest.mark.parametrize("module", ["gptq_cli", "gptq_transformers", "gptq_transformers.cli"])
def test_every_way_to_call_it_is_the_same_program(module: str) -> None:
    done = python("import runpy, sys; runpy.run_module(sys.argv.pop(1), run_name='__main__')", module, "--version")
    assert done.stdout == f"gptq-backend {__version__}\n", done.stderr


def test_the_application_is_still_where_it_was() -> None:
    from gptq_cli.app import app
    from gptq_transformers import cli

    assert cli.app is app


def test_without_the_packages_of_the_extra_one_sentence_says_what_to_install() -> None:
    done = python(
        """
        import importlib.util, sys
        import gptq_cli
        gptq_cli.find_spec = lambda name: None if name in ("typer", "transformers") else importlib.util.find_spec(name)
        sys.exit(gptq_cli.main())
        """
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == (
        "error: gptq-backend needs typer, transformers, not installed here; "
        'install the command line with: pip install "gptq-backend[transformers]"\n'
    )


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_unwinds_once_and_what_is_ignored_stays_ignored(name: str, request: pytest.FixtureRequest) -> None:
    number, before, cleaned = getattr(signal, name), signal.SIG_DFL, []
    outer = signal.signal(number, before)  # nohup ignores SIGHUP
    request.addfinalizer(lambda: signal.signal(number, outer))
    with pytest.raises(SystemExit) as ended, unwinding_signals():
        try:
            signal.raise_signal(number)
        finally:
            signal.raise_signal(number)  # the shell's, after the kernel's
            cleaned.append(True)
    assert ended.value.code == 128 + number
    assert cleaned
    assert signal.getsignal(number) == before
    signal.signal(number, signal.SIG_IGN)
    try:
        with unwinding_signals():
            signal.raise_signal(number)
    finally:
        signal.signal(number, before)


HOSTILE = st.text(st.characters(codec="utf-8") | st.sampled_from("\x00\x07\x08\x1b\x7f\x9b\x9d\u202e\u2066\r\n\t[]"))


@given(HOSTILE)
def test_what_is_printed_steers_no_terminal_and_is_not_markup(text: str) -> None:
    shown = terminal.printable(text)
    assert all(char.isprintable() or char in "\n\t" for char in shown)
    assert terminal.printable(shown) == shown
    target = io.StringIO()
    console = terminal.TerminalConsole()
    console.file, console.width = target, 4000
    table = Table(title=text)
    table.add_column("x")
    table.add_row(text)
    console.print(table)
    console.print(text, soft_wrap=True)
    assert not set(target.getvalue()) & set("\x00\x07\x08\x1b\x7f\x9b\x9d\u202e\u2066\r")


def test_names_from_a_file_are_only_text_in_output_warnings_and_errors(
    original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hostile = shutil.copytree(CHECKPOINTS / "llama-4-32-sym", tmp_path / "hostile")
    tensors = load_file(hostile / "model.safetensors")
    name = next(key for key in tensors if key.endswith("up_proj.qweight")).removesuffix(".qweight")
    for part in ("qweight", "qzeros", "scales", "g_idx"):
        tensors[f"evil\x1b]0;title\x07[red]{name}.{part}"] = tensors.pop(f"{name}.{part}")
    save_file(tensors, hostile / "model.safetensors", {"format": "pt"})
    result = run("inspect", hostile)
    assert "evil\\x1b]0;title\\x07[red]model" in result.output
    assert "\x1b" not in result.output
    assert "\x07" not in result.output
    terminal.set_up_logging(terminal.TerminalConsole())
    logging.getLogger("gptq_backend").warning("about \x1b[2J%s", "[bold]name")
    said = capsys.readouterr().err
    assert "\\x1b[2J[bold]name" in said
    failed = error(run("quantize", tmp_path / "no\x1b[31mne", tmp_path / "out", "--rtn"))
    assert "no\\x1b[31mne does not exist" in failed


@pytest.mark.parametrize(("factor", "dtype"), [(10.0, "float32"), (0.9, "bfloat16"), (0.2, None)])
def test_the_comparison_looks_at_free_memory_first(
    original: Path, quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float, dtype: str | None
) -> None:
    from gptq_transformers.streaming import skeleton

    whole = memory.bytes_of(skeleton(original), torch.float32)
    monkeypatch.setattr(quantizing, "free_bytes", lambda _: int(whole * factor))
    command = ["quantize", original, tmp_path / "out", *SMALL, "--calibration", TEXT, "--quality", "fast"]
    result = run(*command, "--json", tmp_path / "result.json")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "result.json").read_text())["evaluation"]
    said = " ".join(result.stderr.split())
    if dtype is None:
        assert found is None
        assert f"eval {tmp_path}/out --reference {original} --text FILE --dtype bfloat16" in said.replace(
            "out ", "out "
        )
    else:
        assert found["dtype"] == dtype
        assert 0 < found["kld"] < 0.1
    assert ("too little memory for float32" in said) == (dtype == "bfloat16")


def test_the_memory_limit_of_a_container_counts(tmp_path: Path) -> None:
    groups = {"": ("max", 5, 0), "a": ("1000", 700, 100), "a/b": ("2000", 50, 10)}
    for name, (limit, used, cache) in groups.items():
        folder = tmp_path / "cgroup" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 1\ninactive_file {cache}\n")
    membership = tmp_path / "self"
    membership.write_text("1:name=systemd:/x\n0::/a/b\n")
    assert memory._left_in_containers(tmp_path / "cgroup", membership) == [1960, 400]
    assert memory._left_in_containers(tmp_path / "cgroup", tmp_path / "none") == []
    assert memory.free_bytes(torch.device("cpu")) > 0


CONFIGURATION = """
from transformers import LlamaConfig
class OwnConfig(LlamaConfig):
    model_type = "own_code"
"""
MODELING = """
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_a_models_own_code_runs_only_when_asked_for_and_nobody_is_asked(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    model = shutil.copytree(original, tmp_path / "own")
    (model / "configuration_own.py").write_text(CONFIGURATION)
    (model / "modeling_own.py").write_text(MODELING)
    config = json.loads((model / "config.json").read_text())
    code = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    config |= {"model_type": "own_code", "architectures": ["OwnForCausalLM"], "auto_map": code}
    (model / "config.json").write_text(json.dumps(config))
    out = tmp_path / "out"
    commands = [
        ["quantize", model, out, "--rtn", "--group-size", "32"],
        ["quantize", model, out, *SMALL, "--calibration", TEXT, "--quality", "fast", "--overwrite"],
        ["quantize", model, out, *SMALL, "--calibration", "auto", "--kld-windows", "2", "--overwrite"],
        ["eval", model, "--text", TEXT, "--seqlen", "32", "--windows", "1"],
        ["eval", out, "--reference", model, "--text", TEXT, "--seqlen", "32", "--windows", "1"],
    ]
    for command in commands:
        result = run(*command)
        assert result.exit_code == 1, result.output
        last = result.stderr.splitlines()[-1]
        assert "--trust-remote-code" in last
        assert last.startswith(f"error: {command[1]} ") or f" {command[1]} (" in last, last
        result = run(*command, "--trust-remote-code")
        assert result.exit_code == 0, result.output
        assert "could not be compared" not in result.output
    assert (out / "modeling_own.py").is_file()


def test_a_sign_that_the_terminals_encoding_lacks_is_shown_as_an_escape(quantized: Path, original: Path) -> None:
    done = python(
        "import gptq_cli; gptq_cli.main()",
        *("eval", quantized, "--reference", original, "--text", TEXT, "--seqlen", 32, "--windows", 2),
        PYTHONIOENCODING="ascii",
    )
    assert done.returncode == 0, done.stderr
    assert "\\xb1" in done.stdout
