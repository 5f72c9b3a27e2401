"""Triton kernels over the layout of triton_layout.py; triton_ops.py launches them. Importing this module needs triton.

Names common to all, with K, N, G as in docs/format.md:

    words, scales, zeros, perm, groups, bias: the prepared tensors; None where there is none.
    width: N padded, the row length of words, scales and zeros.
    slabs, group_planes: slabs of the weight; planes of a group where ``groups`` is None.
    BITS, SHARE: of a code; how many planes in sequence are sure to lie in one group.

Numbers that would only multiply the compiled variants are not specialized on; with slabs_per_split = 1 as a constant,
LLVM also unrolls the loop, for minutes.

A plane is 16 slots, what one matrix instruction takes of K.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _load_words(words, at, width, inside, BITS: tl.constexpr):
    """The words of a slab, and for 3 bits those of its high bits. at: of an element from the first of the slab."""
    low = tl.load(words + at, mask=inside, other=0)
    high = low
    if BITS == 3:
        halfwords = (words + 16 * width).to(tl.pointer_type(tl.int16))
        high = tl.load(halfwords + at, mask=inside, other=0).to(tl.int32)
    return low, high


@triton.jit
def _codes(low, high, plane: tl.constexpr, BITS: tl.constexpr):
    """int32, in the shape of low. low: words of the slab; high: int32, its 16-bit words of high bits, for 3 bits."""
    if BITS == 3:
        codes = ((low >> (plane * 2)) & 3) | (((high >> plane) & 1) << 2)
    else:
        codes = (low >> (plane * BITS)) & ((1 << BITS) - 1)
    return codes


@triton.jit
def _less_zero(codes, zero, dtype: tl.constexpr, BITS: tl.constexpr):
    """codes - zero, exactly, in dtype. A code becomes the low mantissa bits of a power of two: no conversion."""
    if dtype == tl.float16:
        return (codes | 0x6400).to(tl.int16).to(tl.float16, bitcast=True) - (zero + 1024).to(tl.float16)
    if dtype == tl.bfloat16 and BITS <= 4:
        return (codes | 0x4300).to(tl.int16).to(tl.bfloat16, bitcast=True) - (zero + 128).to(tl.bfloat16)
    difference = (codes | 0x4B000000).to(tl.float32, bitcast=True) - (zero + 0x800000).to(tl.float32)
    return difference.to(dtype)


@triton.jit
def _scale_and_zero(scales, zeros, groups, plane, group_planes, last_group, n, width, BITS: tl.constexpr):
    """float32 [n] and int32 [n] of the group in which ``plane``, counted from the first slab, lies."""
    group = plane // group_planes if groups is None else tl.load(groups + plane)
    at = tl.minimum(group, last_group) * width + n
    scale = tl.load(scales + at, mask=n < width, other=0.0).to(tl.float32)
    if zeros is None:
        zero = tl.full(n.shape, 1 << (BITS - 1), tl.int32)
    else:
        zero = tl.load(zeros + at, mask=n < width, other=0).to(tl.int32)
    return scale, zero


@triton.jit(do_not_specialize=["rows", "slabs", "slabs_per_split", "group_planes", "last_group"])
def gemm(
    x,
    words,
    scales,
    zeros,
    groups,
    bias,
    y,
    order,
    experts,
    rows,
    top_k,
    K,
    N,
    slabs,
    slabs_per_split,
    width,
    group_planes,
    last_group,
    BITS: tl.constexpr,
    SHARE: tl.constexpr,
    SORTED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One tile of one split of y [splits, rows, N], or of y [rows, N] when there is one split.

    Without experts, x is [rows, K]. With them, row ``order[i]`` of y (rows or more for padding) belongs to expert
    ``experts[i // BLOCK_M]``, or comes out as zeros where that is negative. Then x is [ceil(rows/top_k), K], row
    ``order[i] // top_k`` being its input; or, SORTED, row i.
    """
    PLANES: tl.constexpr = 32 // BITS if BITS != 3 else 16
    WORDS: tl.constexpr = 24 if BITS == 3 else 16  # rows of words of a slab
    tile, split = tl.program_id(0), tl.program_id(2)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = split * slabs_per_split
    last = tl.minimum(first + slabs_per_split, slabs)
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    source = row
    # Output channels below ``biased`` get the bias: all in the first split, none in the others, since splits are added.
    biased = tl.where(split == 0, N, 0)
    if experts is not None:
        row = tl.load(order + row)
        source = source if SORTED else row // top_k
        expert = tl.load(experts + tile).to(tl.int64)
        # A tile of no expert comes out as zeros: no bias, and no slab to multiply, since the loop ends where it starts.
        biased = tl.where(expert < 0, 0, biased)
        last = tl.where(expert < 0, first, last)
        expert = tl.maximum(expert, 0)  # so that the pointers below stay inside the tensors
        words += expert * slabs * WORDS * width
        scales += expert * (last_group + 1) * width
        if zeros is not None:
            zeros += expert * (last_group + 1) * width
        if groups is not None:
            groups += expert * slabs * PLANES
        if bias is not None:
            bias += expert * N
    valid = row < rows
    x_rows = x + source.to(tl.int64)[None, :] * K
    slot = tl.arange(0, 16)
    inside = (n < width)[:, None]
    # Weights are the first operand: that one matrix units can take from registers, where the codes are expanded.
    accumulator = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for slab in tl.range(first, last, num_stages=STAGES):
        slab_words = words + tl.cast(slab, tl.int64) * WORDS * width
        low, high = _load_words(slab_words, slot[None, :] * width + n[:, None], width, inside, BITS)
        for plane in tl.static_range(PLANES):
            if plane % SHARE == 0:
                scale, zero = _scale_and_zero(
                    scales, zeros, groups, slab * PLANES + plane, group_planes, last_group, n, width, BITS
                )
                part = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            k = (slab * PLANES + plane) * 16 + slot
            inputs = tl.load(x_rows + k[:, None], mask=valid[None, :] & (k < K)[:, None], other=0.0)
            weights = _less_zero(_codes(low, high, plane, BITS), zero[:, None], x.dtype.element_ty, BITS)
            part = tl.dot(weights, inputs, part, input_precision="ieee")
            if plane % SHARE == SHARE - 1:
                accumulator += part * scale[:, None]
    if bias is not None:
        accumulator += tl.load(bias + n, mask=n < biased, other=0.0).to(tl.float32)[:, None]
    at = (split * rows + row).to(tl.int64)[None, :] * N + n[:, None]
    tl.store(y + at, accumulator.to(y.dtype.element_ty), mask=valid[None, :] & (n < N)[:, None])


@triton.jit(do_not_specialize=["slabs", "slabs_per_split", "group_planes", "last_group"])
def gemv(
    x,
    words,
    scales,
    zeros,
    perm,
    groups,
    bias,
    y,
    K,
    N,
    slabs,
    slabs_per_split,
    width,
    group_planes,
    last_group,
    BITS: tl.constexpr,
    SHARE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One tile of one split of y [splits, N]; x [K] in the order of its channels. No matrix unit pays for one row."""
    PLANES: tl.constexpr = 32 // BITS if BITS != 3 else 16
    WORDS: tl.constexpr = 24 if BITS == 3 else 16  # rows of words of a slab
    split = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = split * slabs_per_split
    last = tl.minimum(first + slabs_per_split, slabs)
    slot = tl.arange(0, 16)
    inside = (n < width)[None, :]
    accumulator = tl.zeros((16, BLOCK_N), tl.float32)
    for slab in tl.range(first, last, num_stages=STAGES):
        slab_words = words + tl.cast(slab, tl.int64) * WORDS * width
        low, high = _load_words(slab_words, slot[:, None] * width + n[None, :], width, inside, BITS)
        for plane in tl.static_range(PLANES):
            if plane % SHARE == 0:
                scale, zero = _scale_and_zero(
                    scales, zeros, groups, slab * PLANES + plane, group_planes, last_group, n, width, BITS
                )
                part = tl.zeros((16, BLOCK_N), tl.float32)
            k = (slab * PLANES + plane) * 16 + slot
            if perm is not None:
                k = tl.load(perm + k)
            inputs = tl.load(x + k, mask=(k >= 0) & (k < K), other=0.0).to(tl.float32)
            weights = _less_zero(_codes(low, high, plane, BITS), zero[None, :], tl.float32, BITS)
            part += inputs[:, None] * weights
            if plane % SHARE == SHARE - 1:
                accumulator += part * scale[None, :]
    result = tl.sum(accumulator, 0)
    if bias is not None:
        result += tl.load(bias + n, mask=n < tl.where(split == 0, N, 0), other=0.0).to(tl.float32)
    tl.store(y + split * N + n, result.to(y.dtype.element_ty), mask=n < N)


@triton.jit(do_not_specialize=["size", "splits"])
def add_splits(parts, y, size, splits, BLOCK: tl.constexpr):
    """y [size] = the sum of parts [splits, size], always in the same order."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        total += tl.load(parts + split * size.to(tl.int64) + i, mask=i < size, other=0.0)
    tl.store(y + i, total.to(y.dtype.element_ty), mask=i < size)


@triton.jit(do_not_specialize=["rows"])
def gather(x, perm, y, order, experts, rows, top_k, K, slots, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr):
    """One row of y [., slots]: x in the order of the slots, padding zero. Experts as in :func:`gemm`."""
    row = tl.program_id(0)
    slot = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    source = row
    if experts is not None:
        perm += tl.maximum(tl.load(experts + row // BLOCK_M), 0).to(tl.int64) * slots
        source = tl.load(order + row)
    channel = tl.load(perm + slot, mask=slot < slots, other=-1)
    valid = (channel >= 0) & (channel < tl.where(source < rows, K, 0))
    value = tl.load(x + (source // top_k).to(tl.int64) * K + channel, mask=valid, other=0.0)
    tl.store(y + row.to(tl.int64) * slots + slot, value, mask=slot < slots)


@triton.jit(do_not_specialize=["group_planes", "last_group"])
def dequantize(
    words,
    scales,
    zeros,
    perm,
    groups,
    y,
    K,
    N,
    start,
    width,
    group_planes,
    last_group,
    BITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One slab of y [K, N], the output channels from ``start`` on."""
    PLANES: tl.constexpr = 32 // BITS if BITS != 3 else 16
    WORDS: tl.constexpr = 24 if BITS == 3 else 16  # rows of words of a slab
    dtype: tl.constexpr = tl.float64 if y.dtype.element_ty == tl.float64 else tl.float32
    slab = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    n = start + column
    slot = tl.arange(0, 16)
    inside = (n < width)[None, :]
    slab_words = words + tl.cast(slab, tl.int64) * WORDS * width
    low, high = _load_words(slab_words, slot[:, None] * width + n[None, :], width, inside, BITS)
    for plane in tl.static_range(PLANES):
        scale, zero = _scale_and_zero(
            scales, zeros, groups, slab * PLANES + plane, group_planes, last_group, n, width, BITS
        )
        k = (slab * PLANES + plane) * 16 + slot
        if perm is not None:
            k = tl.load(perm + k)
        weights = _less_zero(_codes(low, high, plane, BITS), zero[None, :], tl.float32, BITS).to(dtype) * scale[None, :]
        at = k.to(tl.int64)[:, None] * N + column[None, :]
        valid = ((k >= 0) & (k < K))[:, None] & (column < N)[None, :]
        tl.store(y + at, weights.to(y.dtype.element_ty), mask=valid)
