"""A proxy on 127.0.0.1 that stands before a real server and lets go wrong what goes wrong on the way to one.

What is to happen to a request is told by its question and seed, in turn, so that it does not depend on who comes first.
Beside what it did the proxy keeps what really happened: what the server wrote to its end, and what of it was passed on.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import select
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from random import Random
from typing import Any

from flaky_server import reset

Key = tuple[str, int]  # question and seed
# Before the server is asked: 429, 500, hang, reset. After it has written all of it: cut, stall, lost.
FAULTS = ("429", "500", "hang", "reset", "cut", "stall", "lost")
LONGEST_HANG_S = 30.0


class FaultProxy:
    """``faults[key]`` is what happens to a request's first attempts; after ``at`` whole replies ``then`` is called."""

    def __init__(self, port: int, faults: dict[Key, list[str]], *, at: int = 0, then: Callable[[], None] | None = None):
        self.server_port, self.faults = port, {key: list(names) for key, names in faults.items()}
        self.seen: Counter[Key] = Counter()
        self.injected: Counter[str] = Counter()
        self.written: Counter[Key] = Counter()  # by the server, to the end
        self.passed_on: dict[Key, list[bytes]] = {}  # whole replies
        self._at, self._then = at, then
        self._lock = threading.Lock()

    def __enter__(self) -> FaultProxy:
        proxy = self

        class Handler(_Handler):
            owner = proxy

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads, self._http.block_on_close = True, False
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/v1"
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def next_fault(self, key: Key) -> str | None:
        with self._lock:
            self.seen[key] += 1
            fault = self.faults[key].pop(0) if self.faults.get(key) else None
            if fault is not None:
                self.injected[fault] += 1
            return fault

    def count_written(self, key: Key) -> None:
        with self._lock:
            self.written[key] += 1
            now = self._then is not None and self.written.total() == self._at
        if now and self._then is not None:
            threading.Thread(target=self._then, daemon=True).start()

    def count_away(self) -> None:
        with self._lock:
            self.injected["server away"] += 1

    def count_passed_on(self, key: Key, data: bytes) -> None:
        with self._lock:
            self.passed_on.setdefault(key, []).append(data)


def draw_faults(keys: list[Key], seed: int, share: float = 0.6) -> dict[Key, list[str]]:
    """One to three faults for a share of all requests, every kind among them."""
    rng = Random(seed)
    drawn = {key: rng.choices(FAULTS, k=rng.choice((1, 1, 2, 3))) for key in keys if rng.random() < share}
    assert {fault for names in drawn.values() for fault in names} == set(FAULTS)
    return drawn


def read_text(data: bytes) -> tuple[str, int]:
    """The text of a whole reply and its tokens, read in the plainest way there is."""
    if not data.startswith(b"data:"):
        body = json.loads(data)
        return _join([body["choices"][0]["message"]]), body["usage"]["completion_tokens"]
    events = [json.loads(event.removeprefix(b"data: ")) for event in data.split(b"\n\n") if event]
    return _join([event["choices"][0]["delta"] for event in events]), events[-1]["usage"]["completion_tokens"]


def _join(messages: list[dict[str, str]]) -> str:
    return "".join(message.get(name) or "" for name in ("reasoning_content", "content") for message in messages)


class _ClientGoneError(Exception):
    """Nobody reads what is passed on any more; the server is as it was."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    owner: FaultProxy

    def log_message(self, *_: Any) -> None:
        pass

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (OSError, ValueError, _ClientGoneError):
            self.close_connection = True

    def finish(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            super().finish()

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        body = json.loads(data)
        key = (body["messages"][-1]["content"], body["seed"])
        fault = self.owner.next_fault(key)
        if fault == "429":
            self._send(429, b'{"error": "slower, please"}', {"Retry-After": "0.1"})
        elif fault == "500":
            self._send(500, b"Internal Server Error", {"Content-Type": "text/plain"})
        elif fault == "hang":
            self._wait_until_it_goes()
        elif fault == "reset":
            self._reset()
        else:
            self._ask(key, data, fault)

    def _ask(self, key: Key, data: bytes, fault: str | None) -> None:
        """Pass a request on to the server, and its reply back as far as the fault lets it."""
        server = http.client.HTTPConnection("127.0.0.1", self.owner.server_port, timeout=60)
        try:
            server.request("POST", self.path, data, {"Content-Type": "application/json"})
            response = server.getresponse()
            kind = response.headers["Content-Type"]
            as_it_comes = response.status == 200 and fault is None and kind.startswith("text/event-stream")
            reply = self._pass_pieces_on(response) if as_it_comes else response.read()
        except (http.client.HTTPException, ConnectionError):
            self.owner.count_away()
            self._reset()
            return
        finally:
            server.close()
        if response.status == 200:
            self.owner.count_written(key)
        if fault == "lost":
            self._reset()
        elif fault is not None:
            self._send_part(reply, kind, stall=fault == "stall")
        elif not as_it_comes:
            self._send(response.status, reply, {"Content-Type": kind})
        if response.status == 200 and fault is None:
            self.owner.count_passed_on(key, reply)

    def _pass_pieces_on(self, response: http.client.HTTPResponse) -> bytes:
        self.send_response(200)
        self.send_header("Content-Type", response.headers["Content-Type"])
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        pieces = []
        while piece := response.read1(65536):
            pieces.append(piece)
            self._write(b"%x\r\n%s\r\n" % (len(piece), piece))
        self._write(b"0\r\n\r\n")
        return b"".join(pieces)

    def _write(self, data: bytes) -> None:
        try:
            self.wfile.write(data)
        except OSError as error:
            raise _ClientGoneError from error

    def _send_part(self, reply: bytes, kind: str, *, stall: bool) -> None:
        end = len(reply) // 2
        self.send_response(200)
        self.send_header("Content-Type", kind)
        if kind.startswith("text/event-stream"):
            self.send_header("Connection", "close")  # so that a stream that is cut ends like one that is over,
            end = len(reply) - len(reply.rstrip().rpartition(b"\n\n")[2]) - 2  # behind a whole piece, short of the last
        else:
            self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply[:end])
        self.wfile.flush()
        if stall:
            self._wait_until_it_goes()
        self.close_connection = True

    def _send(self, code: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)
        self.wfile.flush()

    def _wait_until_it_goes(self) -> None:
        end = time.monotonic() + LONGEST_HANG_S
        while time.monotonic() < end:
            if select.select([self.connection], [], [], 0.1)[0]:  # it sends nothing more, so this is its end
                break
        self.close_connection = True

    def _reset(self) -> None:
        reset(self.connection)
        self.close_connection = True
