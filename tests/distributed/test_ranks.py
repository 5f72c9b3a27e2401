"""However many ranks share the work, they make the same bits, and tell the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.rank_process import CASES

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")


def run(ranks: int, out: Path) -> Path:
    process = [str(Path(__file__).with_name("rank_process.py")), str(out)]
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--rdzv-backend", "c10d"]
    torchrun += ["--rdzv-endpoint", "localhost:0"]
    command = [sys.executable, *(torchrun if ranks > 1 else []), *process]
    path = os.pathsep.join([str(ROOT), str(ROOT / "integrations"), *sys.path[1:]])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-5000:]
    return out


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """What runs of one, two and four processes wrote."""
    folder = tmp_path_factory.mktemp("ranks")
    return {ranks: run(ranks, folder / str(ranks)) for ranks in (1, 2, 4)}


def facts(out: Path, case: str, rank: int = 0) -> dict[str, Any]:
    return json.loads((out / f"{case}.{rank}.json").read_text())


@pytest.mark.timeout(600)
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_every_rank_ends_with_the_bits_and_the_report_of_one_process(
    outputs: dict[int, Path], case: str, ranks: int
) -> None:
    expected = load_file(outputs[1] / f"{case}.0.safetensors")
    for rank in range(ranks):
        found = load_file(outputs[ranks] / f"{case}.{rank}.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        assert facts(outputs[ranks], case, rank)["run"] == facts(outputs[1], case)["run"]


def test_all_ranks_let_the_same_layers_make_up_for_their_rows(outputs: dict[int, Path]) -> None:
    turns = {case: facts(outputs[1], case)["turns"] for case in CASES}
    assert turns["dense"] == turns["dense, measured at once"] == turns["experts"] > 0
    assert turns["two batches"] > 0  # of which two of four ranks have none
    assert turns["to nearest"] == 0
    assert all(facts(outputs[4], case, rank)["turns"] == turns[case] for case in CASES for rank in range(4))


@pytest.mark.parametrize("ranks", [2, 4])
def test_each_layer_of_an_expert_has_its_weight_on_one_rank_only(outputs: dict[int, Path], ranks: int) -> None:
    by_rank = [facts(outputs[ranks], "experts", rank)["elsewhere"] for rank in range(ranks)]
    for counts in zip(*by_rank, strict=True):  # of a block
        assert sum(counts) == (ranks - 1) * 5 * 3
    assert not facts(outputs[1], "experts")["elsewhere"]
    assert not facts(outputs[ranks], "experts, measured at once")["elsewhere"]


def test_a_rank_holds_the_hessians_of_its_own_experts_only(outputs: dict[int, Path]) -> None:
    """Five experts of three layers each, of which one gets no token; measured before any is quantized."""
    most = {
        ranks: max(facts(out, "experts, measured at once", rank)["hessian_bytes"] for rank in range(ranks))
        for ranks, out in outputs.items()
    }
    dense = max(facts(outputs[1], "dense, measured at once", 0)["hessian_bytes"], 1)
    experts = {ranks: bytes_ - dense * 2 // 4 for ranks, bytes_ in most.items()}  # of attention; the rest is the mlp
    assert experts[2] <= 0.6 * experts[1]
    assert experts[4] <= 0.35 * experts[1]
