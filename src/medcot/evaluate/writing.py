"""What a token back end knows of rows while they are written: their seeds, their share of the time, what they thought.

Rows share a machine, so the seconds of an answer are what it would cost alone only if the time of all is divided among
those that were being written: then they add up, however many were written together.

A thought is remembered because it can be: a row's draws depend on its seed and its step alone, so what is written into
a small room is the beginning of what is written into a large one.
"""

from __future__ import annotations

import hashlib
import json
import time
from array import array
from typing import TYPE_CHECKING

from medcot.evaluate.backends import Request
from medcot.records import Finish

if TYPE_CHECKING:
    from medcot.generate import Generated


def seed_of(request: Request, part: str = "") -> int:
    """The seed of a row's draws, by the request's seed and its item's id; ``part`` tells a second go from the first."""
    text = json.dumps([request.seed, request.item_id, part])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1


class Shares:
    """Each row's share of the time: what passes is divided among those in the slots, so that all shares make the whole.

    Args:
        num_rows: rows in the order in which they get slots.
        num_slots: rows written together.
    """

    def __init__(self, num_rows: int, num_slots: int) -> None:
        self._left, self._num_slots = num_rows, num_slots
        self._then = time.monotonic()
        self._passed = 0.0  # what a row that was there all the time has had
        self._starts = [0.0] * num_slots  # that, when each row got its slot

    def end(self, row: int) -> float:
        """Return the seconds of a row that has just ended."""
        now = time.monotonic()
        self._passed += (now - self._then) / min(self._left, self._num_slots)
        self._then, self._left = now, self._left - 1
        self._starts.append(self._passed)
        return self._passed - self._starts[row]


class Thoughts:
    """What was written behind prompts, the longest of each: a shorter one is its beginning."""

    def __init__(self) -> None:
        self._kept: dict[object, tuple[array[int], Finish]] = {}

    def keep(self, key: object, tokens: list[int], finish: Finish) -> None:
        """Keep what was written, unless more is kept."""
        if key not in self._kept or len(self._kept[key][0]) < len(tokens):
            self._kept[key] = array("i", tokens), finish

    def find(self, key: object, room: int) -> Generated | None:
        """Return what would be written into this room, where it is known."""
        tokens, finish = self._kept.get(key, (array("i"), Finish.LENGTH))
        if len(tokens) > room:
            return tokens[:room].tolist(), Finish.LENGTH
        if finish is Finish.EOS or len(tokens) == room:
            return tokens.tolist(), finish
        return None
