"""A real OpenAI-compatible server, and all that can go wrong on the way to it: nothing is lost, nothing counted twice.

``FlakyServer`` fails as we think that servers fail; this one is Hugging Face's, with a model of two layers behind it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import ask_server
import pytest
from ask_server import SEEDS, ask, make_questions
from fault_proxy import FAULTS, FaultProxy, draw_faults, read_text
from real_server import RealServer, make_served

for package in ("fastapi", "uvicorn", "openai"):
    pytest.importorskip(package, reason="transformers serve needs it; the test extra has it")

HOW = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])


@pytest.fixture(scope="module")
def server(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    folder = tmp_path_factory.mktemp("served")
    with RealServer(make_served(tiny_folder, folder / "model"), folder / "log.txt") as running:
        yield running


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_account(path: Path, proxy: FaultProxy, num_items: int) -> None:
    """Every request has one line, and what stands in it is what the server wrote for that question and seed."""
    requests = make_questions(num_items)
    lines = read_lines(path)
    assert len({line["key"] for line in lines}) == len(lines) == len(requests)
    places = {(line["item_id"], line["seed"]): line for line in lines}
    assert places.keys() == {(request.item_id, request.seed) for request in requests}
    for request in requests:
        line = places[request.item_id, request.seed]
        passed_on = [read_text(data) for data in proxy.passed_on[request.question, request.seed]]
        assert line["error"] is None
        assert (line["text"], line["num_think_tokens"] + line["num_answer_tokens"]) in passed_on
        assert line["closed"] == ("</think>" in line["text"])


@HOW
def test_one_fault_of_each_kind(server: RealServer, stream: bool, tmp_path: Path) -> None:
    requests = make_questions(6)
    keys = [(request.question, request.seed) for request in requests]
    faults = {key: [fault] for key, fault in zip(keys, FAULTS, strict=False)}
    with FaultProxy(server.port, faults) as proxy:
        path = tmp_path / "answers.jsonl"
        answered, took = ask(proxy.url, str(server.model), path, 6, stream=stream, timeout_s=1.5)
        assert took["newly_asked"] == 12 and took["num_failed"] == 0
        check_account(path, proxy, 6)
        assert proxy.injected == Counter(FAULTS)
        assert all(len(replies) == 1 for replies in proxy.passed_on.values())
        assert [answer.num_attempts for answer in answered.answers] == [2] * len(FAULTS) + [1] * (12 - len(FAULTS))
        # The server wrote three replies that never arrived whole; they are in no count of ours.
        assert proxy.written.total() == 12 + 3
        assert took["attempts"] == proxy.seen.total() == 12 + len(FAULTS)
        tokens = [read_text(data)[1] for replies in proxy.passed_on.values() for data in replies]
        assert took["written_tokens"] == sum(tokens)
        assert took["cost"] == pytest.approx((took["prompt_tokens"] + 2 * sum(tokens)) / 1e6)
        before = path.read_bytes(), proxy.seen.total()
        again, took = ask(proxy.url, str(server.model), path, 6, stream=not stream)
        assert (took["newly_asked"], again.answers) == (0, answered.answers)
        assert (path.read_bytes(), proxy.seen.total()) == before


@pytest.mark.slow
@HOW
def test_a_full_run_with_a_restart(server: RealServer, stream: bool, tmp_path: Path) -> None:
    num_items, path = 64, tmp_path / "answers.jsonl"
    keys = [(request.question, request.seed) for request in make_questions(num_items)]
    faults = draw_faults(keys, seed=11 + stream)
    starts = server.num_starts
    with FaultProxy(server.port, faults, at=60, then=server.restart) as proxy:
        answered, took = ask(proxy.url, str(server.model), path, num_items, stream=stream)
        assert took["newly_asked"] == len(keys) and took["num_failed"] == 0
        check_account(path, proxy, num_items)
        assert server.num_starts == starts + 1 and proxy.injected["server away"] > 0
        assert {fault: proxy.injected[fault] for fault in FAULTS} == Counter(chain(*faults.values()))
        assert not any(proxy.faults.values())
        assert all(len(replies) == 1 for replies in proxy.passed_on.values())
        for request, answer in zip(make_questions(num_items), answered.answers, strict=True):
            assert answer.num_attempts >= proxy.seen[request.question, request.seed]
        seen = proxy.seen.total()
        assert ask(proxy.url, str(server.model), path, num_items, stream=stream)[1]["newly_asked"] == 0
        assert proxy.seen.total() == seen
        print(f"\n{dict(proxy.injected)}, written {proxy.written.total()}, kept {len(answered.answers)}; {took}")


@pytest.mark.slow
def test_a_server_that_repeats_the_prompt(tiny_folder: Path, tmp_path: Path) -> None:
    """Of models called qwen2 whose frame is not Qwen's, as DeepSeek-R1-Distill-Qwen's is not."""
    folder = make_served(tiny_folder, tmp_path / "model", family="qwen2")
    with RealServer(folder, tmp_path / "log.txt") as server, FaultProxy(server.port, {}) as proxy:
        for stream in (False, True):
            path, num_repeated = tmp_path / f"{stream}.jsonl", 0
            answered, _ = ask(proxy.url, str(folder), path, 8, stream=stream)
            for request, answer in zip(make_questions(8), answered.answers, strict=True):
                (reply,) = proxy.passed_on.pop((request.question, request.seed))
                sent, _ = read_text(reply)
                num_repeated += request.question in sent
                written = answer.think + answer.answer
                assert answer.answer in sent, (answer, sent)
                assert not any(mark in written + answer.text for mark in (request.question, "<|", "</s>"))
            assert num_repeated > 0, "the server has learned better: this may go from replies.py"
            assert any(answer.closed for answer in answered.answers)
            assert not all(answer.closed for answer in answered.answers)


@pytest.mark.slow
@HOW
def test_a_run_that_is_killed_goes_on(server: RealServer, stream: bool, tmp_path: Path) -> None:
    num_items, path = 64, tmp_path / "answers.jsonl"
    keys = [(request.question, request.seed) for request in make_questions(num_items)]
    with FaultProxy(server.port, draw_faults(keys, seed=5 + stream, share=0.3)) as proxy:
        how = "stream" if stream else "whole"
        command = [sys.executable, ask_server.__file__, proxy.url, str(server.model), str(path), str(num_items), how]
        for least in (25, 70):
            child = subprocess.Popen(command, stdout=subprocess.PIPE)
            while not path.exists() or path.read_bytes().count(b"\n") < least:
                assert child.poll() is None
                time.sleep(0.01)
            os.kill(child.pid, signal.SIGKILL)
            child.wait()
        # A line that was being written may lack its end: then it is no answer yet.
        num_kept = sum(line.endswith(b"}") for line in path.read_bytes().split(b"\n") if line)
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
        took = json.loads(done.stdout)
        assert took["newly_asked"] == len(keys) - num_kept and took["num_failed"] == 0
        check_account(path, proxy, num_items)
        # What was on its way at a kill is the only thing paid for twice: at most six requests, two kills.
        assert sum(len(replies) - 1 for replies in proxy.passed_on.values()) <= 2 * 6
        assert len({line["seed"] for line in read_lines(path)}) == len(SEEDS)
        print(f"\n{dict(proxy.injected)}, written {proxy.written.total()}, kept {num_kept} at the kill; {took}")
