"""Listening, and ending well: uvicorn's server, which drains before it stops.

At SIGTERM or Ctrl-C no more requests are taken (503), what runs is written to its end within some seconds, and the
process ends as a program that did its work, with exit code 0. uvicorn by itself would stop listening at once, which
whoever is in front reads as a crash, and would then let the signal kill the process. A second signal ends it at once.
"""

from __future__ import annotations

import ipaddress
import logging
import socket
import time
from typing import TYPE_CHECKING, Protocol

import uvicorn

from medcot.errors import OutputError

if TYPE_CHECKING:
    from types import FrameType

    from starlette.types import ASGIApp

CUT_S = 5.0  # what answers that were cut are given to reach their clients
_KEEP_ALIVE_S = 15
_HEADER_BYTES = 64 * 1024


class Drains(Protocol):
    """What writes the answers."""

    @property
    def is_alive(self) -> bool:
        """Whether jobs that were taken are being written."""

    def drain(self) -> None:
        """Take no more jobs; those that were taken are written to their ends."""

    def cancel_all(self) -> None:
        """End everything at its next token."""


class Server(uvicorn.Server):
    """A server that drains.

    Args:
        app: the application.
        writer: what is drained.
        drain_seconds: what running answers are given.
    """

    def __init__(self, app: ASGIApp, writer: Drains, drain_seconds: float) -> None:
        config = uvicorn.Config(
            app,
            log_level=logging.WARNING,
            access_log=False,
            server_header=False,
            lifespan="off",
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=int(CUT_S),
            h11_max_incomplete_event_size=_HEADER_BYTES,
        )
        super().__init__(config)
        self._writer, self._drain_seconds = writer, drain_seconds
        self._ends_s: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """At the first signal drain, at the second end; ``on_tick`` sees to it, outside of the signal's handler."""
        again = self._ends_s is not None
        self._ends_s = time.monotonic() + (0 if again else self._drain_seconds)

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether to end."""
        if self._ends_s is not None and not self.should_exit:
            self._writer.drain()
            if not self._writer.is_alive or time.monotonic() >= self._ends_s:
                self._writer.cancel_all()
                self.should_exit = True
        return await super().on_tick(counter)


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """Take an address.

    Raises:
        OutputError: it cannot be had.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, _, _, address = found[0]
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise OutputError(
            f"{host}:{port} cannot be listened at: {error.strerror}",
            "A server needs an address of this machine and a port that is free",
            "Choose another with --port; --port 0 takes a free one",
        ) from None
    return listener


def address_of(listener: socket.socket) -> str:
    """Return where a listener is found, without a path."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
