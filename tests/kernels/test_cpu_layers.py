"""Several decoder layers in one call: bit for bit what their calls give one by one, and nothing written elsewhere."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gptq_backend.kernels import cpu_attention
from gptq_backend.kernels.cpu_attention import PAIRS
from gptq_backend.kernels.cpu_block import Linear, Norm, OutputParts, Projections
from gptq_backend.kernels.cpu_dense import Dense, Product
from gptq_backend.kernels.cpu_layers import Ending, Layer, Room, run_layers
from gptq_backend.kernels.cpu_tail import MLP, Tail, TailParts
from tests.kernels.checks import LIMITS, error, native
from tests.kernels.test_cpu_block import Dense as Quantized
from tests.kernels.test_cpu_block import normalized, random_norm

pytestmark = native


@dataclasses.dataclass(frozen=True)
class Parts:
    """A layer of the tests, whole and in parts."""

    inputs: Projections
    head_norms: tuple[Norm | None, Norm | None]
    pairs: str | None
    heads: int
    kv_heads: int
    head_dim: int
    softcap: float
    tail: Tail

    def layer(self) -> Layer:
        norms = [None if norm is None else norm.native for norm in self.head_norms]
        sizes = self.heads, self.kv_heads, self.head_dim
        return Layer(self.inputs, norms, self.pairs, *sizes, 0.3, self.softcap, self.tail)

    def step(self, room: Room, length: int, x: Tensor, angles: Any, mask: Tensor | None) -> Tensor:
        """By the calls of cpu_block."""
        found = self.inputs(x)
        if len(found) == 1:
            sizes = [count * self.head_dim for count in (self.heads, self.kv_heads, self.kv_heads)]
            found = [part.contiguous() for part in found[0].split(sizes, dim=-1)]
        for part, heads, norm in zip(found, (self.heads, self.kv_heads), self.head_norms):
            native_norm = None if norm is None else norm.native
            if norm is not None and norm.weight is not None and norm.weight.numel() != self.head_dim:
                cpu_attention.rotate_(part, 1, norm=native_norm)
                native_norm = None
            cos, sin = angles if self.pairs else (None, None)
            cpu_attention.rotate_(part, heads, cos, sin, native_norm, self.pairs or "halves")
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in found)
        last = length + x.shape[1]
        room.keys[:, :, length:last] = k.transpose(1, 2)
        room.values[:, :, length:last] = v.transpose(1, 2)
        keys, values = room.keys[:, :, :last], room.values[:, :, :last]
        return self.tail(cpu_attention.attend(q, keys, values, mask, 0.3, self.softcap), x)


def random_parts(seed: int, joined: bool, pairs: str | None, norms: str, softcap: float) -> Parts:
    torch.manual_seed(seed)
    heads, kv_heads, head_dim, hidden, inner = 4, 2, 16, 64, 96
    sizes = [hidden + 2 * kv_heads * head_dim] if joined else [hidden, kv_heads * head_dim, kv_heads * head_dim]
    inputs = [Quantized(4, hidden, size, seed + i, bias=i == 0).linear for i, size in enumerate(sizes)]
    wide = norms == "wide"
    head_norms = [
        None if norms == "none" else Norm(torch.randn(count * head_dim if wide else head_dim)) for count in (4, 2)
    ]
    o, gate, up = (Quantized(4, hidden, size, seed + 5 + i).linear for i, size in enumerate((hidden, inner, inner)))
    mlp = MLP((gate, up), Quantized(8, inner, hidden, seed).linear, "silu")
    parts = TailParts(OutputParts(o, before_mlp=Norm(None)), mlp)
    projections = Projections(random_norm("rms", hidden, torch.float32), inputs)
    return Parts(projections, tuple(head_norms), pairs, heads, kv_heads, head_dim, softcap, Tail(parts))  # type: ignore[arg-type]


def rooms(count: int, batch: int, dtype: torch.dtype, capacity: int = 12) -> list[Room]:
    return [Room(*torch.randn(2, batch, 2, capacity, 16).to(dtype)) for _ in range(count)]


@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(0, 8),
    st.sampled_from(list(LIMITS)),
    st.booleans(),
    st.sampled_from([*PAIRS, None]),
    st.sampled_from(["none", "narrow", "wide"]),
    st.sampled_from([0.0, 5.0]),
    st.sampled_from(["none", "bool", "added"]),
)
def test_layers_in_one_call_give_the_bits_of_their_own_calls(
    count: int,
    batch: int,
    positions: int,
    length: int,
    dtype: torch.dtype,
    joined: bool,
    pairs: str | None,
    norms: str,
    softcap: float,
    masked: str,
) -> None:
    parts = [random_parts(7 * i, joined, pairs, norms, softcap) for i in range(count)]
    x = torch.randn(batch, positions, 64).to(dtype)
    dims = 4 if pairs == "neighbours_by_pair" else 8
    angles = (torch.randn(1, positions, dims), torch.randn(1, positions, dims)) if pairs else None
    seen = torch.rand(batch, 1, positions, length + positions) < 0.7
    added = torch.zeros(seen.shape).masked_fill(~seen, -10.0).to(dtype)
    mask = {"none": None, "bool": seen, "added": added}[masked]
    given_rooms = rooms(count, batch, dtype)
    expected_rooms = [Room(room.keys.clone(), room.values.clone()) for room in given_rooms]
    results = run_layers([each.layer() for each in parts], given_rooms, [length] * count, x, angles, mask)
    y = x
    for i, each in enumerate(parts):
        y = each.step(expected_rooms[i], length, y, angles, mask)
        assert torch.equal(results.ys[i], y)
        assert torch.equal(given_rooms[i].keys, expected_rooms[i].keys)
        assert torch.equal(given_rooms[i].values, expected_rooms[i].values)


def test_a_result_that_somebody_changed_is_told_from_one_that_nobody_did() -> None:
    layers = [random_parts(i, False, None, "none", 0.0).layer() for i in range(2)]
    results = run_layers(layers, rooms(2, 1, torch.float32), [3, 3], torch.randn(1, 1, 64))
    assert results.intact(0, results.ys[0])
    assert results.intact(1, results.ys[1])
    assert not results.intact(0, results.ys[1])
    assert not results.intact(0, results.ys[0].clone())
    results.ys[1].add_(1e-3)
    assert results.intact(0, results.ys[0])
    assert not results.intact(1, results.ys[1])


def product(head: str) -> tuple[Linear | Dense, Any]:
    """A head of 64 inputs for an ending, and what multiplies with it by itself."""
    torch.manual_seed(1)
    if head == "quantized":
        linear = Quantized(4, 64, 50).linear
        return linear, lambda x: Projections(None, [linear])(x)[0]
    dense = Dense(torch.randn(50, 64).bfloat16(), torch.randn(50))
    return dense, Product(dense)


@pytest.mark.parametrize("head", ["quantized", "dense"])
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("count", [1, 3])
def test_an_ending_gives_the_bits_of_its_own_calls(head: str, dtype: torch.dtype, count: int) -> None:
    norm, (weight, multiply) = random_norm("rms", 64, dtype), product(head)
    layers = [random_parts(i, False, None, "none", 0.0).layer() for i in range(count)]
    x, spaces = torch.randn(2, 1, 64).to(dtype), rooms(count, 2, dtype)
    lengths = [3] * count
    plain = run_layers(layers, spaces, lengths, x)
    results = run_layers(layers, spaces, lengths, x, ending=Ending(norm, weight))
    assert torch.equal(results.ys[:-1], plain.ys)
    assert error(results.ys[-1], normalized(norm, plain.ys[-1].double())) < LIMITS[dtype]
    assert torch.equal(results.logits, multiply(results.ys[-1]))
    assert results.intact(count, results.ys[-1])
    results.ys[-1].mul_(2)
    assert not results.intact(count, results.ys[-1])


@pytest.mark.parametrize(
    ("norm", "head", "message"),
    [
        (Norm(torch.ones(5)), 64, "the size of a norm is 5; expected that of its input, 64"),
        (Norm(torch.ones(32)), 32, "the size of a norm is 32; expected that of its input, 64"),
        (Norm(None), 32, "inputs of a head is 32; expected those of x, 64"),
    ],
)
def test_an_ending_of_other_sizes_is_refused(norm: Norm, head: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        one_step(ending=Ending(norm, Dense(torch.randn(9, head))))


def one_step(
    x: Any = (1, 2, 64), length: int = 3, capacity: int = 12, kind: Any = torch.float32, **kwargs: Any
) -> None:
    layer = random_parts(0, False, kwargs.pop("pairs", None), "none", 0.0).layer()
    run_layers([layer], rooms(1, 1, kind, capacity), [length], torch.randn(x), **kwargs)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: one_step(capacity=4), "capacity is 4; expected at least 5"),
        (lambda: one_step(x=(1, 2, 32)), "the width of a layer is 64; expected that of x, 32"),
        (lambda: one_step(x=(2, 2, 64)), "with the batch and dtype of all keys and values"),
        (lambda: one_step(kind=torch.float16), "with the batch and dtype of all keys and values"),
        (lambda: one_step(x=(2, 64)), "expected \\[B, T, H\\]"),
        (lambda: one_step(mask=torch.ones(1, 1, 2, 4, dtype=torch.bool)), "expected bool or torch.float32"),
        (lambda: one_step(angles=(torch.ones(1, 3, 8), torch.ones(1, 3, 8)), pairs="halves"), "expected both"),
        (
            lambda: one_step(angles=(torch.ones(1, 2, 7), torch.ones(1, 2, 7)), pairs="halves"),
            "channels that turn is 7",
        ),
        (
            lambda: one_step(angles=(torch.ones(1, 2, 32), torch.ones(1, 2, 32)), pairs="halves"),
            "channels that turn is 32",
        ),
        (lambda: one_step(pairs="halves"), "dims of cos is 0"),
        (lambda: Room(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 5)), "of one shape"),
        (lambda: Room(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4).half()), "expected both in one dtype"),
    ],
)
def test_what_does_not_fit_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_one_room_for_two_layers_is_refused() -> None:
    layers = [random_parts(i, False, None, "none", 0.0).layer() for i in range(2)]
    with pytest.raises(ValueError, match="two layers have the same room"):
        run_layers(layers, rooms(1, 1, torch.float32) * 2, [3, 3], torch.randn(1, 1, 64))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 3}, "heads is 3; expected a multiple of kv_heads"),
        ({"heads": 8}, "the outputs of q, k and v or of all"),
        ({"head_dim": 513}, "head_dim is 513; expected at most 512"),
        ({"head_norms": (Norm(torch.ones(5)), None)}, "the size of a norm is 5"),
    ],
)
def test_layers_of_other_sizes_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(random_parts(0, False, None, "none", 0.0), **changes).layer()
