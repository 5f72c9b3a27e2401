"""Rotary positions, and attention over a cache, on a CPU (csrc/cpu/block.h)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .cpu import _cpu
from .cpu_tensors import address, describe, dtype_code, vector_code

# Halves, with an angle for each channel (LLaMA); neighbours likewise (GPT-J); neighbours, with the angles of pairs in
# the first half of a row (GLM); halves, with the angles of pairs in a row that is half as long (gpt-oss).
PAIRS = {"halves": 0, "neighbours": 1, "neighbours_by_pair": 2, "halves_by_pair": 3}
MAX_HEAD = 512  # channels
FEW_ROWS = 8  # of queries, up to which attend is faster than torch's attention wherever it was measured


def serves_prompts() -> bool:
    """Whether :func:`attend` is the faster one for any number of rows: on x86 CPUs without matrix units (AMX), which
    torch's attention uses.
    """
    amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)  # since torch 2.6
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") and not amx()


def channels(pairs: str, dims: int) -> int:
    """How many channels of a head turn by rows of ``dims`` cosines."""
    return 2 * dims if pairs == "halves_by_pair" else dims


def rotate_(
    x: Tensor,
    heads: int,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    norm: Any = None,
    pairs: str = "halves",
) -> Tensor:
    """Normalize the heads of x and turn them by rotary angles, in place.

    Args:
        x: contiguous [..., T, heads * D].
        cos, sin: contiguous float [..., T, dims], one sequence of them or as many as x has; or None. At most D
            channels turn: see :func:`channels`.
        norm: ``Norm.native`` [D], or None. The caller keeps its tensors.
        pairs: which channels turn together, see ``PAIRS``.

    Raises:
        ValueError: a tensor has another dtype, device, shape or layout.
    """
    width = x.size(-1) if x.dim() else 1
    dtype = dtype_code(x, width, "x")
    rows = x.numel() // width if width else 0
    dims, positions, code = 0, 1, 0
    if cos is not None:
        dims = cos.size(-1) if cos.dim() else 1
        code = dtype_code(cos, dims, "cos")
        positions = cos.numel() // dims if dims else 0
        if (
            sin is None
            or sin.dtype != cos.dtype
            or sin.numel() != cos.numel()
            or sin.size(-1) != dims
            or not (sin.is_cpu and sin.is_contiguous() and cos.is_contiguous())
            or (positions != rows and (x.dim() < 2 or positions != x.size(-2)))
        ):
            raise ValueError(
                f"cos is {describe(cos)} and sin {describe(sin)}; expected both contiguous, alike, and with the "
                f"positions of x, {describe(x)}"
            )
    if not x.is_contiguous():
        raise ValueError(f"x is {describe(x)}; expected it to be contiguous, because it is changed in place")
    _cpu.rotate(
        dtype,
        rows,
        width,
        x.data_ptr(),
        heads,
        norm,
        code,
        dims,
        PAIRS[pairs],
        positions,
        address(cos),
        address(sin),
        torch.get_num_threads(),
    )
    return x


def attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of query rows over a cache: of a step, or of a prompt.

    Args:
        q: [B, T, H, D] with any strides, but channels side by side.
        keys, values: [B, KV, S, D] likewise, of the dtype of q.
        mask: bool (True: seen) or of the dtype of q (added), [B or 1, 1, T or 1, >= S]; None: row t sees positions up
            to S - T + t.
        softcap: scores become ``softcap * tanh(score / softcap)``, unless it is 0.
        sinks: float [H], for each head the score of one position more, which has no value; or None.

    Returns:
        [B, T, H * D of the values]. A row that sees nothing gives zeros.

    Raises:
        ValueError: a tensor has another dtype, device, shape or layout.
    """
    if q.dim() != 4 or values.dim() != 4:
        raise ValueError(f"q is {describe(q)} and values {describe(values)}; expected four dimensions of both")
    batch, rows, heads, head_dim = q.shape
    _, kv_heads, length, value_dim = values.shape
    code = dtype_code(q, head_dim, "q")
    strides = q.stride(), keys.stride(), values.stride()
    if keys.shape != (batch, kv_heads, length, head_dim) or values.shape[0] != batch:
        raise ValueError(
            f"keys are {describe(keys)} and values {describe(values)}; expected [B, KV, S, D] of both, for "
            f"q [B, T, H, D], {describe(q)}"
        )
    if not (keys.dtype == values.dtype == q.dtype and keys.is_cpu and values.is_cpu):
        raise ValueError(
            f"keys are {describe(keys)} and values {describe(values)}; expected the dtype and device of q, "
            f"{describe(q)}"
        )
    if not strides[0][3] == strides[1][3] == strides[2][3] == 1:
        raise ValueError(f"q, keys and values have strides {strides}; expected channels side by side (the last is 1)")
    of_mask = (0, 0)
    if mask is not None:
        of_mask = mask_strides(mask, q, length)
    out = q.new_empty((batch, rows, heads * value_dim))
    _cpu.attend(
        code,
        (batch, rows, heads, kv_heads, head_dim, value_dim, length),
        q.data_ptr(),
        strides[0],
        keys.data_ptr(),
        strides[1],
        values.data_ptr(),
        strides[2],
        address(mask),
        mask is not None and mask.dtype == torch.bool,
        of_mask,
        scale,
        softcap,
        address(sinks),
        0 if sinks is None else vector_code(sinks, heads, "sinks"),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def mask_strides(mask: Tensor, q: Tensor, length: int) -> tuple[int, int]:
    """Of batch and row."""
    batch, rows = q.shape[:2]
    shape, strides = mask.shape, mask.stride()
    if (
        len(shape) != 4
        or mask.dtype not in (torch.bool, q.dtype)
        or not mask.is_cpu
        or shape[0] not in (1, batch)
        or shape[1] != 1
        or shape[2] not in (1, rows)
        or shape[3] < length
        or strides[3] != 1
    ):
        raise ValueError(
            f"the mask is {describe(mask)} with strides {strides}; expected bool or {q.dtype} "
            f"[1 or {batch}, 1, 1 or {rows}, >= {length}] with positions side by side, on cpu"
        )
    return strides[0] if shape[0] > 1 else 0, strides[2] if shape[2] > 1 else 0
