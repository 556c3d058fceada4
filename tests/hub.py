"""The hub, played by a local server."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

COMMIT = "0123456789" * 4


class Hub(ThreadingHTTPServer):
    """Answer for one model, `org/model`, and refuse others in the hub's ways."""

    files: dict[str, bytes]
    asked: list[str]

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files, self.asked = {}, []


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def reply(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if "org/gated" in path:
            return self.reply(b"{}", 403, X_Error_Code="GatedRepo")
        if "org/half-open" in path and not path.startswith("/api"):
            return self.reply(b"{}", 401)
        if "org/half-open" in path:
            tree = [{"type": "file", "path": "config.json", "size": 2, "oid": "0" * 40}]
            facts = {"id": "org/half-open", "sha": COMMIT, "siblings": []}
            return self.reply(json.dumps(tree if "/tree/" in path else facts).encode())
        if "org/forbidden" in path:
            return self.reply(b"{}", 403)
        if "org/model" not in path:
            return self.reply(b"{}", 401, X_Error_Code="RepoNotFound")
        if path.startswith("/api/models/org/model/tree/"):
            files = self.server.files.items()
            tree = [
                {
                    "type": "file",
                    "path": name,
                    "size": len(body),
                    "oid": hashlib.sha1(body).hexdigest(),
                }
                for name, body in files
            ]
            return self.reply(json.dumps(tree).encode())
        if path.startswith("/api/models/org/model"):
            if path.endswith("/revision/gone"):
                return self.reply(b"{}", 404, X_Error_Code="RevisionNotFound")
            siblings = [{"rfilename": name} for name in self.server.files]
            about: dict[str, object] = {"id": "org/model", "sha": COMMIT, "siblings": siblings}
            return self.reply(json.dumps(about).encode())
        name = path.partition(f"/resolve/{COMMIT}/")[2]
        if self.command == "GET":
            self.server.asked.append(name)
        body = self.server.files[name]
        return self.reply(body, X_Repo_Commit=COMMIT, ETag=f'"{hashlib.sha1(body).hexdigest()}"')


def use_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, endpoint: str) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@contextmanager
def served(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """Serve `org/model`, without files yet, as long as the context lasts."""
    server = Hub()
    use_hub(monkeypatch, tmp_path, f"http://127.0.0.1:{server.server_port}")
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
