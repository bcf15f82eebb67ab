"""Forwards that fit: a batch of rows is split when the GPU's memory runs out, and the same rows are taken again.

A memory plan is a prediction, and other programs use the card too. So a forward and backward that run out of memory are
not the end: the rows are split so that no forward has more than half of the tokens, and where a single row is too much,
its layers are told to keep less. What was learned holds for the rest of the run. Gradients are safe throughout, because
the engine hands them over all together at the end of a backward, so a failed one has left none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from medcot.engine.memory import Keep, Memory

# What to keep when the step before is too much for one row alone.
KEEP_LESS = {Keep.ALL: Keep.INPUT, Keep.LEAN: Keep.INPUT, Keep.INPUT: Keep.HOST}


@dataclass
class Budget:
    """What a forward may take; it only shrinks.

    Attributes:
        memory: what layers keep.
        small: the pieces in which the smallest setting works through a long row.
        max_tokens: of one forward; ``None`` before memory has run out.
        announce: told, in a sentence, whenever it shrinks.
    """

    memory: Memory
    small: Memory
    max_tokens: int | None = None
    announce: Callable[[str], None] = lambda sentence: None

    def run(self, inputs: dict[str, Any], forward_backward: Callable[[dict[str, Any], Memory], torch.Tensor]) -> Any:
        """Run a batch in as many pieces as memory demands; the sum of what each returned.

        Args:
            inputs: a batch of ``data.packing.collate``.
            forward_backward: does the work for a piece of it, and leaves no gradients when it runs out of memory.
        """
        total: Any = 0
        waiting = list(self._split(inputs))
        while waiting:
            piece = waiting.pop(0)
            try:
                total = total + forward_backward(piece, self.memory)
                continue
            except torch.OutOfMemoryError:
                if not self._shrink(piece):
                    raise
            torch.cuda.empty_cache()  # outside of the except block, which keeps the failed graph alive
            waiting = [*self._split(piece), *waiting]
        return total

    def _shrink(self, piece: dict[str, Any]) -> bool:
        """Learn from a piece that did not fit; false when there is nothing left to give up."""
        lengths = piece["lengths"]
        if self.memory.unpacked:
            self.memory = replace(self.memory, unpacked=False)
            self.announce("out of memory: 4-bit weights are unpacked anew for each use")
            return True
        if len(lengths) > 1:
            self.max_tokens = max(max(lengths), sum(lengths) // 2)
            self.announce(f"out of memory at {sum(lengths):,} tokens: forwards now take {self.max_tokens:,} at most")
            return True
        less = KEEP_LESS.get(self.memory.keep)
        if less is None:
            return False
        self.memory = replace(self.small, keep=less) if less is Keep.HOST else Memory(less)
        self.announce(f"out of memory at one row of {lengths[0]:,} tokens: layers now keep less ({less})")
        return True

    def _split(self, inputs: dict[str, Any]) -> Iterator[dict[str, Any]]:
        lengths = inputs["lengths"]
        if self.max_tokens is None or sum(lengths) <= self.max_tokens:
            yield inputs
            return
        first, tokens = 0, 0
        for index, length in enumerate(lengths):
            if tokens and tokens + length > self.max_tokens:
                yield _rows(inputs, first, index)
                first, tokens = index, 0
            tokens += length
        yield _rows(inputs, first, len(lengths))


def _rows(inputs: dict[str, Any], first: int, last: int) -> dict[str, Any]:
    lengths = inputs["lengths"]
    start, stop = sum(lengths[:first]), sum(lengths[:last])
    own = {name: inputs[name][:, start:stop] for name in ("input_ids", "labels", "position_ids")}
    return {**inputs, **own, "lengths": lengths[first:last]}
