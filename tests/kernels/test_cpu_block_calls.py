"""The fused CPU calls beside other code: wrong tensors, other levels, several threads, a busy machine."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gptq_backend.kernels import cpu, cpu_attention, reference
from gptq_backend.kernels.cpu_block import Linear, Norm, OutputParts, Projections
from gptq_backend.kernels.cpu_tail import MLP, Tail, TailParts
from tests.format.test_stored_tensors import random_weight
from tests.kernels.checks import ROOT, assert_passes_at, native, prepared

pytestmark = native


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, cwd=ROOT
    )


@pytest.mark.parametrize("level", cpu._cpu.levels()[:-1] if cpu._cpu else [])
def test_lower_instruction_sets_are_as_exact(level: str) -> None:
    file = str(Path(__file__).with_name("test_cpu_block.py"))
    assert_passes_at(level, file)


def linear(columns: int = 64, outputs: int = 64, bias: torch.Tensor | None = None) -> Linear:
    return Linear(prepared(random_weight(4, columns, outputs, 32), cpu.KERNEL), bias)


def tail(**changes: Any) -> Tail:
    parts = TailParts(OutputParts(linear()), mlp())
    return Tail(dataclasses.replace(parts, **changes))


def mlp(**changes: Any) -> MLP:
    return dataclasses.replace(MLP((linear(), linear()), linear(), "silu"), **changes)


def attend(q=(1, 2, 4, 16), keys=(1, 2, 9, 16), values=(1, 2, 9, 16), mask=None, dtype=torch.float32) -> None:
    cpu_attention.attend(torch.ones(q), torch.ones(keys, dtype=dtype), torch.ones(values), mask, 1.0)


def rotate(x=(1, 3, 64), heads=4, cos=(1, 3, 16), sin=None, norm=None) -> None:
    cpu_attention.rotate_(torch.ones(x), heads, torch.ones(cos), torch.ones(sin or cos), norm)


WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "x in float64": (lambda: Projections(None, [linear()])(torch.ones(2, 64).double()), "x is float64"),
    "x elsewhere": (lambda: Projections(None, [linear()])(torch.ones(2, 64, device="meta")), "on meta; expected"),
    "x too narrow": (lambda: Projections(None, [linear()])(torch.ones(2, 63)), "a last dimension of 64"),
    "x a scalar": (lambda: Projections(None, [linear()])(torch.tensor(1.0)), "a last dimension of 64"),
    "no weight": (lambda: Projections(None, []), "expected one or more"),
    "weights of two inputs": (lambda: Projections(None, [linear(), linear(32)]), "that read the same input"),
    "a short norm": (lambda: Projections(Norm(torch.ones(63)), [linear()])(torch.ones(2, 64)), "size of a norm is 63"),
    "a norm of two sizes": (lambda: Norm(torch.ones(64), torch.ones(63)).native, "last dimension of 64"),
    "a norm of two dtypes": (lambda: Norm(torch.ones(64), torch.ones(64).half()).native, "expected one dtype"),
    "a norm that is a view": (lambda: Norm(torch.ones(128)[::2]).native, "expected a contiguous vector"),
    "a bias that is a view": (lambda: linear(bias=torch.ones(128)[::2]).native, "expected a contiguous vector"),
    "a short bias": (lambda: linear(bias=torch.ones(63)).native, "last dimension of 64"),
    "a bias in float64": (lambda: linear(bias=torch.ones(64).double()).native, "its bias is torch.float64"),
    "another kernel": (
        lambda: Linear(prepared(random_weight(4, 64, 32, 32), reference.KERNEL)).native,
        "the kernel reference serves it",
    ),
    "a weight that is elsewhere": (
        lambda: (
            Linear(
                prepared(random_weight(4, 64, 32, 32), cpu.KERNEL)._replace(
                    tensors={"qweight": torch.ones(1, device="meta")}
                )
            ).native
        ),
        "its tensors are on meta",
    ),
    "an unknown activation": (lambda: tail(mlp=mlp(activation="mish")), "activation='mish'; expected one of silu"),
    "gate without up": (lambda: tail(mlp=mlp(gate_up=(linear(),))), "gate_up and down map"),
    "a narrow down": (lambda: tail(mlp=mlp(down=linear(64, 32))), "gate_up and down map"),
    "a short norm of the tail": (lambda: tail(after_mlp=Norm(torch.ones(63))), "last dimension of 64"),
    "a short norm before the MLP": (
        lambda: tail(output=OutputParts(linear(), before_mlp=Norm(torch.ones(63)))),
        "last dimension of 64",
    ),
    "rows of two numbers": (lambda: tail()(torch.ones(2, 64), torch.ones(3, 64)), "expected as many rows"),
    "rows of two dtypes": (lambda: tail()(torch.ones(2, 64), torch.ones(2, 64).half()), "expected as many rows"),
    "a narrow residual": (lambda: tail()(torch.ones(2, 64), torch.ones(2, 32)), "residual is .* dimension of 64"),
    "no divisor": (lambda: rotate(heads=5), "the number of heads is 5"),
    "no heads": (lambda: rotate(heads=0), "the number of heads is 0"),
    "odd dims": (lambda: rotate(cos=(1, 3, 15)), "channels that turn is 15"),
    "wide dims": (lambda: rotate(cos=(1, 3, 18)), "an even number up to 16"),
    "too wide for the stack": (lambda: rotate((1, 3, 1024), 1, (1, 3, 514)), "at most 512"),
    "few positions": (lambda: rotate(cos=(1, 2, 16)), "the positions of x"),
    "another sin": (lambda: rotate(sin=(1, 3, 14)), "the positions of x"),
    "no sin": (lambda: cpu_attention.rotate_(torch.ones(3, 64), 4, torch.ones(3, 16)), "sin None"),
    "x in pieces": (lambda: cpu_attention.rotate_(torch.ones(3, 128)[:, ::2], 4), "expected it to be contiguous"),
    "a wide head norm": (lambda: rotate(norm=Norm(torch.ones(64)).native), "size of a norm is 64"),
    "q of three dimensions": (lambda: attend(q=(2, 4, 16)), "expected four dimensions"),
    "heads without keys": (lambda: attend(keys=(1, 3, 9, 16), values=(1, 3, 9, 16)), "heads of q is 4"),
    "no keys at all": (lambda: attend(keys=(1, 0, 9, 16), values=(1, 0, 9, 16)), "heads of q is 4"),
    "short keys": (lambda: attend(keys=(1, 2, 8, 16)), r"expected \[B, KV, S, D\]"),
    "narrow keys": (lambda: attend(keys=(1, 2, 9, 15)), r"expected \[B, KV, S, D\]"),
    "another batch": (lambda: attend(keys=(2, 2, 9, 16), values=(2, 2, 9, 16)), r"expected \[B, KV, S, D\]"),
    "keys of another dtype": (lambda: attend(dtype=torch.float16), "expected the dtype and device of q"),
    "a large head": (lambda: attend((1, 2, 4, 513), (1, 2, 9, 513)), "at most 512"),
    "large values": (lambda: attend(values=(1, 2, 9, 513)), "at most 512"),
    "an integer mask": (lambda: attend(mask=torch.ones(1, 1, 2, 9, dtype=torch.int32)), "the mask is int32"),
    "a short mask": (lambda: attend(mask=torch.ones(1, 1, 2, 8)), "the mask is"),
    "a mask per head": (lambda: attend(mask=torch.ones(1, 4, 2, 9)), "the mask is"),
    "a mask in pieces": (lambda: attend(mask=torch.ones(1, 1, 2, 18)[..., ::2]), "positions side by side"),
}


@pytest.mark.parametrize(("call", "message"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_read_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_channels_apart_are_refused_by_attention() -> None:
    ones = torch.ones(1, 2, 9, 32)[..., ::2]
    with pytest.raises(ValueError, match="expected channels side by side"):
        cpu_attention.attend(torch.ones(1, 2, 4, 16), ones, ones, None, 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 5, 60, 500])
def test_weights_in_one_call_give_what_each_gives_alone(rows: int, dtype: torch.dtype) -> None:
    """Bit for bit, though neighbours of one order of channels and one precision share activations."""
    weights = [
        prepared(random_weight(bits, 160, 40, 32, seed, act_order=act_order), kernel)
        for act_order in (False, True)
        for seed in (0, 1)
        for kernel in (cpu.KERNEL, cpu.W4A8)
        for bits in (2, 4, 4, 3, 8)
    ]
    x = torch.randn(rows, 160).to(dtype)
    for y, weight in zip(Projections(None, [Linear(each) for each in weights])(x), weights, strict=True):
        assert torch.equal(y, weight.multiply(x))


def test_empty_batches_are_served() -> None:
    assert Projections(Norm(torch.ones(64)), [linear()])(torch.ones(2, 0, 64))[0].shape == (2, 0, 64)
    assert tail()(torch.ones(0, 64), torch.ones(0, 64)).shape == (0, 64)
    assert cpu_attention.rotate_(torch.ones(0, 3, 64), 4, torch.ones(1, 3, 16), torch.ones(1, 3, 16)).shape == (
        0,
        3,
        64,
    )
    q, empty = torch.ones(1, 2, 4, 16), torch.ones(1, 2, 0, 16)
    assert (cpu_attention.attend(q, empty, empty, None, 1.0) == 0).all()
    assert cpu_attention.attend(q[:0], empty[:0], empty[:0], None, 1.0).shape == (0, 2, 64)


def test_threads_do_not_change_the_result() -> None:
    code = """
import torch
from tests.kernels.test_cpu_block_calls import *
torch.manual_seed(0)
x, q, prompt = torch.randn(500, 64), torch.randn(2, 8, 8, 64), torch.randn(2, 90, 8, 64)
k, v = torch.randn(2, 2, 2, 300, 64)
norm = Norm(torch.randn(64))
project = Projections(norm, [linear(), linear(64, 96)])
last = tail(output=OutputParts(linear(), before_mlp=norm), after_mlp=norm)
def run(threads):
    torch.set_num_threads(threads)
    turned = cpu_attention.rotate_(x.repeat(4, 1), 4, *torch.ones(2, 2000, 16))
    attended = [cpu_attention.attend(each, k, v, None, 0.125) for each in (q, prompt)]
    return [*project(x), last(x, x), *attended, turned]
one = run(1)
for again in range(3):
    assert all(map(torch.equal, one, run(2)))
"""
    done = python(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "call",
    [
        "cpu_attention.rotate_(torch.ones(999, 640), 10, norm=cpu_block.Norm(None).native)",
        "cpu_tail.Tail(cpu_tail.TailParts(cpu_block.OutputParts(part), cpu_tail.MLP((part,) * 2, part, 'silu')))(x, x)",
    ],
)
def test_a_level_that_the_machine_lacks_is_an_error_and_no_crash(call: str) -> None:
    code = f"""
import torch
torch.set_num_threads(2)
from gptq_backend.kernels import cpu_attention, cpu_block, cpu_tail
from tests.kernels.test_cpu_block import Dense
part, x = Dense(4, 512, 512, 0).linear, torch.ones(2, 512)
{call}
"""
    done = python(code, GPTQ_BACKEND_CPU_LEVEL="altivec")
    assert done.returncode == 1
    assert "RuntimeError: GPTQ_BACKEND_CPU_LEVEL=altivec" in done.stderr


TIMED = """
import os, subprocess, sys, time
import torch
torch.set_num_threads(2)
from tests.kernels.test_cpu_block_calls import *
served = prepared(random_weight(4, 2048, 2048, 128, sym=True), cpu.KERNEL)
x = torch.randn(1, 2048, dtype=torch.bfloat16)
def milliseconds(least):
    start, count = time.perf_counter(), 0
    while time.perf_counter() < start + least:
        served.multiply(x)
        count += 1
    return (time.perf_counter() - start) / count * 1e3
def on(cores):
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), cores)
milliseconds(0.5)
cores = sorted(os.sched_getaffinity(0))[:2]
on(cores)
"""
BESIDE_OTHERS = """
alone = milliseconds(2)
others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(4)]
try:
    time.sleep(0.5)
    beside = milliseconds(4)
finally:
    for other in others:
        other.kill()
        other.wait()
time.sleep(0.5)
milliseconds(1.5)  # in which two threads are tried again
print(alone, beside, milliseconds(2))
"""
ON_ONE_CORE = """
on(cores[:1])
two = milliseconds(3)
torch.set_num_threads(1)
print(two, milliseconds(1))
"""
two_cores = pytest.mark.skipif(
    len(getattr(os, "sched_getaffinity", lambda _: [0])(0)) < 2, reason="needs two cores, whose use can be restricted"
)


@pytest.mark.slow
@two_cores
def test_two_threads_beside_busy_processes_get_on() -> None:
    """2 of 6 that want to run on 2 cores have a third of them; waiting at most doubles what that takes."""
    done = python(TIMED + BESIDE_OTHERS)
    assert done.returncode == 0, done.stderr
    alone, beside, after = map(float, done.stdout.split())
    assert beside < 2 * 3 * alone, done.stdout
    assert after < 2 * alone, done.stdout


@pytest.mark.slow
@two_cores
def test_two_threads_on_one_core_do_not_wait_for_each_other() -> None:
    """Where one waits actively the other does not run: 75 times the time of one thread, until that is noticed."""
    done = python(TIMED + ON_ONE_CORE)
    assert done.returncode == 0, done.stderr
    two, one = map(float, done.stdout.split())
    assert two < 3 * one, done.stdout
