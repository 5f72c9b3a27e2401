"""A checkpoint in a hub is fetched as vLLM's own loader fetches it: its revision, its folder, and no file more.

The hub is a small one on loopback that answers what ``huggingface_hub`` asks for one repository.
"""

from __future__ import annotations

import hashlib
import json
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.transformers.checkpoints import PEERS
from tests.vllm.engine import Engine
from tests.vllm.test_offline import BOUND
from tests.vllm.test_reload import expected

NAME = "llama-4-64-actorder"
REPOSITORY, BRANCH, COMMIT = f"someone/{NAME}", "quantized", "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """One repository with one branch. ``fetched`` has the files that were asked for."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.files, self.fetched = files, set[str]()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Answers(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._file(body=False)

    def do_GET(self) -> None:
        parts = self._parts()
        if parts[:2] != ["api", "models"]:
            self._file(body=True)
        elif parts[4:5] == ["tree"]:
            self._json([self._entry(name) for name in self.server.files] if self._known(parts[5]) else None)
        else:
            known = len(parts) == 4 or self._known(parts[5])
            siblings = [{"rfilename": name} for name in self.server.files]
            self._json({"id": REPOSITORY, "sha": COMMIT, "siblings": siblings, "private": False} if known else None)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        if self.headers["Content-Type"].startswith("application/json"):
            paths = json.loads(body)["paths"]
        else:
            paths = urllib.parse.parse_qs(body).get("paths", [])
        self._json([self._entry(name) for name in paths if name in self.server.files])

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _parts(self) -> list[str]:
        path = urllib.parse.urlsplit(self.path).path
        return [urllib.parse.unquote(part) for part in path.strip("/").split("/")]

    def _known(self, revision: str) -> bool:
        return revision in (BRANCH, COMMIT)

    def _entry(self, name: str) -> dict[str, Any]:
        content = self.server.files[name]
        return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def _json(self, answer: Any) -> None:
        body = json.dumps({"error": "not found"} if answer is None else answer).encode()
        self.send_response(404 if answer is None else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _file(self, body: bool) -> None:
        """``/OWNER/NAME/resolve/REVISION/FILE``"""
        parts = self._parts()
        name = "/".join(parts[4:])
        if parts[2:3] != ["resolve"] or not self._known(parts[3]) or name not in self.server.files:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = self.server.files[name]
        if body:
            self.server.fetched.add(name)
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)


@pytest.fixture
def hub() -> Iterator[Hub]:
    files = {path.name: path.read_bytes() for path in (PEERS / NAME).iterdir()}
    files["extra.safetensors"] = files["model.safetensors"][:1000]  # damaged, so that whoever reads it fails
    hub = Hub(files)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    yield hub
    hub.shutdown()
    hub.server_close()


@pytest.mark.slow
def test_a_checkpoint_is_fetched_as_vllms_loader_fetches_it(
    hub: Hub, start_engine: Callable[..., Engine], tmp_path: Path
) -> None:
    variables = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    engine = start_engine(**variables, HF_HUB_DISABLE_TELEMETRY="1", HF_HUB_DISABLE_XET="1")
    options = {"revision": BRANCH, "download_dir": str(tmp_path / "weights"), "ignore_patterns": ["extra*"]}
    ids, wanted = expected(NAME)
    assert (engine.logprobs(REPOSITORY, ids, **options) - wanted).abs().mean() < BOUND
    assert "model.safetensors" in hub.fetched
    assert "extra.safetensors" not in hub.fetched
    assert list((tmp_path / "weights").rglob("snapshots/*/model.safetensors"))
    assert not list((tmp_path / "home").rglob("*.safetensors"))
    assert (engine.logprobs(REPOSITORY, ids, **options, reload={"path": None}) - wanted).abs().mean() < BOUND
    engine.close()
