"""Would the tests of PTX notice a mistake? Single edits of kernels have to be caught, each in the way that it says."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gptq_backend.kernels.cuda import nvrtc
from gptq_backend.kernels.cuda.nvrtc import Compiler
from gptq_backend.kernels.cuda.plan import Plan
from gptq_backend.kernels.triton import operators as triton_ops
from tests.format.test_stored_tensors import random_weight
from tests.kernels.checks import LIMITS, error, exact, prepared
from tests.kernels.ptx.machine import Machine
from tests.kernels.ptx.mutants import CUDA, TRITON, WRONG, Mutant, PtxMutant
from tests.kernels.test_cuda_ptx import product

pytest.importorskip("triton", reason="triton is not installed; it is part of the test extra")
from tests.kernels.ptx.triton_launcher import Launcher

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PLANS = [Plan(1, 1, 1), Plan(1, 1, 3), Plan(2, 2), Plan(0, 2, splits=3), Plan(0, 8)]


def finding_of_cuda(machine: Machine, bits: int) -> str:
    """What is wrong with products by the CUDA kernels; empty: nothing."""
    machine.seed(0)
    for plan in PLANS:
        for columns, size, act_order in ((1000, 128, False), (840, 64, True)):
            weight = random_weight(bits, columns, 40, size, act_order=act_order)
            x = torch.randn(13, columns, generator=torch.Generator().manual_seed(0)).half()
            try:
                y = product(machine, weight, x, None, plan)
            except RuntimeError as fault:
                return str(fault)
            if not error(y, exact(weight, x)) < LIMITS[torch.float16]:
                return WRONG
    return ""


@pytest.mark.parametrize("bits", [3, 4])
def test_without_a_mistake_nothing_is_found_in_the_cuda_kernels(
    bits: int, compiler: Compiler, ptx_driver: Machine
) -> None:
    ptx_driver.load(compiler.compile(bits, "compute_80").rstrip(b"\0").decode())
    assert finding_of_cuda(ptx_driver, bits) == ""


@pytest.mark.parametrize("mutant", CUDA, ids=lambda mutant: mutant.name)
def test_a_mistake_in_the_cuda_kernels_is_found(
    mutant: Mutant, compiler: Compiler, ptx_driver: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = tmp_path / "device"
    shutil.copytree(nvrtc.SOURCES, sources)
    monkeypatch.setattr(nvrtc, "SOURCES", sources)
    text = (sources / mutant.file).read_text()
    assert text.count(mutant.old) == 1, "the sources have changed, and with them this mutant has to"
    (sources / mutant.file).write_text(text.replace(mutant.old, mutant.new))
    ptx_driver.load(compiler.compile(mutant.bits, "compute_80").rstrip(b"\0").decode())
    assert re.search(mutant.caught, finding_of_cuda(ptx_driver, mutant.bits))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where Triton keeps what it has compiled: the same kernels for all mutants."""
    return tmp_path_factory.mktemp("triton")


@pytest.fixture
def poisoned(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What nobody has written is NaN."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def finding_of_triton(machine: Machine) -> str:
    """What is wrong with products by the Triton kernels; empty: nothing."""
    machine.seed(0)
    for rows in (1, 13):
        weight = random_weight(4, 1104, 40, 128, sym=True)
        x = torch.randn(rows, 1104, generator=torch.Generator().manual_seed(0)).half()
        try:
            with machine.memory(x):
                y = prepared(weight, triton_ops.KERNEL).multiply(x)
        except RuntimeError as fault:
            return str(fault)
        if not error(y, exact(weight, x)) < LIMITS[torch.float16]:
            return WRONG
    return ""


def test_without_a_mistake_nothing_is_found_in_the_triton_kernels(
    machine: Machine, poisoned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = Launcher(machine)
    monkeypatch.setattr(triton_ops, "_kernels", lambda: launcher)
    assert finding_of_triton(machine) == ""
    assert set(launcher.launched) == {"gemv", "gemm", "add_splits"}


@pytest.mark.parametrize("mutant", TRITON, ids=lambda mutant: f"{mutant.kernel}: {mutant.name}")
def test_a_mistake_in_the_triton_kernels_is_found(
    mutant: PtxMutant, machine: Machine, poisoned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = Launcher(machine, mutant.edit)
    monkeypatch.setattr(triton_ops, "_kernels", lambda: launcher)
    assert re.search(mutant.caught, finding_of_triton(machine))
