"""Fixtures for the GPU kernels without a GPU."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
import torch

from gptq_backend.kernels.cuda import loading, nvrtc
from gptq_backend.kernels.cuda.machine_code import Image
from tests.kernels.emulator import Emulator, StandIn
from tests.kernels.ptx.machine import Machine


@pytest.fixture(scope="session")
def compiler() -> nvrtc.Compiler:
    """NVRTC, of an installed torch for CUDA or of a package."""
    try:
        return nvrtc.find_compiler(torch.version.cuda)
    except nvrtc.CompileError as error:
        pytest.skip(str(error))


def host_compiler() -> str:
    if loading.extension is None:
        pytest.skip(loading.MISSING)
    if not (found := shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("what runs kernels on the host needs a C++ compiler")
    return found


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    """The kernels, compiled for the host."""
    return Emulator(host_compiler(), tmp_path_factory.mktemp("emulator"))


@pytest.fixture(scope="session")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    """What runs PTX."""
    return Machine(host_compiler(), tmp_path_factory.mktemp("machine"))


def instead_of_the_driver(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A new driver, with machine code that fits, until the test ends."""
    real = loading.open_driver
    monkeypatch.setattr(loading, "open_driver", lambda: None)  # it is open
    monkeypatch.setattr(loading, "images", lambda bits, capability: iter([Image("emulated", lambda: b"emulated")]))
    stand_in.start()
    yield
    for cached in (real, loading.unfit):  # a later test may use the machine's driver
        cached.cache_clear()


@pytest.fixture
def driver(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulator]:
    """The emulator in place of NVIDIA's driver."""
    for _ in instead_of_the_driver(emulator, monkeypatch):
        yield emulator


@pytest.fixture
def ptx_driver(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """The machine in place of NVIDIA's driver. What it runs has to be loaded before the extension asks for it."""
    for _ in instead_of_the_driver(machine, monkeypatch):
        yield machine
