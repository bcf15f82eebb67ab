"""Answers on their way back: what is told by the scheduler's thread, written down as OpenAI's clients read it."""

from __future__ import annotations

import abc
import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

from medcot.serve.jobs import End, Ending, Job, Text
from medcot.serve.protocol import BadRequest, error_body, new_id, now


class Answers:
    """The answers to one request, and what is told of them."""

    def __init__(self, num: int) -> None:
        self.num, self.jobs = num, list[Job]()
        self._told: asyncio.Queue[tuple[int, Text | End]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()

    def listener(self, index: int) -> Callable[[Text | End], None]:
        """Return what a job tells, called from another thread."""

        def tell(event: Text | End) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the process is ending
                self._loop.call_soon_threadsafe(self._told.put_nowait, (index, event))

        return tell

    async def events(self) -> AsyncIterator[tuple[int, Text | End]]:
        """Yield what is told, until every answer has ended."""
        num_open = self.num
        while num_open:
            index, event = await self._told.get()
            num_open -= isinstance(event, End)
            yield index, event

    def cancel(self) -> None:
        """Say that nobody listens any more."""
        for job in self.jobs:
            job.cancelled.set()


async def cancel_when_gone(receive: Callable[[], Awaitable[Any]], answers: Answers) -> None:
    """Wait until the client has gone, and say so to the answers' jobs; cancelled where it stays."""
    while (await receive())["type"] != "http.disconnect":
        pass
    answers.cancel()


async def collect(answers: Answers) -> tuple[list[list[Text]], list[End]]:
    """Wait for every answer.

    Raises:
        BadRequest: one could not be written, or had no time to begin.
    """
    texts: list[list[Text]] = [[] for _ in range(answers.num)]
    ends: dict[int, End] = {}
    async for index, event in answers.events():
        if isinstance(event, Text):
            texts[index].append(event)
        else:
            check(event)
            ends[index] = event
    return texts, [ends[index] for index in range(answers.num)]


def check(end: End) -> None:
    """Raise ``BadRequest`` where an answer could not be written, or had no time to begin."""
    if end.ending is Ending.ERROR:
        raise BadRequest("The answer could not be written; the server's log says why", 500)
    if end.timed_out and not end.num_tokens:
        raise BadRequest("No slot became free in time", 504)


async def stream(answers: Answers, form: Form, *, usage: bool) -> AsyncIterator[str]:
    """Server-sent events, as OpenAI sends them."""
    ends: list[End] = []
    try:
        for index in range(answers.num):
            yield _event(form.opening(index))
        async for index, told in answers.events():
            if isinstance(told, Text):
                yield _event(form.piece(index, told))
                continue
            try:
                check(told)
            except BadRequest as error:
                yield _event(error_body(str(error), "server_error"))
                return
            ends.append(told)
            yield _event(form.closing(index, told))
        if usage:
            yield _event(form.usage(ends))
        yield "data: [DONE]\n\n"
    finally:
        answers.cancel()  # the client may have gone


def _event(body: Any) -> str:
    return f"data: {json.dumps(body)}\n\n"


def _reason(end: End) -> str:
    return "stop" if end.ending is Ending.STOP else "length"


def _count(ends: list[End]) -> dict[str, Any]:
    prompt, written = ends[0].num_prompt_tokens if ends else 0, sum(end.num_tokens for end in ends)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
        "completion_tokens_details": {"reasoning_tokens": sum(end.num_think_tokens for end in ends)},
    }


class Form(abc.ABC):
    """How an answer is written down; one for each of the two routes."""

    kind = ""
    chunk_kind = ""
    id_kind = ""

    def __init__(self, model: str) -> None:
        self._base = {"id": new_id(self.id_kind), "created": now(), "model": model}

    def whole(self, texts: list[list[Text]], ends: list[End]) -> dict[str, Any]:
        """All answers at once."""
        choices = [
            {"index": index, "finish_reason": _reason(end), "logprobs": None, **self._said(some)}
            for index, (some, end) in enumerate(zip(texts, ends, strict=True))
        ]
        return {**self._base, "object": self.kind, "choices": choices, "usage": _count(ends)}

    def opening(self, index: int) -> dict[str, Any]:
        """The first event of an answer."""
        return self._chunk(index, self._part("", in_think=False, first=True))

    def piece(self, index: int, text: Text) -> dict[str, Any]:
        """Some text."""
        return self._chunk(index, self._part(text.text, in_think=text.in_think, first=False))

    def closing(self, index: int, end: End) -> dict[str, Any]:
        """The last event of an answer."""
        return self._chunk(index, self._nothing(), _reason(end))

    def usage(self, ends: list[End]) -> dict[str, Any]:
        """The counts, after the last answer."""
        return {**self._base, "object": self.chunk_kind, "choices": [], "usage": _count(ends)}

    def _chunk(self, index: int, part: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        choice = {"index": index, **part, "logprobs": None, "finish_reason": reason}
        return {**self._base, "object": self.chunk_kind, "choices": [choice]}

    @abc.abstractmethod
    def _said(self, texts: list[Text]) -> dict[str, Any]:
        """All of an answer."""

    @abc.abstractmethod
    def _part(self, text: str, *, in_think: bool, first: bool) -> dict[str, Any]:
        """Some of it."""

    @abc.abstractmethod
    def _nothing(self) -> dict[str, Any]:
        """None of it, where it ends."""


class ChatForm(Form):
    """Thinking apart from the answer, as DeepSeek's API has it."""

    kind, chunk_kind, id_kind = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def _said(self, texts: list[Text]) -> dict[str, Any]:
        think, answer = ("".join(_those(texts, in_think)) for in_think in (True, False))
        return {"message": {"role": "assistant", "content": answer, "reasoning_content": think}}

    def _part(self, text: str, *, in_think: bool, first: bool) -> dict[str, Any]:
        if first:
            return {"delta": {"role": "assistant", "content": ""}}
        return {"delta": {"reasoning_content": text} if in_think else {"content": text}}

    def _nothing(self) -> dict[str, Any]:
        return {"delta": {}}


class CompletionForm(Form):
    """Text as it comes, tags and all."""

    kind = chunk_kind = "text_completion"
    id_kind = "cmpl"

    def _said(self, texts: list[Text]) -> dict[str, Any]:
        return {"text": "".join(text.text for text in texts)}

    def _part(self, text: str, *, in_think: bool, first: bool) -> dict[str, Any]:
        return {"text": text}

    def _nothing(self) -> dict[str, Any]:
        return {"text": ""}


def _those(texts: list[Text], in_think: bool) -> Iterator[str]:
    return (text.text for text in texts if text.in_think is in_think)
