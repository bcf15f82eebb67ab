"""Which prompt is in which slot of the cache, and when a slot whose row has ended is given the next one.

Batch after batch, every batch is as slow as its longest row: of reasoning answers, most slots stand idle most of the
time. Here a slot whose row has ended takes a waiting prompt while the others go on (Yu et al. 2022, "Orca", OSDI). Only
when none waits do rows leave, so that the last ones do not pay for the width of the first.

When to refill. Reading R prompts costs ``t0 + R t1``: the ``t1`` are paid in any case, the ``t0`` (a launch of every
operation of every layer, or every weight read from memory once more) each time that decoding stops to read. A slot that
waits loses its share of each step. With B slots, rows of L tokens and steps of ``t``, rows end at B/L a step; refilling
every k steps loses ``k/2L`` by slots that wait and ``t0/kt`` by stopping, least at ``k = √(2L t0/t)``, where the share
of slots that are free is ``k/L = √(2 t0/(L t))``. On one H200 an 8B is launched in about 8 ms and 256 rows step in
about 16, so ``t0/t`` is near 1/2 (reckoned, not measured), and on a CPU reading the weights once against a step of
sixteen rows comes to about the same. The best share is then 1/11 for rows of 128 tokens, 1/22 for 512, 1/45 for 2,048;
the loss is flat around it: with 1/16 it is at most a half more than the least for any of these, and under 8 %.

Prompts are read in the order given. Nothing is padded, so sorting them by length would save nothing; and whoever wants
the longest answers begun first can give them first.

Which row a token belongs to is told by the prompt in the slot when the step was launched, and no prompt is ever in two
slots: tokens of steps that were launched before anyone knew that a row had ended need no further mark to be known.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

# Slots are refilled when this share of them is free, see above.
REFILL_SHARE = 1 / 16
# Prompts are read together up to this many tokens: matrix products are at their best long before, and the widest
# activations (three of an 8B's 28,672 in 16 bit) come to 1.4 GB.
READ_TOKENS = 8192
EMPTY = -1


class Piece(NamedTuple):
    """Prompts to be read together: the slots they go to, and which they are."""

    places: list[int]
    rows: list[int]


class Slots:
    """The rows of a static cache, handed out to prompts.

    Args:
        lengths: tokens of each prompt.
        num_slots: rows of the cache.

    Attributes:
        rows: the prompt in each slot, by its index; one that has ended is there until the slot is given away.
        running: prompts that are being written.
        num_ended: prompts that are done.
    """

    def __init__(self, lengths: Sequence[int], num_slots: int) -> None:
        self.rows = [EMPTY] * min(num_slots, len(lengths))
        self.running: set[int] = set()
        self.num_ended = 0
        self._lengths = lengths
        self._waiting = deque(range(len(lengths)))

    @property
    def busy(self) -> bool:
        """Whether a prompt is waiting or being written."""
        return bool(self.running or self._waiting)

    def end(self, row: int) -> None:
        """Note that a prompt's row has ended."""
        self.running.remove(row)
        self.num_ended += 1

    def fill(self) -> list[Piece]:
        """Give free slots to waiting prompts, where enough are free; return what is to be read, piece by piece."""
        num_free = len(self.rows) - len(self.running)
        wanted = min(len(self._waiting), math.ceil(REFILL_SHARE * len(self.rows)))
        if num_free < wanted or not self._waiting:
            return []
        free = [place for place, row in enumerate(self.rows) if row not in self.running]
        taken = [(place, self._waiting.popleft()) for place in free[: len(self._waiting)]]
        for place, row in taken:
            self.rows[place] = row
            self.running.add(row)
        parts = split_to_read([self._lengths[row] for _, row in taken])
        return [Piece([taken[i][0] for i in part], [taken[i][1] for i in part]) for part in parts]

    def drop(self, share: float) -> list[int] | None:
        """Forget slots whose rows have ended, where none waits and ``share`` have; return the places that stay."""
        if self._waiting or not self.running or len(self.running) > (1 - share) * len(self.rows):
            return None
        places = [place for place, row in enumerate(self.rows) if row in self.running]
        self.rows = [self.rows[place] for place in places]
        return places


def split_to_read(lengths: Sequence[int]) -> Iterator[range]:
    """Split prompts, in order, into pieces of at most ``READ_TOKENS``, or of one prompt that is longer."""
    start = num_tokens = 0
    for index, length in enumerate(lengths):
        if index > start and num_tokens + length > READ_TOKENS:
            yield range(start, index)
            start, num_tokens = index, 0
        num_tokens += length
    if lengths:
        yield range(start, len(lengths))
