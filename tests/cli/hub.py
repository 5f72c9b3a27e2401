"""A stand-in for the Hugging Face Hub: a server on this machine that takes uploads by git LFS from its client."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

OWNER = "somebody"


class Hub(ThreadingHTTPServer):
    """Its repositories: files by name."""

    def __init__(self, refuse_commits: bool = False) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.blobs: dict[str, bytes] = {}
        self.refuse_commits = refuse_commits

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(self, value: Any, status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        if self.headers.get("Authorization") != "Bearer hf_right":
            return self.answer({"error": "Invalid user token."}, 401)
        if self.path.startswith("/api/whoami"):
            return self.answer({"name": OWNER, "type": "user", "auth": {}})
        return self.answer({"error": "Repository not found"}, 404)

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        self.server.blobs[self.path.rpartition("/")[2]] = self.body()
        self.answer({})

    def do_POST(self) -> None:
        data, address = self.body(), self.server.address
        path = self.path.partition("?")[0]
        if path == "/api/repos/create":
            name = f"{json.loads(data).get('organization') or OWNER}/{json.loads(data)['name']}"
            self.server.repositories.setdefault(name, {})
            return self.answer({"url": f"{address}/{name}", "name": name, "id": name})
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if "/preupload/" in path:
            files = [{"path": file["path"], "uploadMode": _mode(file["path"]), "shouldIgnore": False}
                     for file in json.loads(data)["files"]]  # fmt: skip
            return self.answer({"files": files})
        if path.endswith("/objects/batch"):
            return self.answer({"transfer": "basic", "objects": [
                {**each, "actions": {"upload": {"href": f"{address}/blobs/{each['oid']}"}}}
                for each in json.loads(data)["objects"]
            ]})  # fmt: skip
        if "/commit/" in path and not self.server.refuse_commits:
            name = path.removeprefix("/api/models/").partition("/commit/")[0]
            repository = self.server.repositories[name]
            for line in map(json.loads, data.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    repository[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    repository[value["path"]] = self.server.blobs[value["oid"]]
            return self.answer({"success": True, "commitOid": "0" * 40, "commitUrl": f"{address}/{name}/commit/0"})
        return self.answer({"error": "You have exceeded your quota"}, 403)


def _mode(name: str) -> str:
    return "lfs" if name.endswith(".safetensors") else "regular"


@contextmanager
def hub(refuse_commits: bool = False) -> Iterator[Hub]:
    server = Hub(refuse_commits)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
