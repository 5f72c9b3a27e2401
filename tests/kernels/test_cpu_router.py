"""A mixture's router and what follows the attention with it: torch's own choice, and exact against float64."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gptq_backend.kernels import cpu
from gptq_backend.kernels.cpu_block import OutputParts
from gptq_backend.kernels.cpu_dense import Dense as Gate
from gptq_backend.kernels.cpu_experts import ExpertMLPs
from gptq_backend.kernels.cpu_layers import run_layers
from gptq_backend.kernels.cpu_router import Router, RouterParts, Rule
from gptq_backend.kernels.cpu_tail import MLP, Mixture, Tail, TailParts
from tests.kernels.checks import LIMITS, assert_passes_at, native
from tests.kernels.test_cpu_block import REFERENCES, Dense, assert_close
from tests.kernels.test_cpu_experts import dense, expected, grouped
from tests.kernels.test_cpu_layers import Parts, random_parts, rooms

pytestmark = native
dtypes = st.sampled_from(list(LIMITS))


def routed(parts: RouterParts, x: Tensor) -> tuple[Tensor, Tensor]:
    """By torch, from the logits in float64: what each expert counts [T, E], and how good the choice is [T]."""
    rule, gate = parts.rule, parts.gate
    logits = x.double() @ gate.weight.double().t() + (0.0 if gate.bias is None else gate.bias.double())
    logits = logits.to(x.dtype).double() if rule.rounded else logits
    scores = logits.sigmoid() if rule.sigmoid else logits.softmax(-1)
    choice = scores if parts.correction is None else scores + parts.correction.double()
    grouped_choice = choice.unflatten(-1, (rule.groups, -1))
    of_group = grouped_choice.topk(rule.best, -1)[0].sum(-1)
    kept = of_group.topk(rule.chosen_groups, -1)[1]
    mask = torch.zeros_like(of_group).scatter_(-1, kept, 1.0).bool()
    choice = grouped_choice.masked_fill(~mask[..., None], -float("inf")).flatten(-2)
    best, ids = choice.topk(rule.top_k, -1)
    counts = scores.gather(-1, ids)
    if rule.normalized:
        counts = counts / counts.sum(-1, keepdim=True)
    return torch.zeros_like(scores).scatter_(-1, ids, counts * rule.scale), best.sum(-1)


def spread(ids: Tensor, factors: Tensor, experts: int) -> Tensor:
    return torch.zeros(len(ids), experts, dtype=torch.float64).scatter_(-1, ids.long(), factors.double())


@st.composite
def rules(draw: Any) -> tuple[int, Rule]:
    """How many experts there are, and a rule for them."""
    groups, size = draw(st.sampled_from([(1, 5), (1, 40), (1, 128), (2, 4), (4, 8), (8, 32)]))
    chosen = draw(st.integers(1, groups))
    top_k = draw(st.integers(1, min(chosen * size, 9)))
    rule = Rule(
        top_k=top_k,
        sigmoid=draw(st.booleans()),
        rounded=draw(st.booleans()),
        groups=groups,
        chosen_groups=chosen,
        best=draw(st.integers(1, 2)),
        normalized=draw(st.booleans()),
        scale=draw(st.sampled_from([1.0, 2.5])),
    )
    return groups * size, rule


@given(rules(), st.sampled_from([0, 1, 2, 7, 9, 33]), st.integers(8, 700), dtypes, dtypes, st.booleans(), st.booleans())
def test_routers_are_exact(sizes, tokens, width, dtype, weight_dtype, bias, corrected) -> None:
    experts, rule = sizes
    torch.manual_seed(tokens)
    weight = (torch.randn(experts, width) / width**0.5).to(weight_dtype)
    parts = RouterParts(
        Gate(weight, torch.randn(experts).to(weight_dtype) if bias else None),
        rule,
        torch.rand(experts).to(dtype) if corrected else None,
    )
    x = (2 * torch.randn(tokens, width)).to(dtype)
    found = spread(*Router(parts)(x), experts)
    wanted, _ = routed(parts, x)
    alike = ((found > 0) == (wanted > 0)).all(-1)
    # The last bit of a logit decides between two that are nearly alike; rounded to 16 bits, many are.
    assert (~alike).sum() <= 1 + tokens // 4
    torch.testing.assert_close(found[alike], wanted[alike], rtol=3e-2 if rule.rounded else 1e-5, atol=1e-7)


@pytest.mark.skipif(
    sys.platform == "win32", reason="torch there is built with another C++ library, which sorts otherwise"
)
@given(st.integers(2, 300), st.integers(1, 40), st.integers(1, 6), st.booleans(), st.integers(0, 99))
def test_of_equal_scores_the_same_are_chosen_as_by_torch(experts, top_k, levels, nan, seed) -> None:
    """Also for so few of so many that torch sorts in another way, and where some are no numbers."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(levels, (5, experts), generator=generator) / 8
    if nan:
        scores[0, 0] = float("nan")
    top_k = min(top_k, experts)
    parts = RouterParts(Gate(scores.t().contiguous()), Rule(top_k, sigmoid=True))
    ids, _ = Router(parts)(torch.eye(5))
    logits = torch.nn.functional.linear(torch.eye(5), scores.t())
    wanted = logits.sigmoid().topk(top_k, sorted=False).indices
    assert torch.equal(ids.long().sort().values, wanted.sort().values)


def mixture(
    router: RouterParts, hidden: int, inner: int, experts: int, dtype: torch.dtype
) -> tuple[ExpertMLPs, list[Dense], list[Dense]]:
    first, down = dense(4, hidden, inner, 2 * experts), dense(4, inner, hidden, experts)
    return ExpertMLPs(grouped(first, torch.float32), grouped(down, torch.float32), "silu"), first, down


@given(
    tokens=st.sampled_from([0, 1, 3, 9]),
    hidden=st.integers(16, 90),
    inner=st.integers(16, 90),
    experts=st.integers(2, 6),
    beside=st.sampled_from(["nothing", "mlp", "gated mlp"]),
    dtype=dtypes,
    threads=st.integers(1, 3),
)
def test_the_tail_with_a_mixture_is_exact(tokens, hidden, inner, experts, beside, dtype, threads) -> None:
    torch.manual_seed(tokens)
    router = RouterParts(Gate(torch.randn(experts, hidden)), Rule(2, normalized=True))
    run, first, down = mixture(router, hidden, inner, experts, dtype)
    o, up, last = Dense(4, hidden, hidden, 1), Dense(4, hidden, inner, 2), Dense(4, inner, hidden, 3)
    mlp = None if beside == "nothing" else MLP((up.linear,), last.linear, "silu", gated=False)
    gate = torch.randn(1, hidden) / hidden**0.5
    parts = TailParts(OutputParts(o.linear), mlp, Mixture(router, run, Gate(gate) if beside == "gated mlp" else None))
    x, residual = torch.randn(tokens, hidden).to(dtype), torch.randn(tokens, hidden).to(dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        y, ids = Tail(parts).with_choice(x, residual)
    finally:
        torch.set_num_threads(before)
    h = (residual.double() + o(x.double()).to(dtype).double()).to(dtype)
    found_ids, factors = Router(router)(h)
    assert ids.dtype == torch.int32
    assert ids.shape == (tokens, 2)
    if not torch.equal(ids.sort().values, found_ids.sort().values):  # h differs by a rounding, and that decides
        return
    total = expected(first, down, experts, REFERENCES["silu"], h, found_ids.long(), factors).to(dtype).double()
    if mlp is not None:
        middle = REFERENCES["silu"](up(h.double()).to(dtype).double()).to(dtype).double()
        factor = (h.double() @ gate.double().t()).sigmoid() if beside == "gated mlp" else 1.0
        total = (total + factor * last(middle).to(dtype).double()).to(dtype).double()
    assert_close(y, h.double() + total, steps=8)


def mixed_layer(seed: int, top_k: int) -> Parts:
    parts = random_parts(seed, False, None, "none", 0.0)
    router = RouterParts(Gate(torch.randn(4, 64)), Rule(top_k))
    run, *_ = mixture(router, 64, 48, 4, torch.float32)
    tail = Tail(TailParts(OutputParts(Dense(4, 64, 64, seed).linear), None, Mixture(router, run)))
    return dataclasses.replace(parts, tail=tail)


def test_layers_with_mixtures_run_in_one_call_with_others() -> None:
    """And tell what was chosen; each layer has another number of experts for a row, or none."""
    parts = [mixed_layer(1, 3), random_parts(2, False, None, "none", 0.0), mixed_layer(3, 1)]
    x, given_rooms = torch.randn(2, 3, 64), rooms(3, 2, torch.float32)
    others = rooms(3, 2, torch.float32)
    for room, other in zip(given_rooms, others):
        other.keys.copy_(room.keys)
        other.values.copy_(room.values)
    mask = torch.ones(1, 1, 3, 8, dtype=torch.bool)
    results = run_layers([each.layer() for each in parts], given_rooms, [5] * 3, x, None, mask)
    y = x
    for i, each in enumerate(parts):
        y = each.step(others[i], 5, y, None, mask)
        assert torch.equal(results.ys[i], y)
        assert results.chosen(i).numel() == 6 * each.tail.top_k
        assert not each.tail.top_k or results.chosen(i).max() < 4


GATE = Gate(torch.ones(4, 8))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Rule(5), "top_k is 5; expected 1 to the experts of the groups, 4"),
        (Rule(0), "top_k is 0"),
        (Rule(3, groups=2, chosen_groups=1), "top_k is 3; expected 1 to the experts of the groups, 2"),
        (Rule(1, groups=3), "groups is 3; expected a divisor of the experts, 4"),
        (Rule(1, groups=2, chosen_groups=3), "chosen_groups is 3"),
        (Rule(1, groups=2, chosen_groups=1, best=3), "best is 3"),
    ],
)
def test_rules_that_no_choice_fits_are_refused(rule: Rule, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Router(RouterParts(GATE, rule))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Router(RouterParts(Gate(torch.ones(4, 16)[:, ::2]), Rule(1))), "in rows"),
        (lambda: Router(RouterParts(Gate(torch.ones(4, 8).double()), Rule(1))), "a weight is float64"),
        (lambda: Router(RouterParts(Gate(torch.ones(4, 8), torch.ones(3)), Rule(1))), "a bias is"),
        (lambda: Router(RouterParts(GATE, Rule(1), torch.ones(3))), "a router's correction is"),
        (lambda: Router(RouterParts(GATE, Rule(1)))(torch.ones(2, 7)), "a last dimension of 8"),
        (lambda: tail(experts=5), "outputs of the router is 4; expected the number of experts, 5"),
        (lambda: tail(hidden=32), "inputs of the router is 8; expected those of experts, 32"),
        (lambda: tail(gate=Gate(torch.ones(2, 8))), "outputs of mlp_gate is 2"),
        (lambda: tail(gate=Gate(torch.ones(1, 7))), "inputs of mlp_gate is 7"),
        (lambda: tail(o=16), "inputs of a mixture is 8; expected outputs of o, 16"),
        (lambda: Tail(TailParts(OutputParts(Dense(4, 8, 8).linear), None)), "MLPs and mixtures is 0"),
    ],
)
def test_what_does_not_fit_together_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def tail(hidden: int = 8, experts: int = 4, o: int = 8, gate: Gate | None = None) -> Tail:
    router = RouterParts(GATE, Rule(1))
    run, *_ = mixture(router, hidden, 16, experts, torch.float32)
    return Tail(TailParts(OutputParts(Dense(4, o, o).linear), None, Mixture(router, run, gate)))


@pytest.mark.slow
@pytest.mark.parametrize("level", cpu._cpu.levels()[:-1] if cpu._cpu else [])
def test_lower_instruction_sets_are_as_exact(level: str) -> None:
    assert_passes_at(level, str(Path(__file__)), "-k", "not lower")
