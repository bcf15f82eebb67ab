"""The model behind the pages: loaded when it is first asked, and one question at a time.

A page that answers many people side by side is ``medcot serve``'s business. Here one thread has the model, questions
wait in a line, and each knows how many are before it. Whoever closes the browser while an answer is being written is
noticed because nobody looks any more: an answer that nobody looked at for ``PATIENCE_S`` is stopped, so that the next
one in the line does not wait for text that no one reads. Gradio's own queue would tell none of this to the page, and
its ``cancels`` cannot reach a thread that is inside a forward pass.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from medcot.errors import MedcotError, ModelError

if TYPE_CHECKING:
    from medcot.answering import Choice
    from medcot.evaluate.speaking import Speaker, Spoken

PATIENCE_S = 20.0  # a browser that is there looks several times a second
MOST_WAITING = 16
MOST_THINKING, MOST_ANSWER = 4096, 1024  # tokens; what the pages offer

_log = logging.getLogger("medcot.ui")


@dataclass(frozen=True, slots=True)
class Wish:
    """What is asked, and how; the thinking is closed at ``think_tokens``."""

    question: str
    base: bool
    think_tokens: int
    answer_tokens: int
    temperature: float
    top_p: float
    seed: int


class State(StrEnum):
    """How far an answer is."""

    WAITING = "waiting"
    LOADING = "loading"
    WRITING = "writing"
    DONE = "done"
    STOPPED = "stopped"
    FAILED = "failed"


OVER = (State.DONE, State.STOPPED, State.FAILED)


@dataclass(frozen=True, slots=True)
class Look:
    """An answer as it stands at one moment.

    Attributes:
        state: how far it is.
        ahead: answers before it.
        think: the thinking so far.
        answer: the answer so far.
        think_s: seconds of thinking so far.
        answer_s: seconds of answering so far.
        spoken: what came of it, once it is over.
        error: value, rule and remedy, where it failed.
    """

    state: State
    ahead: int = 0
    think: str = ""
    answer: str = ""
    think_s: float = 0.0
    answer_s: float = 0.0
    spoken: Spoken | None = None
    error: tuple[str, str, str] | None = None


class Answering:
    """One answer on its way. The model's thread writes it, a page looks at it.

    Args:
        wish: what was asked.
        owner: whose it is: a browser's session.
    """

    def __init__(self, wish: Wish, owner: str) -> None:
        self.wish, self.owner = wish, owner
        self.state = State.WAITING
        self._texts = {True: "", False: ""}
        self._began = self._answered = self._ended = 0.0
        self._spoken: Spoken | None = None
        self._error: tuple[str, str, str] | None = None
        self._stop = threading.Event()
        self._looked_at = time.monotonic()

    @property
    def over(self) -> bool:
        """Whether nothing more comes."""
        return self.state in OVER

    def stop(self) -> None:
        """Stop after the token that is being written, or before the first."""
        self._stop.set()

    def stopped(self) -> bool:
        """Whether it is to stop: somebody said so, or nobody looks."""
        return self._stop.is_set() or time.monotonic() - self._looked_at > PATIENCE_S

    def look(self, ahead: int = 0) -> Look:
        """Return how it stands."""
        self._looked_at = now = time.monotonic()
        state = self.state  # read first: what is over has all its text
        end = self._ended or now
        turn = self._answered or end
        return Look(
            state,
            ahead,
            self._texts[True],
            self._texts[False],
            turn - self._began if self._began else 0.0,
            end - turn,
            self._spoken,
            self._error,
        )

    def write(self, open_speaker: Callable[[], Speaker]) -> None:
        """Answer, on the model's thread; what goes wrong is kept for the page."""
        try:
            if self.stopped():
                self.state = State.STOPPED
                return
            self.state = State.LOADING
            from medcot.evaluate.speaking import choose_limits  # seconds, the first time
            from medcot.generate import Sampling

            speaker = open_speaker()
            wish = self.wish
            limits = choose_limits(wish.think_tokens, wish.answer_tokens)
            speaker.check_room(wish.question, limits)
            self._began = time.monotonic()
            self.state = State.WRITING
            self._spoken = speaker.say(
                wish.question,
                limits,
                sampling=Sampling(wish.temperature, wish.top_p),
                seed=wish.seed,
                base=wish.base,
                on_text=self._add,
                stopped=self.stopped,
            )
            self._end(State.STOPPED if self._spoken.stopped else State.DONE)
        except MedcotError as error:
            self._error = error.value, error.rule, error.remedy
            self._end(State.FAILED)
        except Exception:
            # The page must come to an end whatever happens; the terminal, where medcot ui runs, gets all of it.
            _log.exception("an answer could not be written")
            self._error = ("The answer could not be written", "This is a fault of medcot", "The terminal says more")
            self._end(State.FAILED)

    def _end(self, state: State) -> None:
        self._ended = time.monotonic()
        self.state = state

    def _add(self, piece: str, in_think: bool) -> None:
        if not in_think and not self._answered:
            self._answered = time.monotonic()
        self._texts[in_think] += piece


class Voice:
    """The line before one model.

    Args:
        choice: the model.
    """

    def __init__(self, choice: Choice) -> None:
        self.choice = choice
        self._speaker: Speaker | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="medcot-ui-model")
        self._line: list[Answering] = []
        self._lock = threading.Lock()

    @property
    def has_adapter(self) -> bool:
        """Whether there is a tuned model beside the base."""
        return self.choice.adapter is not None

    def ask(self, wish: Wish, owner: str) -> Answering:
        """Put a question in the line.

        Raises:
            ModelError: the line is too long.
        """
        with self._lock:
            self._line = [one for one in self._line if not one.over]
            if len(self._line) >= MOST_WAITING:
                raise ModelError(
                    f"{len(self._line)} questions are waiting", "The model answers one at a time", "Ask again later"
                )
            answering = Answering(wish, owner)
            self._line.append(answering)
        self._thread.submit(answering.write, self._open)
        return answering

    def look(self, answering: Answering) -> Look:
        """Return how an answer stands, and how many are before it."""
        with self._lock:
            before = self._line[: self._line.index(answering)] if answering in self._line else []
        return answering.look(sum(not one.over for one in before))

    def stop(self, owner: str) -> None:
        """Stop all answers of a session."""
        with self._lock:
            mine = [one for one in self._line if one.owner == owner]
        for one in mine:
            one.stop()

    def close(self) -> None:
        """Stop all answers, and wait for the one that is being written to notice."""
        with self._lock:
            for one in self._line:
                one.stop()
        self._thread.shutdown(cancel_futures=True)

    def _open(self) -> Speaker:
        """Load the model, once; on the model's thread."""
        if self._speaker is None:
            self._speaker = open_speaker(self.choice)
        return self._speaker


def open_speaker(choice: Choice) -> Speaker:
    """Load a model and its adapter.

    Raises:
        MedcotError: one of them cannot be loaded.
    """
    from medcot.answering import find_adapter
    from medcot.evaluate.speaking import Speaker
    from medcot.model import load

    adapter = None if choice.adapter is None else find_adapter(choice.adapter)
    loaded = load(
        choice.source,
        precision=choice.precision,
        revision=choice.revision,
        max_seq_length=1,  # how long it may get is known with the question: Speaker.check_room
        allow_pickle=choice.allow_pickle,
        trust_remote_code=choice.trust_remote_code,
    )
    for note in loaded.notes:
        _log.info(note)
    return Speaker(loaded, choice.style, adapter=adapter, accelerate=choice.accelerate)
