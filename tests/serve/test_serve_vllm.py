"""vLLM's seam: a stand-in module with its names, which writes the tokens of a script."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from medcot.generate import Sampling
from medcot.model import LoadedModel
from medcot.prompt import Style, closing_ids, encode_prompt
from medcot.prompt.frames import frame_of, tokenise
from medcot.serve.jobs import End, Ending, Job, Text
from medcot.serve.rows import Row
from medcot.serve.scheduler import Draining, Overloaded
from medcot.serve.vllm_scheduler import VllmScheduler


class StandIn:
    """What of vLLM is used, by its own names; remembers what it was asked."""

    __version__ = "0.0"

    def __init__(self, script: list[int], *, pause: threading.Event | None = None, fails: bool = False) -> None:
        self.script, self.pause, self.fails = script, pause, fails
        self.asked: list[SimpleNamespace] = []
        self.aborted: list[str] = []
        self.shut = False
        self.AsyncEngineArgs = self.SamplingParams = lambda **settings: SimpleNamespace(**settings)
        lora = SimpleNamespace(LoRARequest=lambda name, number, path: (name, number, path))
        self.lora = SimpleNamespace(request=lora)
        self.sampling_params = SimpleNamespace(RequestOutputKind=SimpleNamespace(DELTA="delta"))
        engine = SimpleNamespace(AsyncLLM=SimpleNamespace(from_engine_args=self._open))
        self.v1 = SimpleNamespace(engine=SimpleNamespace(async_llm=engine))

    def _open(self, arguments: Any) -> StandIn:
        if self.fails:
            raise RuntimeError("no GPU")
        self.arguments = arguments
        return self

    async def generate(
        self, prompt: Any, params: Any, request_id: str, *, lora_request: Any = None
    ) -> AsyncIterator[Any]:
        self.asked.append(SimpleNamespace(prompt=prompt, params=params, key=request_id, lora=lora_request))
        while self.pause is not None and not self.pause.is_set():
            await asyncio.sleep(0.01)
        done = len(prompt["prompt_token_ids"]) - self.num_prompt
        for place in range(min(params.max_tokens, len(self.script) - done)):
            token, last = self.script[done + place], place + 1 == params.max_tokens
            yield SimpleNamespace(
                outputs=[SimpleNamespace(token_ids=[token], finish_reason="length" if last else None)]
            )

    async def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)

    def shutdown(self) -> None:
        self.shut = True

    num_prompt = 0


class Heard:
    """What a job tells, and when it has ended."""

    def __init__(self) -> None:
        self.texts: list[Text] = []
        self.end: End | None = None
        self.over = threading.Event()

    def __call__(self, event: Text | End) -> None:
        if isinstance(event, Text):
            self.texts.append(event)
        else:
            self.end = event
            self.over.set()

    def said(self, *, in_think: bool) -> str:
        return "".join(text.text for text in self.texts if text.in_think is in_think)


def start(embedded: LoadedModel, stand_in: StandIn, **settings: Any) -> tuple[VllmScheduler, Any]:
    tokenizer = embedded.tokenizer
    frame = frame_of(Style.SHORT, tokenizer)
    prompt = encode_prompt("Why?", Style.SHORT, tokenizer)
    stand_in.num_prompt = len(prompt)
    scheduler = VllmScheduler(
        stand_in,
        "some/model",
        {"tuned": Path("here"), "base": None},
        lambda job: Row(job, tokenizer, frame, {tokenizer.eos_token_id}),
        **{"most_running": 2, "most_waiting": 1} | settings,
    )
    scheduler.start()

    def ask(model: str = "tuned", **more: Any) -> Heard:
        heard = Heard()
        asked = {"max_tokens": 50, "sampling": Sampling(0.6, 0.95), "seed": 9, "splits": True} | more
        scheduler.submit(Job(model, prompt, tell=heard, **asked))
        return heard

    return scheduler, ask


def stop(scheduler: VllmScheduler) -> None:
    scheduler.drain()
    assert scheduler.join(5)


def test_ids_go_in_and_text_comes_out(embedded: LoadedModel) -> None:
    tokenizer = embedded.tokenizer
    script = [*tokenise("first this</think>then that", tokenizer)[0], tokenizer.eos_token_id]
    stand_in = StandIn(script)
    ended: list[Row] = []
    scheduler, ask = start(embedded, stand_in, on_end=ended.append, max_model_len=512)
    heard, base = ask(), ask("base")
    assert heard.over.wait(5) and base.over.wait(5)
    assert (heard.said(in_think=True), heard.said(in_think=False)) == ("first this", "then that")
    assert heard.end is not None and heard.end.ending is Ending.STOP and heard.end.num_tokens == len(script)
    assert {call.lora for call in stand_in.asked} == {("tuned", 1, "here"), None}
    params = stand_in.asked[0].params
    assert (params.temperature, params.top_p, params.max_tokens, params.seed) == (0.6, 0.95, 50, 9)
    assert params.detokenize is False and params.output_kind == "delta"
    assert stand_in.arguments.model == "some/model" and stand_in.arguments.max_model_len == 512
    stop(scheduler)
    assert len(ended) == 2 and stand_in.shut
    with pytest.raises(Draining):
        ask()


def test_the_budget_closes_the_thinking_and_goes_on(embedded: LoadedModel) -> None:
    tokenizer, frame = embedded.tokenizer, frame_of(Style.SHORT, embedded.tokenizer)
    thought = tokenise("one two three", tokenizer)[0]
    close = closing_ids(frame, tokenizer)
    script = [*thought, *close, *tokenise("an answer", tokenizer)[0], tokenizer.eos_token_id]
    stand_in = StandIn(script)
    scheduler, ask = start(embedded, stand_in)
    heard = ask(think_tokens=len(thought))
    assert heard.over.wait(5)
    assert heard.said(in_think=True).strip() == "one two three" and heard.said(in_think=False) == "an answer"
    assert len(stand_in.asked) == 2 and stand_in.asked[0].key in stand_in.aborted
    assert stand_in.asked[1].prompt["prompt_token_ids"][stand_in.num_prompt :] == [*thought, *close]
    assert stand_in.asked[1].params.max_tokens == 50 - len(thought) - len(close)
    stop(scheduler)


def test_who_is_too_many_is_turned_away_and_who_leaves_is_aborted(embedded: LoadedModel) -> None:
    gate = threading.Event()
    stand_in = StandIn([5] * 60, pause=gate)
    scheduler, ask = start(embedded, stand_in)
    heard = [ask() for _ in range(3)]
    with pytest.raises(Overloaded):
        ask()
    scheduler.cancel_all()
    gate.set()
    for one in heard:
        assert one.over.wait(5) and one.end is not None and one.end.ending is Ending.CANCELLED
    stop(scheduler)
    assert scheduler.num_running == scheduler.num_waiting == 0


def test_a_model_that_cannot_be_loaded_is_said_at_the_start(embedded: LoadedModel) -> None:
    with pytest.raises(RuntimeError, match="no GPU"):
        start(embedded, StandIn([], fails=True))
