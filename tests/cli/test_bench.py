"""The benchmark: every row appears with its error or reason, nothing is timed from a cache, and all take turns."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from torch import Tensor
from typer.testing import CliRunner, Result

from gptq_backend import QuantizeConfig
from gptq_backend.bench import machine, products, timing
from gptq_backend.bench.layers import Problem, Weight
from gptq_cli import bench_quantize
from gptq_cli.app import app
from tests.transformers.checkpoints import VERSION_4

CPU = torch.device("cpu")
PEERS = """
def right(x, q, scales, zeros, group_size):
    index = [k // group_size for k in range(q.shape[0])]
    return x @ ((q.to(x.dtype) - zeros[index].to(x.dtype)) * scales[index])

def packed(x, state):
    return state(x)

def prepare(q, scales, zeros, group_size):
    def product(x):
        return right(x, q, scales, zeros, group_size)
    return (product,)

packed.prepare = prepare

def wrong(x, q, scales, zeros, group_size):
    return x.new_ones(x.shape[0], q.shape[1])

def misshapen(x, q, scales, zeros, group_size):
    return x

def raising(x, q, scales, zeros, group_size):
    raise RuntimeError("no such instruction\\nand more")
"""
NAMES = ["right", "packed", "wrong", "misshapen", "raising"]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ceilings and rotation of a size that suits tests."""
    monkeypatch.setattr(machine, "_MIN_STREAMED", 1 << 20)
    monkeypatch.setattr(machine, "_MAX_SQUARE", 128)
    monkeypatch.setattr(machine, "last_level_cache", lambda: 1 << 16)
    monkeypatch.setattr(products, "rotated_bytes", lambda device: 200_000)


@pytest.fixture(scope="module")
def peers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("peers")
    (folder / "bench_peers.py").write_text(PEERS)
    return folder


def bench(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["bench", *(str(argument) for argument in arguments)])


def _gemm(*arguments: object) -> dict:
    result = bench("gemm", "--seconds", "0.01", "--json", "-", *arguments)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture
def peer_rows(peers: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict]:
    monkeypatch.chdir(peers)
    monkeypatch.syspath_prepend(peers)
    arguments = [text for name in NAMES for text in ("--peer", f"bench_peers:{name}")]
    rows = _gemm("--shape", "64x128", "--m", "3", "--group-size", "32", "--dtype", "fp32", "--asym", *arguments)["rows"]
    return {row["kernel"].removeprefix("bench_peers:"): row for row in rows}


# -- gemm --------------------------------------------------------------------------------------------------------------


def test_json_has_the_machine_the_ceilings_and_every_row() -> None:
    found = _gemm("--shape", "32x64", "--shape", "48x96", "--m", "1,5", "--group-size", "32,-1", "--dtype", "bf16,fp32")
    assert list(found) == ["machine", "ceilings", "rows"]
    assert {"cpu", "cores", "threads", "isa", "torch", "gptq_backend", "git_commit", "command"} <= set(found["machine"])
    ceilings = found["ceilings"]
    assert ceilings["read_gbps"] == max(ceilings["read_gbps_by_reader"].values()) > 0
    assert ceilings["peak_gflops"] == max(ceilings["matmul_gflops"].values()) > 0
    assert ceilings["read_gbps_1_thread"] > 0
    assert ceilings["read_gbps_after"] > 0
    rows = found["rows"]
    assert len(rows) == 2 * 2 * 2 * 2 * 5  # shapes, groups, dtypes, M; ours, reading twice, F.linear, aten
    assert {row["group_size"] for row in rows} == {32, 64, 96}
    for row in rows:
        assert (row["reason"] is None) == (row["us"] is not None)
        if row["reason"] is None:
            assert row["spread"][0] <= row["us"] <= row["spread"][1]
            size = row["N"] * row["K"]
            groups = row["N"] * row["K"] // row["group_size"]
            dense = 2 if row["dtype"] == "bf16" else 4
            nbytes = size * dense if row["kernel"] == "F.linear" else size / 2 + 2 * groups
            assert row["gbps"] == pytest.approx(nbytes / row["us"] / 1e3)
            reading = row["kernel"].startswith("reading")
            operations = 0 if reading else 2 * row["M"] * size
            limits = nbytes / ceilings["read_gbps"], operations / ceilings["peak_gflops"]
            assert row["roof_share"] == pytest.approx(max(limits) / 1e3 / row["us"])
            if reading:
                assert row["error"] is None
            else:
                assert row["error"] < (1e-2 if row["dtype"] == "bf16" else 1e-5)
    linear = {(r["N"], r["group_size"], r["dtype"], r["M"]): r["us"] for r in rows if r["kernel"] == "F.linear"}
    for row in rows:
        if row["reason"] is None:
            ratio = linear[row["N"], row["group_size"], row["dtype"], row["M"]] / row["us"]
            assert row["ratio_bf16"] == pytest.approx(ratio)


def test_one_copy_of_a_weight_stays_in_the_cache() -> None:
    (row, *_) = _gemm("--shape", "64x64", "--m", "1", "--group-size", "32", "--in-cache")["rows"]
    assert (row["copies"], row["rotated_bytes"]) == (1, 64 * 64 // 2 + 2 * 64 * 2)


def test_a_peer_that_computes_something_else_is_reported_with_its_error(peer_rows: dict[str, dict]) -> None:
    assert peer_rows["wrong"]["error"] > 0.5
    assert peer_rows["wrong"]["us"] > 0
    assert peer_rows["right"]["error"] < 1e-5
    assert peer_rows["packed"]["error"] < 1e-5


def test_a_peer_that_fails_is_a_row_with_the_reason(peer_rows: dict[str, dict]) -> None:
    assert peer_rows["raising"]["reason"] == "RuntimeError: no such instruction"
    assert "(3, 128), expected a tensor (3, 64)" in peer_rows["misshapen"]["reason"]
    assert peer_rows["raising"]["us"] is peer_rows["misshapen"]["us"] is None
    assert peer_rows["F.linear"]["us"] > 0
    assert set(peer_rows["F.linear"]["ratios"]).isdisjoint({"bench_peers:raising", "bench_peers:misshapen"})


def test_a_peer_that_fails_in_the_middle_does_not_end_the_run() -> None:
    def fail_later() -> None:
        if len(broken.samples) == 2:
            raise MemoryError("gone")

    broken = timing.Candidate("broken", [fail_later])
    other = timing.Candidate("other", [lambda: None])
    timing.interleave([broken, other], 0.5, CPU)
    assert broken.reason == "MemoryError: gone"
    assert other.reason is None
    assert len(other.samples) > 2


def test_errors_of_the_user_are_one_line(tmp_path: Path) -> None:
    expected = [
        (["--backend", "abacus"], "backend='abacus' is not a kernel"),
        (["--shape", "64"], "--shape 64 is not NxK"),
        (["--shapes", "gpt5"], "--shapes gpt5 is not known"),
        (["--m", "0"], "--m 0: expected positive numbers"),
        (["--bits", "5"], "--bits 5: expected (2, 3, 4, 8)"),
        (["--dtype", "int8"], "--dtype int8: expected bf16"),
        (["--peer", "nothing_here:f"], "peer 'nothing_here:f' cannot be imported"),
        (["--peer", "torch"], "is not MODULE:FUNCTION"),
        (["--device", "abacus"], "device 'abacus' cannot be used here"),
        (["--json", tmp_path / "none" / "x.json"], "its folder does not exist"),
    ]
    for arguments, message in expected:
        result = bench("gemm", *arguments)
        assert result.exit_code == 1, arguments
        (line,) = result.stderr.strip().splitlines()
        assert message in line
        assert result.stdout == ""


def test_no_kernel_is_timed_from_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many copies as promised, in memory of their own, and each is used before any is used again."""
    monkeypatch.undo()
    assert products.rotated_bytes(CPU) >= max(160_000_000, 5 * machine.last_level_cache())
    monkeypatch.setattr(products, "rotated_bytes", lambda device: 1_000_000)
    weight = Weight.random(Problem(N=256, K=512), CPU)

    def foreign(x: Tensor, *state: Tensor) -> Tensor:
        seen.append(state[0].data_ptr())
        return x.new_zeros(x.shape[0], 256)

    seen: list[int] = []
    peer = products.peer(weight, products.Peer("peer", foreign))
    for rotation in (products.ours(weight, "reference"), products.dense(weight), products.aten(weight), peer):
        assert rotation.reason is None
        assert len(rotation.products) * rotation.nbytes >= 1_000_000
    layers: list = products.ours(weight, "reference").products
    addresses = {layer.qweight.data_ptr() for layer in layers}
    assert len(addresses) == len(layers)
    candidate = timing.Candidate("peer", [functools.partial(product, torch.ones(1, 512)) for product in peer.products])
    timing.interleave([candidate], 0.02, CPU)
    count = len(peer.products)
    assert candidate.timed_calls == len(seen) > 2 * count
    assert all(len(set(seen[i : i + count])) == count for i in range(len(seen) - count))


def test_candidates_take_turns_and_slow_ones_do_not_starve_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    now = 0.0

    def call(name: str, seconds: float) -> None:
        nonlocal now
        order.append(name)
        now += seconds

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now)
    seconds = {"a": 0.002, "b": 0.002, "slow": 0.05}
    timing.interleave(
        [timing.Candidate(name, [functools.partial(call, name, seconds[name])]) for name in seconds], 0.0275, CPU
    )
    blocks = [name for i, name in enumerate(order) if i == 0 or order[i - 1] != name]
    assert blocks == ["a", "b", "slow", *["a", "b"] * 4]


def test_act_order_and_unsupported_layers_are_told_not_dropped(peers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(peers)
    arguments = ["--shape", "32x80", "--m", "2", "--bits", "3", "--act-order", "--peer", "bench_peers:right"]
    rows = {row["kernel"]: row for row in _gemm(*arguments, "--group-size", "48", "--backend", "reference")["rows"]}
    assert rows["reference"]["error"] < 1e-2
    assert "without act-order" in rows["aten int4pack"]["reason"]
    assert "no act-order" in rows["bench_peers:right"]["reason"]


def test_the_table_has_a_line_per_row_and_threads_are_given_back() -> None:
    before = torch.get_num_threads()
    result = bench("gemm", "--shape", "40x64", "--m", "1,2", "--seconds", "0.01", "--threads", before + 1)
    assert result.exit_code == 0, result.output
    assert torch.get_num_threads() == before
    assert "40x64, 4 bits, group 64, sym, bf16" in result.stdout
    assert result.stdout.count("F.linear") == 2
    assert result.stdout.count("aten int4pack") == 2


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_random_layers_are_what_they_say(bits: int) -> None:
    problem = Problem(N=33, K=75, bits=bits, group_size=32, sym=False, act_order=True, dtype="fp32")
    weight = Weight.random(problem, CPU)
    layer = products.layer(weight, "reference")
    whole = torch.cat([part.dequantize() for _, part in weight.slices()])
    assert torch.equal(whole, layer.dequantize().weight)
    assert layer.spec.act_order
    assert torch.equal(weight.tensors["scales"].bfloat16().half(), weight.tensors["scales"])
    assert 0.3 < layer(torch.randn(64, 75)).std() < 3


# -- model -------------------------------------------------------------------------------------------------------------

CHECKPOINTS = Path(__file__).parents[1] / "data" / "checkpoints"


def test_model_reports_both_models_both_phases_and_where_the_time_goes() -> None:
    path, other = CHECKPOINTS / "llama-4-32-sym", CHECKPOINTS / "llama-4-32-asym-v2"
    sizes = ["--prompt", "6", "--new-tokens", "4", "--batch", "2", "--repeats", "2", "--dtype", "fp32"]
    result = bench("model", path, "--reference", other, *sizes, "--profile", "--json", "-")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    rows = found["rows"]
    assert [(row["model"], row["phase"]) for row in rows] == [
        (str(each), phase) for each in (path, other) for phase in ("prefill", "decode")
    ]
    for row in rows:
        steps = row["prompt"] if row["phase"] == "prefill" else 1
        assert row["tokens_per_second"] == pytest.approx(1e3 * row["batch"] * steps / row["ms_per_step"])
        assert row["spread"][0] <= row["tokens_per_second"] <= row["spread"][1]
        assert row["quantized"]
    assert [row["ratio"] for row in rows[2:]] == [1.0, 1.0]
    for phases in found["profile"].values():
        for kinds in phases.values():
            assert kinds["fused layer"]["calls_per_step"] == 2
            assert kinds["Linear"]["calls_per_step"] == 1
            assert sum(kind["share"] for kind in kinds.values()) == pytest.approx(1)
    assert {"QuantLinear", "nn.Linear"} < set(found["call_overhead_us"])


def test_looking_leaves_the_model_as_it_was() -> None:
    from gptq_cli import bench_model
    from gptq_cli.models import load_model

    model = load_model(CHECKPOINTS / "llama-4-32-sym")
    prompt = bench_model.random_prompt(model, 1, 4, 3)
    before = [vars(module).get("forward") for module in model.modules()]
    bench_model.profile(model, prompt, 3)
    assert [vars(module).get("forward") for module in model.modules()] == before


def test_the_head_is_rounded_where_that_is_asked_for() -> None:
    sizes = ["--prompt", "6", "--new-tokens", "4", "--repeats", "1", "--head-bits", "8"]
    result = bench("model", CHECKPOINTS / "llama-4-32-sym", *sizes, "--profile", "--json", "-")
    assert result.exit_code == 0, result.output
    for kinds in json.loads(result.stdout)["profile"][str(CHECKPOINTS / "llama-4-32-sym")].values():
        assert kinds["QuantLinear"]["calls_per_step"] == 1
        assert "Linear" not in kinds


@pytest.mark.skipif(VERSION_4, reason="transformers 4 keeps the experts apart, and nothing is grouped")
def test_the_time_of_grouped_experts_is_that_of_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTQ_BACKEND_FUSE", "0")  # or it is part of that of the layers
    from gptq_cli import bench_model
    from gptq_cli.models import load_model
    from gptq_transformers.experts.expert_list import ExpertList

    model = load_model(CHECKPOINTS / "qwen3_moe-4-32")
    layers = sum(isinstance(module, ExpertList) for module in model.modules())
    for kinds in bench_model.profile(model, bench_model.random_prompt(model, 1, 4, 3), 3).values():
        assert sum(kind["share"] for kind in kinds.values()) == pytest.approx(1)
        assert layers
        assert kinds["ExpertList"]["calls_per_step"] == layers


def test_lengths_beyond_the_model_are_refused_before_generating() -> None:
    result = bench("model", CHECKPOINTS / "llama-4-32-sym", "--prompt", "100000", "--dtype", "fp32")
    assert result.exit_code == 1
    assert "exceed the model's" in result.stderr.splitlines()[-1]


def test_a_shape_without_a_checkpoint_is_measured(tmp_path: Path) -> None:
    target = tmp_path / "tiny.json"
    options = "--shape tiny --device cpu --dtype fp32 --prompt 4 --new-tokens 3 --repeats 1"
    script = str(CHECKPOINTS.parents[2] / "docs" / "benchmarks" / "decode_shape.py")
    subprocess.run([sys.executable, script, str(target), *options.split()], check=True)
    found = json.loads(target.read_text())
    assert found["bytes"]["4-bit"] < 0.6 * found["bytes"]["16-bit"]  # the embeddings are not quantized
    assert {(row["model"], row["quantized"]) for row in found["rows"]} == {("4-bit", True), ("16-bit", False)}
    assert all(row["tokens_per_second"] > 0 for row in found["rows"])


def test_quantizing_accounts_for_every_second_and_every_block(tmp_path: Path) -> None:
    arguments = ["--shape", "tiny", "--samples", "4", "--seqlen", "32", "--group-size", "32", "--quality", "default"]
    result = bench("quantize", *arguments, "--json", str(tmp_path / "out.json"))
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out.json").read_text())
    before, first, second = found["phases"]
    every = {"forward", "hessian", "drift", "factor", "search", "sensitivity", "column loop", "refine", "pack", "write"}
    every.add("other")
    assert first.keys() == second.keys() == every
    assert all(seconds > 0 for seconds in second.values())
    whole = sum(before.values()) + sum(first.values()) + sum(second.values())
    assert found["whole"] == pytest.approx(whole)  # the shape has two blocks
    assert (found["tokens"], found["all_blocks"], found["config"]["group_size"]) == (128, 2, 32)
    assert found["peak_bytes"] > 10**7
    assert "2 blocks of tiny with 128 tokens" in result.output


def test_the_whole_is_the_first_block_and_the_mean_of_the_others_for_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench_quantize.SHAPES, "tall", {**bench_quantize.SHAPES["tiny"], "num_hidden_layers": 9})
    config = QuantizeConfig(group_size=32, quality="fast")
    found = bench_quantize.run("tall", config, 3, 2, 16, CPU)
    before, first, *later = [sum(lap.values()) for lap in found.phases]
    assert found.whole == pytest.approx(before + first + 8 * sum(later) / 2)


@pytest.mark.parametrize(
    "wrong",
    [["--blocks", "3"], ["--shape", "huge"], ["--quality", "best"], ["--block-epochs", "1"], ["--dtype", "int8"]],
)
def test_quantizing_what_cannot_be_is_refused(wrong: list[str]) -> None:
    result = bench("quantize", "--shape", "tiny", "--samples", "1", "--seqlen", "8", *wrong)
    assert result.exit_code == 1
    assert "expected" in result.output
