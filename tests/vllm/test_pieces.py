"""Neighbours that one product can serve become one piece, in their order."""

from __future__ import annotations

import torch

from gptq_vllm.pieces import DensePiece, joined
from tests.format.test_packed_weight import K, dense, piece, weight


def test_only_neighbours_of_one_kind_and_form_are_joined() -> None:
    plain, other, wide = weight(4, sym=True), weight(4, sym=True), weight(8, sym=True)
    found = joined(
        [piece(plain), piece(other), piece(wide), DensePiece(torch.zeros(4, K)), DensePiece(torch.ones(2, K))]
    )
    assert [one.out_features for one in found] == [2 * piece(plain).out_features, piece(wide).out_features, 6]
    assert torch.equal(dense(found[0]), torch.cat([plain.dequantize(), other.dequantize()]))
    assert torch.equal(found[2].weight, torch.cat([torch.zeros(4, K), torch.ones(2, K)]))
