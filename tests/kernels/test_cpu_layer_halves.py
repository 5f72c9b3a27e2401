"""The two operators of a decoder layer whose attention somebody else computes: their results, and what they refuse."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptq_backend.kernels.cpu_block import Norm, Output, OutputParts, Projections
from gptq_backend.kernels.cpu_layer_halves import LayerEnd, LayerStart, end_layer, start_layer
from gptq_backend.kernels.cpu_tail import MLP, Tail, TailParts
from tests.kernels.checks import native
from tests.kernels.test_cpu_block import Dense, assert_close, dtypes, norm_kinds, normalized, random_norm

pytestmark = native
bits = st.sampled_from([2, 3, 4, 8])
rows = st.sampled_from([0, 1, 2, 7, 40, 480, 481])


def random_tail(hidden: int, inner: int, attended: int, seed: int = 0, after: str = "none") -> TailParts:
    o, gate_up, down = (Dense(4, *shape, seed) for shape in ((attended, hidden), (hidden, 2 * inner), (inner, hidden)))
    norms = random_norm("rms", hidden, torch.float32), random_norm(after, hidden, torch.float32)
    return TailParts(OutputParts(o.linear, None, norms[0]), MLP((gate_up.linear,), down.linear, "silu"), None, norms[1])


# -- exact -------------------------------------------------------------------------------------------------------------


@given(
    widths=st.lists(bits, min_size=1, max_size=3),
    columns=st.integers(8, 200),
    rows=rows,
    dtype=dtypes,
    norm_kind=norm_kinds,
    has_residual=st.booleans(),
    act_order=st.booleans(),
)
def test_the_start_is_exact(widths, columns, rows, dtype, norm_kind, has_residual, act_order) -> None:
    torch.manual_seed(rows)
    layers = [Dense(each, columns, 20 + 7 * i, i, bias=True, act_order=act_order) for i, each in enumerate(widths)]
    norm = random_norm(norm_kind, columns, torch.float32)
    x = torch.randn(rows, columns).to(dtype)
    residual = torch.randn(rows, columns).to(dtype) if has_residual else None
    y, total = LayerStart(norm, [each.linear for each in layers])(x, residual)
    torch.testing.assert_close(total, x if residual is None else x + residual, rtol=0, atol=0)
    apart = Projections(norm, [each.linear for each in layers])(total)
    torch.testing.assert_close(y, torch.cat(apart, -1), rtol=0, atol=0)
    normed = normalized(norm, total.double()).to(dtype).double()
    assert_close(y, torch.cat([layer(normed) for layer in layers], -1), steps=2)


@given(
    rows=rows,
    dtype=dtypes,
    hidden=st.integers(16, 100),
    inner=st.integers(16, 100),
    attended=st.integers(16, 100),
    after=norm_kinds,
)
def test_the_end_gives_what_the_tail_gives_before_its_last_sum(rows, dtype, hidden, inner, attended, after) -> None:
    """The tail and the output are compared with float64 in test_cpu_block.py."""
    torch.manual_seed(rows)
    parts = random_tail(hidden, inner, attended, after=after)
    x, residual = torch.randn(rows, attended).to(dtype), torch.randn(rows, hidden).to(dtype)
    y, h = LayerEnd(parts)(x, residual)
    torch.testing.assert_close(h, Output(parts.output)(x, residual)[0], rtol=0, atol=0)
    torch.testing.assert_close(y + h, Tail(parts)(x, residual), rtol=0, atol=0)


def halves(hidden: int = 64) -> tuple[LayerStart, LayerEnd]:
    start = LayerStart(random_norm("rms", hidden, torch.float32), [Dense(4, hidden, 3 * hidden).linear])
    return start, LayerEnd(random_tail(hidden, 96, hidden))


def layer(x, residual, first, second, outputs):  # type: ignore[no-untyped-def]
    """Something in place of an attention is between the two."""
    operators = torch.ops.gptq_backend
    y, total = operators.cpu_start_layer_inference(x, residual, first, outputs)
    attended = y[..., : x.shape[-1]].tanh()
    return operators.cpu_end_layer_inference(attended, total, second)


def test_what_is_not_contiguous_gives_the_same() -> None:
    start, end = halves()
    x, residual = torch.randn(2, 5, 64), torch.randn(2, 5, 64)

    def apart(t: torch.Tensor) -> torch.Tensor:
        return t.transpose(0, 1).contiguous().transpose(0, 1)

    for half, given_ in ((start, (x, residual)), (end, (x, residual))):
        for a, b in zip(half(*given_), half(*map(apart, given_))):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_sixteen_threads_at_once_get_what_one_gets() -> None:
    start, end = halves()
    inputs = [torch.randn(1 + i % 5, 64) for i in range(64)]

    def run(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return layer(x, x, start.key, end.key, start.outputs)

    expected = [run(x) for x in inputs]
    with ThreadPoolExecutor(16) as pool:
        for found, wanted in zip(pool.map(run, inputs), expected):
            torch.testing.assert_close(found, wanted, rtol=0, atol=0)


# -- operators of torch ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "_inference"])
@pytest.mark.parametrize("has_residual", [True, False])
def test_the_operators_pass_opcheck(name: str, has_residual: bool) -> None:
    start, end = halves()
    x, residual = torch.randn(3, 64), torch.randn(3, 64)
    operators = torch.ops.gptq_backend
    arguments = (x, residual if has_residual else None, start.key, start.outputs)
    torch.library.opcheck(getattr(operators, f"cpu_start_layer{name}").default, arguments)
    torch.library.opcheck(getattr(operators, f"cpu_end_layer{name}").default, (x, residual, end.key))


def test_a_compiled_graph_gives_the_same_and_serves_other_keys() -> None:
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        torch.manual_seed(seed)
        start, end = halves()
        for count in (1, 4, 7):
            x, residual = torch.randn(count, 64), torch.randn(count, 64)
            with torch.no_grad():
                given_ = compiled(x, residual, start.key, end.key, start.outputs)
            torch.testing.assert_close(given_, layer(x, residual, start.key, end.key, start.outputs))


# -- keys --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "_inference"])
def test_a_key_that_nothing_has_is_refused(name: str) -> None:
    start, end = halves()
    x = torch.randn(3, 64)
    operator = getattr(torch.ops.gptq_backend, f"cpu_start_layer{name}")
    for wrong in (start.key + 1, end.key, start.key.int(), start.key.expand(2), torch.tensor(int(start.key))):
        with pytest.raises((ValueError, RuntimeError)):
            operator(x, x, wrong, start.outputs)
    with pytest.raises(ValueError, match="that of no LayerStart of this process"):
        start_layer(x, x, end.key, start.outputs)
    with pytest.raises(ValueError, match="that of no LayerEnd of this process"):
        end_layer(x, x, start.key)


@pytest.mark.parametrize("name", ["", "_inference"])
def test_the_key_of_what_is_gone_is_refused(name: str) -> None:
    start, _ = halves()
    key, outputs = start.key, start.outputs
    del start
    gc.collect()
    with pytest.raises((ValueError, RuntimeError)):
        getattr(torch.ops.gptq_backend, f"cpu_start_layer{name}")(torch.randn(3, 64), None, key, outputs)


# -- wrong input -------------------------------------------------------------------------------------------------------


def test_input_that_does_not_fit_is_named() -> None:
    start, end = halves()
    x = torch.randn(3, 64)
    for wrong, said in (
        ((torch.randn(3, 63), None), "x is float32"),
        ((x.double(), None), "x is float64"),
        ((x, torch.randn(2, 64)), "expected the same of both"),
        ((x, x.half()), "expected the same of both"),
    ):
        with pytest.raises(ValueError, match=said):
            start_layer(*wrong, start.key, start.outputs)
        with pytest.raises((ValueError, RuntimeError)):
            start(*wrong)
    with pytest.raises(ValueError, match="expected 192, as the weights of the key have"):
        start_layer(x, None, start.key, 191)
    for wrong in ((x, torch.randn(2, 64)), (torch.randn(3, 60), x), (x, x.half())):
        with pytest.raises(ValueError, match="expected"):
            end_layer(*wrong, end.key)
        with pytest.raises((ValueError, RuntimeError)):
            end(*wrong)


def test_sizes_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(ValueError, match="norm"):
        LayerStart(Norm(torch.ones(63)), [Dense(4, 64, 20).linear])
    with pytest.raises(ValueError, match="channels"):
        LayerStart(None, [Dense(4, 64, 20).linear, Dense(4, 60, 20).linear])
    parts = random_tail(64, 32, 64)
    scaled = TailParts(OutputParts(parts.output.o, factor=0.5), parts.mlp)
    with pytest.raises(ValueError, match="factor"):
        LayerEnd(scaled)
