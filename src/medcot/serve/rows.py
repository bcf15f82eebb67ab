"""A job while it is written: every token that comes is turned into text here, and it is decided whether it goes on.

Stop strings are looked for in the answer alone: a chain of thought quotes what it will say. Text that may be the
beginning of one is held back until it is known not to be, so no client sees half of it.

A row's draws are its own: the n-th token the model writes is picked by the n-th number of the stream of its seed, as in
``generate``, so an answer depends neither on who else is being answered nor on when it was asked.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from medcot.generate import make_chances, row_seed
from medcot.prompt import StreamSplitter, TokenText, answer_ids, closing_ids, count_torn
from medcot.serve.jobs import End, Ending, Job, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from medcot.prompt.frames import Frame


class StopMatcher:
    """Looks for stop strings in text that comes in pieces.

    Args:
        stops: what ends the text; none empty.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops, self._held = stops, ""
        self.found = False

    def feed(self, text: str) -> str:
        """Take some text; return what is certainly no part of a stop string and stands before any."""
        if not self._stops or self.found:
            return "" if self.found else text
        text = self._held + text
        places = [text.find(stop) for stop in self._stops]
        first = min((place for place in places if place >= 0), default=-1)
        if first >= 0:
            self.found, self._held = True, ""
            return text[:first]
        longest = max(map(len, self._stops)) - 1
        num_held = next(
            (n for n in range(min(longest, len(text)), 0, -1) if any(s.startswith(text[-n:]) for s in self._stops)), 0
        )
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def finish(self) -> str:
        """Return what was held back."""
        held, self._held = self._held, ""
        return held


class Row:
    """A job that has a slot.

    Args:
        job: what is asked.
        tokenizer: the model's.
        frame: of the prompt style, which says how thinking is closed.
        eos_ids: tokens that end an answer.

    Attributes:
        written: tokens so far.
        num_think: of these, thinking.
        ending: why it ended; ``None`` before.
        first_s: when its first token came, on the monotonic clock; ``None`` before.
    """

    def __init__(self, job: Job, tokenizer: PreTrainedTokenizerBase, frame: Frame, eos_ids: set[int]) -> None:
        self.job, self.written, self.num_think = job, list[int](), 0
        self.ending: Ending | None = None
        self.first_s: float | None = None
        self._tokenizer, self._frame, self._eos_ids = tokenizer, frame, eos_ids
        self._splitter = StreamSplitter(tokenizer) if job.splits else None
        self._plain = None if job.splits else TokenText(tokenizer)
        self._stops = StopMatcher(job.stop)
        self._num_drawn = 0
        self._chances = make_chances(row_seed(job.seed, 0), job.max_tokens) if job.sampling.temperature else None

    @property
    def chance(self) -> float:
        """The number that picks the next token."""
        return 0.0 if self._chances is None else float(self._chances[self._num_drawn])

    @property
    def ended(self) -> bool:
        """Whether it has told its end."""
        return self.ending is not None

    @property
    def in_think(self) -> bool:
        """Whether it is thinking."""
        return self._splitter is not None and self._splitter.in_think

    @property
    def ids(self) -> list[int]:
        """All that the model has read or written."""
        return [*self.job.prompt_ids, *self.written]

    def take(self, token: int) -> None:
        """Take the model's next token, tell its text, and end where it ends."""
        self.first_s = self.first_s or time.monotonic()
        self._num_drawn += 1
        self._add(token)
        if token in self._eos_ids or self._stops.found:
            self.end(Ending.STOP)
        elif self._num_drawn >= self.job.max_tokens or len(self.written) >= self.job.max_tokens:
            self.end(Ending.LENGTH)

    @property
    def must_close(self) -> bool:
        """Whether its thinking has reached the cap; ``close`` then."""
        cap = self.job.think_tokens
        return cap is not None and self.in_think and len(self.written) >= cap and not self.ended

    def close(self) -> None:
        """Close the thinking for the model; the slot must then read the row again."""
        torn = count_torn(self.written, self._frame)
        ids = closing_ids(self._frame, self._tokenizer)
        if torn:  # the model has begun the tag itself
            ids = [*self._frame.close_ids[torn:], *answer_ids(self._frame, self._tokenizer, "")]
        elif not self.written:  # no thinking at all: its block is opened as a training row opens it
            ids = closing_ids(self._frame, self._tokenizer, before=self._frame.before_think)
        for token in ids:
            self._add(token)
        if len(self.written) >= self.job.max_tokens:
            self.end(Ending.LENGTH)

    def end(self, ending: Ending, *, timed_out: bool = False) -> None:
        """Tell what was held back, and that it is over; once."""
        if self.ended:
            return
        self.ending = ending
        if ending in (Ending.STOP, Ending.LENGTH):
            for piece in self._rest():
                self.job.tell(piece)
            if self._stops.found:  # in what was held back
                self.ending = Ending.STOP
        self.job.tell(End(self.ending, len(self.job.prompt_ids), len(self.written), self.num_think, timed_out))

    def _add(self, token: int) -> None:
        self.num_think += self.in_think and token not in self._eos_ids
        self.written.append(token)
        if self._splitter is not None:
            pieces = [(piece.text, piece.in_think) for piece in self._splitter.feed(token)]
        else:
            assert self._plain is not None
            pieces = [(self._plain.feed(token), False)]
        for text, in_think in pieces:
            shown = text if in_think else self._stops.feed(text)
            if shown:
                self.job.tell(Text(shown, in_think))

    def _rest(self) -> Iterator[Text]:
        if self._stops.found:
            return
        if self._splitter is not None:
            pieces = [(piece.text, piece.in_think) for piece in self._splitter.finish()]
        else:
            assert self._plain is not None
            pieces = [(self._plain.finish(), False)]
        for text, in_think in pieces:
            shown = text if in_think else self._stops.feed(text)
            if shown:
                yield Text(shown, in_think)
        if held := self._stops.finish():
            yield Text(held, False)
