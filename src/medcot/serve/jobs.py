"""What is asked of the scheduler, and what it tells while it writes; no tensors."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from medcot.generate import Sampling


class Ending(StrEnum):
    """Why a row ended."""

    STOP = "stop"  # EOS, or a stop string
    LENGTH = "length"  # its tokens, the room of its slot, or its time
    CANCELLED = "cancelled"  # nobody listens any more
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Text:
    """Some more of what is written."""

    text: str
    in_think: bool


@dataclass(frozen=True, slots=True)
class End:
    """The last thing that is told of a job.

    Attributes:
        ending: why.
        num_prompt_tokens: of the prompt.
        num_tokens: written, the forced close of the thinking among them.
        num_think_tokens: of these, thinking.
        timed_out: whether it was cut by its deadline.
    """

    ending: Ending
    num_prompt_tokens: int
    num_tokens: int
    num_think_tokens: int
    timed_out: bool = False


@dataclass
class Job:
    """One answer to be written.

    Attributes:
        model: whose, by the name it is served under.
        prompt_ids: what the model reads.
        max_tokens: of thinking and answer together.
        sampling: how tokens are drawn.
        seed: of the draws.
        splits: whether the prompt opened a thinking block, so that thinking is told apart from the answer.
        think_tokens: the most of them before the thinking is closed; ``None`` for no cap.
        stop: texts that end the answer, and are not part of it.
        tell: called from the scheduler's thread with each ``Text`` and then one ``End``; it must not wait.
        seconds: how long the job may take in all, waiting included.
        cancelled: set when nobody listens any more.
        asked_s: when it was made, on the monotonic clock.
    """

    model: str
    prompt_ids: Sequence[int]
    max_tokens: int
    sampling: Sampling
    seed: int
    splits: bool
    tell: Callable[[Text | End], None]
    think_tokens: int | None = None
    stop: tuple[str, ...] = ()
    seconds: float = 600.0
    cancelled: threading.Event = field(default_factory=threading.Event)
    asked_s: float = field(default_factory=time.monotonic)

    @property
    def is_late(self) -> bool:
        """Whether its time is up."""
        return time.monotonic() - self.asked_s > self.seconds
