"""Answers on disk: what a key is made of, what survives a kill, and two processes on one file."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from medcot.errors import OutputError
from medcot.evaluate.backends import Answer, Counts, Ending, Limits, OnAnswer, Request, answer_failed
from medcot.evaluate.store import AnswerStore, Subject, answer_all, compute_key
from medcot.generate import Sampling
from medcot.records import Finish

SUBJECT = Subject("model@1", "ad", "ta")
REQUEST = Request("q-1", "Which?", Sampling(0.6, 0.95), 3, Limits(100, 20))


def answered(request: Request, text: str = "so") -> Answer:
    return Answer(
        request.item_id, request.seed, text=text, answer="Final answer: B\u2028é", closed=True, finish=Finish.EOS,
        counts=Counts.EXACT, log_probs={"A": -1.5},
    )  # fmt: skip


class Echo:
    """Answers at once; some items fail."""

    def __init__(self, *failing: str) -> None:
        self.failing, self.asked = failing, list[str]()

    def prompt_of(self, request: Request) -> str:
        return f"<frame>{request.question}"

    def answer(self, requests: Sequence[Request], on_answer: OnAnswer) -> None:
        for request in reversed(requests):
            self.asked.append(request.item_id)
            failed = request.item_id in self.failing
            on_answer(answer_failed(request, "no") if failed else answered(request, f"{request.item_id}!"))


def make_requests(count: int) -> list[Request]:
    return [replace(REQUEST, item_id=f"q-{i}") for i in range(count)]


def test_a_key_changes_with_everything_an_answer_depends_on() -> None:
    other = [
        (replace(SUBJECT, model="model@2"), REQUEST, "p"),
        (replace(SUBJECT, adapter_sha256=None), REQUEST, "p"),
        (replace(SUBJECT, task_sha256="tb"), REQUEST, "p"),
        (SUBJECT, replace(REQUEST, item_id="q-2"), "p"),
        (SUBJECT, REQUEST, "p "),
        (SUBJECT, replace(REQUEST, sampling=Sampling(0.7, 0.95)), "p"),
        (SUBJECT, replace(REQUEST, sampling=Sampling(0.6, 0.9)), "p"),
        (SUBJECT, replace(REQUEST, seed=4), "p"),
        (SUBJECT, replace(REQUEST, limits=Limits(101, 20)), "p"),
        (SUBJECT, replace(REQUEST, limits=Limits(0, 121)), "p"),
        (SUBJECT, replace(REQUEST, limits=Limits(100, 20, Ending.FORCED)), "p"),
        (SUBJECT, replace(REQUEST, choices=("A", "B")), "p"),
    ]
    keys = {compute_key(*parts) for parts in other} | {compute_key(SUBJECT, REQUEST, "p")}
    assert len(keys) == len(other) + 1
    shared = replace(REQUEST, limits=Limits(90, 30))  # one limit for both, however it is divided
    assert compute_key(SUBJECT, shared, "p") == compute_key(SUBJECT, REQUEST, "p")
    assert compute_key(SUBJECT, REQUEST, "p") == compute_key(replace(SUBJECT), replace(REQUEST), "p")


def test_an_answer_comes_back_as_it_was(tmp_path: Path) -> None:
    with AnswerStore(tmp_path / "deep" / "a.jsonl") as store:
        assert store.add("k", answered(REQUEST)) and not store.add("k", answered(REQUEST, "another"))
    with AnswerStore(tmp_path / "deep" / "a.jsonl") as store:
        assert store.get("k") == answered(REQUEST) and store.get("l") is None
        assert (len(store), store.num_torn) == (1, 0)


def test_only_what_is_missing_is_asked_and_what_failed_is_asked_again(tmp_path: Path) -> None:
    first, second, requests = Echo("q-2"), Echo(), make_requests(5)
    with AnswerStore(tmp_path / "a.jsonl") as store:
        got = answer_all(first, requests[:4], store, SUBJECT)
        assert got.num_asked == 4 and [a.error for a in got.answers] == [None, None, "no", None]
    with AnswerStore(tmp_path / "a.jsonl") as store:
        got = answer_all(second, [*requests, requests[0]], store, SUBJECT)
        assert second.asked == ["q-4", "q-2"] and got.num_asked == 2
        assert [a.text for a in got.answers] == ["q-0!", "q-1!", "q-2!", "q-3!", "q-4!", "q-0!"]
        assert answer_all(Echo(), requests, store, replace(SUBJECT, adapter_sha256=None)).num_asked == 5


def test_a_torn_line_is_passed_over_wherever_it_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with AnswerStore(path) as store:
        store.add("k1", answered(REQUEST))
        store.add("k2", answered(REQUEST, "second"))
    whole = path.read_bytes()
    start = whole.index(b"\n") + 1
    for stop in (*range(start, len(whole) - 9, 17), *range(len(whole) - 9, len(whole))):
        path.write_bytes(whole[:stop])
        with AnswerStore(path) as store:
            assert store.get("k1") is not None and store.get("k2") is None
            store.add("k3", answered(REQUEST, "third"))
        with AnswerStore(path) as store:
            assert {"k1", "k3"} <= {key for key in ("k1", "k2", "k3") if store.get(key)}
            assert store.num_torn == (start < stop < len(whole) - 1)
            assert (store.get("k2") is not None) == (stop == len(whole) - 1)  # only its line break was missing


CHILD = """
import sys, time
from types import SimpleNamespace
from pathlib import Path
from medcot.evaluate.backends import Answer, Limits, Request
from medcot.evaluate.store import AnswerStore, Subject, answer_all
from medcot.records import Finish

class Slow:
    def prompt_of(self, request): return request.question
    def answer(self, requests, on_answer):
        for request in requests:
            print(request.item_id, flush=True)
            time.sleep(float(sys.argv[3]))
            on_answer(Answer(request.item_id, 0, text=sys.argv[2] * 5000, closed=True, finish=Finish.EOS))

sampling = SimpleNamespace(temperature=0.6, top_p=0.95)
requests = [Request(f"q-{i}", "?", sampling, 0, Limits(10, 5)) for i in range(int(sys.argv[4]))]
if sys.argv[2] == "b":
    requests.reverse()
assert "torch" not in sys.modules
with AnswerStore(Path(sys.argv[1])) as store:
    got = answer_all(Slow(), requests, store, Subject("m", None, "t"))
    assert [a.item_id for a in got.answers] == [r.item_id for r in requests]
print("asked", got.num_asked, flush=True)
"""


def start(path: Path, letter: str, pause_s: float, count: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(path), letter, str(pause_s), str(count)], stdout=subprocess.PIPE, text=True
    )


def test_a_killed_evaluation_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    child = start(path, "a", 0.02, 60)
    assert child.stdout is not None
    while (line := child.stdout.readline()).strip() != "q-20":
        assert line, "the child ended early"
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
    kept = len([line for line in path.read_bytes().split(b"\n") if line.endswith(b"}")])
    assert 20 <= kept < 60
    again = start(path, "a", 0, 60)
    out, _ = again.communicate(timeout=30)
    assert again.returncode == 0 and f"asked {60 - kept}" in out
    items = [json.loads(line)["item_id"] for line in path.read_text().splitlines()]
    assert sorted(items) == sorted({f"q-{i}" for i in range(60)})


def test_two_processes_share_a_store(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    children = [start(path, letter, 0.001, 150) for letter in "ab"]
    for child in children:
        child.communicate(timeout=60)
        assert child.returncode == 0
    lines = [json.loads(line) for line in path.read_text().splitlines()]  # each line is whole
    assert sorted(line["item_id"] for line in lines) == sorted({f"q-{i}" for i in range(150)})
    assert {line["text"][0] for line in lines} == {"a", "b"}, "both wrote"


def test_a_place_that_takes_nothing_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"a\.jsonl' cannot be used"):
        AnswerStore(tmp_path / "file" / "a.jsonl")


def test_an_answer_costs_little_to_keep(tmp_path: Path) -> None:
    with AnswerStore(tmp_path / "a.jsonl") as store:
        begin = time.monotonic()
        for number in range(300):
            store.add(str(number), answered(REQUEST, "x" * 8000))
        assert (time.monotonic() - begin) / 300 < 0.01
