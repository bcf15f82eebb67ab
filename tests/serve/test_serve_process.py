"""``medcot serve`` as a process of its own: what it says, how it is asked, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from medcot.cli import app
from tiny_runs import run_job

ASKED = [{"role": "user", "content": "A patient drinks 3 cups and then 2 more. How many?"}]
START_S = 90.0


@pytest.fixture(scope="module")
def run_folder(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("served") / "tuned"
    run_job(recipe_file, out, "train.max_steps=4")
    return out


@contextmanager
def process(folder: Path, tmp_path: Path, *options: str, **environment: str) -> Iterator[tuple[Any, str, Path]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path / "serve.log"
    command = [sys.executable, "-m", "medcot", "serve", str(folder), "--port", str(port), "--context", "512", *options]
    with log.open("wb") as out:
        served = subprocess.Popen(
            command, stdout=out, stderr=out, env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", **environment}
        )
    url, end = f"http://127.0.0.1:{port}", time.monotonic() + START_S
    try:
        while True:
            assert served.poll() is None and time.monotonic() < end, log.read_text()
            try:
                httpx.get(f"{url}/ready", timeout=1)
                break
            except httpx.HTTPError:
                time.sleep(0.1)
        yield served, url, log
    finally:
        if served.poll() is None:
            served.kill()
        served.wait(10)


def test_it_says_where_it_is_and_drains_at_sigterm(run_folder: Path, tmp_path: Path) -> None:
    with process(run_folder, tmp_path) as (served, url, log):
        said = log.read_text()
        assert f"{url}/v1 serves tuned, base" in said and f"curl -N {url}/v1/chat/completions" in said
        assert "not for diagnosis" in said
        lines: list[str] = []
        under_way = threading.Event()

        def read() -> None:
            # Eight answers of nearly any tokens: one of them goes on while the server is told to stop.
            body = {"model": "base", "messages": ASKED, "max_tokens": 480, "n": 8, "stream": True}
            body |= {"temperature": 2, "top_p": 1}
            with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as reply:
                for line in reply.iter_lines():
                    lines.append(line)
                    if len(lines) > 8:
                        under_way.set()

        reader = threading.Thread(target=read)
        reader.start()
        assert under_way.wait(30)
        served.send_signal(signal.SIGTERM)
        statuses = set()
        while reader.is_alive() and served.poll() is None:
            try:
                statuses.add(httpx.post(f"{url}/v1/chat/completions", json={"messages": ASKED}, timeout=5).status_code)
            except httpx.HTTPError:  # it has stopped listening
                break
        reader.join(30)
        assert served.wait(30) == 0
    events = [line for line in lines if line]
    assert events[-1] == "data: [DONE]", "an answer under way is written to its end"
    assert json.loads(events[-2].removeprefix("data: "))["choices"][0]["finish_reason"] in ("stop", "length")
    assert statuses <= {200, 503}, "200 only before the signal was seen"
    assert "stopped" in log.read_text() and "Traceback" not in log.read_text()


@pytest.mark.slow
def test_who_has_no_time_left_is_cut_and_told(run_folder: Path, tmp_path: Path) -> None:
    with process(run_folder, tmp_path, "--drain-seconds", "0", "--slots", "1") as (served, url, _):
        replies: list[int] = []

        def post() -> None:
            body = {"messages": ASKED, "max_tokens": 480, "temperature": 2, "top_p": 1, "n": 4}
            replies.append(httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).status_code)

        askers = [threading.Thread(target=post) for _ in range(1)]
        for asker in askers:
            asker.start()
        while "medcot_running 1.0" not in httpx.get(f"{url}/metrics").text:
            time.sleep(0.02)
        served.send_signal(signal.SIGTERM)
        assert served.wait(20) == 0
        for asker in askers:
            asker.join(10)
        assert replies == [200] and not any(asker.is_alive() for asker in askers)


@pytest.mark.slow
def test_a_key_is_asked_for_and_never_shown(run_folder: Path, tmp_path: Path) -> None:
    key = "a-key-that-nobody-guesses"
    with process(run_folder, tmp_path, "--host", "0.0.0.0", "--api-key-env", "MY_KEY", MY_KEY=key) as (
        served,
        url,
        log,
    ):
        assert httpx.get(f"{url}/v1/models").status_code == 401
        assert httpx.get(f"{url}/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == 200
        served.send_signal(signal.SIGINT)
        assert served.wait(20) == 0
        assert key not in log.read_text()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--host", "0.0.0.0"], "without an API key"),
        (["--api-key-env", "NOT_THERE"], "no such secret"),
        (["--style", "short"], "--style with a run"),
        (["--engine", "fast"], "--engine fast"),
        (["--engine", "vllm"], "vllm is not installed"),
        (["--adapter", "base=here"], "base and tuned are taken"),
        (["--adapter", "x=nowhere"], "'nowhere' is no adapter"),
        (["--max-tokens", "9000"], "share the context"),
        (["--context", "100000"], "made for at most"),
    ],
)
def test_a_wrong_call_is_told_what_is_wrong(
    run_folder: Path, options: list[str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MEDCOT_API_KEY", raising=False)
    result = CliRunner().invoke(app, ["serve", str(run_folder), "--port", "0", *options])
    assert result.exit_code == 2 and words in " ".join(result.output.split()), result.output


def test_a_port_that_somebody_has_is_missed_before_loading(run_folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        result = CliRunner().invoke(app, ["serve", str(run_folder), "--port", str(taken.getsockname()[1])])
    assert result.exit_code == 2 and "cannot be listened at" in result.output and "load model" not in result.output
