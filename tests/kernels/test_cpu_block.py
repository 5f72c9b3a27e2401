"""The calls that make a decoder layer: exact to the stated error at every shape, dtype and level, and safe to call."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gptq_backend import QuantizedWeight
from gptq_backend.kernels import cpu, cpu_attention, cpu_block
from gptq_backend.kernels.cpu_block import Linear, Norm, Output, OutputParts, Projections
from gptq_backend.kernels.cpu_tail import MLP, Tail, TailParts
from tests.format.test_stored_tensors import random_weight
from tests.kernels.checks import LIMITS, error, native, prepared

pytestmark = native
dtypes = st.sampled_from(list(LIMITS))
sizes = st.integers(1, 150)
REFERENCES = {
    "silu": lambda x: x * torch.sigmoid(x),
    "gelu": lambda x: 0.5 * x * torch.erfc(-x * 0.5**0.5),
    "gelu_tanh": lambda x: x * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)),
    "relu": lambda x: x.relu(),
    "relu_squared": lambda x: x.relu() ** 2,
}


class Dense:
    """A linear layer of the tests: its fused form, and what it does in float64."""

    def __init__(self, bits: int, columns: int, outputs: int, seed: int = 0, bias: bool = False, **kwargs) -> None:
        weight = random_weight(bits, columns, outputs, min(32, columns), seed, **kwargs)
        scales = weight.scales.float() / (2**bits * columns**0.5)  # results of about 1
        self.weight = QuantizedWeight(weight.codes, scales, weight.zeros, weight.g_idx, bits)
        self.bias = torch.randn(outputs) if bias else None
        self.linear = Linear(prepared(self.weight, cpu.KERNEL), self.bias)

    def __call__(self, x: Tensor) -> Tensor:
        y = x @ self.weight.dequantize(torch.float64).t()
        return y if self.bias is None else y + self.bias.double()


def normalized(norm: Norm | None, x: Tensor) -> Tensor:
    """x: float64."""
    if norm is None:
        return x
    if norm.centered:
        x = x - x.mean(-1, keepdim=True)
    x = x * (x.square().mean(-1, keepdim=True) + norm.eps).rsqrt()
    x = x if norm.weight is None else x * (norm.weight.double() + norm.offset)
    return x if norm.bias is None else x + norm.bias.double()


def random_norm(kind: str, n: int, dtype: torch.dtype) -> Norm | None:
    weight, bias = torch.randn(n).to(dtype), torch.randn(n).to(dtype)
    return {
        "none": None,
        "plain": Norm(None),
        "rms": Norm(weight, eps=1e-5),
        "rms, 1 + weight": Norm(weight, offset=1.0),
        "layer": Norm(weight, bias, 1e-5, centered=True),
        "layer, bias alone": Norm(None, bias, centered=True),
    }[kind]


norm_kinds = st.sampled_from(["none", "plain", "rms", "rms, 1 + weight", "layer", "layer, bias alone"])


def assert_close(y: Tensor, expected: Tensor, steps: int = 1) -> None:
    """``expected``: float64, rounded where y was, which a tie can do differently in each of ``steps``."""
    slack = error(expected.to(y.dtype), expected) if expected.any() else 0.0
    assert float((y - expected).norm()) <= max(steps * LIMITS[y.dtype], 1.5 * slack) * float(expected.norm())


# -- exact -------------------------------------------------------------------------------------------------------------


@given(
    bits=st.lists(st.sampled_from([2, 3, 4, 8]), min_size=1, max_size=3),
    act_order=st.sampled_from(["none", "alike", "unlike", "some"]),
    columns=st.integers(8, 300),
    outputs=st.integers(16, 70),
    rows=st.one_of(st.integers(1, 20), st.sampled_from([0, 48, 97, 480, 481, 600])),
    dtype=dtypes,
    norm_dtype=dtypes,
    norm_kind=norm_kinds,
    sym=st.booleans(),
    bias=st.booleans(),
)
def test_projections_are_exact(
    bits, act_order, columns, outputs, rows, dtype, norm_dtype, norm_kind, sym, bias
) -> None:
    torch.manual_seed(rows)
    layers = [
        Dense(each, columns, outputs + i, i * (act_order == "unlike"), bias, sym=sym,
              act_order=act_order in ("alike", "unlike") or (act_order == "some" and i % 2 == 0))
        for i, each in enumerate(bits)
    ]  # fmt: skip
    norm = random_norm(norm_kind, columns, norm_dtype)
    x = (torch.randn(rows, columns) * torch.randn(columns).exp() + 1).to(dtype)
    ys = Projections(norm, [layer.linear for layer in layers])(x)
    normed = normalized(norm, x.double()).to(dtype).double()
    for layer, y in zip(layers, ys, strict=True):
        assert y.dtype == dtype
        assert_close(y, layer(normed), steps=2)


@given(
    batch=st.integers(1, 3),
    rows=st.integers(1, 9),
    heads=st.integers(1, 5),
    head_dim=st.sampled_from([2, 3, 16, 30, 64, 128, 512]),
    part=st.sampled_from([0, 0.5, 1]),
    pairs=st.sampled_from(list(cpu_attention.PAIRS)),
    shared=st.booleans(),
    dtype=dtypes,
    angles_dtype=dtypes,
    norm_kind=norm_kinds,
)
def test_rotating_is_exact(
    batch, rows, heads, head_dim, part, pairs, shared, dtype, angles_dtype, norm_kind
) -> None:  # fmt: skip
    torch.manual_seed(head_dim)
    turning = int(head_dim * part) // 2 * 2
    dims = turning // 2 if pairs == "halves_by_pair" else turning
    x = torch.randn(batch, rows, heads * head_dim).to(dtype)
    norm = random_norm(norm_kind, head_dim, torch.float32)
    cos, sin = (torch.randn(1 if shared else batch, rows, dims).to(angles_dtype) for _ in range(2))
    given_x = normalized(norm, x.double().unflatten(-1, (heads, head_dim))).to(dtype).double()
    c, s = (each.double().unsqueeze(2) for each in (cos, sin))
    channels = torch.arange(turning)
    first, second = channels.view(2, -1) if pairs.startswith("halves") else channels.view(-1, 2).t()
    if pairs == "neighbours_by_pair":
        c, s = (each[..., : dims // 2].repeat_interleave(2, -1) for each in (c, s))
    if pairs == "halves_by_pair":
        c, s = (torch.cat([each, each], -1) for each in (c, s))
    expected = given_x.clone()
    expected[..., first] = given_x[..., first] * c[..., first] - given_x[..., second] * s[..., first]
    expected[..., second] = given_x[..., second] * c[..., second] + given_x[..., first] * s[..., second]
    native_norm = None if norm is None else norm.native
    y = cpu_attention.rotate_(x, heads, *((cos, sin) if dims else (None, None)), native_norm, pairs)
    assert y is x
    assert_close(y.unflatten(-1, (heads, head_dim)), expected, steps=2)


def attended(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float, sinks: Tensor | None = None
) -> Tensor:
    """In float64, with the tensors as ``cpu_attention.attend`` takes them."""
    q, k, v = (each.double() for each in (q.transpose(1, 2), k, v))
    k, v = (each.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for each in (k, v))
    scores = q @ k.transpose(-1, -2) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    rows, length = scores.shape[-2:]
    if mask is None:
        mask = torch.ones(rows, length, dtype=torch.bool).tril(length - rows)
    else:
        mask = mask[..., :length]
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, float("-inf"))
    scores = scores + mask.double()
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[:, None, None].expand(*scores.shape[:3], 1)], -1)
        v = torch.cat([v, torch.zeros_like(v[:, :, :1])], 2)
    hidden = (scores == float("-inf")).all(-1, keepdim=True)
    weights = torch.where(hidden, 0, scores.masked_fill(hidden, 0).softmax(-1))
    return (weights @ v).transpose(1, 2).flatten(2)


def in_memory(x: Tensor, order: str) -> Tensor:
    """The same numbers [B, T or KV, H or S, D] in another layout, channels side by side."""
    if order == "transposed":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if order == "part of more":
        return torch.cat([x, torch.full_like(x, float("nan"))], 2)[:, :, : x.shape[2]]
    if order == "part of channels":
        return torch.cat([x, torch.full_like(x, float("nan"))], 3)[..., : x.shape[3]]
    return x


orders = st.sampled_from(["contiguous", "transposed", "part of more", "part of channels"])


@given(
    batch=st.integers(1, 3),
    rows=st.one_of(st.integers(1, 8), st.sampled_from([9, 21, 64, 65, 130])),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 9),
    head_dim=st.sampled_from([1, 7, 16, 40, 64, 100, 512]),
    value_dim=st.sampled_from([1, 9, 16, 64, 512]),
    length=st.sampled_from([1, 2, 8, 63, 64, 65, 127, 128, 129, 200]),
    mask_kind=st.sampled_from(["none", "bool", "float", "row alone", "longer"]),
    softcap=st.sampled_from([0.0, 0.5, 30.0]),
    sinks_dtype=st.sampled_from([None, torch.float32, torch.bfloat16]),
    q_order=orders,
    k_order=orders,
    v_order=orders,
    dtype=dtypes,
)
def test_attention_is_exact(
    batch,
    rows,
    kv_heads,
    group,
    head_dim,
    value_dim,
    length,
    mask_kind,
    softcap,
    sinks_dtype,
    q_order,
    k_order,
    v_order,
    dtype,
) -> None:
    torch.manual_seed(length + head_dim)
    q = in_memory(torch.randn(batch, rows, kv_heads * group, head_dim).to(dtype), q_order)
    k = in_memory(torch.randn(batch, kv_heads, length, head_dim).to(dtype), k_order)
    values = torch.randn(batch, kv_heads, length, value_dim) + 1  # their mean is not about 0, for few channels
    v = in_memory(values.to(dtype), v_order)
    mask = None
    if mask_kind != "none":
        shape = (1, 1, rows, length) if mask_kind == "row alone" else (batch, 1, 1, length)
        mask = torch.rand(shape).expand(-1, -1, rows, -1) > 0.4
        if mask_kind == "longer":
            mask = torch.cat([mask, mask, ~mask], -1)
        if mask_kind == "float":
            mask = torch.randn(mask.shape).masked_fill(~mask, float("-inf")).to(dtype)
    scale = head_dim**-0.5
    sinks = None if sinks_dtype is None else (2 * torch.randn(kv_heads * group)).to(sinks_dtype)
    y = cpu_attention.attend(q, k, v, mask, scale, softcap, sinks)
    assert_close(y, attended(q, k, v, mask, scale, softcap, sinks), steps=2)


@given(
    activation=st.sampled_from(list(cpu_block.ACTIVATIONS)),
    mlp=st.sampled_from(["gated", "joined", "plain"]),
    bits=st.lists(st.sampled_from([2, 3, 4, 8]), min_size=4, max_size=4),
    act_order=st.booleans(),
    norm_kinds=st.tuples(norm_kinds, norm_kinds, norm_kinds),
    attended=sizes,
    hidden=st.integers(16, 150),
    inner=st.integers(16, 150),
    rows=st.sampled_from([0, 1, 2, 5, 30, 481]),
    factor=st.sampled_from([1.0, 0.22]),
    parallel=st.booleans(),
    dtype=dtypes,
)
def test_the_tail_is_exact(
    activation, mlp, bits, act_order, norm_kinds, attended, hidden, inner, rows, factor, parallel, dtype
) -> None:
    torch.manual_seed(rows)
    o = Dense(bits[0], attended, hidden, bias=True)
    widths = {"gated": (inner, inner), "joined": (2 * inner,), "plain": (inner,)}[mlp]
    gate_up = [
        Dense(each, hidden, width, i, act_order=act_order) for i, (each, width) in enumerate(zip(bits[1:], widths))
    ]
    down = Dense(bits[3], inner, hidden, act_order=act_order)
    norms = [random_norm(kind, hidden, torch.float32) for kind in norm_kinds]
    output = OutputParts(o.linear, *norms[:2], factor, parallel)
    dense = MLP(tuple(each.linear for each in gate_up), down.linear, activation, mlp != "plain")
    parts = TailParts(output, dense, after_mlp=norms[2])
    x, residual = torch.randn(rows, attended).to(dtype), torch.randn(rows, hidden).to(dtype)

    def rounded(y: Tensor) -> Tensor:
        return y.to(dtype).double()

    h = rounded(o(x.double()))
    h = rounded(residual.double() + factor * rounded(normalized(norms[0], h)))
    n = rounded(normalized(norms[1], residual.double() if parallel else h))
    found = Output(output)(x, residual)
    assert_close(found[0], h, steps=3 if dtype != torch.float32 else 8)
    assert_close(found[1], n, steps=3 if dtype != torch.float32 else 8)
    products = rounded(torch.cat([each(n) for each in gate_up], -1))
    middle = REFERENCES[activation](products[:, :inner])
    if mlp != "plain":
        middle = middle * products[:, inner:]
    out = rounded(normalized(norms[2], rounded(down(rounded(middle)))))
    # Roundings that differ by a tie are not averaged away behind a norm.
    assert_close(Tail(parts)(x, residual), h + factor * out, steps=3 if dtype != torch.float32 else 8)


# -- activations over the whole range ----------------------------------------------------------------------------------


def activated(activation: str, values: Tensor) -> Tensor:
    """What a tail makes of each value: channel 0 holds it, and channel 1 receives the result."""

    def weight(*rows: list[int]) -> Linear:
        codes = torch.tensor(rows, dtype=torch.uint8).t().contiguous() + 8
        ones = torch.ones(1, len(rows))
        g_idx = torch.zeros(len(codes), dtype=torch.int32)
        return Linear(prepared(QuantizedWeight(codes, ones, (ones * 8).to(torch.uint8), g_idx, 4), cpu.KERNEL))

    mlp = MLP((weight([1, 0]),), weight([0], [1]), activation, gated=False)
    parts = TailParts(OutputParts(weight([0], [0])), mlp)
    residual = torch.stack([values, torch.zeros_like(values)], -1)
    return Tail(parts)(torch.zeros(len(values), 1), residual)[:, 1]


@pytest.mark.parametrize("activation", cpu_block.ACTIVATIONS)
def test_an_activation_keeps_its_relative_error_down_to_the_tails(activation: str) -> None:
    least = {"silu": -60.0, "gelu": -9.0, "gelu_tanh": -6.5}.get(activation, -100.0)
    small = 10.0 ** torch.linspace(-15, 0, 2000)
    x = torch.cat([torch.linspace(least, 100, 20000), small, -small])
    expected = REFERENCES[activation](x.double())
    relative = ((activated(activation, x) - expected) / expected.abs().clamp_min(1e-37)).abs()
    limit = 1e-6 if activation != "gelu_tanh" else 2e-5  # a large cube rounds before the exponential
    if activation == "gelu":
        limit = 1e-6 + 3e-7 * x.square().clamp_max(90)  # likewise its square
    assert (relative <= limit).all(), (float(relative.max()), float(x[relative.argmax()]))


@pytest.mark.parametrize("activation", cpu_block.ACTIVATIONS)
def test_an_activation_of_extreme_values_is_their_limit(activation: str) -> None:
    y = activated(activation, torch.tensor([-1e38, -1e30, -1e4, -200.0, 200.0, 1e4]))
    assert (y[:4] == 0).all()
    large = torch.tensor([200.0, 1e4])
    torch.testing.assert_close(y[4:], large**2 if activation == "relu_squared" else large)


# -- not finite --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("rows", [3, 9])
def test_nan_reaches_its_own_row_only(rows: int, dtype: torch.dtype) -> None:
    layer, inner = Dense(4, 64, 64), Dense(4, 64, 128)
    x = torch.randn(rows, 64).to(dtype)
    bad = x.clone()
    bad[1, 5] = float("nan")
    other = torch.arange(rows) != 1
    for kind in ("rms", "layer"):
        norm = random_norm(kind, 64, torch.float32)
        calls = Projections(norm, [layer.linear])
        assert torch.equal(calls(bad)[0][other], calls(x)[0][other])
        assert calls(bad)[0][1].isnan().all()
        for activation in cpu_block.ACTIVATIONS:
            mlp = MLP((inner.linear,), layer.linear, activation)
            tail = Tail(TailParts(OutputParts(layer.linear, before_mlp=norm), mlp))
            for arguments in ((bad, x), (x, bad)):
                y = tail(*arguments)
                assert torch.equal(y[other], tail(x, x)[other])
                assert y[1].isnan().all()


@pytest.mark.parametrize("where", ["q", "keys", "values", "mask"])
@pytest.mark.parametrize("softcap", [0.0, 20.0])
@pytest.mark.parametrize("rows", [2, 30])
def test_nan_that_attention_sees_is_not_lost(where: str, softcap: float, rows: int) -> None:
    tensors = {"q": torch.randn(1, rows, 4, 16), "keys": torch.randn(1, 2, 70, 16), "values": torch.randn(1, 2, 70, 16)}
    tensors["mask"] = torch.zeros(1, 1, rows, 70)
    clean = cpu_attention.attend(*tensors.values(), 0.25, softcap)
    tensors[where][(0, 1, 0, 3) if where != "mask" else (0, 0, 1, 66)] = float("nan")
    y = cpu_attention.attend(*tensors.values(), 0.25, softcap)
    spoiled = {
        "q": y[0, 1, :16],
        "keys": y[0, :, 32:],
        "values": y.view(rows, 4, 16)[:, 2:, 3],
        "mask": y[0, 1],
    }[where]
    assert spoiled.isnan().all()
    assert torch.equal(y[~y.isnan()], clean[~y.isnan()])
    assert int(y.isnan().sum()) == spoiled.numel()


@pytest.mark.parametrize("kind", ["bool", "-inf", "lowest"])
@pytest.mark.parametrize("rows", [3, 100])
def test_a_row_that_sees_nothing_is_zero(kind: str, rows: int) -> None:
    q, k, v = torch.randn(2, rows, 4, 16), torch.randn(2, 2, 130, 16), torch.randn(2, 2, 130, 16)
    mask = torch.rand(2, 1, rows, 130) > 0.5
    mask[0, 0, 1] = False
    mask[1, 0, 2, :64] = False  # a whole chunk
    if kind != "bool":
        low = float("-inf") if kind == "-inf" else torch.finfo(torch.float32).min
        mask = torch.zeros(mask.shape).masked_fill(~mask, low)
    y = cpu_attention.attend(q, k, v, mask, 0.25)
    assert (y[0, 1] == 0).all()
    seen = mask if kind == "bool" else mask == 0
    assert_close(y, attended(q, k, v, seen, 0.25, 0.0))


def test_fp16_beyond_its_range_becomes_infinite_and_then_nan() -> None:
    layer = Dense(4, 64, 64)
    x = torch.full((2, 64), 60000.0, dtype=torch.float16)
    norm = dataclasses.replace(Norm(torch.full((64,), 3e5)), eps=0.0)
    assert Projections(norm, [layer.linear])(x)[0].isnan().all()
