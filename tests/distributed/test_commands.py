"""The commands under torchrun: one rank speaks for all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from gptq_backend import GPTQError
from gptq_backend.distributed import process_team
from tests.distributed.commands import run, torchrun

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
TORCHRUN = torchrun(2)


@pytest.mark.timeout(400)
def test_an_error_of_all_ranks_is_told_once(tmp_path: Path) -> None:
    done = run(*TORCHRUN, "gptq_cli", "quantize", tmp_path / "nothing", tmp_path / "out", "--rtn")
    assert done.returncode == 1
    assert [line for line in done.stderr.splitlines() if line.startswith("error:")] != []
    assert done.stderr.count("error: ") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.timeout(400)
def test_a_model_is_written_and_reported_by_one_rank(deep: Path, tmp_path: Path) -> None:
    arguments = ("--rtn", "--group-size", "32", "--json", "-")
    alone = run("gptq_cli", "quantize", deep, tmp_path / "alone", *arguments)
    done = run(*TORCHRUN, "gptq_cli", "quantize", deep, tmp_path / "out", *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["modules"] == json.loads(alone.stdout)["modules"]
    names = {path.name for path in (tmp_path / "alone").iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    model = "model.safetensors"
    assert (tmp_path / "out" / model).read_bytes() == (tmp_path / "alone" / model).read_bytes()


@pytest.mark.timeout(400)
def test_the_benchmark_starts_its_ranks_itself(tmp_path: Path) -> None:
    target = tmp_path / "out.json"
    arguments = ("--shape", "tiny", "--group-size", "32", "--samples", "4", "--seqlen", "16", "--ranks", "2")
    done = run("gptq_cli", "bench", "quantize", *arguments, "--threads", "1", "--json", target)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(target.read_text())
    assert len(found["peak_bytes_by_rank"]) == 2
    assert all("exchange" in lap for lap in found["phases"])
    assert done.stdout.count("blocks of tiny") == 1


def test_processes_that_something_else_started_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would take itself for the only one."""
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    done = run("gptq_cli", "quantize", tmp_path / "model", tmp_path / "out", "--rtn")
    assert done.returncode == 1
    assert "torchrun" in done.stderr


def test_a_group_that_the_caller_made_is_neither_joined_nor_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_team, "launched", lambda: True)
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with pytest.raises(GPTQError, match="pass team=ProcessTeam"), process_team.joined("cpu"):
            pass
        assert torch.distributed.is_initialized()
    finally:
        torch.distributed.destroy_process_group()
