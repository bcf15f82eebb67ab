"""A Hugging Face Hub on loopback, just large enough for create, upload, list and download of model repositories.

Repositories live in a dict of file name to bytes. Files are taken inline with the commit ("regular" upload mode), which
the real Hub does only for small ones; nothing else of the large-file protocol is needed here.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

_REPO = r"(?P<repo>[^/]+/[^/]+)"


class LoopbackHub:
    """A running server; ``with LoopbackHub() as hub`` stops it at the end."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.requests: list[str] = []  # "GET /path"
        self.deny: tuple[int, dict[str, str]] | None = None  # answer every request with this status and headers
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> LoopbackHub:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def sha(self, repo: str) -> str:
        digest = hashlib.sha1(repr(sorted(self.repos[repo].items())).encode())
        return digest.hexdigest()

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        """Return status, a JSON value or raw bytes, and headers."""
        if self.deny is not None:
            return self.deny[0], {"error": "denied"}, self.deny[1]
        if path == "/api/repos/create":
            wish = json.loads(body)
            repo = f"{wish.get('organization') or 'me'}/{wish['name']}"
            if repo in self.repos:
                return 409, {"error": "exists", "url": f"{self.url}/{repo}"}, {}
            self.repos[repo], self.private[repo] = {}, wish.get("visibility") == "private"
            return 200, {"url": f"{self.url}/{repo}", "name": repo, "id": repo}, {}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}, {}
        if match := re.fullmatch(rf"/{_REPO}/resolve/[^/]+/(?P<file>.+)", path):
            return self._file(match["repo"], match["file"])
        match = re.fullmatch(rf"/api/models/{_REPO}(?:/(?P<verb>revision|tree|preupload|commit)/(?P<rest>.+))?", path)
        if match is None:
            return 404, {"error": f"no route {method} {path}"}, {}
        if match["repo"] not in self.repos:
            return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        return 200, self._api(match["repo"], match["verb"], body), {}

    def _file(self, repo: str, name: str) -> tuple[int, Any, dict[str, str]]:
        if name not in self.repos.get(repo, {}):
            code = "EntryNotFound" if repo in self.repos else "RepoNotFound"
            return 404, {"error": code}, {"X-Error-Code": code}
        content = self.repos[repo][name]
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        return 200, content, {"ETag": etag, "X-Repo-Commit": self.sha(repo)}

    def _api(self, repo: str, verb: str | None, body: bytes) -> Any:
        files = self.repos[repo]
        if verb == "tree":
            return [{"type": "file", "oid": "0" * 40, "size": len(c), "path": n} for n, c in files.items()]
        if verb == "preupload":
            wishes = json.loads(body)["files"]
            return {"files": [{"path": w["path"], "uploadMode": "regular", "shouldIgnore": False} for w in wishes]}
        if verb == "commit":
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            return {"success": True, "commitOid": self.sha(repo), "commitUrl": f"{self.url}/{repo}/commit/x"}
        siblings = [{"rfilename": name} for name in files]
        return {"id": repo, "sha": self.sha(repo), "private": self.private.get(repo, False), "siblings": siblings}


def _handler(hub: LoopbackHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _respond(self) -> None:
            path = unquote(urlsplit(self.path).path)
            body = self._read_body()
            hub.requests.append(f"{self.command} {path}")
            status, value, headers = hub.answer(self.command, path, body)
            raw = value if isinstance(value, bytes) else json.dumps(value).encode()
            self.send_response(status)
            for name, text in {"Content-Type": "application/json", "Content-Length": str(len(raw)), **headers}.items():
                self.send_header(name, text)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(raw)

        do_GET = do_HEAD = do_POST = do_PUT = _respond

        def _read_body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body

        def log_message(self, *_: object) -> None:
            pass

    return Handler
