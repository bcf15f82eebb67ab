"""What an OpenAI-compatible server sends back, whole or in pieces, read into one ``Answer``.

A reply counts only when it is whole: JSON that ends, with a choice that says why it stopped. A stream is whole when a
piece carried that reason; where it breaks off before, nothing of it is kept, because half a chain of thought with half
an answer looks like a model that cannot finish. Reasoning is taken from ``reasoning_content`` (DeepSeek, vLLM,
llama.cpp) or ``reasoning`` (vLLM since 0.11, OpenRouter, Ollama), else from the tags in the text.

Where neither is there, text alone does not say whether a model thought: one that hides its reasoning (o1, o3) and one
whose ``<think>`` stood in the prompt and was never closed look the same. ``Thinks`` says which it is; without being
told, what has no tag is taken as an answer, except behind an opened tag, and where it was cut at the limit with no word
from the server of hidden thinking: half a chain of thought often holds a "Final answer" that the model then drops.

A stream is split into lines as its standard says. ``str.splitlines``, and with it httpx's and requests' line readers,
also splits at U+2028 and U+0085, which servers write as they are into their JSON: a model that writes one such sign
would never get an answer through, however often it is asked.

A frame that a server forgets to take off is taken off here, and nothing else is: ``transformers serve`` (5.23) repeats
the whole prompt before the answers of DeepSeek-R1-Distill-Qwen, and leaves the end-of-turn token behind them. As it
comes, no such answer can be read, and where there is none, the question's own words stand in its place.

Sources: the OpenAI API reference (chat completion object, chunk object); the HTML standard's server-sent events.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from medcot.evaluate.backends import Answer, Counts, Request
from medcot.prompt import THINK_CLOSE, THINK_OPEN
from medcot.records import Finish

_ENDED = {"stop": Finish.EOS, "eos": Finish.EOS, "length": Finish.LENGTH, "max_tokens": Finish.LENGTH}
# The server gave up: DeepSeek, vLLM and SGLang, OpenRouter, in their words.
_GAVE_UP = ("insufficient_system_resource", "abort", "error")
_REASONING = ("reasoning_content", "reasoning")
_LINE_END = re.compile(r"\r\n|\n|\r")
# A token of the chat frame: <|im_end|>, <｜Assistant｜>, </s>.
_FRAME = r"(?:<[|｜][^<>|｜\s]{1,40}[|｜]>|</?s>|<(?:bos|eos|start_of_turn|end_of_turn)>)"
_BEFORE = re.compile(rf"\s*(?:{_FRAME}(?:user\b)?\s*)+")
_BETWEEN = re.compile(rf"\s*(?:{_FRAME}(?:(?:assistant|model)\b)?\s*)*")
_AFTER = re.compile(rf"(?:\s*{_FRAME})+\s*$")


class Thinks(StrEnum):
    """How a served model shows its reasoning."""

    AUTO = "auto"  # in a field, or up to a tag; without either, what it wrote is the answer unless it was cut
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
        self.usage = _mapping(body.get("usage")) or self.usage
        self.model = _text(body.get("model")) or self.model
        choices = body.get("choices")
        if not isinstance(choices, list) or not choices:  # the last chunk of a stream has the usage alone
            return
        choice = _mapping(choices[0])
        if choice.get("error"):
            raise Broken(f"the server sent {json.dumps(choice['error'])[:200]}")
        message = _mapping(choice.get(part))
        self.content += _text(message.get("content"))
        self.reasoning += next((_text(message[key]) for key in _REASONING if message.get(key)), "")
        self.finish = _text(choice.get("finish_reason")) or self.finish

    @property
    def num_tokens(self) -> int | None:
        """Tokens read and written together, by the server's account; ``None`` where it gives none."""
        total = _number(self.usage.get("total_tokens"))
        if total is not None:
            return total
        parts = [_number(self.usage.get(name)) for name in ("prompt_tokens", "completion_tokens")]
        return sum(part or 0 for part in parts) if any(part is not None for part in parts) else None


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


def read_stream(data: bytes) -> Reply:
    """Read a reply sent as server-sent events, all of it.

    Raises:
        Broken: it is not whole.
    """
    reply = Reply()
    for line in _LINE_END.split(data.decode(errors="replace")):
        if not line.startswith("data:"):
            continue  # an empty line, a comment that keeps the line open, an event's name
        event = line.removeprefix("data:").strip(" ")
        if event == "[DONE]":
            break
        try:
            chunk = json.loads(event)
        except ValueError:
            raise Broken(f"a piece of the stream is no JSON: {event[:80]!r}") from None
        reply.take(chunk, "delta")
    return _whole(reply)


def _whole(reply: Reply) -> Reply:
    if reply.finish is None:
        raise Broken("it broke off before the reason for its end")
    if reply.finish in _GAVE_UP:
        raise Broken(f"the server gave it up with finish_reason '{reply.finish}'")
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
    question = request.question.strip()
    reply = replace(
        reply,
        content=_take_frame_off(reply.content, question, finish),
        reasoning=_take_frame_off(reply.reasoning, question, finish),
    )
    cut = finish is Finish.LENGTH and request.limits.think_tokens > 0
    think, answer, closed = _split(reply, thinks, cut=cut)
    num_prompt, num_think, num_answer, counts = _count(reply.usage, think, answer)
    cost = None
    if price is not None and counts is not Counts.UNKNOWN:
        cost = (num_prompt * price.prompt + (num_think + num_answer) * price.completion) / 1e6
    return Answer(
        item_id=request.item_id,
        seed=request.seed,
        text=f"{THINK_OPEN}\n{think}\n{THINK_CLOSE}\n\n{answer}" if reply.reasoning and closed
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


def _take_frame_off(content: str, question: str, finish: Finish) -> str:
    """Return what a model wrote, without the prompt before it and the token that ended it."""
    before, found, rest = content.partition(question)
    if question and found and _BEFORE.fullmatch(before):
        content = rest[between.end() :] if (between := _BETWEEN.match(rest)) else rest
    return _AFTER.sub("", content) if finish is Finish.EOS else content


def _split(reply: Reply, thinks: Thinks, *, cut: bool) -> tuple[str, str, bool]:
    """Return thinking, answer, and whether thinking ended; ``cut`` is one that was to think and met its limit."""
    think, tag, answer = reply.content.rpartition(THINK_CLOSE)
    if tag:
        return _join(reply.reasoning, think), answer.strip(), True
    content = reply.content.strip()
    if reply.reasoning:
        return reply.reasoning.strip(), content, bool(content)
    cut = cut and not _num_hidden(reply.usage)
    if thinks is Thinks.TAGS or cut or content.startswith(THINK_OPEN):
        return content.removeprefix(THINK_OPEN).strip(), "", False
    return "", content, bool(content)


def _join(reasoning: str, think: str) -> str:
    return "\n".join(part for part in (reasoning.strip(), think.replace(THINK_OPEN, "").strip()) if part)


def _count(usage: Mapping[str, Any], think: str, answer: str) -> tuple[int, int, int, Counts]:
    """Return tokens read, of thinking and of the answer, and how far they can be trusted."""
    total = _number(usage.get("completion_tokens"))
    if total is None:
        return 0, 0, 0, Counts.UNKNOWN
    num_prompt = _number(usage.get("prompt_tokens")) or 0
    num_think = _num_hidden(usage)
    if num_think is not None and (num_think or not think):
        return num_prompt, num_think, max(0, total - num_think), Counts.EXACT
    if not think or not answer:
        return num_prompt, total if think else 0, 0 if think else total, Counts.EXACT
    num_think = round(total * len(think) / (len(think) + len(answer)))
    return num_prompt, num_think, total - num_think, Counts.APPORTIONED


def _num_hidden(usage: Mapping[str, Any]) -> int | None:
    """Return the tokens of thinking that the server counted, shown or not."""
    return _number(_mapping(usage.get("completion_tokens_details")).get("reasoning_tokens"))


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _text(value: object) -> str:
    """Return a message's text, which some servers send in parts."""
    if isinstance(value, list):
        return "".join(str(part.get("text", "")) for part in value if isinstance(part, dict))
    return value if isinstance(value, str) else ""
