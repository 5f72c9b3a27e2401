"""Two tensor-parallel ranks compute what one does, wherever the cut between them falls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from gptq_backend import QuantizeConfig
from tests.transformers.checkpoints import PEERS, ids, tiny, write
from tests.vllm.engine import Engine, EngineError
from tests.vllm.test_offline import BOUND, distance

# down_proj has 96 inputs, of which each rank gets 48: one and a half groups of 32, or of 3-bit codes four and a half
# words. o_proj has 64, two groups of 32. Two heads of queries and one of keys and values, which both ranks have.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "groups that straddle the cut": ("llama", {"group_size": 32}),
    "act-order": ("llama", {"group_size": 16, "desc_act": True}),
    "words and groups that straddle the cut": ("llama", {"bits": 3, "group_size": 20, "sym": False}),
    "a quantized head and dense shards": (
        "llama",
        {"group_size": 32, "lm_head": True, "dynamic": {"-:.*(v_proj|up_proj|1.*down_proj)": {}}},
    ),
    "experts that straddle the cut": ("mixtral", {"group_size": 32, "desc_act": True}),
}


def check(engine: Engine, pair: Engine, folder: Path, prompt: Tensor, logits: Tensor, **options: Any) -> None:
    alone, together = engine.logprobs(folder, prompt), pair.logprobs(folder, prompt, **options)
    print(f"{folder.name} {options}: {distance(together, logits):.4f}, {(together - alone).abs().mean():.4f} from one")
    assert distance(together, logits) < BOUND
    assert (together - alone).abs().mean() < BOUND


def check_peer(engine: Engine, pair: Engine, name: str, **options: Any) -> None:
    expected = load_file(PEERS / f"{name}.expected.safetensors")
    check(engine, pair, PEERS / name, expected["input_ids"][0], expected["logits"][0], **options)


@pytest.mark.parametrize(
    "case",
    [
        case if case == "words and groups that straddle the cut" else pytest.param(case, marks=pytest.mark.slow)
        for case in CASES
    ],
)
def test_two_ranks_compute_what_one_does(engine: Engine, pair: Engine, case: str, tmp_path: Path) -> None:
    model_type, settings = CASES[case]
    logits = write(tmp_path / "model", tiny(model_type), QuantizeConfig(**settings))[0]
    check(engine, pair, tmp_path / "model", ids()[0], logits)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama-4-32-sym", "llama-dynamic", "qwen2-4-64", "qwen3_moe-4-32"])
def test_two_ranks_give_the_logprobs_of_a_peer(engine: Engine, pair: Engine, name: str) -> None:
    check_peer(engine, pair, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_moe-4-32", "mixtral-4-32"])
def test_ranks_share_out_the_experts(engine: Engine, pair: Engine, name: str) -> None:
    """Attention is tensor-parallel, and whole experts are assigned to ranks."""
    check_peer(engine, pair, name, enable_expert_parallel=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama-4-64-actorder", "qwen3_moe-4-32"])
def test_ranks_share_out_the_layers(engine: Engine, pair: Engine, name: str) -> None:
    """Compiled, because vLLM's eager mode on CPUs fails at this for any model if the size of its cache is given."""
    check_peer(engine, pair, name, tensor_parallel_size=1, pipeline_parallel_size=2, enforce_eager=False)


@pytest.mark.slow
def test_balancing_of_experts_is_refused_by_vllm(pair: Engine) -> None:
    from gptq_vllm.fused_moe import GPTQMoEMethod

    with pytest.raises(EngineError, match="load balancing is only supported on CUDA devices"):
        pair.run(PEERS / "qwen3_moe-4-32", [[5, 6]], enable_expert_parallel=True, enable_eplb=True)
    # Elsewhere vLLM asks the method, and says "EPLB is not supported GPTQMoEMethod".
    assert "supports_eplb" not in vars(GPTQMoEMethod)


@pytest.mark.slow
def test_experts_are_shared_out_between_ranks(engine: Engine, pair: Engine, tmp_path: Path) -> None:
    logits = write(tmp_path / "model", tiny("mixtral"), QuantizeConfig(group_size=32, desc_act=True))[0]
    found = pair.logprobs(tmp_path / "model", ids()[0], enable_expert_parallel=True)
    assert distance(found, logits) < BOUND


@pytest.mark.slow
def test_act_order_is_kept_between_ranks(engine: Engine, pair: Engine) -> None:
    check_peer(engine, pair, "llama-4-64-actorder")
