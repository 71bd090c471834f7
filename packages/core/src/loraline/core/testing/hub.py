"""A small Hub on loopback that speaks the routes huggingface_hub asks: point HF_ENDPOINT at it."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class SmallHub:
    """Models by id, each a mapping of file names to content."""

    url: str = ""
    models: dict[str, Mapping[str, bytes]] = field(default_factory=dict)
    others: dict[tuple[str, str], Mapping[str, bytes]] = field(default_factory=dict)
    """Files of a model's other commits, by (id, commit); `models` is what `main` and COMMIT give."""
    tags: dict[str, str] = field(default_factory=dict)
    """Commits by the names of tags."""
    gated: set[str] = field(default_factory=set)
    """Models whose list is public and whose files answer 403, as the Hub does without an accepted licence."""
    token: str = ""
    """When set, requests without this bearer token get 401."""
    torn: set[str] = field(default_factory=set)
    """Files whose download breaks off half-way."""
    silent: bool = False
    """Take requests and never answer."""
    asked: list[str] = field(default_factory=list)
    """Method and path of every request."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: SmallHub

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def _answer(self, *, body: bool) -> None:
        hub, address = self.hub, urlsplit(self.path)
        hub.asked.append(f"{self.command} {address.path}")
        if hub.silent:
            time.sleep(30)
            return
        if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
            self._send(401, b"Invalid username or password.", body=body)
            return
        parts = [unquote(part) for part in address.path.strip("/").split("/")]
        if parts[:2] == ["api", "models"]:
            self._listing("/".join(parts[2:4]), parts[4:], parse_qs(address.query), body)
        elif "resolve" in parts:
            at = parts.index("resolve")
            self._file("/".join(parts[:at]), parts[at + 1], "/".join(parts[at + 2 :]), body)
        else:
            self._send(404, b"", body=body)

    def _listing(self, model: str, rest: list[str], query: dict[str, list[str]], body: bool) -> None:
        found = self._files(model, rest[1] if len(rest) > 1 else "main", body)
        if found is None:
            return
        commit, files = found
        if rest[:1] == ["tree"]:
            content: object = [
                {"type": "file", "path": name, "size": len(data), "oid": _etag(data)} for name, data in files.items()
            ]
        else:
            siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
            content = {"id": model, "sha": commit, "siblings": siblings, "gated": model in self.hub.gated}
        self._send(200, json.dumps(content).encode(), body=body)

    def _file(self, model: str, revision: str, name: str, body: bool) -> None:
        found = self._files(model, revision, body)
        if found is None:
            return
        commit, files = found
        if model in self.hub.gated:
            self._send(403, b"", body=body, error="GatedRepo")
        elif name not in files:
            self._send(404, b"", body=body, error="EntryNotFound")
        else:
            torn = body and name in self.hub.torn
            self._send(200, files[name], body=body, etag=_etag(files[name]), commit=commit, torn=torn)

    def _files(self, model: str, revision: str, body: bool) -> tuple[str, Mapping[str, bytes]] | None:
        """Return the commit that a revision stands for, with its files; answer 404 and return None when unknown."""
        newest = self.hub.models.get(model)
        commit = COMMIT if revision == "main" else self.hub.tags.get(revision, revision)
        files = newest if commit == COMMIT else self.hub.others.get((model, commit))
        if newest is None:
            self._send(404, b"", body=body, error="RepoNotFound")
        elif files is None:
            self._send(404, b"", body=body, error="RevisionNotFound")
        else:
            return commit, files
        return None

    def _send(
        self,
        status: int,
        data: bytes,
        *,
        body: bool,
        kind: str = "",
        error: str = "",
        etag: str = "",
        commit: str = "",
        torn: bool = False,
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Type", "application/octet-stream" if etag else "application/json")
        if error:
            self.send_header("X-Error-Code", error)
        if etag:
            self.send_header("ETag", f'"{etag}"')
            self.send_header("X-Repo-Commit", commit)
        self.end_headers()
        if body:
            self.wfile.write(data[: len(data) // 2] if torn else data)
        if torn:
            self.close_connection = True


def _etag(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@contextmanager
def small_hub() -> Iterator[SmallHub]:
    """Run a Hub for the time of a test."""
    hub = SmallHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)
