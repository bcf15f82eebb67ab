"""What an OpenAI-compatible server sends back, whole or in pieces, read into one ``Answer``.

A reply counts only when it is whole: JSON that ends, with a choice that says why it stopped. A stream is whole when a
piece carried that reason; where it breaks off before, nothing of it is kept, because half a chain of thought with half
an answer looks like a model that cannot finish. Reasoning is taken from ``reasoning_content`` (DeepSeek, vLLM,
llama.cpp) or ``reasoning`` (vLLM since 0.11, OpenRouter, Ollama), else from the tags in the text.

Where neither is there, text alone does not say whether a model thought: one that hides its reasoning (o1, o3) and one
whose ``<think>`` stood in the prompt and was never closed look the same. ``Thinks`` says which it is; without being
told, what has no tag is taken as an answer, except behind an opened tag.

Sources: the OpenAI API reference (chat completion object, chunk object); the HTML standard's server-sent events.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from medcot.evaluate.backends import Answer, Counts, Request
from medcot.prompt import THINK_CLOSE, THINK_OPEN
from medcot.records import Finish

_ENDED = {"stop": Finish.EOS, "eos": Finish.EOS, "length": Finish.LENGTH, "max_tokens": Finish.LENGTH}
_REASONING = ("reasoning_content", "reasoning")


class Thinks(StrEnum):
    """How a served model shows its reasoning."""

    AUTO = "auto"  # in a field, or up to a tag; without either, what it wrote is the answer
    TAGS = "tags"  # up to a tag, and what has none is unfinished thinking


class Broken(Exception):
    """A reply that did not arrive whole, or says that the server failed: worth another attempt."""


class Refused(Exception):
    """A reply that another attempt would not change."""


@dataclass(frozen=True, slots=True)
class Price:
    """What a million tokens cost, in whatever currency."""

    prompt: float
    completion: float


@dataclass(slots=True)
class Reply:
    """A whole reply, put together from one piece or many."""

    content: str = ""
    reasoning: str = ""
    finish: str | None = None
    usage: Mapping[str, Any] = field(default_factory=dict)
    model: str | None = None

    def take(self, body: Any, part: str) -> None:
        """Add a body's, or a chunk's, first choice.

        Args:
            body: parsed JSON.
            part: where the text lies: "message" or "delta".

        Raises:
            Broken: it tells of an error, or is no such object.
        """
        if not isinstance(body, dict) or body.get("error"):
            raise Broken(f"the server sent {json.dumps(body)[:200]}")
        self.usage = body.get("usage") or self.usage
        self.model = body.get("model") or self.model
        choices = body.get("choices")
        if not choices:  # the last chunk of a stream has the usage alone
            return
        choice = choices[0] if isinstance(choices, list) and isinstance(choices[0], dict) else {}
        message = choice.get(part) or {}
        self.content += _text(message.get("content"))
        self.reasoning += next((_text(message[key]) for key in _REASONING if message.get(key)), "")
        self.finish = choice.get("finish_reason") or self.finish


def read_body(data: bytes) -> Reply:
    """Read a reply sent in one piece.

    Raises:
        Broken: it is not whole.
    """
    try:
        body = json.loads(data)
    except ValueError:
        raise Broken(f"the body is no JSON: {data[:80]!r}") from None
    reply = Reply()
    reply.take(body, "message")
    return _whole(reply)


def read_lines(lines: Iterable[str]) -> Reply:
    """Read a reply sent as server-sent events, all lines of it.

    Raises:
        Broken: it is not whole.
    """
    reply = Reply()
    for line in lines:
        if not line.startswith("data:"):
            continue  # an empty line, a comment that keeps the line open, an event's name
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            break
        try:
            chunk = json.loads(data)
        except ValueError:
            raise Broken(f"a piece of the stream is no JSON: {data[:80]!r}") from None
        reply.take(chunk, "delta")
    return _whole(reply)


def _whole(reply: Reply) -> Reply:
    if reply.finish is None:
        raise Broken("it broke off before the reason for its end")
    return reply


def build_answer(
    reply: Reply, request: Request, thinks: Thinks, price: Price | None, *, seconds: float, num_attempts: int
) -> Answer:
    """Make an answer of a whole reply.

    Raises:
        Refused: it ended for a reason that leaves no answer, such as a content filter.
    """
    if reply.finish not in _ENDED:
        raise Refused(f"it ended with finish_reason '{reply.finish}'")
    finish = _ENDED[reply.finish]
    think, answer, closed = _split(reply, thinks)
    num_prompt, num_think, num_answer, counts = _count(reply.usage, think, answer)
    cost = None
    if price is not None and counts is not Counts.UNKNOWN:
        cost = (num_prompt * price.prompt + (num_think + num_answer) * price.completion) / 1e6
    return Answer(
        item_id=request.item_id,
        seed=request.seed,
        text=f"{THINK_OPEN}\n{think}\n{THINK_CLOSE}\n\n{reply.content}" if reply.reasoning and closed
        else reply.reasoning + reply.content,
        think=think,
        answer=answer,
        closed=closed,
        finish=finish,
        num_prompt_tokens=num_prompt,
        num_think_tokens=num_think,
        num_answer_tokens=num_answer,
        counts=counts,
        seconds=seconds,
        cost=cost,
        num_attempts=num_attempts,
        served_by=reply.model,
    )  # fmt: skip


def _split(reply: Reply, thinks: Thinks) -> tuple[str, str, bool]:
    """Return thinking, answer, and whether thinking ended."""
    think, tag, answer = reply.content.rpartition(THINK_CLOSE)
    if tag:
        return _join(reply.reasoning, think), answer.strip(), True
    content = reply.content.strip()
    if reply.reasoning:
        return reply.reasoning.strip(), content, bool(content)
    if thinks is Thinks.TAGS or content.startswith(THINK_OPEN):
        return content.removeprefix(THINK_OPEN).strip(), "", False
    return "", content, bool(content)


def _join(reasoning: str, think: str) -> str:
    return "\n".join(part for part in (reasoning.strip(), think.replace(THINK_OPEN, "").strip()) if part)


def _count(usage: Mapping[str, Any], think: str, answer: str) -> tuple[int, int, int, Counts]:
    """Return tokens read, of thinking and of the answer, and how far they can be trusted."""
    total = usage.get("completion_tokens")
    if not isinstance(total, int):
        return 0, 0, 0, Counts.UNKNOWN
    num_prompt = usage.get("prompt_tokens")
    num_prompt = num_prompt if isinstance(num_prompt, int) else 0
    num_think = (usage.get("completion_tokens_details") or {}).get("reasoning_tokens")
    if isinstance(num_think, int) and (num_think or not think):
        return num_prompt, num_think, max(0, total - num_think), Counts.EXACT
    if not think or not answer:
        return num_prompt, total if think else 0, 0 if think else total, Counts.EXACT
    num_think = round(total * len(think) / (len(think) + len(answer)))
    return num_prompt, num_think, total - num_think, Counts.APPORTIONED


def _text(value: object) -> str:
    """Return a message's text, which some servers send in parts."""
    if isinstance(value, list):
        return "".join(str(part.get("text", "")) for part in value if isinstance(part, dict))
    return value if isinstance(value, str) else ""
