"""The progress of a long run: nothing of the user's is lost, nothing of another run is taken."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gptq_backend import ConfigError
from gptq_backend.progress import Progress, digest


def test_an_entry_comes_back_only_under_its_digest(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors = {"a": torch.arange(6).view(2, 3).t(), "b": torch.tensor(0.5)}
    Progress(tmp_path / "p").save("entry", "1", tensors, {"loss": [0.1, float("nan")]})
    progress = Progress(tmp_path / "p")
    found, facts = progress.load("entry", "1") or pytest.fail("lost")
    assert all(torch.equal(found[key], tensors[key]) for key in tensors)
    assert facts["loss"][0] == 0.1
    assert progress.load("another", "1") is None
    assert not caplog.records
    assert progress.load("entry", "2") is None
    assert progress.load("entry", "3") is None
    assert caplog.text.count("starting over") == 1
    progress.remove()
    assert not (tmp_path / "p").exists()


def test_what_a_killed_process_left_is_no_hindrance(tmp_path: Path) -> None:
    Progress(tmp_path).save("entry", "1", {"a": torch.ones(1)}, None)
    (tmp_path / "entry.safetensors.partial").write_bytes(b"half")
    assert Progress(tmp_path).load("entry", "1") is not None


@pytest.mark.parametrize("content", ["notes", "a checkpoint", "a folder", "half a file", "empty"])
def test_a_folder_that_holds_something_else_is_refused_and_kept(tmp_path: Path, content: str) -> None:
    folder = tmp_path / "out.progress"
    folder.mkdir()
    other = folder / ("notes.txt" if content == "notes" else "model.safetensors")
    if content == "a folder":
        other.mkdir()
    elif content == "a checkpoint":
        save_file({"a": torch.ones(1)}, other, metadata={"format": "pt"})
    else:
        other.write_bytes({"notes": b"mine", "half a file": b"\x10\0\0\0\0\0\0\0{", "empty": b""}[content])
    with pytest.raises(ConfigError, match=f"holds something else .{other.name}.; move it away"):
        Progress(folder)
    assert other.exists()


def test_a_file_in_its_place_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "out.progress"
    file.write_text("mine")
    with pytest.raises(ConfigError, match="move it away"):
        Progress(file)
    assert file.read_text() == "mine"


def test_without_a_folder_nothing_is_kept() -> None:
    progress = Progress(None)
    progress.save("entry", "1", {"a": torch.ones(1)}, None)
    assert progress.load("entry", "1") is None
    progress.remove()


def test_a_digest_tells_values_types_shapes_and_what_came_before_apart() -> None:
    ones = torch.ones(2, 2)
    others = [
        digest("", 1, [ones]),
        digest("x", 1, [ones]),
        digest("", 2, [ones]),
        digest("", 1, [ones.view(4)]),
        digest("", 1, [ones.int()]),
        digest("", 1, [ones, ones]),
        digest("", 1, [torch.ones(2, 2).fill_diagonal_(0)]),
    ]
    assert len(set(others)) == len(others)
    assert digest("", 1, [ones.t()]) == others[0]
