"""One interface for whatever answers questions: the model in memory, vLLM, or a server somewhere.

An evaluation does not care who writes the answers, and a comparison is only worth something when every one of them is
asked, limited and counted alike. So a back end takes ``Request``s and calls back with one ``Answer`` for each, as it
comes; nothing else is shared. One call for each answer, failed ones among them, is the promise that lets
``store.answer_all`` say that no item was lost and none counted twice. The usual interface, a function from prompts to
texts, has no word for an item that failed, and loses all of them when the process dies at the last.

Limits are in two parts, because they are two questions: how long may it think, and how much may it say. ``Ending`` says
what happens at the first border. Budget forcing (``FORCED``) closes the block at the cap and asks for the answer
(Muennighoff et al. 2025, arXiv:2501.19393); ``LIKELIHOOD`` then compares the choices instead of letting the model
write, which measures something in models too small to keep to any form. No thinking at all is a budget of 0.

This module loads neither a tensor library nor an HTTP client; ``local.py``, ``vllm_writer.py`` and ``endpoint.py`` do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from medcot.records import Completion, Finish


class Ending(StrEnum):
    """What happens when the tokens for thinking are spent."""

    WRITTEN = "written"  # nothing: thinking and answer share one limit, and what it cuts stays cut
    FORCED = "forced"  # thinking is closed, and the final answer asked for
    LIKELIHOOD = "likelihood"  # as FORCED, and the likeliest of the choices is taken


class Counts(StrEnum):
    """Where an answer's token counts are from."""

    EXACT = "exact"  # counted by us, or told by the server
    APPORTIONED = "apportioned"  # a server's total, shared between thinking and answer by their characters
    UNKNOWN = "unknown"  # the server told none


class Draws(Protocol):
    """How tokens are drawn: ``generate.Sampling``, without loading what that module needs."""

    @property
    def temperature(self) -> float:
        """0 is greedy."""

    @property
    def top_p(self) -> float:
        """Share of the nucleus."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How long a model may think and answer.

    Attributes:
        think_tokens: cap on thinking; 0 opens and closes an empty block.
        answer_tokens: cap on what follows.
        ending: what happens at the first cap.
    """

    think_tokens: int
    answer_tokens: int
    ending: Ending = Ending.WRITTEN


@dataclass(frozen=True, slots=True)
class Request:
    """One question to be answered once.

    Attributes:
        item_id: the item's id, by which its answer is found again.
        question: what is asked, the form of the last line included; the back end puts its own frame around it.
        sampling: how tokens are drawn.
        seed: of the draws.
        limits: how long the answer may be.
        choices: the final answers that ``Ending.LIKELIHOOD`` compares: letters, or yes, no and maybe.
    """

    item_id: str
    question: str
    sampling: Draws
    seed: int
    limits: Limits
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of one request.

    Attributes:
        item_id: the request's.
        seed: the request's.
        text: all that was written, thinking tags included.
        think: the reasoning; empty where the server hides it.
        answer: what follows it.
        closed: whether thinking came to its end.
        finish: why writing stopped; ``None`` of an answer that failed.
        num_prompt_tokens: tokens read.
        num_think_tokens: tokens up to and with the closing tag.
        num_answer_tokens: tokens after it.
        counts: how far these three can be trusted.
        seconds: of a server, from sending to the last byte of the attempt that counted; of a batch, its share.
        cost: by the price table given, in its currency; ``None`` without one.
        forced: whether thinking was closed for the model.
        log_probs: of each choice, in nats, where they were compared.
        num_attempts: how often it was sent.
        served_by: the model's name as the server gave it.
        error: why there is no text; ``None`` where there is.
    """

    item_id: str
    seed: int
    text: str = ""
    think: str = ""
    answer: str = ""
    closed: bool = False
    finish: Finish | None = None
    num_prompt_tokens: int = 0
    num_think_tokens: int = 0
    num_answer_tokens: int = 0
    counts: Counts = Counts.UNKNOWN
    seconds: float = 0.0
    cost: float | None = None
    forced: bool = False
    log_probs: dict[str, float] | None = None
    num_attempts: int = 1
    served_by: str | None = None
    error: str | None = None

    @property
    def completion(self) -> Completion | None:
        """The part that is graded; ``None`` of an answer that failed."""
        if self.finish is None:
            return None
        return Completion(
            text=self.text,
            think=self.think,
            answer=self.answer,
            closed=self.closed,
            finish=self.finish,
            num_prompt_tokens=self.num_prompt_tokens,
            num_think_tokens=self.num_think_tokens,
            num_answer_tokens=self.num_answer_tokens,
        )


OnAnswer = Callable[[Answer], None]


class Backend(Protocol):
    """Whatever answers."""

    def prompt_of(self, request: Request) -> str:
        """Return all the text that the model reads, as far as it is known; a change of it is another question."""

    def answer(self, requests: Sequence[Request], on_answer: OnAnswer) -> None:
        """Answer all requests, calling ``on_answer`` exactly once for each, in any order, from one thread.

        Raises:
            MedcotError: nothing of it can be answered (a wrong key, no such model). What fails for one question alone
                is an ``Answer`` with its ``error``.
        """


def answer_failed(request: Request, error: str, *, num_attempts: int = 1) -> Answer:
    """Return the answer that stands for none."""
    return Answer(request.item_id, request.seed, error=error, num_attempts=num_attempts)
