"""Codes <-> packed integer words.

A row of ``b``-bit codes is a little-endian bit stream: code ``i`` occupies bits ``[i*b, (i+1)*b)``, so 3-bit codes
cross word boundaries and 32 of them fill 3 words::

    bit   0  3  6  ...      30    33         word 0 | word 1
          c0 c1 c2 ...  c9  c10 (2 low bits)|(1 high bit) c11 ...

The planar layout (``gptq_p``) stores each run of 32 codes as planes, one after another: of 3 bits, a plane of the low 2
bits (two words) and one of the high bit (one word); of 5 to 7 bits, a plane of the low 4 bits (four words), one of 2
bits where there are as many left, and one of the highest bit where one is left. 2, 4 and 8 bits have a single plane,
which equals the stream.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import ConfigError

_WORD = 32
_PLANES = {  # bits -> (width, lowest bit) of each plane, in storage order
    3: ((2, 0), (1, 2)),
    5: ((4, 0), (1, 4)),
    6: ((4, 0), (2, 4)),
    7: ((4, 0), (2, 4), (1, 6)),
}


def words_for(count: int, bits: int) -> int:
    """32-bit words that hold ``count`` codes."""
    return math.ceil(count * bits / _WORD)


def pack(codes: Tensor, bits: int, planar: bool = False) -> Tensor:
    """Pack along dim 0. codes: integer [n, m], values < 2**bits -> int32 [ceil(n*bits/32), m]; the tail is zero.

    Raises:
        ConfigError: planes hold whole runs of 32 codes, and n is not a multiple of 32.
    """
    n, m = codes.shape
    if planar and bits in _PLANES and n % _WORD:
        raise ConfigError(
            f"checkpoint_format='gptq_p' stores {bits}-bit codes in runs of 32, but a layer has {n} channels; use "
            "8 bits, or for 3 bits checkpoint_format='gptq_v2'"
        )
    block = _WORD if planar else _WORD // math.gcd(_WORD, bits)
    padded = torch.zeros((math.ceil(n / block) * block, m), dtype=torch.int32, device=codes.device)
    padded[:n] = codes
    blocks = padded.view(-1, block, m)
    if planar and bits in _PLANES:
        planes = [pack_stream((blocks >> low) & ((1 << width) - 1), width) for width, low in _PLANES[bits]]
        words = torch.cat(planes, dim=1)
    else:
        words = pack_stream(blocks, bits)
    return words.reshape(-1, m)[: words_for(n, bits)].contiguous()


def unpack(words: Tensor, bits: int, count: int, planar: bool = False) -> Tensor:
    """Undo :func:`pack`. words: int32 [>= ceil(count*bits/32), m] -> uint8 [count, m]."""
    m = words.shape[1]
    block = _WORD if planar else _WORD // math.gcd(_WORD, bits)
    words_per_block = block * bits // _WORD
    rows = math.ceil(count / block) * words_per_block
    if words.shape[0] < rows:  # a ragged tail is stored without the words that would be all padding
        words = torch.cat([words, words.new_zeros(rows - words.shape[0], m)])
    blocks = words[:rows].reshape(-1, words_per_block, m)
    if planar and bits in _PLANES:
        codes = torch.zeros((blocks.shape[0], block, m), dtype=torch.uint8, device=words.device)
        first = 0
        for width, low in _PLANES[bits]:
            codes |= unpack_stream(blocks[:, first : first + width], width) << low
            first += width
    else:
        codes = unpack_stream(blocks, bits)
    return codes.reshape(-1, m)[:count]


def pack_stream(codes: Tensor, bits: int) -> Tensor:
    """int32 [blocks, codes per block, m] -> int32 [blocks, words per block, m] as one bit stream per block."""
    blocks, count, m = codes.shape
    words = torch.zeros((blocks, count * bits // _WORD, m), dtype=torch.int32, device=codes.device)
    for i in range(count):
        word, shift = divmod(i * bits, _WORD)
        words[:, word] |= codes[:, i] << shift
        if shift + bits > _WORD:
            words[:, word + 1] |= codes[:, i] >> (_WORD - shift)
    return words


def unpack_stream(words: Tensor, bits: int) -> Tensor:
    """Undo :func:`pack_stream` -> uint8 [blocks, codes per block, m]."""
    blocks, count, m = words.shape
    mask = (1 << bits) - 1
    codes = torch.empty((blocks, count * _WORD // bits, m), dtype=torch.uint8, device=words.device)
    for i in range(codes.shape[1]):
        word, shift = divmod(i * bits, _WORD)
        value = words[:, word] >> shift
        if shift + bits > _WORD:
            low = _WORD - shift
            value = (value & ((1 << low) - 1)) | (words[:, word + 1] << low)
        codes[:, i] = value & mask
    return codes


def to_int32_words(packed: Tensor, dim: int) -> Tensor:
    """Re-slice int8/int16/int64 words, packed along ``dim``, into the int32 words of the same bit stream."""
    if packed.dtype == torch.int32:
        return packed
    stream = packed.movedim(dim, -1).contiguous()
    size = stream.element_size()
    if size < 4 and (short := -stream.shape[-1] % (4 // size)):
        stream = torch.nn.functional.pad(stream, (0, short))
    return _view(stream, torch.int32).movedim(-1, dim).contiguous()


def from_int32_words(packed: Tensor, dtype: torch.dtype, dim: int, length: int) -> Tensor:
    """Undo :func:`to_int32_words`: int32 words -> ``dtype`` words, ``length`` of them along ``dim``."""
    if dtype == torch.int32:
        return packed
    stream = packed.movedim(dim, -1).contiguous()
    if dtype == torch.int64 and stream.shape[-1] % 2:
        stream = torch.nn.functional.pad(stream, (0, 1))
    return _view(stream, dtype)[..., :length].movedim(-1, dim).contiguous()


def _view(stream: Tensor, dtype: torch.dtype) -> Tensor:
    """``stream.view(dtype)``, which refuses the strides that a dimension of one element may have."""
    return stream.clone(memory_format=torch.contiguous_format).view(-1).view(dtype).view(*stream.shape[:-1], -1)
