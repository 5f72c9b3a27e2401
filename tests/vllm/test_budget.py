"""vLLM serves layers whose bits and groups a budget chose, also those that it joins."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gptq_backend.budget import BudgetPlan
from gptq_transformers import quantize
from tests.toy import listener
from tests.transformers.checkpoints import ids, load, logits, tiny
from tests.vllm.engine import Engine
from tests.vllm.test_offline import BOUND, distance


@pytest.mark.parametrize("kind", ["llama", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_the_engine_serves_what_a_budget_chose(engine: Engine, tmp_path: Path, kind: str) -> None:
    tiny(kind).save_pretrained(tmp_path / "original")
    plans: list[BudgetPlan] = []
    data = torch.randint(3, 259, (16, 24), generator=torch.Generator().manual_seed(2))
    settings = {"bits": 4, "group_size": 32, "quality": "fast"}
    options = {"output": tmp_path / "out", "events": listener(budget_planned=plans.append), "target_bits": 3.4}
    quantize(tmp_path / "original", settings, data, **options)
    assert len({(each.bits, each.group_size) for each in plans[0].groups}) > 1
    expected = logits(load(tmp_path / "out"))[0]
    assert distance(engine.logprobs(tmp_path / "out", ids()[0]), expected) < BOUND
