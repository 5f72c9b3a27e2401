"""What Python may pass to the C++ kernels; csrc/python/binding.h refuses the rest before any address is read."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

_cpu: Any = pytest.importorskip("gptq_backend._cpu", reason="the extension was not built")

NORM = (0, 0, 0, 1e-6, 0.0, False, 0)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (NORM[:-1], TypeError, "got 6 arguments where 7 were expected"),
        (("x", *NORM[1:]), TypeError, "int"),
        ((-1, *NORM[1:]), OverflowError, "negative"),
        ((*NORM[:2], 2**40, *NORM[3:]), OverflowError, "a number is too large for the kernels"),
        ((*NORM[:3], None, *NORM[4:]), TypeError, "must be real number"),
    ],
)
def test_what_is_no_number_of_the_expected_kind_is_refused(arguments: Any, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        _cpu.Norm(*arguments)


def test_an_object_of_another_type_and_a_missing_one_are_refused() -> None:
    norm = _cpu.Norm(*NORM)
    with pytest.raises(TypeError, match=r"got <gptq_backend\._cpu\.Norm .* an object of .*Linear.* was expected"):
        _cpu.Output(norm, None, None, 1.0, False)
    with pytest.raises(TypeError, match=r"got None where an object of .*ExpertMLPs.* was expected"):
        _cpu.run_experts(None, 0, 1, 1, 0, 0, 8, 0, 0, 1)


LINEAR = (0, 0, 0, 0, 0, 0, 4, 8, 8, 32, 1, 1, 0, 0, False)
DENSE = (0, 0, 4, 8, 0, 0)


def parts() -> dict[str, Any]:
    linear, gate = _cpu.Linear(*LINEAR), _cpu.Dense(*DENSE)
    router = _cpu.Router(gate, *ROUTING)
    output, experts = _cpu.Output(linear, None, None, 1.0, False), _cpu.ExpertMLPs(linear, 2, 4, 0, linear)
    mlp = _cpu.MLP([linear, linear], True, 0, linear)
    tail = _cpu.Tail(output, mlp, None, None)
    return {"linear": linear, "router": router, "experts": experts, "output": output, "mlp": mlp, "tail": tail}


ROUTING = (False, False, 0, 0, 1, 1, 1, 2, True, 1.0)
HEADS = (None, None, 0, 1, 1, 8, 1.0, 0.0)
NEEDED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "o": lambda has: _cpu.Output(None, None, None, 1.0, False),
    "gate": lambda has: _cpu.Router(None, *ROUTING),
    "down": lambda has: _cpu.MLP([has["linear"], has["linear"]], True, 0, None),
    "gate and up": lambda has: _cpu.MLP([has["linear"], None], True, 0, has["linear"]),
    "experts": lambda has: _cpu.ExpertMLPs(None, 2, 4, 0, has["linear"]),
    "router": lambda has: _cpu.Mixture(None, has["experts"], None),
    "experts of a mixture": lambda has: _cpu.Mixture(has["router"], None, None),
    "output": lambda has: _cpu.Tail(None, has["mlp"], None, None),
    "tail": lambda has: _cpu.Layer(None, [has["linear"]] * 3, *HEADS, None),
    "inputs": lambda has: _cpu.Layer(None, [has["linear"], None, has["linear"]], *HEADS, has["tail"]),
    "weights": lambda has: _cpu.project(0, 1, 8, 0, None, [None], [0], 1),
    "layers": lambda has: _cpu.run_layers(
        [None], [(0, 0, 0, 1)], 0, (1, 1, 8), 0, (0, 0), 0, 1, 0, 0, False, (0, 0), 0, 0, 0, None, (0, 0), 1
    ),
    "a norm": lambda has: _cpu.Ending(None, has["linear"], None),
}


@pytest.mark.parametrize("name", NEEDED)
def test_a_part_that_is_needed_cannot_be_none(name: str) -> None:
    """It would be read all the same, which ends the process."""
    with pytest.raises(TypeError, match="got None where an object of"):
        NEEDED[name](parts())


def test_parts_of_sizes_that_do_not_fit_are_refused() -> None:
    has = parts()
    linear, narrow = has["linear"], _cpu.Linear(*LINEAR[:7], 4, *LINEAR[8:])
    assert _cpu.Layer(None, [linear] * 3, *HEADS, has["tail"])
    with pytest.raises(ValueError, match="results is 2; expected one for each weight, 1"):
        _cpu.project(0, 1, 8, 0, None, [linear], [0, 0], 1)
    with pytest.raises(ValueError, match="inputs of a weight is 4; expected the width of what it reads, 8"):
        _cpu.project(0, 1, 8, 0, None, [narrow], [0], 1)
    with pytest.raises(ValueError, match="weights of gate and up is 0"):
        _cpu.MLP([], True, 0, linear)
    with pytest.raises(ValueError, match="outputs of gate and up is 8; expected by the inputs of down 16"):
        _cpu.MLP([linear], True, 0, linear)
    with pytest.raises(ValueError, match="inputs of q, k and v is 4"):
        _cpu.Layer(None, [linear, linear, narrow], *HEADS, has["tail"])


def test_sequences_are_lists_or_tuples_of_the_expected_length() -> None:
    strides = (0, 0, 0, 0)
    with pytest.raises(TypeError, match="got 2 values where 7 were expected"):
        _cpu.attend(0, (1, 1), 0, strides, 0, strides, 0, strides, 0, False, (0, 0), 1.0, 0.0, 0, 0, 0, 1)
    with pytest.raises(TypeError, match="where a list or a tuple was expected"):
        _cpu.MLP({}, True, 0, parts()["linear"])


def test_what_a_kernel_refuses_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="the number of heads is 0; expected a divisor of 8"):
        _cpu.rotate(0, 1, 8, 0, 0, None, 0, 0, 0, 1, 0, 0, 1)


def test_objects_are_freed() -> None:
    pytest.importorskip("resource", reason="Windows has no such count of memory")
    code = """
import resource, gptq_backend._cpu as cpu
def grow(count):
    for _ in range(count): cpu.Norm(0, 0, 0, 1e-6, 0.0, False, 0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = grow(20_000)
assert grow(500_000) < before + 4096, "kilobytes"
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_extension_keeps_to_pythons_stable_interface() -> None:
    """So that one build serves every version; no name with an underscore but the three that its macros bring."""
    assert Path(_cpu.__file__).name in ("_cpu.abi3.so", "_cpu.pyd")
    names = set(re.findall(rb"\b_Py[A-Za-z_]+", Path(_cpu.__file__).read_bytes()))
    assert names <= {b"_Py_Dealloc", b"_Py_NoneStruct"}
    assert torch.ops.gptq_backend.cpu_gemm is not None
