"""Fixtures for the CUDA kernels without a GPU."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from gptq_backend.kernels.cuda import loading
from gptq_backend.kernels.cuda.machine_code import Image
from tests.kernels.emulator import Emulator


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    """The kernels, compiled for the host."""
    if loading.extension is None:
        pytest.skip(loading.MISSING)
    if not (compiler := shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("the emulator needs a C++ compiler")
    return Emulator(compiler, tmp_path_factory.mktemp("emulator"))


@pytest.fixture
def driver(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulator]:
    """A new stand-in, in place of NVIDIA's driver, with machine code that fits."""
    real = loading.open_driver
    monkeypatch.setattr(loading, "open_driver", lambda: None)  # it is open
    monkeypatch.setattr(loading, "images", lambda bits, capability: iter([Image("emulated", lambda: b"emulated")]))
    emulator.start()
    yield emulator
    for cached in (real, loading.unfit):  # a later test may use the machine's driver
        cached.cache_clear()
