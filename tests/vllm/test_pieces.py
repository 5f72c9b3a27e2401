"""Pieces become segments: neighbours that one product can serve as one, in their order."""

from __future__ import annotations

import torch

from gptq_vllm.fused_weight import FusedWeight
from gptq_vllm.pieces import DensePiece, joined
from tests.format.test_weight import K, dense, piece, weight


def test_only_neighbours_of_one_kind_and_form_are_joined() -> None:
    plain, other, wide = weight(4, sym=True), weight(4, sym=True), weight(8, sym=True)
    found = joined(
        [piece(plain), piece(other), piece(wide), DensePiece(torch.zeros(4, K)), DensePiece(torch.ones(2, K))]
    )
    assert [one.out_features for one in found] == [2 * piece(plain).out_features, piece(wide).out_features, 6]
    assert torch.equal(dense(found[0]), torch.cat([plain.dequantize(), other.dequantize()]))
    assert torch.equal(found[2].weight, torch.cat([torch.zeros(4, K), torch.ones(2, K)]))


def test_segments_multiply_by_the_tensors_that_offloading_puts_in_their_place() -> None:
    segments, x = FusedWeight([piece(weight(4, sym=False))], torch.float32, None), torch.randn(3, K)
    expected = segments(x)
    others = {key: value * 2 if key.endswith("scales") else value for key, value in segments.state_dict().items()}
    torch.testing.assert_close(torch.func.functional_call(segments, others, (x,)), 2 * expected)
    assert torch.equal(segments(x), expected)
