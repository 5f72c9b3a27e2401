"""Packing round-trips bit for bit, and 3-bit fields that cross words land where an independent model says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gptq_backend import ConfigError
from gptq_backend.format import packing

bits_strategy = st.sampled_from([2, 3, 4, 5, 6, 7, 8])
PLANES = {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}
WORDS = {torch.int8: 8, torch.int16: 16, torch.int32: 32, torch.int64: 64}


def random_codes(bits: int, rows: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << bits, (rows, columns), generator=generator, dtype=torch.uint8)


def bit_string(codes: list[int], bits: int) -> str:
    """The stream as characters, lowest bit first."""
    return "".join(format(code, f"0{bits}b")[::-1] for code in codes)


def words_of(stream: str, width: int = 32) -> list[int]:
    """Signed integers of ``width`` bits from a stream, zero-padded at its end."""
    chunks = [stream[i : i + width].ljust(width, "0") for i in range(0, len(stream), width)]
    values = [int(chunk[::-1], 2) for chunk in chunks]
    return [value - (1 << width) if value >> (width - 1) else value for value in values]


@given(bits_strategy, st.integers(1, 130), st.integers(1, 5), st.integers(0, 9), st.booleans())
def test_round_trip_of_any_size(bits: int, rows: int, columns: int, seed: int, planar: bool) -> None:
    rows = -(-rows // 32) * 32 if planar else rows
    codes = random_codes(bits, rows, columns, seed)
    packed = packing.pack(codes, bits, planar)
    assert packed.shape == (packing.words_for(rows, bits), columns)
    assert packed.dtype == torch.int32
    assert torch.equal(packing.unpack(packed, bits, rows, planar), codes)


@given(bits_strategy, st.integers(1, 130), st.integers(0, 9))
def test_stream_equals_a_string_of_bits(bits: int, rows: int, seed: int) -> None:
    codes = random_codes(bits, rows, 1, seed)
    expected = words_of(bit_string(codes[:, 0].tolist(), bits))
    assert packing.pack(codes, bits)[:, 0].tolist() == expected


@given(st.sampled_from(list(PLANES)), st.integers(1, 3), st.integers(0, 9))
def test_planes_equal_strings_of_bits(bits: int, blocks: int, seed: int) -> None:
    """Per 32 codes: the words of the low bits, then those of the higher ones."""
    codes = random_codes(bits, 32 * blocks, 1, seed)
    expected: list[int] = []
    for first in range(0, 32 * blocks, 32):
        rest = codes[first : first + 32, 0].tolist()
        for width in PLANES[bits]:
            expected += words_of(bit_string([code & ((1 << width) - 1) for code in rest], width))
            rest = [code >> width for code in rest]
    assert packing.pack(codes, bits, planar=True)[:, 0].tolist() == expected


@given(st.sampled_from([2, 4, 8]), st.integers(1, 70), st.integers(0, 9))
def test_planar_differs_from_the_stream_for_3_bits_only(bits: int, rows: int, seed: int) -> None:
    codes = random_codes(bits, rows, 2, seed)
    assert torch.equal(packing.pack(codes, bits, planar=True), packing.pack(codes, bits))
    three = torch.arange(32, dtype=torch.uint8).remainder(8).unsqueeze(1)
    assert not torch.equal(packing.pack(three, 3, planar=True), packing.pack(three, 3))


@given(bits_strategy, st.integers(1, 70), st.integers(1, 4), st.sampled_from(list(WORDS)), st.integers(0, 1))
def test_other_word_types_are_the_same_stream(bits: int, rows: int, columns: int, dtype: torch.dtype, dim: int) -> None:
    codes = random_codes(bits, rows, columns, seed=rows)
    width = WORDS[dtype]
    expected = [words_of(bit_string(codes[:, c].tolist(), bits), width) for c in range(columns)]
    foreign = torch.tensor(expected, dtype=dtype)  # [columns, words]
    foreign = foreign.t().contiguous() if dim == 0 else foreign
    words = packing.to_int32_words(foreign, dim)
    along = words if dim == 0 else words.t()
    assert torch.equal(packing.unpack(along, bits, rows), codes)
    assert torch.equal(packing.from_int32_words(words, dtype, dim, foreign.shape[dim]), foreign)


def test_planes_of_a_partial_run_are_refused_not_cut_off() -> None:
    with pytest.raises(ConfigError, match="runs of 32.*33 channels.*gptq_v2"):
        packing.pack(random_codes(3, 33, 1, 0), 3, planar=True)


def test_tail_bits_are_zero() -> None:
    """So that two writers of the same codes write the same bytes."""
    packed = packing.pack(torch.full((9, 1), 15, dtype=torch.uint8), 4)
    assert packed.flatten().tolist() == [-1, 15]


def test_top_bit_of_a_word_is_not_lost_in_the_sign() -> None:
    for bits in (2, 3, 4, 8):
        codes = torch.full((64, 1), (1 << bits) - 1, dtype=torch.uint8)
        packed = packing.pack(codes, bits)
        assert packed.flatten().tolist() == [-1] * (64 * bits // 32)
        assert torch.equal(packing.unpack(packed, bits, 64), codes)


@pytest.mark.parametrize(("count", "bits", "words"), [(32, 3, 3), (33, 3, 4), (8, 4, 1), (9, 4, 2), (259, 8, 65)])
def test_words_for(count: int, bits: int, words: int) -> None:
    assert packing.words_for(count, bits) == words
