"""The loss of rows that are never trained on.

transformers' own evaluation loop pads rows to a rectangle, averages the means of its batches (so that short batches
weigh as much as long ones) and, with several processes, repeats rows to make them even. Here the held-out rows go
through the very forward that training uses, packed end to end, and their loss is the sum over all trained tokens
divided by their number: the same number however rows are batched, up to the rounding of float32.

Batches are settled once, longest rows first, none with more tokens than the memory plan foresaw for a training forward
(unless a single row has more). Processes take them in turn; the sums are added up in float64 in the order of the
batches, so that more processes change nothing but the time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from medcot import ranks
from medcot.data.packing import flatten_rows
from medcot.records import Row


class Validation:
    """Held-out rows in batches.

    Args:
        rows: the rows; at least one token of them carries loss.
        max_tokens: of one forward.
    """

    def __init__(self, rows: Sequence[Row], max_tokens: int) -> None:
        self.num_trained = sum(row.num_trained_tokens for row in rows)
        assert self.num_trained > 0, "each row's answer carries loss"
        self.batches: list[list[Row]] = []
        room = 0
        for row in sorted(rows, key=lambda row: -row.num_tokens):
            if row.num_tokens > room:
                self.batches.append([])
                room = max_tokens
            self.batches[-1].append(row)
            room -= row.num_tokens

    def compute_loss(self, summed_loss: Callable[[dict[str, Any]], Tensor]) -> float:
        """Return the mean loss of all trained tokens; the same number in every process.

        Args:
            summed_loss: the summed loss of a batch of ``data.packing.collate``.
        """
        here = ranks.current()
        mine = range(here.rank, len(self.batches), here.size)
        losses = [summed_loss(flatten_rows(self.batches[number])).detach() for number in mine]
        sums = torch.zeros(len(self.batches), dtype=torch.float64)
        if losses:
            sums[list(mine)] = torch.stack(losses).double().cpu()  # all at once: a GPU is waited for once
        if here.size > 1:
            torch.distributed.all_reduce(sums, group=here.messages)  # each has zeros where the others have sums
        return float(sums.sum()) / self.num_trained


class ValidationSteps(TrainerCallback):
    """Asks the trainer for a validation after every so many steps, and after the last.

    Args:
        every: steps; ``None`` for the last one only.
    """

    def __init__(self, every: int | None) -> None:
        self._every = every

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for it where it is due."""
        due = self._every is not None and state.global_step % self._every == 0
        if due or state.global_step >= state.max_steps:
            control.should_evaluate = True
