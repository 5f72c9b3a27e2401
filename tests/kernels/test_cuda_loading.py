"""How CUDA kernels come onto a device: which machine code, by which calls of the driver, and what a failure says.

A stand-in takes the driver's place (cuda_emulator/driver.cpp).
"""

from __future__ import annotations

import dataclasses
import json
import logging
import lzma
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from gptq_backend import kernel_report, select_kernel
from gptq_backend.kernels import self_check, table
from gptq_backend.kernels.cuda import loading, machine_code, nvrtc
from gptq_backend.kernels.cuda import operators as cuda
from gptq_backend.kernels.cuda.machine_code import Image
from gptq_backend.kernels.cuda.nvrtc import CompileError
from gptq_backend.kernels.triton import operators as triton
from tests.format.test_stored_tensors import random_weight
from tests.kernels.checks import packed, prepared
from tests.kernels.emulator import Emulator

ROOT = Path(__file__).parents[2]
CUBINS = [75, 80, 86, 89, 90, 100, 120]


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package gptq-backend-cuda whose machine code is its name, and no compiler."""
    folder = tmp_path / "gptq_backend_cuda"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    for target in [*(f"sm_{arch}" for arch in CUBINS), "compute_80"]:
        for bits in (2, 3, 4, 8):
            (folder / f"{target}-{bits}.xz").write_bytes(lzma.compress(f"{target}-{bits}\0".encode()))
    contents = {"cuda": "12.9", "cubins": CUBINS, "ptx": 80, "sources": nvrtc.source_hash()}
    (folder / "contents.json").write_text(json.dumps(contents))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(nvrtc, "_candidates", lambda major: iter(()))
    for cached in (machine_code._shipped, machine_code._compiler):
        cached.cache_clear()
    yield folder
    for cached in (machine_code._shipped, machine_code._compiler):
        cached.cache_clear()


@pytest.fixture
def real_images(driver: Emulator, monkeypatch: pytest.MonkeyPatch) -> Emulator:
    """The stand-in for the driver, and the true choice of machine code."""
    monkeypatch.setattr(loading, "images", machine_code.images)
    return driver


def loaded(driver: Emulator) -> list[str]:
    """What the driver was given."""
    return [call.partition(" ")[2] for call in driver.calls if call.startswith("cuModuleLoadData")]


# -- choice ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "image"),
    [
        *((each, f"sm_{each}") for each in CUBINS),
        (87, "sm_86"),
        (103, "sm_100"),
        (121, "sm_120"),
        (110, "compute_80"),
        (130, "compute_80"),
    ],
)
def test_each_device_gets_the_best_code_that_it_can_run(
    capability: int, image: str, shipped: Path, real_images: Emulator
) -> None:
    real_images.start(capability)
    for bits in (2, 3, 4, 8):
        assert loading.unfit(0, bits) is None
    assert loaded(real_images) == [f"{image}-{bits}" for bits in (2, 3, 4, 8)]


def test_devices_before_the_matrix_instructions_are_told_so(real_images: Emulator) -> None:
    real_images.start(70)
    assert loading.unfit(0, 4) == "compute capability 7.0, expected 7.5 or newer"


def test_code_of_other_sources_is_not_used(
    shipped: Path, real_images: Emulator, caplog: pytest.LogCaptureFixture
) -> None:
    contents = shipped / "contents.json"
    contents.write_text(contents.read_text().replace(nvrtc.source_hash(), "0"))
    reason = loading.unfit(0, 4)
    assert reason is not None
    assert "no machine code for compute capability 8.0" in reason
    assert "torch's CUDA builds bring it" in reason
    assert not loaded(real_images)
    assert caplog.text.count("install the same version of both") == 1


def test_a_damaged_package_is_no_crash(shipped: Path, real_images: Emulator, caplog: pytest.LogCaptureFixture) -> None:
    whole = (shipped / "sm_80-4.xz").read_bytes()
    (shipped / "sm_80-4.xz").write_bytes(whole[:-9])
    assert loading.unfit(0, 4) is None  # by the PTX
    assert loaded(real_images) == ["compute_80-4"]
    for bits, damage in ((8, "{"), (3, "[]"), (2, '{"cuda": "12.9", "cubins": 80}')):
        (shipped / "contents.json").write_text(damage)
        machine_code._shipped.cache_clear()
        assert "no machine code" in (loading.unfit(0, bits) or "")
    assert caplog.text.count("gptq-backend-cuda is damaged") == 3


def test_a_driver_that_refuses_everything_leaves_every_reason(shipped: Path, real_images: Emulator) -> None:
    real_images.start(90)
    real_images.fail("cuModuleLoadData", 222)
    reason = loading.unfit(0, 4)
    assert reason is not None
    error = "cuModuleLoadData failed with CUDA_ERROR_UNSUPPORTED_PTX_VERSION (222): the text of this error"
    assert f"sm_90 of gptq-backend-cuda: {error}" in reason
    assert "machine code by NVRTC: no libnvrtc.so" in reason
    assert f"PTX of gptq-backend-cuda, which needs the driver of CUDA 12.9 or a newer one: {error}" in reason
    assert loading.unfit(0, 4) is reason  # found once


# -- calls of the driver -----------------------------------------------------------------------------------------------


def test_a_module_is_loaded_once_with_all_its_kernels_and_captures_may_run(driver: Emulator) -> None:
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda _: loading.unfit(0, 4), range(16))) == {None}
    calls = driver.calls
    assert loaded(driver) == ["emulated"]
    asked = {call.partition(" ")[2] for call in calls if call.startswith("cuModuleGetFunction")}
    assert asked == {name for name in driver.kernels if f"_4_{name.rsplit('_')[-1]}" in name}
    assert len(asked) == 21
    assert calls.count("cuFuncSetAttribute") == 6  # the wide kernels
    modes = [index for index, call in enumerate(calls) if call.startswith("cuThreadExchangeStreamCaptureMode")]
    assert [calls[index][-1] for index in modes] == ["2", "0"]  # relaxed, and as it was
    assert modes[0] < calls.index("cuModuleLoadData emulated") < modes[1]
    assert calls.count("cuCtxPushCurrent") == calls.count("cuCtxPopCurrent") == 1


def test_each_device_has_its_own_module(driver: Emulator) -> None:
    assert loading.unfit(0, 4) is None
    assert loading.unfit(1, 4) is None
    assert loaded(driver) == ["emulated", "emulated"]
    with pytest.raises(RuntimeError, match="no kernels for 4 bits were loaded on CUDA device 2"):
        loading.extension.gather(2, 4, 0, 1, 8, 2, 0, 8, 0, 0)
    for device in (-1, 64):
        with pytest.raises(ValueError, match=f"CUDA device {device}, expected 0..63"):
            loading.extension.load(device, 4, b"")
    with pytest.raises(ValueError, match="bits is 5, expected 2, 3, 4 or 8"):
        loading.extension.load(0, 5, b"")
    with pytest.raises(TypeError):
        loading.extension.load(0, 2, "text")


def test_a_layer_that_was_moved_finds_its_kernels(driver: Emulator) -> None:
    """``supports`` was asked about another device, or not at all."""
    served = prepared(random_weight(4, 64, 16, 32), cuda.KERNEL)
    assert not loaded(driver)
    served.multiply(torch.ones(1, 64, dtype=torch.float16))
    served.multiply(torch.ones(1, 64, dtype=torch.float16))
    assert loaded(driver) == ["emulated"]
    assert driver.calls.count("cuLaunchKernel") == 2


def test_a_module_without_a_kernel_is_unloaded(driver: Emulator) -> None:
    driver.forget_kernel("gptq_wide_8_4_bf16")
    assert loading.unfit(0, 4) == (
        "no machine code for compute capability 8.0 (emulated: looking for gptq_wide_8_4_bf16 failed with "
        "CUDA_ERROR_NOT_FOUND (500): the text of this error)"
    )
    assert "cuModuleUnload" in driver.calls
    served = prepared(random_weight(4, 64, 16, 32), cuda.KERNEL)
    with pytest.raises(RuntimeError, match="the CUDA kernels do not run on device 0: no machine code"):
        served.multiply(torch.ones(1, 64, dtype=torch.float16))


def test_the_next_code_serves_where_one_fails(driver: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> bytes:
        raise CompileError("it is broken")

    choice = [Image("first", broken), Image("second", lambda: b"second")]
    monkeypatch.setattr(loading, "images", lambda bits, capability: iter(choice))
    assert loading.unfit(0, 4) is None
    assert loaded(driver) == ["second"]


@pytest.mark.parametrize(("rows", "kernel"), [(1, "skinny_1_1"), (40, "wide_2"), (2000, "dequantize")])
def test_a_launch_that_fails_names_its_kernel(rows: int, kernel: str, driver: Emulator) -> None:
    served = prepared(random_weight(4, 64, 16, 32), cuda.KERNEL)
    assert loading.unfit(0, 4) is None
    driver.fail("cuLaunchKernel", 701)
    message = rf"launching gptq_{kernel}_4_f16 failed with CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES \(701\): the text"
    with pytest.raises(RuntimeError, match=message):
        served.multiply(torch.ones(rows, 64, dtype=torch.float16))
    driver.fail("cuLaunchKernel", 700)
    with pytest.raises(RuntimeError, match=r"failed with an unknown error \(700\)$"):
        served.multiply(torch.ones(rows, 64, dtype=torch.float16))
    assert driver.calls.count("cuCtxPushCurrent") == driver.calls.count("cuCtxPopCurrent")


# -- no driver ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def library(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """To set the name of the driver's library."""
    loading.open_driver.cache_clear()
    loading.unfit.cache_clear()
    yield monkeypatch
    loading.open_driver.cache_clear()
    loading.unfit.cache_clear()


def test_no_driver_is_a_reason(library: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library.setattr(loading, "DRIVER", str(tmp_path / "libcuda.so.1"))
    reason = loading.unfit(0, 4)
    assert reason is not None
    assert reason.startswith("the library of the NVIDIA driver cannot be loaded (")
    assert "No such file" in reason


def test_a_library_without_a_function_is_too_old(library: pytest.MonkeyPatch) -> None:
    library.setattr(loading, "DRIVER", "libm.so.6")
    assert loading.unfit(0, 4) == "libm.so.6 has no cuInit; the NVIDIA driver is too old"


def test_a_driver_that_cannot_start_is_a_reason(library: pytest.MonkeyPatch, emulator: Emulator) -> None:
    emulator.start()
    emulator.fail("cuInit", 100)
    library.setattr(loading, "DRIVER", str(emulator.path))
    assert loading.unfit(0, 4) == "cuInit failed with CUDA_ERROR_NO_DEVICE (100): the text of this error"


def test_an_nvidia_gpu_that_cuda_does_not_serve_is_named_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [
        dataclasses.replace(cuda.KERNEL, supports=lambda spec, device: "the driver has measles"),
        dataclasses.replace(triton.KERNEL, supports=lambda spec, device: None),
    ]
    monkeypatch.setattr(table, "KERNELS", rows)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setenv(self_check.VARIABLE, "0")  # there is no such device
    table._warn_once.cache_clear()
    spec = packed(random_weight(4, 64, 32, 16)).spec
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert select_kernel(spec, torch.device("cuda")).name == "triton"
    assert caplog.text.count("the driver has measles") == 1
    caplog.clear()
    monkeypatch.setattr(torch.version, "hip", "6.4")
    table._warn_once.cache_clear()
    assert select_kernel(spec, torch.device("cuda")).name == "triton"
    assert not caplog.records
    assert kernel_report(spec, torch.device("cuda"))["cuda"] == "the driver has measles"


def test_without_the_extension_the_reason_is_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "extension", None)
    monkeypatch.setattr(loading, "MISSING", "it is not there")
    loading.open_driver.cache_clear()
    loading.unfit.cache_clear()
    assert loading.unfit(0, 4) == "it is not there"
    loading.open_driver.cache_clear()
    loading.unfit.cache_clear()


@pytest.mark.parametrize(("system", "advice"), [("Linux", "install a C++ compiler"), ("Windows", "for Linux only")])
def test_the_advice_to_build_the_extension_is_for_linux(system: str, advice: str) -> None:
    code = f"""
import platform, sys, torch
platform.system = lambda: {system!r}
sys.modules["gptq_backend._cuda"] = None
from gptq_backend.kernels.cuda import loading
print(loading.MISSING)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert advice in done.stdout
    assert ("compiler" in done.stdout) == (system == "Linux")
