"""A Hugging Face Hub on loopback: create, upload, commit, list and download of model repositories, and their troubles.

Small files come inline with the commit; large ones (weights by name, anything from ``lfs_from`` bytes) through Git LFS:
batch, PUT, verify, in several parts where ``part_bytes`` is set. Uploaded bytes lie in ``storage``, which nobody sees,
until a commit names them. ``repos`` is what a visitor sees: file name to bytes. Commits form a chain, and one whose
parent is not the last is refused with 412, as the Hub does.

Troubles are put into ``faults`` and happen to the first requests that they match: a connection cut after some bytes of
the body, a status instead of an answer, an answer lost after the request was obeyed. ``spoil`` keeps other bytes of a
file than were sent, while its hash is reported as the client said.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

_REPO = r"(?P<repo>[^/]+/[^/]+)"
_LFS_NAMES = ("*.safetensors", "*.gguf", "*.bin", "tokenizer.json")  # as in the .gitattributes of a new repository
Answer = tuple[int, Any, dict[str, str]]


@dataclass
class Fault:
    """What happens to the next ``times`` requests that match ``pattern`` ("PUT /lfs/.*")."""

    pattern: str
    status: int | None = None  # answered with this
    after: int | None = None  # else the connection is cut after so many bytes of the body
    obeyed: bool = False  # the request is obeyed first, and only its answer is lost
    words: str = "trouble"
    times: int = 1


@dataclass
class Commit:
    """A state of a repository: file name to sha256, and which of them are large."""

    oid: str
    message: str
    files: dict[str, str] = field(default_factory=dict)
    large: set[str] = field(default_factory=set)


class LoopbackHub:
    """A running server; ``with LoopbackHub() as hub`` stops it at the end."""

    def __init__(self) -> None:
        self.private: dict[str, bool] = {}
        self.requests: list[str] = []  # "GET /path"
        self.tokens: set[str] = set()  # every Authorization that came
        self.deny: tuple[int, dict[str, str]] | None = None  # answer every request with this status and headers
        self.faults: list[Fault] = []
        self.spoil: set[str] = set()
        self.lfs_from = 10 * 2**20
        self.part_bytes: int | None = None
        self.storage: dict[str, bytes] = {}
        self.commits: dict[str, list[Commit]] = {}
        self._parts: dict[str, dict[int, bytes]] = {}
        self._lock = threading.RLock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> LoopbackHub:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def repos(self) -> Repos:
        """What a visitor sees: of each repository, file name to bytes; writing makes commits by somebody."""
        return Repos(self)

    def sha(self, repo: str) -> str:
        """The last commit."""
        return self.commits[repo][-1].oid

    def count(self, pattern: str) -> int:
        """How many requests so far match."""
        return sum(bool(re.fullmatch(pattern, request)) for request in self.requests)

    def make(self, repo: str, files: dict[str, bytes] | None = None, *, private: bool = True) -> None:
        """Create a repository, with files of its own in a commit by somebody."""
        self.commits[repo], self.private[repo] = [Commit(_oid(repo, "initial"), "initial commit")], private
        if files:
            self.add(repo, files)

    def add(self, repo: str, files: dict[str, bytes], message: str = "somebody's") -> None:
        """Commit files as somebody else would."""
        last = self.commits[repo][-1]
        known = {**last.files, **{name: self._keep(content) for name, content in files.items()}}
        large = last.large | {name for name, content in files.items() if self._is_large(name, len(content))}
        self.commits[repo].append(Commit(_oid(last.oid, message, repr(sorted(known.items()))), message, known, large))

    def _keep(self, content: bytes) -> str:
        sha = hashlib.sha256(content).hexdigest()
        self.storage[sha] = content
        return sha

    def stored(self, name: str, sha: str) -> bytes:
        content = self.storage[sha]
        return content[:-1] + bytes([content[-1] ^ 1]) if name in self.spoil and content else content

    def _is_large(self, name: str, size: int) -> bool:
        return size > 0 and (size >= self.lfs_from or any(fnmatch(name, pattern) for pattern in _LFS_NAMES))

    def answer(self, method: str, path: str, body: bytes) -> Answer:
        """Return status, a JSON value or raw bytes, and headers."""
        if self.deny is not None:
            return self.deny[0], {"error": "denied"}, self.deny[1]
        with self._lock:
            return self._answer(method, path, body)

    def _answer(self, method: str, path: str, body: bytes) -> Answer:
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/whoami-v2":
            return 200, {"type": "user", "name": "me", "orgs": [], "auth": {}}, {}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}, {}
        if path.startswith("/lfs/"):
            return self._store(method, path.removeprefix("/lfs/").split("/"), body)
        if match := re.fullmatch(rf"/{_REPO}\.git/info/lfs/objects/batch", path):
            return self._batch(match["repo"], json.loads(body))
        if match := re.fullmatch(rf"/{_REPO}/resolve/(?P<commit>[^/]+)/(?P<file>.+)", path):
            return self._file(match["repo"], match["commit"], match["file"])
        match = re.fullmatch(rf"/api/models/{_REPO}(?:/(?P<verb>revision|tree|preupload|commit)/(?P<rest>.+))?", path)
        if match is None:
            return 404, {"error": f"no route {method} {path}"}, {}
        if match["repo"] not in self.commits:
            return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        return self._api(match["repo"], match["verb"], match["rest"], body)

    def _create(self, wish: dict[str, Any]) -> Answer:
        repo = f"{wish.get('organization') or 'me'}/{wish['name']}"
        if repo in self.commits:
            return 409, {"error": "exists", "url": f"{self.url}/{repo}"}, {}
        self.make(repo, private=wish.get("visibility") == "private")
        return 200, {"url": f"{self.url}/{repo}", "name": repo, "id": repo}, {}

    def _batch(self, repo: str, wish: dict[str, Any]) -> Answer:
        if repo not in self.commits:
            return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        found = []
        for wanted in wish["objects"]:
            known = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.storage:
                upload = {"href": f"{self.url}/lfs/{wanted['oid']}", "header": self._header(wanted)}
                known["actions"] = {"upload": upload, "verify": {"href": f"{self.url}/lfs/{wanted['oid']}/verify"}}
            found.append(known)
        return 200, {"transfer": "basic", "objects": found}, {}

    def _header(self, wanted: dict[str, Any]) -> dict[str, str]:
        if self.part_bytes is None or wanted["size"] <= self.part_bytes:
            return {}
        num_parts = -(-wanted["size"] // self.part_bytes)
        urls = {str(n): f"{self.url}/lfs/{wanted['oid']}/part/{n}" for n in range(1, num_parts + 1)}
        return {"chunk_size": str(self.part_bytes), **urls}

    def _store(self, method: str, path: list[str], body: bytes) -> Answer:
        sha, verb = path[0], path[1] if len(path) > 1 else ""
        if method == "PUT" and verb == "part":
            self._parts.setdefault(sha, {})[int(path[2])] = body
            return 200, b"", {"ETag": f'"{hashlib.md5(body).hexdigest()}"'}
        if verb == "verify":
            return (200, {}, {}) if sha in self.storage else (404, {"error": "not stored"}, {})
        whole = body if method == "PUT" else b"".join(part for _, part in sorted(self._parts.pop(sha).items()))
        if hashlib.sha256(whole).hexdigest() != sha:
            return 400, {"error": "the bytes do not match"}, {}
        self._keep(whole)
        return 200, {}, {}

    def _find(self, repo: str, name: str) -> Commit | None:
        commits = self.commits.get(repo, [])
        return next((c for c in reversed(commits) if name in ("main", "HEAD") or c.oid.startswith(name)), None)

    def _file(self, repo: str, commit_name: str, name: str) -> Answer:
        commit = self._find(repo, commit_name)
        if commit is None or name not in commit.files:
            code = "RepoNotFound" if repo not in self.commits else "EntryNotFound" if commit else "RevisionNotFound"
            return 404, {"error": code}, {"X-Error-Code": code}
        content = self.stored(name, commit.files[name])
        return 200, content, {"ETag": f'"{commit.files[name]}"', "X-Repo-Commit": commit.oid}

    def _api(self, repo: str, verb: str | None, rest: str | None, body: bytes) -> Answer:
        name, _, folder = (rest or "main").partition("/")
        commit = self._find(repo, name) if verb in (None, "tree", "revision") else self.commits[repo][-1]
        if commit is None:
            return 404, {"error": "Revision not found"}, {"X-Error-Code": "RevisionNotFound"}
        if verb == "tree" and folder:  # nobody here has folders
            return 404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"}
        if verb == "tree":
            return 200, [self._entry(commit, name) for name in commit.files], {}
        if verb == "preupload":
            return 200, {"files": [self._mode(commit, wish) for wish in json.loads(body)["files"]]}, {}
        if verb == "commit":
            return self._commit(repo, commit, [json.loads(line) for line in body.splitlines()])
        siblings = [{"rfilename": name} for name in commit.files]
        return 200, {"id": repo, "sha": commit.oid, "private": self.private[repo], "siblings": siblings}, {}

    def _entry(self, commit: Commit, name: str) -> dict[str, Any]:
        sha, size = commit.files[name], len(self.storage[commit.files[name]])
        if name not in commit.large:
            return {"type": "file", "path": name, "size": size, "oid": _blob(self.stored(name, sha))}
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha}\nsize {size}\n".encode()
        lfs = {"oid": sha, "size": size, "pointerSize": len(pointer)}
        return {"type": "file", "path": name, "size": size, "oid": _blob(pointer), "lfs": lfs}

    def _mode(self, commit: Commit, wish: dict[str, Any]) -> dict[str, Any]:
        name, known = wish["path"], {}
        if name in commit.files:
            sha = commit.files[name]
            known["oid"] = sha if name in commit.large else _blob(self.storage[sha])
        mode = "lfs" if self._is_large(name, wish["size"]) else "regular"
        return {"path": name, "uploadMode": mode, "shouldIgnore": False, **known}

    def _commit(self, repo: str, last: Commit, lines: list[dict[str, Any]]) -> Answer:
        header = next(line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit", last.oid) != last.oid:
            return 412, {"error": "A commit has happened since. Please refresh and try again."}, {}
        files, large = dict(last.files), set(last.large)
        for line in lines:
            name = line["value"].get("path")
            if line["key"] == "file":
                files[name] = self._keep(base64.b64decode(line["value"]["content"]))
                large.discard(name)
            elif line["key"] == "lfsFile":
                if line["value"]["oid"] not in self.storage:
                    return 400, {"error": f"LFS object of {name} is not there"}, {}
                files[name] = line["value"]["oid"]
                large.add(name)
            elif line["key"] == "deletedFile":
                del files[name]
        commit = Commit(_oid(last.oid, repr(sorted(files.items()))), header["summary"], files, large & files.keys())
        self.commits[repo].append(commit)
        return (
            200,
            {"success": True, "commitOid": commit.oid, "commitUrl": f"{self.url}/{repo}/commit/{commit.oid}"},
            {},
        )

    def take_fault(self, request: str) -> Fault | None:
        """Return the fault that this request meets, used up by it."""
        with self._lock:
            for fault in self.faults:
                if fault.times > 0 and re.fullmatch(fault.pattern, request):
                    fault.times -= 1
                    return fault
        return None


class Repos(MutableMapping[str, "Files"]):
    """All repositories as a visitor sees them."""

    def __init__(self, hub: LoopbackHub) -> None:
        self._hub = hub

    def __getitem__(self, repo: str) -> Files:
        if repo not in self._hub.commits:
            raise KeyError(repo)
        return Files(self._hub, repo)

    def __setitem__(self, repo: str, files: Mapping[str, bytes]) -> None:
        self._hub.make(repo, dict(files))

    def __delitem__(self, repo: str) -> None:
        del self._hub.commits[repo]

    def __iter__(self) -> Iterator[str]:
        return iter(self._hub.commits)

    def __len__(self) -> int:
        return len(self._hub.commits)


class Files(MutableMapping[str, bytes]):
    """The files of a repository at its last commit."""

    def __init__(self, hub: LoopbackHub, repo: str) -> None:
        self._hub, self._repo = hub, repo

    def __getitem__(self, name: str) -> bytes:
        return self._hub.stored(name, self._hub.commits[self._repo][-1].files[name])

    def __setitem__(self, name: str, content: bytes) -> None:
        self._hub.add(self._repo, {name: content})

    def __delitem__(self, name: str) -> None:
        raise NotImplementedError("files go by a commit")

    def __iter__(self) -> Iterator[str]:
        return iter(self._hub.commits[self._repo][-1].files)

    def __len__(self) -> int:
        return len(self._hub.commits[self._repo][-1].files)


def _oid(*parts: str) -> str:
    return hashlib.sha1("\n".join(parts).encode()).hexdigest()


def _blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _handler(hub: LoopbackHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _respond(self) -> None:
            path = unquote(urlsplit(self.path).path)
            request = f"{self.command} {path}"
            hub.requests.append(request)
            if authorization := self.headers.get("Authorization"):
                hub.tokens.add(authorization)
            fault = hub.take_fault(request)
            if fault is not None and fault.after is not None:
                self._hang_up(fault.after)
                return
            body = self._read_body()
            if fault is None or fault.obeyed:
                status, value, headers = hub.answer(self.command, path, body)
            if fault is not None:
                if fault.status is None:
                    self._hang_up(0)
                    return
                status, value, headers = fault.status, {"error": fault.words}, {}
            self._send(status, value, headers)

        do_GET = do_HEAD = do_POST = do_PUT = _respond

        def _send(self, status: int, value: Any, headers: dict[str, str]) -> None:
            raw = value if isinstance(value, bytes) else json.dumps(value).encode()
            self.send_response(status)
            for name, text in {"Content-Type": "application/json", "Content-Length": str(len(raw)), **headers}.items():
                self.send_header(name, text)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(raw)

        def _hang_up(self, after: int) -> None:
            """Read so many bytes of the body, and be gone as a router is."""
            is_chunked = self.headers.get("Transfer-Encoding") == "chunked"
            self.rfile.read(after if is_chunked else min(after, int(self.headers.get("Content-Length") or 0)))
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

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
