"""Column order: every channel once, groups where the checkpoint will say, the loop's assumption of runs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptq_backend import QuantizeConfig
from gptq_backend.algorithm.column_order import column_order
from tests import naive

diagonals = st.lists(st.integers(1, 6).map(float), min_size=1, max_size=40)  # few values: many ties
ORDERS = [
    {"act_group_aware": False},
    {"desc_act": True},
    {"static_groups": True},
    {"desc_act": True, "static_groups": True},
    {"act_group_aware": True},
    {"act_group_aware": True, "static_groups": True},
]


@given(diagonals, st.sampled_from([1, 3, 8, -1]), st.sampled_from(ORDERS))
def test_agrees_with_the_naive_order(diagonal: list[float], size: int, options: dict[str, bool]) -> None:
    config = QuantizeConfig(group_size=size, **options)
    order = column_order(torch.tensor(diagonal), config)
    perm, g_idx = naive.column_order(diagonal, config)
    assert order.perm.tolist() == perm
    assert order.g_idx.tolist() == g_idx
    assert order.g_idx.dtype == torch.int32


@given(diagonals, st.sampled_from([1, 3, 8, -1]), st.sampled_from(ORDERS))
def test_visits_each_channel_once_and_keeps_group_sizes(
    diagonal: list[float], size: int, options: dict[str, bool]
) -> None:
    order = column_order(torch.tensor(diagonal), QuantizeConfig(group_size=size, **options))
    assert sorted(order.perm.tolist()) == list(range(len(diagonal)))
    counts = torch.bincount(order.g_idx.long()).tolist()
    full = len(diagonal) if size == -1 else size
    assert all(count == full for count in counts[:-1])
    assert sum(counts) == len(diagonal)


@given(diagonals, st.sampled_from([1, 3, 8, -1]), st.sampled_from(ORDERS))
def test_groups_that_are_fitted_on_the_way_are_consecutive(
    diagonal: list[float], size: int, options: dict[str, bool]
) -> None:
    order = column_order(torch.tensor(diagonal), QuantizeConfig(group_size=size, **options))
    if not order.static:
        runs = torch.unique_consecutive(order.g_idx[order.perm]).tolist()
        assert len(runs) == len(set(runs))


@pytest.mark.parametrize("options", [o for o in ORDERS if not o.get("desc_act") or o.get("static_groups")])
def test_only_plain_act_order_has_a_real_g_idx(options: dict[str, bool]) -> None:
    diagonal = torch.rand(20)
    order = column_order(diagonal, QuantizeConfig(group_size=8, **options))
    assert order.g_idx.tolist() == [i // 8 for i in range(20)]


def test_act_order_puts_the_most_important_channels_into_the_first_group() -> None:
    diagonal = torch.tensor([1.0, 9.0, 2.0, 8.0, 3.0])
    order = column_order(diagonal, QuantizeConfig(group_size=2, desc_act=True))
    assert order.perm.tolist() == [1, 3, 4, 2, 0]
    assert order.g_idx.tolist() == [2, 0, 1, 0, 1]
