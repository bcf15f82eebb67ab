"""A server in this process: a tiny tuned model, asked over a real socket."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import uvicorn
from openai import OpenAI

from medcot.serving import Service, Wish, open_service


@dataclass(frozen=True)
class Running:
    """A service that listens."""

    service: Service
    url: str

    def client(self, key: str = "none", **settings: float) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, **settings)

    def wait_until_idle(self, seconds: float = 10) -> None:
        scheduler, end = self.service.scheduler, time.monotonic() + seconds
        while (scheduler.num_running or scheduler.num_waiting) and time.monotonic() < end:
            time.sleep(0.02)
        assert scheduler.num_running == scheduler.num_waiting == 0


@contextmanager
def running(wish: Wish) -> Iterator[Running]:
    service = open_service(wish)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(128)
    config = uvicorn.Config(service.app, log_level="warning", lifespan="off", timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    service.scheduler.start()
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield Running(service, f"http://127.0.0.1:{listener.getsockname()[1]}")
    finally:
        server.should_exit = True
        thread.join(10)
        service.scheduler.drain()
        assert service.scheduler.join(10), "the scheduler ends"
