"""Ranks on two machines: the bits of one process, and an end within seconds when one of the two is lost."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.distributed.commands import SETTINGS, environment
from tests.distributed.commands import run as run_alone
from tests.machines import Machine, obstacle, two_machines

pytest.importorskip("transformers")

SECONDS = 30  # in which all have ended after a loss that the kernel tells of
pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo"),
    pytest.mark.skipif(obstacle() is not None, reason=f"no machines out of namespaces: {obstacle()}"),
    pytest.mark.timeout(600),
]


class Run:
    """``torchrun -m gptq_cli quantize`` on each of two machines, one rank each."""

    def __init__(self, machines: tuple[Machine, Machine], model: Path, out: Path, logs: Path) -> None:
        self.logs = [logs / f"{machine.name}.txt" for machine in machines]
        torchrun = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
        torchrun += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "first:29500"]
        command = [sys.executable, *torchrun, "-m", "gptq_cli", "quantize", model, out, *SETTINGS]
        self.processes = []
        for machine, log in zip(machines, self.logs):
            with log.open("wb") as file:
                self.processes.append(machine.popen(command, environment(), stdout=file, stderr=subprocess.STDOUT))

    def wait(self, seconds: float) -> list[int]:
        """The exit status on each machine."""
        end = time.monotonic() + seconds
        return [process.wait(end - time.monotonic()) for process in self.processes]

    def wait_for_block(self, number: int) -> None:
        while f"block {number}/" not in self.told(0):
            assert all(process.poll() is None for process in self.processes), self.told(0) + self.told(1)
            time.sleep(0.05)

    def told(self, machine: int) -> str:
        return self.logs[machine].read_text(errors="replace")

    def errors(self, machine: int) -> list[str]:
        return [line for line in self.told(machine).splitlines() if line.startswith("error: ")]


def alone(model: Path, out: Path) -> bytes:
    """The weights that one process writes, or ends to write."""
    done = run_alone("gptq_cli", "quantize", model, out, *SETTINGS)
    assert done.returncode == 0, done.stderr
    return (out / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def expected(deep: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return alone(deep, tmp_path_factory.mktemp("alone") / "out")


@pytest.fixture
def machines() -> Iterator[tuple[Machine, Machine]]:
    with two_machines() as found:
        yield found


@pytest.fixture
def run(machines: tuple[Machine, Machine], deep: Path, tmp_path: Path) -> Run:
    """A run in its third block."""
    started = Run(machines, deep, tmp_path / "out", tmp_path)
    started.wait_for_block(3)
    return started


@pytest.mark.parametrize("own_address", [pytest.param(None, marks=pytest.mark.slow), "127.0.1.1"])
def test_two_machines_write_the_bits_of_one_process(
    own_address: str | None, deep: Path, expected: bytes, tmp_path: Path
) -> None:
    """Only the first sees the folder of OUT; each takes its own name for loopback, or for its address."""
    folder = tmp_path / "disk"
    folder.mkdir()
    with two_machines(own_address) as machines:
        machines[1].hide(folder)
        run = Run(machines, deep, folder / "out", tmp_path)
        assert run.wait(400) == [0, 0], run.told(0) + run.told(1)
        assert machines[1].run("ls", "-A", folder) == ""
    assert (folder / "out" / "model.safetensors").read_bytes() == expected
    assert "140 modules" in run.told(0)
    assert "modules" not in run.told(1)


@pytest.mark.slow
def test_a_rank_killed_on_one_machine_ends_the_other(
    machines: tuple[Machine, Machine], run: Run, deep: Path, expected: bytes, tmp_path: Path
) -> None:
    rank = machines[1].run("pgrep", "-n", "-f", "gptq_cli").strip()
    machines[1].run("kill", "-9", rank)
    assert 0 not in run.wait(SECONDS)
    assert len(run.errors(0)) == 1, run.told(0)
    assert "another rank has ended or cannot be reached" in run.errors(0)[0]
    assert run.errors(1) == []
    assert alone(deep, tmp_path / "out") == expected


@pytest.mark.slow
def test_the_first_machine_that_is_switched_off_ends_the_other(
    machines: tuple[Machine, Machine], run: Run, deep: Path, expected: bytes, tmp_path: Path
) -> None:
    """It keeps the store of all ranks, and writes. Its torchrun may end the other's rank before that speaks.

    Another machine that is switched off is silent, as behind a cut cable. Here it would take along both ends of the
    virtual one.
    """
    machines[0].close()
    assert run.processes[1].wait(150) != 0
    assert len(run.errors(1)) <= 1, run.told(1)
    assert alone(deep, tmp_path / "out") == expected


@pytest.mark.slow
def test_a_cut_cable_ends_the_ranks_within_minutes(machines: tuple[Machine, Machine], run: Run) -> None:
    """torchrun itself, on a machine that has lost the one it meets the others on, may stay."""
    machines[1].unplug()
    assert run.processes[0].wait(150) != 0
    end = time.monotonic() + 60
    while not run.errors(1):
        assert time.monotonic() < end, run.told(1)
        time.sleep(0.5)
    assert len(run.errors(0)) == len(run.errors(1)) == 1
