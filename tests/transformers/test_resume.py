"""A run that is killed goes on where it was: the same bits, nothing of another run, nothing half-written."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gptq_backend import CheckpointError, QuantizeConfig
from gptq_transformers import quantize
from tests.toy import listener
from tests.transformers.checkpoints import ids, tiny

SETTINGS: dict[str, dict[str, Any]] = {
    "dense": {"quality": "fast"},
    "dense, rounded to nearest": {"quality": "fast"},
    "dense, 5 bits": {"quality": "fast", "bits": 5, "embed_bits": 8, "embed_group_size": 64},
    "mixture": {"quality": "fast", "keep_edge_blocks": 1},
    "mixture that trains": {"quality": "fast", "block_epochs": 1},
    "dense that trains and distils": {"quality": "fast", "block_epochs": 1, "distill_epochs": 1},
}
# Quantizes in one process after the other, each forked from one that has imported everything. They kill themselves at
# an event ("at") or while they write a file ("in"), the N-th of the process; 0 is never.
SCRIPT = """
    import os, signal, sys
    import torch
    from gptq_backend import Events, QuantizeConfig
    from gptq_backend.model import progress
    from gptq_transformers import quantize

    source, settings, calibrated, runs = sys.argv[1], eval(sys.argv[2]), bool(int(sys.argv[3])), eval(sys.argv[4])
    samples = torch.randint(3, 259, (6, 24), generator=torch.Generator().manual_seed(1)) if calibrated else None

    def run(out, where, moment):
        count = 0

        def tick(*_):
            nonlocal count
            count += 1
            if count == moment:
                os.kill(os.getpid(), signal.SIGKILL)

        def half(tensors, path, **options):
            save(tensors, path, **options)
            whole = path.read_bytes()
            os.truncate(path, len(whole) // 2)
            tick()
            path.write_bytes(whole)

        events = Events()
        if where == "at":
            events.layer_done = events.block_needed = events.block_done = events.training_step = tick
        else:
            save, progress.save_file = progress.save_file, half
        config = QuantizeConfig(group_size=32, **settings)
        quantize(source, config, samples, output=out, events=events, batch_size=2)

    for each in runs:
        if (child := os.fork()) == 0:
            run(*each)
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def run(source: Path, kind: str, *runs: tuple[str, str, int]) -> list[int]:
    """How each run ended: its output, and where and when it kills itself."""
    calibrated = int("nearest" not in kind)
    arguments = [str(source), repr(SETTINGS[kind]), str(calibrated), repr(runs)]
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ended.returncode == 0, ended.stderr
    return [int(line) for line in ended.stdout.split()]


@pytest.fixture
def source(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    kind = getattr(request, "param", "dense")
    model = tiny("mixtral" if "mixture" in kind else "llama", num_hidden_layers=3)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()}


@pytest.mark.parametrize(("source", "kind"), [(kind, kind) for kind in SETTINGS], indirect=["source"])
def test_killed_three_times_gives_the_bits_of_an_unbroken_run(source: Path, tmp_path: Path, kind: str) -> None:
    choose, whole, out = random.Random(kind), str(tmp_path / "whole"), str(tmp_path / "out")
    killed = [(out, "at", choose.randint(2, 12)), (out, "in", 1), (out, "at", choose.randint(13, 30))]
    assert run(source, kind, (whole, "at", 0), *killed, (out, "at", 0)) == [0, -9, -9, -9, 0]
    expected, found = stored(tmp_path / "whole"), stored(tmp_path / "out")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert {path.name for path in tmp_path.iterdir()} == {"source", "whole", "out"}


def interrupted(source: Path, out: Path, **options: Any) -> None:
    """A run that ends when two blocks are done."""
    done: list[str] = []

    def stop(name: str, block: Any) -> None:
        done.append(name)
        if len(done) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        again(source, out, listener(block_done=stop), **options)


def again(source: Path, out: Path, events: Any, settings: dict[str, Any] = {}, **options: Any) -> None:  # noqa: B006
    config = QuantizeConfig(group_size=32, quality="fast", **settings)
    quantize(source, config, options.pop("samples", ids(24)), output=out, events=events, **options)


def restored(source: Path, out: Path, **options: Any) -> list[str]:
    """Names of the blocks that a run takes from the one before."""
    found: list[str] = []
    again(source, out, listener(block_restored=found.append), **options)
    return found


BLOCKS = ["model.layers.0", "model.layers.1"]


def test_what_was_done_is_taken_by_the_same_run_only(source: Path, tmp_path: Path) -> None:
    interrupted(source, tmp_path / "out")
    assert restored(source, tmp_path / "other") == []
    assert restored(source, tmp_path / "out") == BLOCKS
    for name, change in {"settings": {"settings": {"bits": 3}}, "text": {"samples": ids(23)}}.items():
        interrupted(source, tmp_path / name)
        assert restored(source, tmp_path / name, **change) == []
        assert not (tmp_path / f"{name}.progress").exists()


def test_other_weights_begin_anew_from_their_block(source: Path, tmp_path: Path) -> None:
    interrupted(source, tmp_path / "out")
    model = tiny("llama", num_hidden_layers=3).to(torch.bfloat16)
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] += 1  # type: ignore[union-attr,index,operator]
    model.save_pretrained(source)
    assert restored(source, tmp_path / "out") == BLOCKS[:1]


def test_a_run_can_begin_anew(source: Path, tmp_path: Path) -> None:
    interrupted(source, tmp_path / "out")
    assert restored(source, tmp_path / "out", resume=False) == []
    assert not (tmp_path / "out.progress").exists()


def test_a_damaged_block_is_made_again(source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    again(source, tmp_path / "whole", None)
    interrupted(source, tmp_path / "out")
    (entry,) = (tmp_path / "out.progress").glob("model.layers.1.*.safetensors")
    os.truncate(entry, entry.stat().st_size - 1)
    assert restored(source, tmp_path / "out") == BLOCKS[:1]
    assert "is damaged and not taken" in caplog.text
    expected, found = stored(tmp_path / "whole"), stored(tmp_path / "out")
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_model_in_memory_goes_on_too(source: Path, tmp_path: Path) -> None:
    def model() -> Any:
        return tiny("llama", num_hidden_layers=3)

    again(model(), tmp_path / "whole", None)
    interrupted(model(), tmp_path / "out")
    assert restored(model(), tmp_path / "out") == BLOCKS
    expected, found = stored(tmp_path / "whole"), stored(tmp_path / "out")
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_second_run_into_the_same_folder_is_told(source: Path, tmp_path: Path) -> None:
    def another(name: str, block: Any) -> None:
        with pytest.raises(CheckpointError, match="another run is writing"):
            again(source, tmp_path / "out", None)

    again(source, tmp_path / "out", listener(block_done=another))
    assert not (tmp_path / "out.progress").exists()
