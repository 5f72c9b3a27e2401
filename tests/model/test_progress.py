"""The progress of a long run: nothing of the user's is lost, nothing of another run is taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from gptq_backend import ConfigError
from gptq_backend.model.progress import Progress

A, B = "0123456789abcdef", "fedcba9876543210"


def test_an_entry_comes_back_as_it_was(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors = {"a": torch.arange(6).view(2, 3).t(), "b": torch.tensor(0.5)}
    Progress(tmp_path / "p").save("entry", A, lambda: (tensors, {"loss": [0.1, float("nan")]}))
    progress = Progress(tmp_path / "p")
    found, facts = progress.load("entry", A) or pytest.fail("lost")
    assert all(torch.equal(found[key], tensors[key]) for key in tensors)
    assert facts["loss"][0] == 0.1
    assert progress.load("another", A) is None
    assert caplog.text.count("going on with what an earlier run kept") == 1
    progress.remove()
    assert not (tmp_path / "p").exists()


def test_runs_neither_take_nor_lose_what_another_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Progress(tmp_path).save("entry", A, lambda: ({"a": torch.ones(1)}, None))
    other = Progress(tmp_path)
    assert other.load("entry", B) is None
    assert other.load("entry", B) is None
    assert caplog.text.count("starting over") == 1
    other.save("entry", B, lambda: ({"a": torch.zeros(1)}, None))
    found = Progress(tmp_path).load("entry", A) or pytest.fail("lost")
    assert float(found[0]["a"]) == 1


def test_what_a_killed_process_left_is_no_hindrance(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Progress(tmp_path).save("entry", A, lambda: ({"a": torch.ones(1)}, None))
    facts, entry = sorted(tmp_path.iterdir())
    for file in (facts, entry):
        whole = file.read_bytes()
        file.with_name(file.name + ".partial").write_bytes(b"half")
        assert Progress(tmp_path).load("entry", A) is not None
        file.write_bytes(whole[:20])
        progress = Progress(tmp_path)
        assert progress.load("entry", A) is None
        assert "is damaged" in caplog.text
        caplog.clear()
        file.write_bytes(whole)
    progress.remove()
    assert not tmp_path.exists()


@pytest.mark.parametrize("name", ["notes.txt", "model.safetensors", "download.safetensors.partial", "folder"])
def test_what_is_not_ours_is_refused_and_kept(tmp_path: Path, name: str) -> None:
    if name == "folder":
        (tmp_path / f"entry.{A}.safetensors").mkdir()
    else:
        save_file({"a": torch.ones(1)}, tmp_path / name)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="holds something else .*; move it away"):
        Progress(tmp_path)
    assert sorted(tmp_path.iterdir()) == before


def test_what_came_into_the_folder_meanwhile_stays(tmp_path: Path) -> None:
    progress = Progress(tmp_path)
    progress.save("entry", A, lambda: ({"a": torch.ones(1)}, None))
    (tmp_path / "notes.txt").write_text("mine")
    progress.remove()
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_file_in_its_place_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "out.progress"
    file.write_text("mine")
    with pytest.raises(ConfigError, match="move it away"):
        Progress(file)
    assert file.read_text() == "mine"


def test_progress_that_cannot_be_written_does_not_end_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "p").symlink_to(tmp_path / "nowhere" / "else")
    progress = Progress(tmp_path / "p")
    for name in ("one", "two"):
        progress.save(name, A, lambda: ({"a": torch.ones(1)}, None))
    assert caplog.text.count("can no longer be kept") == 1
    progress.remove()


def test_a_full_disk_ends_the_run_and_leaves_what_was_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    progress = Progress(tmp_path)
    progress.save("one", A, lambda: ({"a": torch.ones(1)}, None))

    def full(*args: Any, **kwargs: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("gptq_backend.model.progress.save_file", full)
    with pytest.raises(SafetensorError):
        progress.save("two", A, lambda: ({"a": torch.ones(1)}, None))
    assert Progress(tmp_path).load("one", A) is not None
    assert Progress(tmp_path).load("two", A) is None


def test_tensors_have_their_own_names_in_the_file_and_may_be_one(tmp_path: Path) -> None:
    progress = Progress(tmp_path)
    progress.stored_names = lambda names: {name: f"stored.{name}" for name in names}
    shared = torch.arange(4)
    progress.save("entry", A, lambda: ({"a": shared, "b": shared, "c": shared[1:]}, None))
    found, _ = Progress(tmp_path).load("entry", A) or pytest.fail("lost")
    assert [found[key].tolist() for key in "abc"] == [[0, 1, 2, 3], [0, 1, 2, 3], [1, 2, 3]]
    with safe_open(progress.files["entry"], "pt") as file:
        assert sorted(file.keys()) == ["stored.a", "stored.b", "stored.c"]


def test_without_a_folder_nothing_is_kept() -> None:
    progress = Progress(None)
    progress.save("entry", A, lambda: pytest.fail("made for nothing"))
    assert progress.load("entry", A) is None
    assert progress.digest("", 1, [torch.ones(2)]) == ""
    progress.remove()


def test_a_digest_tells_values_types_shapes_and_what_came_before_apart(tmp_path: Path) -> None:
    ones, digest = torch.ones(2, 2), Progress(tmp_path).digest
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
