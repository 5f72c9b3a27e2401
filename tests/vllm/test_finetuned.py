"""An adapter that peft trained is served on top of its quantized base, and merged into it: both say what it learned."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from gptq_backend import QuantizeConfig
from gptq_transformers import merge_adapter
from tests.transformers.checkpoints import ids, load, logits, tiny, write
from tests.vllm.engine import Engine
from tests.vllm.test_offline import distance

peft = pytest.importorskip("peft", reason="peft trains the adapter; pip install peft")

RANK, PROMPT = 8, 8
ON_TOP = {"enable_lora": True, "max_lora_rank": RANK}
# Mean absolute differences of log-probabilities. Against transformers in float32: what bfloat16 costs. Between adapter
# on top and merged: what it costs to round the changed weights again, to these bits.
SERVED, ROUNDED_AGAIN = 0.005, {4: 0.03, 8: 0.005}


@pytest.mark.parametrize("bits", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_what_was_learned_is_served_on_top_and_merged(engine: Engine, bits: int, tmp_path: Path) -> None:
    base, adapter, merged = (tmp_path / name for name in ("base", "adapter", "merged"))
    plain = write(base, tiny(), QuantizeConfig(bits=bits, group_size=32))[0]
    trained = learn_by_heart(base, adapter)
    merge_adapter(base, adapter, merged, calibration=[*ids()])

    prompts, text = ids()[:, :PROMPT], ids()[:, PROMPT:].tolist()
    count = len(text[0])
    assert trained[:, PROMPT - 1 : -1].argmax(-1).tolist() == text
    assert engine.tokens(base, prompts, count, lora=adapter, **ON_TOP) == text
    assert engine.tokens(base, prompts, count, **ON_TOP) != text
    on_top = engine.logprobs(base, ids()[0], lora=adapter, **ON_TOP)
    assert engine.tokens(merged, prompts, count) == text
    again = engine.logprobs(merged, ids()[0])

    changed, rounded = distance(on_top, plain), (on_top - again).abs().mean().item()
    served = distance(on_top, trained[0]), distance(again, logits(load(merged))[0])
    print(f"{bits} bits: changed {changed:.4f}, on top {served[0]:.4f}, merged {served[1]:.4f}, between {rounded:.4f}")
    assert max(served) < SERVED
    assert rounded < ROUNDED_AGAIN[bits] < changed / 5


def learn_by_heart(base: Path, adapter: Path) -> Tensor:
    """Train an adapter until greedy text is that of ``ids()``, and save it -> logits of base and adapter there."""
    from tests.peft.training import train

    torch.manual_seed(0)
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(load(base), config)
    train(model, steps=40)
    model.save_pretrained(adapter)
    return logits(model)
