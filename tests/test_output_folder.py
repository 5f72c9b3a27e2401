"""Whatever happens while an output folder is written: it is old or new, and no file of the user's is lost."""

from __future__ import annotations

import errno
import logging
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptq_backend import CheckpointError
from gptq_backend import output_folder as output
from gptq_backend.locks import claim, clear_scratch, scratch_folder, write_text
from gptq_backend.output_folder import atomic_folder, check_spared

ROOT = Path(__file__).parents[1]
linux = pytest.mark.skipif(sys.platform != "linux", reason="swapping two names in one step is Linux's")


def tree(folder: Path) -> dict[str, str | None]:
    """Names of all that is in ``folder`` -> its text, None for folders."""
    return {str(path.relative_to(folder)): path.read_text() if path.is_file() else None for path in folder.rglob("*")}


def write(target: Path, overwrite: bool = False, meanwhile: object = None) -> None:
    with atomic_folder(target, overwrite) as folder:
        (folder / "model").write_text("new")
        (folder / "sub").mkdir()
        (folder / "sub" / "more").write_text("new")
        if callable(meanwhile):
            meanwhile()


def dying(code: str, *arguments: object, number: int = signal.SIGKILL) -> None:
    """Run ``code`` in a process of its own until it says that it waits, then send it a signal."""
    command = [sys.executable, "-c", f"import sys, time\nfrom pathlib import Path\n{code}", *map(str, arguments)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(number)
    process.wait(60)


HALFWAY = """
from gptq_backend.output_folder import atomic_folder
with atomic_folder(sys.argv[1], overwrite=True) as folder:
    (folder / "model").write_text("half")
    print("waiting", flush=True); time.sleep(60)
"""
BETWEEN_RENAMES = """
from gptq_backend import output_folder as output
output.exchange = lambda *_: False
rename = Path.rename
def slow(self, target):
    rename(self, target)
    if str(target).endswith(".replaced"):
        print("waiting", flush=True); time.sleep(60)
Path.rename = slow
with output.atomic_folder(sys.argv[1], overwrite=True) as folder:
    (folder / "model").write_text("new")
"""


@pytest.mark.parametrize("overwrite_later", [False, True])
@pytest.mark.parametrize("kind", ["file", "folder", "link", "dangling link"])
def test_what_appears_meanwhile_stays_and_the_result_lies_beside_it(
    tmp_path: Path, kind: str, overwrite_later: bool
) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"

    def appear() -> None:
        if kind == "file":
            out.write_text("mine")
        elif kind == "folder":
            out.mkdir()
            (out / "notes").write_text("mine")
        else:
            if kind == "link":
                elsewhere.mkdir()
                (elsewhere / "notes").write_text("mine")
            out.symlink_to(elsewhere)

    with pytest.raises(CheckpointError, match=r"appeared .* left as it is; the finished checkpoint is in .*out-2"):
        write(out, meanwhile=appear)
    assert tree(tmp_path / "out-2") == {"model": "new", "sub": None, "sub/more": "new"}
    assert out.is_symlink() == ("link" in kind)
    if kind == "file":
        assert out.read_text() == "mine"
    elif kind != "dangling link":
        assert tree(out) == {"notes": "mine"}
    assert {path.name for path in tmp_path.iterdir()} <= {"out", "out-2", "elsewhere"}


def test_a_file_that_appears_stays_even_where_a_folder_may_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "out-2").write_text("also mine")
    with pytest.raises(CheckpointError, match="out-3"):
        write(tmp_path / "out", overwrite=True, meanwhile=lambda: (tmp_path / "out").write_text("mine"))
    assert (tmp_path / "out").read_text() == "mine"
    assert (tmp_path / "out-2").read_text() == "also mine"
    assert (tmp_path / "out-3" / "model").read_text() == "new"


def test_an_empty_folder_and_one_that_may_be_replaced_give_way_though_they_appear_late(tmp_path: Path) -> None:
    write(tmp_path / "empty", meanwhile=(tmp_path / "empty").mkdir)

    def appear() -> None:
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "old").write_text("old")

    write(tmp_path / "full", overwrite=True, meanwhile=appear)
    assert tree(tmp_path / "empty") == tree(tmp_path / "full") == {"model": "new", "sub": None, "sub/more": "new"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full"]


@linux
def test_names_are_swapped_in_one_step_and_the_old_folder_goes_after_the_new_one_is_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, seen = tmp_path / "out", []
    write(out)
    (out / "model").write_text("old")
    swap = output.exchange

    def look(one: Path, other: Path) -> bool:
        seen.append(other.is_dir())
        done = swap(one, other)
        seen.append((other / "model").read_text() + (one / "model").read_text())
        return done

    monkeypatch.setattr(output, "exchange", look)
    write(out, overwrite=True)
    assert seen == [True, "newold"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("step", [1, 2, 3])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.EIO, "broken")])
def test_two_steps_that_fail_leave_the_old_folder_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, error: BaseException
) -> None:
    out, count = tmp_path / "out", 0
    write(out)
    (out / "model").write_text("old")
    rename = Path.rename
    monkeypatch.setattr(output, "exchange", lambda *_: False)

    def failing(self: Path, target: Path) -> Path:
        nonlocal count
        if ".replaced" in f"{self}{target}" or count:
            count += 1
            if count == step:
                raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else CheckpointError):
        write(out, overwrite=True)
    assert (out / "model").read_text() == ("new" if step == 3 else "old")
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("swaps", [True, False])
@pytest.mark.parametrize("code", [HALFWAY, BETWEEN_RENAMES])
def test_the_next_run_puts_back_or_removes_what_a_killed_one_left_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, code: str, swaps: bool
) -> None:
    out = tmp_path / "out"
    write(out)
    (out / "model").write_text("old")
    dying(code, out)
    assert {path.name.rpartition(".")[2] for path in tmp_path.iterdir()} >= {"partial", "lock"}
    if not swaps:
        monkeypatch.setattr(output, "exchange", lambda *_: False)
    with pytest.raises(CheckpointError, match="not empty"):
        write(out)  # it is back, and may not be replaced
    if code == BETWEEN_RENAMES:
        assert "the old folder was put back" in caplog.text
    write(out, overwrite=True)
    assert tree(tmp_path) == {"out": None, "out/model": "new", "out/sub": None, "out/sub/more": "new"}
    assert "partial, which a killed run left" in caplog.text


def test_a_folder_that_was_moved_aside_is_kept_where_its_place_is_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    write(out)
    (out / "model").write_text("old")
    dying(BETWEEN_RENAMES, out)
    out.mkdir()
    write(out)
    assert (tmp_path / "out-2" / "model").read_text() == "old"
    assert (out / "model").read_text() == "new"
    assert f"the old folder is now {tmp_path / 'out-2'}" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out-2"]


def test_a_folder_that_was_replaced_goes_if_its_run_was_killed_just_then(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    write(out)
    (out / "model").write_text("old")
    dying(BETWEEN_RENAMES.replace('str(target).endswith(".replaced")', "self.name.endswith('.partial')"), out)
    assert (out / "model").read_text() == "new"
    assert list(tmp_path.glob(".out.*.replaced"))
    with pytest.raises(CheckpointError, match="not empty"):
        write(out)
    write(out, overwrite=True)
    assert "which a killed run had replaced" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_second_run_for_the_same_folder_is_refused_at_once_and_the_first_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()

    def again() -> None:
        code = HALFWAY.replace("time.sleep(60)", "pass")
        command = [sys.executable, "-c", f"import sys, time\n{code}"]
        for name in (out, tmp_path / "x" / ".." / "out"):
            done = subprocess.run([*command, str(name)], cwd=ROOT, capture_output=True, text=True, timeout=60)
            assert "CheckpointError: another run is writing" in done.stderr
        other = subprocess.run([*command, str(tmp_path / "other")], cwd=ROOT, capture_output=True, text=True)
        assert other.returncode == 0, other.stderr

    (tmp_path / "x").mkdir()
    write(out, meanwhile=again)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out", "x"]
    write(out, overwrite=True)  # the lock went with the run


def test_without_locks_nothing_that_may_be_a_live_runs_is_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unsupported(*_: object) -> bool:
        return False

    monkeypatch.setattr("gptq_backend.locks._lock", unsupported)
    left = [".out.12345678.partial", ".out.12345678.replaced"]
    for name in left:
        (tmp_path / name).mkdir()
    write(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == [*left, "out"]
    assert f"it was moved to {tmp_path / left[1]}; move it back" in caplog.text


def test_a_full_disk_elsewhere_is_named(tmp_path: Path) -> None:
    for file in (None, str(tmp_path / ".out.12345678.partial" / "model")):
        with pytest.raises(CheckpointError, match=f"disk of {tmp_path};"), atomic_folder(tmp_path / "out"):
            raise OSError(errno.ENOSPC, "No space left on device", file)
    with pytest.raises(CheckpointError, match="disk of /somewhere/else;"), atomic_folder(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device", "/somewhere/else/file")


@settings(max_examples=60)
@given(name=st.text("ab.*[]{}-_01", min_size=1, max_size=6).filter(lambda name: name.strip(".")), data=st.data())
def test_only_names_that_a_run_for_this_folder_makes_are_leftovers(name: str, data: st.DataObject) -> None:
    other = data.draw(st.text("ab.*[]{}-_01", min_size=1, max_size=9))
    with tempfile.TemporaryDirectory() as folder:
        mine = Path(folder) / f".{other}.abcdefgh.partial"
        mine.mkdir()
        (mine / "model").write_text("mine")
        output.clear_leftovers(Path(folder) / name)
        assert mine.exists() == (other != name)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_scratch_folders_of_dead_processes_go_and_those_of_live_ones_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    code = """
from gptq_backend.locks import scratch_folder
with scratch_folder("view") as folder:
    (Path(folder) / "x").write_text("x")
    print("waiting", flush=True); time.sleep(60)
"""
    dying(code, number=number)
    (left,) = tmp_path.iterdir()
    (tmp_path / "gptq-offload-empty000").mkdir()
    stranger = tmp_path / "gptq-offload-12345678"
    stranger.mkdir()
    (stranger / "file").write_text("no run of ours makes a folder with files and no lock")
    (tmp_path / "gptq-offload-of-mine").mkdir()
    with scratch_folder("offload") as live, caplog.at_level(logging.WARNING):
        clear_scratch()
        assert Path(live).is_dir()
        assert sorted(path.name for path in tmp_path.iterdir() if path != Path(live)) == [
            "gptq-offload-12345678",
            "gptq-offload-of-mine",
        ]
    assert f"removed temporary folders of runs that were killed: gptq-offload-empty000, {left.name}" in caplog.text


def test_a_text_file_is_replaced_whole_and_leftovers_of_dead_writers_go(tmp_path: Path) -> None:
    target, live = tmp_path / "x.json", tmp_path / ".x.json.00000000.partial"
    held = claim(live)
    (tmp_path / ".x.json.11111111.partial").write_text("half")
    (tmp_path / ".y.json.11111111.partial").write_text("of another file")
    link = tmp_path / "link"
    link.symlink_to(target)
    before = os.umask(0o027)
    try:
        write_text(link, "one")
        write_text(target, "two\u2028")
    finally:
        os.umask(before)
    assert link.is_symlink()
    assert target.read_text(encoding="utf-8") == "two\u2028"
    assert target.stat().st_mode & 0o777 == 0o640
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".x.json.00000000.partial", ".y.json.11111111.partial", "link", "x.json",
    ]  # fmt: skip
    held.close(remove=True)
    with pytest.raises(UnicodeEncodeError):
        write_text(target, "\ud800")
    assert target.read_text(encoding="utf-8") == "two\u2028"
    assert not list(tmp_path.glob(".x*"))


@linux
@pytest.mark.skipif(os.name == "nt", reason="has no such files")
def test_a_text_for_a_pipe_goes_into_it(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    try:
        write_text(Path(f"/dev/fd/{writing}"), "text")
        assert os.read(reading, 100) == b"text"
    finally:
        os.close(reading)
        os.close(writing)


@pytest.mark.skipif(os.name == "nt", reason="has no such modes")
def test_what_is_replaced_keeps_its_mode(tmp_path: Path) -> None:
    file, folder = tmp_path / "private.json", tmp_path / "out"
    file.write_text("old")
    file.chmod(0o600)
    write_text(file, "new")
    assert file.read_text() == "new"
    assert file.stat().st_mode & 0o777 == 0o600

    folder.mkdir(mode=0o700)
    (folder / "old").touch()
    with atomic_folder(folder, overwrite=True) as beside:
        (beside / "new").touch()
    assert [entry.name for entry in folder.iterdir()] == ["new"]
    assert folder.stat().st_mode & 0o777 == 0o700


def test_names_that_lead_nowhere_are_no_folders(tmp_path: Path) -> None:
    (tmp_path / "one").symlink_to(tmp_path / "two")
    (tmp_path / "two").symlink_to(tmp_path / "one")
    for name, reason in (("", "is empty"), (str(tmp_path / "one"), "symbolic link that leads nowhere")):
        with pytest.raises(CheckpointError, match=reason), atomic_folder(name, overwrite=True):
            pass


@pytest.mark.parametrize("name", ["out", "out/text.txt", "out/inside/text.txt", "link/text.txt"])
def test_a_folder_does_not_take_the_place_of_what_is_read(tmp_path: Path, name: str) -> None:
    (tmp_path / "out" / "inside").mkdir(parents=True)
    (tmp_path / "link").symlink_to("out")
    source = tmp_path / name
    if not source.exists():
        source.touch()
    with pytest.raises(CheckpointError, match="is or holds the text"):
        check_spared(tmp_path / "out", source, "the text")
    check_spared(tmp_path / "other", source, "the text")
    check_spared(tmp_path / "out" / "new", source, "the text")


def test_a_text_for_a_device_goes_into_it_and_does_not_replace_it(tmp_path: Path) -> None:
    write_text(Path("/dev/null"), "gone")
    assert Path("/dev/null").is_char_device()
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with subprocess.Popen(["cat", str(pipe)], stdout=subprocess.PIPE, text=True) as reader:
        write_text(pipe, "through")
        assert reader.communicate(timeout=30)[0] == "through"
    assert pipe.is_fifo()
