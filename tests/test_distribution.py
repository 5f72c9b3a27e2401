"""What a package index gets: a source distribution whose tests run, and a page whose links work."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
from email import message_from_bytes
from pathlib import Path

import pytest

pytest.importorskip("pybind11")

ROOT = Path(__file__).parents[1]
ADDRESS = "https://example.org/someone/gptq_backend"
BUILD = "from setuptools import build_meta; print('file:', build_meta.build_sdist('dist'))"


def tracked() -> list[str]:
    """Files of the repository, relative to its root."""
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [name for name in done.stdout.splitlines() if (ROOT / name).exists()]


def source_distribution(folder: Path, monkeypatch: pytest.MonkeyPatch, address: str) -> dict[str, bytes]:
    """Files of a source distribution of the tracked files, by name; the address of the repository is ``address``."""
    for name in tracked():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    monkeypatch.setenv("GPTQ_BACKEND_REPOSITORY", address)
    monkeypatch.setenv("GPTQ_BACKEND_CUDA", "0")
    done = subprocess.run([sys.executable, "-c", BUILD], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with tarfile.open(folder / "dist" / done.stdout.rpartition("file: ")[2].strip()) as archive:
        members = [each for each in archive.getmembers() if each.isfile()]
        return {each.name.partition("/")[2]: archive.extractfile(each).read() for each in members}


def links(page: str) -> list[str]:
    return re.findall(r"\]\(([^)]*)\)", page)


def test_it_holds_every_tracked_file_and_its_page_links_into_the_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = source_distribution(tmp_path, monkeypatch, ADDRESS)
    assert sorted(set(tracked()) - set(files)) == []
    metadata = message_from_bytes(files["PKG-INFO"])
    assert f"Source, {ADDRESS}" in metadata.get_all("Project-URL")
    found = links(metadata.get_payload())
    assert len(found) > 20
    for link in found:
        path = re.fullmatch(rf"{ADDRESS}/blob/v[\d.]+/([\w./-]+)(#[\w-]+)?", link)
        assert path is not None, link
        assert (ROOT / path[1]).exists(), link


def test_without_an_address_its_page_has_no_links_that_lead_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metadata = message_from_bytes(source_distribution(tmp_path, monkeypatch, "")["PKG-INFO"])
    assert metadata.get_all("Project-URL") is None
    assert [link for link in links(metadata.get_payload()) if not link.startswith("https://")] == []
    assert "[quick start" not in metadata.get_payload()
    assert "quick start" in metadata.get_payload()
