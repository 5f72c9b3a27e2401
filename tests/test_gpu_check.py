"""`make gpu-check` without a GPU: its time, what it writes, and that no step takes the others with it."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from _pytest.mark.expression import Expression

ROOT = Path(__file__).parents[1]
KEY = {"device": "none", "sources": "0123"}


@pytest.fixture(scope="module")
def check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", ROOT / ".ci" / "gpu_check.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["gpu_check"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs phases -> names of the steps that did not pass, and the lines of the file, oldest first."""
    monkeypatch.setattr(check, "BUILD", tmp_path / "build")
    path = tmp_path / "results" / "check.jsonl"

    def call(*phases: list[Any], key: dict[str, str] = KEY, seconds: float = 60, dry: bool = False) -> Any:
        runner = check.Runner(check.Results(path, key), seconds, dry, say=lambda text: None)
        return runner.run(phases), [json.loads(line) for line in path.read_text().splitlines()]

    call.path = path  # type: ignore[attr-defined]
    return call


def python(check: ModuleType, name: str, code: str, limit: float = 30, **how: Any) -> Any:
    return check.Step(name, limit, (check.PYTHON, "-c", code, check.JSON), **how)


@pytest.mark.parametrize("wheels", [None, "."])
def test_all_limits_together_are_fifteen_minutes(check: ModuleType, wheels: str | None) -> None:
    phases = check.plan(["some.module:function"], wheels)
    names = [step.name for phase in phases for step in phase]
    assert len(set(names)) == len(names)
    assert check.planned_seconds(phases) <= check.ALL_SECONDS == 900
    order = ["build", "machine-code-4", "tests-tiny", "plans-4096x4096", "gemm-cuda", "decode-7b", "quantize-7b"]
    assert sorted(order, key=names.index) == order


def test_every_test_for_a_gpu_is_in_one_step(check: ModuleType) -> None:
    files = [check.CUDA_TESTS, "tests/gpu/test_quantize.py", check.TRITON_TESTS]
    collect = [sys.executable, "-m", "pytest", "-m", "gpu", "--collect-only", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(collect, cwd=ROOT, capture_output=True, text=True)
    tests = [line for line in done.stdout.splitlines() if "::" in line]
    assert len(tests) > 80, done.stdout
    commands = [
        step.command for phase in check.plan() for step in phase if step.command[: len(check.PYTEST)] == check.PYTEST
    ]
    for test in tests:
        steps = [command for command in commands if selects(command, test)]
        assert len(steps) == 1, (test, steps)


def selects(command: tuple[str, ...], test: str) -> bool:
    """Whether this call of pytest runs the test."""
    file, _, name = test.partition("::")
    if file not in command or "-k" not in command:
        return file in command
    return Expression.compile(command[-1]).evaluate(lambda word: word.lower() in name.lower())


def test_a_step_that_fails_crashes_or_hangs_is_recorded_and_the_others_run(check: ModuleType, run: Any) -> None:
    hang = "import subprocess, time; subprocess.Popen(['sleep', '200']); print('asleep', flush=True); time.sleep(200)"
    start = time.monotonic()
    bad, lines = run(
        [python(check, "fails", "print('the reason'); raise SystemExit(3)")],
        [python(check, "crashes", "import os; os.abort()"), python(check, "hangs", hang, limit=3)],
        [python(check, "passes", "import sys; open(sys.argv[1], 'w').write('{\"us\": 1.5}')")],
    )
    assert time.monotonic() - start < 150  # nothing waits for what the step started
    assert bad == ["fails", "crashes", "hangs"]
    found = {line["step"]: line for line in lines}
    assert {name: line["state"] for name, line in found.items()} == {
        "fails": "failed", "crashes": "failed", "hangs": "timed out", "passes": "passed",
    }  # fmt: skip
    assert (found["fails"]["code"], found["fails"]["tail"]) == (3, ["the reason"])
    assert found["hangs"]["tail"] == ["asleep"]
    assert found["passes"]["result"] == {"us": 1.5}
    assert all(line["key"] == KEY for line in lines)


def test_rows_are_written_as_they_come(check: ModuleType, run: Any) -> None:
    code = "import time; print('{\"M\": 1}', flush=True); print('no row', flush=True); time.sleep(60)"
    _, lines = run([python(check, "rows", code, limit=3)])
    assert [line.get("row", line.get("state")) for line in lines] == [{"M": 1}, "timed out"]
    assert lines[1]["tail"] == ["no row"]


def test_a_rerun_leaves_out_what_passed_on_this_device_with_these_sources(check: ModuleType, run: Any) -> None:
    phase = [
        python(check, "passes", "pass"),
        python(check, "fails", "raise SystemExit(1)"),
        python(check, "always", "pass", once=False),
    ]
    counts = []
    for key in (KEY, KEY, {**KEY, "sources": "4567"}, {**KEY, "device": "another"}):
        _, lines = run(phase, key=key)
        counts.append(sorted(line["step"] for line in lines))
    added = [len(later) - len(before) for before, later in itertools.pairwise([[], *counts])]
    assert added == [3, 2, 3, 3]
    _, lines = run([python(check, "passes", "print('changed')")])
    assert lines[-1]["tail"] == ["changed"]


def test_a_line_that_was_cut_off_costs_only_its_step(check: ModuleType, run: Any) -> None:
    run([python(check, "passes", "pass")])
    with run.path.open("a") as file:
        file.write('{"step": "other", "sta')
    results = check.Results(run.path, KEY)
    assert check.Runner(results, 60, False).run([[python(check, "other", "pass")]]) == []
    assert {name for name, _ in results.passed()} == {"passes", "other"}


def test_what_cannot_run_is_listed_with_the_reason(check: ModuleType, run: Any) -> None:
    bad, lines = run(
        [python(check, "peerless", "pass", needs=("no_such_module_anywhere",))],
        [python(check, "gpu only", "raise SystemExit(1)", dry="it needs a GPU")],
        [python(check, "tiny", "raise SystemExit(1)", dry=(check.PYTHON, "-c", "print('tiny')"))],
        dry=True,
    )
    assert bad == []
    assert [line.get("reason") for line in lines[:2]] == ["no_such_module_anywhere not installed", "it needs a GPU"]
    assert lines[2]["tail"] == ["tiny"]


def test_no_step_begins_when_the_time_is_over(check: ModuleType, run: Any) -> None:
    bad, lines = run([python(check, "slow", "import time; time.sleep(60)")], [python(check, "late", "pass")], seconds=3)
    assert bad == ["slow", "late"]
    assert [line["state"] for line in lines] == ["timed out", "no time"]


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="process groups are POSIX's")
def test_without_a_gpu_it_says_so_in_a_sentence(tmp_path: Path) -> None:
    command = [sys.executable, ".ci/gpu_check.py", str(tmp_path / "check.jsonl"), "--peer", "no_such_module:function"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert "no_such_module:function is left out" in done.stdout
    assert done.stderr.startswith("torch cannot use cuda here (")
