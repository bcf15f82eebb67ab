"""The server asked by OpenAI's own client over a socket: text, streams, names, limits, and everybody's bad input."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from running import Running, running

from medcot.answering import choose_run
from medcot.engine import accelerate
from medcot.errors import RecipeError
from medcot.generate import Sampling, generate
from medcot.model import load, load_adapter
from medcot.prompt import Style, encode_prompt, split_completion
from medcot.serve.lanes import EngineLane, PlainLane
from medcot.serving import Wish, check_wish, choose
from tiny_runs import run_job

QUESTION = "A patient drinks 3 cups and then 2 more. How many?"
ASKED = [{"role": "user", "content": QUESTION}]


@pytest.fixture(scope="module")
def run_folder(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("served") / "tuned"
    run_job(recipe_file, out, "train.max_steps=8")
    return out


@pytest.fixture(scope="module")
def server(run_folder: Path) -> Iterator[Running]:
    wish = Wish(choose(str(run_folder)), slots=4, waiting=24, context_tokens=512, max_tokens=40, temperature=0)
    with running(wish) as one:
        yield one


def ask(server: Running, **more: Any) -> Any:
    return server.client().chat.completions.create(**{"model": "tuned", "messages": ASKED, "max_tokens": 24} | more)


def write_here(run_folder: Path, adapter: bool, num_tokens: int, sampling: Sampling, seed: int) -> Any:
    """What ``generate`` writes for the same question."""
    who = choose_run(run_folder)
    loaded = load(who.source, precision=who.precision, max_seq_length=512)
    model = load_adapter(loaded, Path(who.adapter)) if adapter else loaded.model
    accelerate(model)
    prompt = encode_prompt(QUESTION, who.style, loaded.tokenizer)
    written, finish = generate(
        model, loaded.tokenizer, [prompt], max_new_tokens=num_tokens, sampling=sampling, seed=seed, batch_size=1
    )[0]
    return split_completion(written, loaded.tokenizer, num_prompt_tokens=len(prompt), finish=finish)


@pytest.mark.parametrize("model", ["tuned", "base"])
def test_greedy_answers_are_those_of_generate(server: Running, run_folder: Path, model: str) -> None:
    wanted = write_here(run_folder, model == "tuned", 24, Sampling(0, 1), 0)
    got = ask(server, model=model)
    message = got.choices[0].message
    assert (message.reasoning_content, message.content) == (wanted.think, wanted.answer)
    assert got.usage.completion_tokens <= 24 and got.usage.prompt_tokens == wanted.num_prompt_tokens
    assert got.model == model and got.choices[0].finish_reason in ("stop", "length")


def test_drawn_answers_follow_from_the_seed_whoever_else_is_asked(server: Running, run_folder: Path) -> None:
    wanted = write_here(run_folder, True, 24, Sampling(0.9, 0.9), 7)
    with ThreadPoolExecutor(12) as pool:
        others = [pool.submit(ask, server, model=name, temperature=1.0) for name in ("base", "tuned") * 5]
        got = ask(server, temperature=0.9, top_p=0.9, seed=7)
        assert all(other.result().choices[0].finish_reason for other in others)
    message = got.choices[0].message
    assert (message.reasoning_content, message.content) == (wanted.think, wanted.answer)


def test_a_stream_is_the_whole_answer_in_pieces(server: Running) -> None:
    whole = ask(server).choices[0].message
    think = answer = ""
    reasons, usage = [], None
    for chunk in ask(server, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            think += getattr(choice.delta, "reasoning_content", None) or ""
            answer += choice.delta.content or ""
            reasons += [choice.finish_reason] if choice.finish_reason else []
    assert (think, answer) == (whole.reasoning_content, whole.content) and len(reasons) == 1
    assert usage is not None and usage.completion_tokens <= 24


def test_several_answers_each_with_its_seed(server: Running) -> None:
    both = ask(server, n=3, temperature=1.0, seed=5, max_tokens=8)
    second = ask(server, temperature=1.0, seed=6, max_tokens=8)
    assert [choice.index for choice in both.choices] == [0, 1, 2]
    assert both.choices[1].message == second.choices[0].message
    streamed = {choice.index for chunk in ask(server, n=2, stream=True) for choice in chunk.choices}
    assert streamed == {0, 1}


def test_a_thinking_budget_closes_the_thinking(server: Running) -> None:
    free = ask(server, max_tokens=30)
    capped = ask(server, max_tokens=30, extra_body={"thinking_budget": 3})
    assert free.usage.completion_tokens_details.reasoning_tokens > 3
    # The close itself is thinking up to the end of its tag.
    assert 3 <= capped.usage.completion_tokens_details.reasoning_tokens < 3 + 12
    none = ask(server, max_tokens=30, extra_body={"thinking_budget": 0})
    assert not none.choices[0].message.reasoning_content


def test_raw_completions(server: Running) -> None:
    got = server.client().completions.create(model="base", prompt="The answer is", max_tokens=5)
    assert isinstance(got.choices[0].text, str) and 0 < got.usage.completion_tokens <= 5
    stop = got.choices[0].text[2:4]
    if stop:
        cut = server.client().completions.create(model="base", prompt="The answer is", max_tokens=5, stop=stop)
        assert cut.choices[0].text == got.choices[0].text.partition(stop)[0]
        assert cut.choices[0].finish_reason == "stop"


def test_names(server: Running) -> None:
    assert [model.id for model in server.client().models.list()] == ["tuned", "base"]
    assert server.client().models.retrieve("base").id == "base"
    with pytest.raises(openai.NotFoundError, match="There is no model 'gpt' here; there are tuned, base"):
        ask(server, model="gpt")


def test_further_adapters_by_name_over_one_base(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other") / "adapter"
    shutil.copytree(run_folder / "adapter", other)
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 8 * config["lora_alpha"]}))
    wish = Wish(choose(str(run_folder)), {"strong": str(other)}, slots=2, context_tokens=512, temperature=0)
    with running(wish) as three:
        names = ["tuned", "strong", "base"]
        assert [model.id for model in three.client().models.list()] == names
        with ThreadPoolExecutor(6) as pool:
            together = list(pool.map(lambda name: ask(three, model=name).choices[0].message, names * 2))
        alone = [ask(three, model=name).choices[0].message for name in names]
        assert together == alone * 2, "who else is asked changes nothing"
        assert len({(message.reasoning_content, message.content) for message in alone}) == 3
        lanes = three.service.scheduler._lanes.values()
        tables = {lane._decoder.layers[0].qkv.weight.dense().data_ptr() for lane in lanes}
        assert len(tables) == 1, "one set of base weights"


def test_a_client_that_goes_away_frees_its_slot(server: Running) -> None:
    for stream in (True, False):
        body = {"messages": ASKED, "max_tokens": 400, "temperature": 1.0, "stream": stream, "stop": ["no such text"]}
        post = httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=0.3)
        with pytest.raises((httpx.ReadTimeout, StopIteration)), post as reply:
            next(reply.iter_lines())
            raise StopIteration
        server.wait_until_idle(5)


def test_overload_is_told_at_once(run_folder: Path) -> None:
    with running(Wish(choose(str(run_folder)), slots=1, waiting=2, context_tokens=512)) as small:
        statuses = []

        def post() -> None:
            body = {"messages": ASKED, "max_tokens": 200, "temperature": 1.0}
            reply = httpx.post(f"{small.url}/v1/chat/completions", json=body, timeout=60)
            statuses.append((reply.status_code, reply.headers.get("retry-after")))

        threads = [threading.Thread(target=post) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert {status for status, _ in statuses} == {200, 429} and (429, "5") in statuses


def test_time_is_bounded(run_folder: Path) -> None:
    wish = Wish(choose(str(run_folder)), slots=1, context_tokens=512, seconds=0.001)
    with running(wish) as hasty:
        reply = httpx.post(f"{hasty.url}/v1/chat/completions", json={"messages": ASKED}, timeout=30)
        assert reply.status_code in (200, 504)
        hasty.wait_until_idle()


def test_an_error_while_writing_ends_those_answers_and_no_others(server: Running, monkeypatch: Any) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("the secret traceback")

    with monkeypatch.context() as patch:
        patch.setattr(EngineLane, "turn", fail)
        with pytest.raises(openai.InternalServerError) as caught:
            ask(server)
    assert "secret" not in str(caught.value) and "Traceback" not in str(caught.value)
    assert ask(server).choices[0].finish_reason


def test_metrics_and_health(server: Running) -> None:
    ask(server)
    text = httpx.get(f"{server.url}/metrics").text
    assert 'medcot_answers_total{end="length",model="tuned"}' in text or 'end="stop",model="tuned"' in text
    assert "medcot_waiting 0" in text and "medcot_first_token_seconds_count" in text
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    assert httpx.get(f"{server.url}/nothing").status_code == 404
    assert httpx.get(f"{server.url}/v1/chat/completions").status_code == 405


def test_a_model_that_the_engine_does_not_know_is_served_too(run_folder: Path) -> None:
    wish = Wish(replace(choose(str(run_folder)), accelerate=False), slots=4, context_tokens=512, temperature=0)
    with running(wish) as plain, running(Wish(choose(str(run_folder)), context_tokens=512, temperature=0)) as fast:
        for model in ("tuned", "base"):
            one, other = (ask(server, model=model, max_tokens=12).choices[0].message for server in (plain, fast))
            assert (one.reasoning_content, one.content) == (other.reasoning_content, other.content)
        capped = ask(plain, max_tokens=20, extra_body={"thinking_budget": 2}).usage.completion_tokens_details
        assert capped.reasoning_tokens < 2 + 12
        assert isinstance(plain.service.scheduler._lanes["tuned"], PlainLane)


def test_without_a_key_only_loopback_is_answered(server: Running) -> None:
    post = {"url": f"{server.url}/v1/chat/completions", "json": {"messages": ASKED, "max_tokens": 1}}
    assert httpx.post(**post, headers={"Host": "evil.example"}).status_code == 403
    assert httpx.post(**post, headers={"Origin": "https://evil.example"}).status_code == 403
    assert httpx.post(**post, headers={"Origin": "http://localhost:3000"}).status_code == 200


def test_other_addresses_need_a_key(run_folder: Path) -> None:
    who = choose(str(run_folder))
    with pytest.raises(RecipeError, match="MEDCOT_API_KEY"):
        check_wish(Wish(who, host="0.0.0.0"))
    check_wish(Wish(who, host="0.0.0.0", api_key="k"))
    with running(Wish(who, slots=1, context_tokens=512, api_key="right-key")) as locked:
        with pytest.raises(openai.AuthenticationError):
            locked.client("wrong-key").models.list()
        assert [model.id for model in locked.client("right-key").models.list()] == ["tuned", "base"]
        assert httpx.get(f"{locked.url}/health").status_code == 200
        assert httpx.get(f"{locked.url}/metrics").status_code == 401


BAD = [
    (b"", "not JSON"),
    (b"{", "not JSON"),
    (b"[]", "not a JSON object"),
    (b"[" * 100_000, "not JSON"),
    (b'{"messages": "hello"}', "messages"),
    (b'{"messages": []}', "at least 1"),
    (b'{"messages": [{"role": "user", "content": ""}]}', "empty"),
    (b'{"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]}', "single questions"),
    (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "surrogate"),
    (b'{"messages": [{"role": "user", "content": "</think> so"}]}', "</think>"),
    (b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}', "text"),
    (b'{"model": "\\ud800", "messages": [{"role": "user", "content": "x"}]}', "no model"),
    (b'{"messages": [{"role": "user", "content": "x"}], "tools": [{}]}', "'tools' is not supported"),
    (b'{"messages": [{"role": "user", "content": "x"}], "temperature": 9}', "temperature"),
    (b'{"messages": [{"role": "user", "content": "x"}], "n": 9999}', "n"),
    (b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 0}', "max_tokens"),
    (b'{"messages": [{"role": "user", "content": "x"}], "stop": [""]}', "stop"),
    (json.dumps({"messages": [{"role": "user", "content": "word " * 3000}]}).encode(), "tokens"),
]


@pytest.mark.parametrize(("body", "words"), BAD, ids=[str(number) for number in range(len(BAD))])
def test_bad_input_is_told_what_is_wrong_with_it(server: Running, body: bytes, words: str) -> None:
    reply = httpx.post(f"{server.url}/v1/chat/completions", content=body, timeout=30)
    assert 400 <= reply.status_code < 500, reply.text
    assert words in reply.json()["error"]["message"]


def test_a_body_too_large_is_refused(server: Running) -> None:
    body = b'{"messages": "' + b"x" * 2**20 + b'"}'
    assert httpx.post(f"{server.url}/v1/chat/completions", content=body).status_code == 413

    def pieces() -> Iterator[bytes]:
        for _ in range(40):
            yield b"x" * 2**16

    assert httpx.post(f"{server.url}/v1/chat/completions", content=pieces()).status_code == 413


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
FIELDS = ("model", "messages", "prompt", "temperature", "top_p", "max_tokens", "seed", "stop", "n", "stream")
FIELDS += ("stream_options", "thinking_budget", "max_completion_tokens", "logprobs", "tools")
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "system", "assistant", "x"])},
        optional={"content": st.text(max_size=30) | JSON},
    ),
    max_size=3,
)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    path=st.sampled_from(["chat/completions", "completions"]),
    good=st.booleans(),
    fields=st.dictionaries(st.sampled_from(FIELDS), JSON | MESSAGES, max_size=5),
    question=st.text(max_size=40),
)
def test_whatever_is_sent_the_server_does_not_break(
    server: Running, path: str, good: bool, fields: dict[str, Any], question: str
) -> None:
    body = dict(fields)
    if good:
        body = {"messages": [{"role": "user", "content": question}], "prompt": question, "max_tokens": 2} | body
    if isinstance(body.get("max_tokens"), int | float):
        body["max_tokens"] = min(body["max_tokens"], 2)
    reply = httpx.post(f"{server.url}/v1/{path}", content=json.dumps(body), timeout=60)
    assert reply.status_code < 500 and "Traceback" not in reply.text
    if reply.status_code >= 400:
        assert reply.json()["error"]["message"]


def test_a_style_or_a_port_that_is_not_there(run_folder: Path) -> None:
    wish = Wish(choose(str(run_folder)))
    assert wish.who.style is Style.SHORT and wish.who.adapter is not None
    with pytest.raises(RecipeError, match="are taken"):
        check_wish(replace(wish, adapters={"base": "x"}))
    with pytest.raises(RecipeError, match="share the context"):
        check_wish(replace(wish, max_tokens=9000))
