"""A server on 127.0.0.1 that speaks chat completions and fails as it is told, counting by item what it sent whole."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import struct
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_ITEM = re.compile(r"item-\d+")


class FlakyServer:
    """Answers ``Final answer: <item's own>``; ``faults[item]`` is what happens to its first requests, in turn."""

    def __init__(self, faults: dict[str, list[str]] | None = None, *, delay_s: float = 0.0) -> None:
        self.faults = {item: list(names) for item, names in (faults or {}).items()}
        self.delay_s = delay_s
        self.seen: Counter[str] = Counter()
        self.whole: Counter[str] = Counter()  # replies written to their end
        self.times: dict[str, list[float]] = {}
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.message: dict[str, Any] = {}  # instead of the usual one
        self.fields: dict[str, Any] = {}  # further fields of a reply
        self.ensure_ascii = True
        self.said: str | None = None  # of an error; otherwise it quotes the key
        self.location = ""  # of "307 to"
        self.most_at_once = self._at_once = 0
        self._lock = threading.Lock()
        self._port = 0

    def __enter__(self) -> FlakyServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}/v1"

    def start(self) -> None:
        flaky = self

        class Handler(_Handler):
            owner = flaky

        self._open: set[socket.socket] = set()
        self._http = ThreadingHTTPServer(("127.0.0.1", self._port), Handler)
        self._http.daemon_threads, self._http.block_on_close = True, False
        self._port = self._http.server_address[1]
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        """Go away as a killed process does: nobody listens, and what was open is reset."""
        self._http.shutdown()
        self._http.server_close()
        for connection in list(self._open):
            reset(connection)

    def count(self, change: int) -> None:
        with self._lock:
            self._at_once += change
            self.most_at_once = max(self.most_at_once, self._at_once)

    def reply(self, item: str) -> dict[str, Any]:
        text = f"<think>\nhm about {item}\n</think>\n\nFinal answer: {item}"
        return {
            "model": "served-model",
            "choices": [{"finish_reason": "stop", "message": self.message or {"role": "assistant", "content": text}}],
            "usage": {"prompt_tokens": 10, "completion_tokens": 30, "total_tokens": 40},
            **self.fields,
        }


def reset(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RDWR)
        connection.close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: FlakyServer

    def setup(self) -> None:
        super().setup()
        self.owner._open.add(self.connection)

    def finish(self) -> None:
        self.owner._open.discard(self.connection)
        with contextlib.suppress(OSError, ValueError):
            super().finish()

    def log_message(self, *_: Any) -> None:
        pass

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (OSError, ValueError):  # the other side has gone
            self.close_connection = True

    def do_POST(self) -> None:
        owner = self.owner
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        found = _ITEM.search(body["messages"][-1]["content"])
        assert found is not None and self.path == "/v1/chat/completions"
        item = found[0]
        with owner._lock:
            owner.seen[item] += 1
            owner.times.setdefault(item, []).append(time.monotonic())
            owner.bodies.append(body)
            owner.keys.add(self.headers["Authorization"])
            faults = owner.faults.get(item)
            fault = faults.pop(0) if faults else None
        owner.count(+1)
        try:
            time.sleep(owner.delay_s)
            self._answer(item, fault, body.get("stream", False))
        finally:
            owner.count(-1)

    def _answer(self, item: str, fault: str | None, stream: bool) -> None:
        if fault is not None and fault[:1].isdigit():
            code, _, wish = fault.partition(" after ")
            quoted = self.owner.said or f"no: {self.headers['Authorization']}"
            headers = (
                {"Location": self.owner.location} if code.endswith(" to") else {"Retry-After": wish} if wish else {}
            )
            code = code.removesuffix(" to")
            self._send(int(code), json.dumps({"error": {"message": quoted, "code": code}}).encode(), headers)
        elif fault == "drip":
            self._drip()
        elif fault == "timeout":
            time.sleep(1.6)
            self.close_connection = True
        elif fault == "reset":
            reset(self.connection)
            self.close_connection = True
        elif fault == "error in body":
            self._send(200, b'{"error": {"message": "overloaded"}}', {})
        elif stream:
            self._stream(item, cut=fault == "truncated")
        else:
            data = json.dumps(self.owner.reply(item), ensure_ascii=self.owner.ensure_ascii).encode()
            self._send(200, data, {}, sent=len(data) // 2 if fault == "truncated" else None)
            if fault is None:
                self.owner.whole[item] += 1

    def _drip(self) -> None:
        """Send signs of life, as DeepSeek does while a request waits for its turn, and nothing else."""
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Connection", "close")
        self.end_headers()
        for _ in range(30):
            self.wfile.write(b"\n")
            self.wfile.flush()
            time.sleep(0.05)
        self.close_connection = True

    def _send(self, code: int, data: bytes, headers: dict[str, str], sent: int | None = None) -> None:
        self.send_response(code)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data[:sent])
        self.wfile.flush()
        if sent is not None:
            self.close_connection = True

    def _stream(self, item: str, *, cut: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")  # so a stream that is cut ends like one that is over
        self.end_headers()
        reply = self.owner.reply(item)
        text = reply["choices"][0]["message"]["content"]
        pieces = [text[start : start + 7] for start in range(0, len(text), 7)]
        for piece in pieces[: len(pieces) // 2] if cut else pieces:
            self._event({"model": "served-model", "choices": [{"delta": {"content": piece}, "finish_reason": None}]})
        if not cut:
            self._event({"choices": [{"delta": {}, "finish_reason": "stop"}]})
            self._event({"choices": [], "usage": reply["usage"]})
            self.wfile.write(b": that was all\n\ndata: [DONE]\n\n")
            self.owner.whole[item] += 1
        self.wfile.flush()
        self.close_connection = True

    def _event(self, value: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(value, ensure_ascii=self.owner.ensure_ascii).encode() + b"\n\n")
