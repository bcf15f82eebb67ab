"""An OpenAI-compatible server as a back end: whatever the server does, each item ends in exactly one answer."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest

from flaky_server import FlakyServer
from medcot.errors import ModelError, NetworkError
from medcot.evaluate import endpoint
from medcot.evaluate.backends import Answer, Counts, Ending, Limits, Request
from medcot.evaluate.endpoint import Dialect, Endpoint, EndpointBackend, _read_retry_after, is_this_machine
from medcot.evaluate.pace import Pace
from medcot.evaluate.replies import Broken, Price, Refused, Reply, Thinks, build_answer, read_body, read_stream
from medcot.evaluate.store import AnswerStore, Subject, answer_all
from medcot.generate import Sampling
from medcot.records import Finish
from medcot.secrets import Secret

R1 = Sampling(0.6, 0.95)
LIMITS = Limits(1000, 100)
KEY = "sk-this-must-never-be-seen"


def make_requests(count: int, limits: Limits = LIMITS) -> list[Request]:
    return [Request(f"item-{i}", f"What about item-{i}?", R1, 7, limits) for i in range(count)]


def make_backend(server: FlakyServer, **settings: Any) -> EndpointBackend:
    return EndpointBackend(Endpoint(server.url, "a-model", **{"pause_s": 0.01, "timeout_s": 1.0, **settings}))


def ask(backend: EndpointBackend, requests: list[Request]) -> dict[str, Answer]:
    answers: list[Answer] = []
    backend.answer(requests, answers.append)
    assert Counter(answer.item_id for answer in answers) == Counter(request.item_id for request in requests)
    return {answer.item_id: answer for answer in answers}


FAULTS = ("429", "429 after 0.05", "500", "503 after 0.02", "timeout", "reset", "truncated", "error in body")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_no_item_is_lost_and_none_counted_twice(stream: bool, tmp_path: Path) -> None:
    rng, requests = random.Random(1), make_requests(48)
    faults = {f"item-{i}": rng.choices(FAULTS, k=rng.choice((0, 1, 1, 2, 3))) for i in range(48)}
    assert {fault for names in faults.values() for fault in names} == set(FAULTS)
    subject = Subject("a-model", None, "t")
    with FlakyServer(faults) as server, AnswerStore(tmp_path / "answers.jsonl") as store:
        backend = make_backend(server, stream=stream, concurrency=16)
        answered = answer_all(backend, requests, store, subject)
        assert [answer.item_id for answer in answered.answers] == [request.item_id for request in requests]
        for answer in answered.answers:
            assert (answer.error, answer.answer) == (None, f"Final answer: {answer.item_id}")
            # A kept connection that the server has closed meanwhile costs an attempt that it never sees.
            assert answer.num_attempts >= server.seen[answer.item_id] == 1 + len(faults[answer.item_id])
        assert server.whole == {request.item_id: 1 for request in requests}
        assert answer_all(backend, requests, store, subject).num_asked == 0
        assert server.whole.total() == 48  # nothing was paid for twice
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert Counter(line["item_id"] for line in lines) == server.whole


def test_a_server_that_is_restarted_in_the_middle(tmp_path: Path) -> None:
    requests = make_requests(60)
    with FlakyServer(delay_s=0.02) as server, AnswerStore(tmp_path / "answers.jsonl") as store:

        def restart() -> None:
            while server.whole.total() < 20:
                time.sleep(0.005)
            server.stop()
            time.sleep(0.3)
            server.start()

        thread = threading.Thread(target=restart)
        thread.start()
        answered = answer_all(make_backend(server, pause_s=0.05), requests, store, Subject("m", None, "t"))
        thread.join()
        assert [a.error for a in answered.answers] == [None] * 60
        assert any(a.num_attempts > 1 for a in answered.answers), "the restart met nobody"
        assert set(server.whole) == {request.item_id for request in requests}
    lines = [json.loads(line)["item_id"] for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert sorted(lines) == sorted(request.item_id for request in requests)


def test_retry_after_is_obeyed_by_all() -> None:
    with FlakyServer({"item-0": ["429 after 0.4"]}) as server:
        ask(make_backend(server, concurrency=1), make_requests(2))
        first, again = server.times["item-0"]
        assert again - first >= 0.4
    with FlakyServer({"item-0": ["429 after 0.4"]}, delay_s=0.05) as server:
        ask(make_backend(server, concurrency=2), make_requests(6))
        first = server.times["item-0"][0]
        others = [t - first for item, times in server.times.items() if item != "item-0" for t in times]
        assert not [t for t in others if 0.15 < t < 0.4], "others were sent while the account was limited"


@pytest.mark.parametrize(
    ("value", "wanted"), [(None, None), ("3", 3.0), ("-1", 0.0), ("soon", None), ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0)]
)
def test_retry_after_in_both_forms(value: str | None, wanted: float | None) -> None:
    assert _read_retry_after(value) == wanted
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    assert _read_retry_after(later) == pytest.approx(30, abs=1.5)


def test_what_concerns_one_question_fails_alone() -> None:
    faults = {"item-1": ["400"], "item-2": ["500"] * 3, "item-3": ["422"]}
    with FlakyServer(faults) as server:
        answers = ask(make_backend(server, max_attempts=3), make_requests(5))
    assert {item for item, answer in answers.items() if answer.error is None} == {"item-0", "item-4"}
    assert "status 400" in (answers["item-1"].error or "") and answers["item-1"].num_attempts == 1
    assert "3 times" in (answers["item-2"].error or "") and server.seen["item-2"] == 3
    assert answers["item-2"].completion is None


@pytest.mark.parametrize(("code", "kind"), [("401", NetworkError), ("402", NetworkError), ("404", ModelError)])
def test_what_concerns_all_stops_at_once(code: str, kind: type[Exception]) -> None:
    with FlakyServer({f"item-{i}": [code] * 9 for i in range(50)}) as server:
        backend = make_backend(server, api_key=Secret(KEY, "a test"), concurrency=2)
        with pytest.raises(kind) as caught:
            backend.answer(make_requests(50), lambda _: None)
        assert server.seen.total() <= 4
        assert KEY not in str(caught.value) and "•••" in str(caught.value)


def test_a_server_that_stays_away_ends_the_evaluation() -> None:
    with FlakyServer({f"item-{i}": ["503"] * 9 for i in range(99)}) as server:
        with pytest.raises(NetworkError, match="in a row failed"):
            make_backend(server, max_attempts=2, concurrency=2).answer(make_requests(99), lambda _: None)
        assert server.seen.total() <= 20


def test_the_deadline_leaves_no_item_without_an_answer() -> None:
    with FlakyServer(delay_s=0.1) as server:
        start = time.monotonic()
        answers = ask(make_backend(server, deadline_s=0.35, concurrency=2), make_requests(40))
        assert time.monotonic() - start < 1.5
    done = [answer for answer in answers.values() if answer.error is None]
    assert 2 <= len(done) <= 8
    assert all("no time is left" in (a.error or "") for a in answers.values() if a not in done)


def test_the_key_is_sent_and_seen_nowhere(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with FlakyServer({"item-0": ["400"], "item-1": ["500"]}) as server:
        backend = make_backend(server, api_key=Secret(KEY, "a test"))
        answers = ask(backend, make_requests(3))
        assert server.keys == {f"Bearer {KEY}"}
    assert "•••" in (answers["item-0"].error or "")  # the server quoted it
    for text in (repr(backend.endpoint), caplog.text, repr(answers), backend.prompt_of(make_requests(1)[0])):
        assert KEY not in text


def test_what_is_sent() -> None:
    with FlakyServer() as server:
        ask(make_backend(server), make_requests(1))
        (body,) = server.bodies
        assert body == {
            "model": "a-model",
            "messages": [{"role": "user", "content": "What about item-0?"}],
            "max_tokens": 1100,
            "temperature": 0.6,
            "top_p": 0.95,
            "seed": 7,
        }
        ask(make_backend(server, dialect=Dialect.REASONING, extra={"reasoning_effort": "low"}), make_requests(1))
        assert server.bodies[1].keys() == {"model", "messages", "max_completion_tokens", "reasoning_effort"}
        quiet = {"chat_template_kwargs": {"enable_thinking": False}}
        ask(make_backend(server, no_thinking=quiet), make_requests(1, Limits(0, 100)))
        assert server.bodies[2]["chat_template_kwargs"] == quiet["chat_template_kwargs"]


def test_what_a_server_cannot_do_is_refused_before_anything_is_sent() -> None:
    with FlakyServer() as server:
        for limits in (Limits(0, 10), Limits(10, 10, Ending.FORCED), Limits(10, 10, Ending.LIKELIHOOD)):
            with pytest.raises(ModelError):
                make_backend(server).answer(make_requests(2, limits), lambda _: None)
        assert not server.seen
    with pytest.raises(ModelError, match="is no address"):
        EndpointBackend(Endpoint("api.deepseek.com/v1", "m"))


def test_no_more_at_once_than_allowed_and_from_within_a_loop() -> None:
    async def cell() -> dict[str, Answer]:  # as a notebook runs it
        return ask(make_backend(server, concurrency=3), make_requests(12))

    with FlakyServer(delay_s=0.03) as server:
        assert all(answer.error is None for answer in asyncio.run(cell()).values())
        assert server.most_at_once == 3


def test_requests_are_spaced_and_tokens_counted() -> None:
    with FlakyServer() as server:
        ask(make_backend(server, requests_a_minute=1200), make_requests(6))
        times = sorted(itertools.chain(*server.times.values()))
        assert times[-1] - times[0] >= 5 * 0.05 * 0.9
    with FlakyServer() as server:
        # The first reserve 1,100 tokens each and settle for 40, as do all later ones: 12,000 a minute are 200 a second.
        start = time.monotonic()
        ask(make_backend(server, tokens_a_minute=12_000, concurrency=4), make_requests(30))
        assert time.monotonic() - start < 2


def test_a_spent_allowance_is_waited_for() -> None:
    async def run() -> float:
        pace = Pace(None, 6_000)  # 100 a second
        await pace.enter(0, 6_000)
        start = time.monotonic()
        await pace.enter(0, 30)
        return time.monotonic() - start

    assert asyncio.run(run()) == pytest.approx(0.3, abs=0.1)


def test_a_pause_asked_for_while_tokens_are_waited_for_is_kept() -> None:
    async def run() -> float:
        pace = Pace(None, 6_000)
        await pace.enter(0, 6_000)
        start = time.monotonic()
        waiting = asyncio.create_task(pace.enter(0, 10))  # 0.1 s for the tokens
        await asyncio.sleep(0.05)
        pace.hold(0.4)
        await waiting
        return time.monotonic() - start

    assert asyncio.run(run()) == pytest.approx(0.45, abs=0.1)


def test_cost_counts_and_who_served() -> None:
    with FlakyServer() as server:
        prices = {"a-model": Price(prompt=2.0, completion=8.0)}
        (answer,) = ask(make_backend(server, prices=prices), make_requests(1)).values()
        assert answer.cost == pytest.approx((10 * 2 + 30 * 8) / 1e6)
        assert (answer.served_by, answer.counts, answer.num_prompt_tokens) == ("served-model", Counts.APPORTIONED, 10)
        assert answer.num_think_tokens + answer.num_answer_tokens == 30
        server.fields = {"usage": {"completion_tokens": 30, "completion_tokens_details": {"reasoning_tokens": 21}}}
        (answer,) = ask(make_backend(server), make_requests(1)).values()
        assert (answer.num_think_tokens, answer.num_answer_tokens, answer.counts) == (21, 9, Counts.EXACT)
        assert answer.cost is None
        server.fields = {"usage": None}
        (answer,) = ask(make_backend(server, prices=prices), make_requests(1)).values()
        assert (answer.counts, answer.cost) == (Counts.UNKNOWN, None)


def test_the_wrong_place_stops_at_once_and_is_not_followed() -> None:
    with FlakyServer() as other, FlakyServer({"item-0": ["307 to", "405"]}) as server:
        server.location = f"{other.url}/chat/completions"
        backend = make_backend(server, api_key=Secret(KEY, "a test"), concurrency=1)
        with pytest.raises(ModelError, match=r"307.*points to.*Check the address"):
            backend.answer(make_requests(5), lambda _: None)
        with pytest.raises(ModelError, match="405"):
            backend.answer(make_requests(5), lambda _: None)
        assert not other.seen, "the key went somewhere else"


def test_a_flagged_question_concerns_itself_alone() -> None:
    with FlakyServer({"item-1": ["403"]}) as server:
        server.said = "your input was flagged"
        answers = ask(make_backend(server), make_requests(3))
        assert [answers[f"item-{i}"].error is None for i in range(3)] == [True, False, True]
        server.faults, server.said = {"item-1": ["403"]}, "not your model"
        with pytest.raises(NetworkError, match="not your model"):
            make_backend(server).answer(make_requests(3), lambda _: None)


def test_no_money_is_seen_however_late_it_is_said() -> None:
    with FlakyServer({"item-0": ["429"]}) as server:
        server.said = "You exceeded your quota. " * 20 + "insufficient_quota"
        with pytest.raises(NetworkError, match="in credit"):
            make_backend(server).answer(make_requests(1), lambda _: None)


def test_a_pause_of_hours_is_said_and_not_slept() -> None:
    with FlakyServer({"item-0": ["429 after 86400"]}) as server, pytest.raises(NetworkError, match=r"24\.0 hours"):
        make_backend(server).answer(make_requests(1), lambda _: None)
    assert _read_retry_after("inf") is _read_retry_after("nan") is None


def test_all_refused_alike_stops_and_one_answer_before_does_not() -> None:
    def faults(indices: range) -> dict[str, list[str]]:
        return {f"item-{i}": ["400"] for i in indices}

    with FlakyServer(faults(range(100))) as server:
        with pytest.raises(ModelError, match=r"first 32 requests were all refused.*null"):
            make_backend(server).answer(make_requests(100), lambda _: None)
        assert server.seen.total() < 50
    with FlakyServer(faults(range(20))) as server:  # the last few of a run, all of them filtered
        assert all(answer.error for answer in ask(make_backend(server), make_requests(20)).values())
    with FlakyServer(faults(range(1, 50))) as server:
        ask(make_backend(server, concurrency=1), make_requests(50))


def test_signs_of_life_without_end_are_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "LONGEST_ATTEMPT", 1)
    with FlakyServer({"item-0": ["drip"]}) as server:
        start = time.monotonic()
        (answer,) = ask(make_backend(server, timeout_s=0.4), make_requests(1)).values()
        assert (answer.error, answer.num_attempts) == (None, 2)
        assert 0.4 <= time.monotonic() - start < 2


def test_a_field_that_a_server_does_not_know_is_left_out() -> None:
    with FlakyServer() as server:
        backend = make_backend(server, extra={"seed": None, "top_k": 20})
        ask(backend, make_requests(1))
        assert server.bodies[0].keys() == {"model", "messages", "max_tokens", "temperature", "top_p", "top_k"}
        assert "seed" not in backend.prompt_of(make_requests(1)[0])


def test_another_way_to_read_is_another_answer() -> None:
    with FlakyServer() as server:
        (request,) = make_requests(1)
        plain, tags = make_backend(server), make_backend(server, thinks=Thinks.TAGS)
        assert plain.prompt_of(request) != tags.prompt_of(request)
        assert json.loads(plain.prompt_of(request)) == plain.body_of(request)
        assert make_backend(server, stream=True).prompt_of(request) == plain.prompt_of(request)


@pytest.mark.parametrize(
    ("url", "here"),
    [
        ("http://127.0.0.1:8000/v1", True), ("http://127.8.8.8/v1", True), ("http://[::1]:1/v1", True),
        ("http://localhost/v1", True), ("http://LOCALHOST:9/v1", True), ("http://10.0.0.1/v1", False),
        ("http://localhost.evil.com/v1", False), ("http://127.0.0.1.evil.com/v1", False),
        ("https://127.0.0.1@evil.com/v1", False), ("http://0.0.0.0/v1", False),
    ],
)  # fmt: skip
def test_what_is_this_machine(url: str, here: bool) -> None:
    assert is_this_machine(url) is here


# --- replies ----------------------------------------------------------------------------------------------------------


def build(message: dict[str, Any], finish: str = "stop", thinks: Thinks = Thinks.AUTO) -> Answer:
    reply = read_body(json.dumps({"choices": [{"message": message, "finish_reason": finish}]}).encode())
    return build_answer(reply, make_requests(1)[0], thinks, None, seconds=1.0, num_attempts=1)


@pytest.mark.parametrize(
    ("message", "think", "answer", "closed"),
    [
        ({"content": "B", "reasoning_content": "hm"}, "hm", "B", True),
        ({"content": "B", "reasoning": "hm"}, "hm", "B", True),
        ({"content": "<think>\nhm</think>\n\nB"}, "hm", "B", True),
        ({"content": "hm</think>B"}, "hm", "B", True),
        ({"content": "one</think>two</think>B"}, "one</think>two", "B", True),
        ({"content": [{"type": "text", "text": "B"}], "reasoning_content": "hm"}, "hm", "B", True),
        ({"content": None, "reasoning_content": "hm"}, "hm", "", False),
        ({"content": "", "reasoning_content": "hm"}, "hm", "", False),
        ({"content": "<think>hm"}, "hm", "", False),
        ({"content": "B"}, "", "B", True),
        ({"content": ""}, "", "", False),
    ],
)
def test_reasoning_is_found(message: dict[str, Any], think: str, answer: str, closed: bool) -> None:
    got = build(message)
    assert (got.think, got.answer, got.closed) == (think, answer, closed)
    assert got.text.rpartition("</think>")[2].strip() == answer or not closed


def test_thinking_in_a_field_and_in_tags_stands_in_the_text_once() -> None:
    got = build({"content": "more</think>\nB", "reasoning_content": "hm"})
    assert (got.think, got.answer, got.text) == ("hm\nmore", "B", "<think>\nhm\nmore\n</think>\n\nB")


def test_a_model_that_thinks_in_tags_and_has_none_is_unfinished() -> None:
    got = build({"content": "thinking, Final answer: B"}, thinks=Thinks.TAGS)
    assert (got.think, got.answer, got.closed) == ("thinking, Final answer: B", "", False)
    assert build({"content": "hm</think>B"}, finish="length", thinks=Thinks.TAGS).finish is Finish.LENGTH


def test_a_filtered_answer_is_none() -> None:
    with pytest.raises(Refused, match="content_filter"):
        build({"content": "half"}, finish="content_filter")


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b'{"choices": []}', b'{"choices": [{"message": {"content": "x"}}]}']
)
def test_half_a_body_is_no_reply(body: bytes) -> None:
    with pytest.raises(Broken):
        read_body(body)


def test_every_way_to_cut_a_stream_is_noticed() -> None:
    def event(delta: dict[str, str], finish: str | None = None) -> str:
        return "data: " + json.dumps({"choices": [{"delta": delta, "finish_reason": finish}]})

    lines = [": hello", event({"role": "assistant"}), "", event({"reasoning_content": "h"}), event({"reasoning": "m"})]
    lines += [event({"content": "Final"}), event({"content": " answer: B"}), event({}, "stop"), "data: [DONE]"]
    for stop in range(len(lines) - 2):
        with pytest.raises(Broken):
            read_stream("\n".join(lines[:stop]).encode())
    check: Callable[[Reply], tuple[str, str, str | None]] = lambda r: (r.reasoning, r.content, r.finish)  # noqa: E731
    for end in ("\n", "\r\n", "\r"):
        for sent in (lines, lines[:-1]):
            assert check(read_stream(end.join(sent).encode())) == ("hm", "Final answer: B", "stop")
    with pytest.raises(Broken, match="no JSON"):
        read_stream("\n".join([*lines[:4], 'data: {"choices": [{"del']).encode())


def test_a_line_ends_where_the_standard_says_and_not_where_python_does() -> None:
    signs = "a\u2028b\u2029c\x85d"  # as pydantic's JSON has them: unescaped
    chunk = {"choices": [{"delta": {"content": signs}, "finish_reason": "stop"}]}
    assert read_stream(b"data: " + json.dumps(chunk, ensure_ascii=False).encode() + b"\n\n").content == signs
    with FlakyServer() as server:
        server.message = {"content": f"<think>{signs}</think>Final answer: B"}
        server.ensure_ascii = False
        for stream in (False, True):
            (answer,) = ask(make_backend(server, stream=stream, max_attempts=2), make_requests(1)).values()
            assert (answer.think, answer.answer, answer.num_attempts) == (signs, "Final answer: B", 1)


@pytest.mark.parametrize("finish", ["insufficient_system_resource", "abort", "error"])
def test_what_a_server_gave_up_is_no_answer(finish: str) -> None:
    with pytest.raises(Broken, match=finish):
        build({"content": "half"}, finish=finish)
    with pytest.raises(Broken, match="overloaded"):
        read_body(b'{"choices": [{"error": {"message": "overloaded"}, "finish_reason": "stop"}]}')


def test_half_a_chain_of_thought_is_no_answer_unless_thinking_was_elsewhere() -> None:
    message = {"content": "so maybe\nFinal answer: B\nWait"}
    cut = build(message, finish="length")
    assert (cut.think, cut.answer, cut.closed) == (message["content"], "", False)
    assert build(message, finish="stop").closed
    reply = Reply(content="x", finish="length", usage={"completion_tokens_details": {"reasoning_tokens": 5}})
    settings: dict[str, Any] = {"seconds": 1.0, "num_attempts": 1}
    assert build_answer(reply, make_requests(1)[0], Thinks.AUTO, None, **settings).answer == "x"
    quiet = make_requests(1, Limits(0, 10))[0]  # it was told not to think
    assert build_answer(Reply(content="x", finish="length"), quiet, Thinks.AUTO, None, **settings).answer == "x"


Q = make_requests(1)[0].question


@pytest.mark.parametrize(
    ("content", "text"),
    [
        # As transformers serve 5.23 sent them, of DeepSeek-R1-Distill-Qwen's tokenizer.
        (f"<｜begin▁of▁sentence｜><｜User｜>{Q}<｜Assistant｜>hm</think>\nB<｜end▁of▁sentence｜>", "hm</think>\nB"),
        (f"<｜begin▁of▁sentence｜><｜User｜>{Q}<｜Assistant｜><think>\nhm<｜end▁of▁sentence｜>", "<think>\nhm"),
        (f"<｜begin▁of▁sentence｜><｜User｜>{Q}<｜Assistant｜><｜end▁of▁sentence｜>", ""),
        (f"<|im_start|>user\n{Q}<|im_end|>\n<|im_start|>assistant\nB<|im_end|>\n<|endoftext|>", "B"),
        ("B</s>", "B"),
        # What a model wrote itself stays.
        (f"You ask: {Q} B", f"You ask: {Q} B"),
        (f"{Q} B", f"{Q} B"),
        ("a <|im_end|> b", "a <|im_end|> b"),
        ("if p<|x| then |y|> B", "if p<|x| then |y|> B"),
        ("<think>\nhm</think>\nuser B", "<think>\nhm</think>\nuser B"),
    ],
)
def test_a_frame_that_was_left_on_is_taken_off(content: str, text: str) -> None:
    assert build({"content": content}).text == text
    assert build({"content": "<think>a<|im_end|>"}, finish="length").text == "<think>a<|im_end|>"


def test_no_body_however_odd_is_more_than_broken() -> None:
    rng = random.Random(3)
    odd: list[Any] = [None, True, 0, -1, 1.5, "x", [], {}, [None], ["x"], {"x": 1}]
    names = ("choices", "message", "delta", "content", "reasoning", "finish_reason", "usage", "model", "error")
    names += ("completion_tokens", "completion_tokens_details", "total_tokens")

    def grow(depth: int) -> Any:
        if depth == 0 or rng.random() < 0.2:
            return rng.choice(odd)
        if rng.random() < 0.3:
            return [grow(depth - 1)]
        return {name: grow(depth - 1) for name in rng.sample(names, 4)} | {"finish_reason": "stop"}

    def body() -> dict[str, Any]:
        choice = {"message": grow(2), "delta": grow(2), "finish_reason": "stop"}
        return {"choices": [choice], "usage": grow(2), "model": grow(1)} if rng.random() < 0.7 else {"choices": grow(2)}

    num_whole = 0
    for _ in range(3000):
        value = json.dumps(body()).encode()
        for read, data in ((read_body, value), (read_stream, b"data: " + value)):
            try:
                answer = build_answer(
                    read(data), make_requests(1)[0], Thinks.AUTO, Price(1, 1), seconds=1.0, num_attempts=1
                )
            except Broken:
                continue
            num_whole += 1
            assert isinstance(answer.answer, str) and answer.num_answer_tokens >= 0
    assert 1000 < num_whole < 6000
