"""Which rows of an optimizer step each process takes.

The rows of a step are those that one process alone would take, in the order that transformers and accelerate shuffle
them, so more processes change nothing but the speed. accelerate's own division does change them: it repeats rows to
make the last step of an epoch even. Here a step is dealt out longest rows first and back and forth, so that every
process has the same number of rows (at most one more) and about as many tokens; the one with most tokens is the one
that all wait for. A process that is left without rows gets an empty batch, which the collator fills with two tokens
that carry no loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import DataLoader, Dataset

from medcot.data.packing import collate


def deal(rows: Sequence[int], lengths: Sequence[int], size: int) -> list[list[int]]:
    """Deal the rows of a step out to ``size`` processes.

    Args:
        rows: row numbers.
        lengths: tokens of every row of the data, by row number.
        size: processes.
    """
    hands: list[list[int]] = [[] for _ in range(size)]
    longest_first = sorted(rows, key=lambda row: (-lengths[row], row))
    for position, row in enumerate(longest_first):
        turn, seat = divmod(position, size)
        hands[seat if turn % 2 == 0 else size - 1 - seat].append(row)
    return hands


class StepShares:
    """The batches of one process: a batch sampler of ``len`` equal on all processes.

    Args:
        sampler: the order of the rows, one permutation an epoch.
        lengths: tokens of every row.
        batch_size: rows of a step, over all processes.
        micro_batch_size: rows of a batch.
        rank: this process.
        size: processes.
    """

    def __init__(
        self,
        sampler: SeedableRandomSampler,
        lengths: Sequence[int],
        *,
        batch_size: int,
        micro_batch_size: int,
        rank: int,
        size: int,
    ) -> None:
        self.sampler, self.lengths = sampler, lengths
        self.batch_size, self.micro_batch_size = batch_size, micro_batch_size
        self.rank, self.size = rank, size

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        whole, rest = divmod(len(self.lengths), self.batch_size)
        return whole * self._num_batches(self.batch_size) + self._num_batches(rest)

    def __iter__(self) -> Iterator[list[int]]:
        order = list(self.sampler)
        for start in range(0, len(order), self.batch_size):
            step = order[start : start + self.batch_size]
            mine = deal(step, self.lengths, self.size)[self.rank]
            for number in range(self._num_batches(len(step))):
                yield mine[number * self.micro_batch_size : (number + 1) * self.micro_batch_size]

    def _num_batches(self, num_rows: int) -> int:
        """Batches that the process with most of ``num_rows`` rows needs."""
        return -(-num_rows // (self.size * self.micro_batch_size))


class ShareLoader(DataLoader[Any]):
    """A data loader that hands the epoch on to its ``StepShares``, as transformers' trainer asks of one."""

    def __init__(self, dataset: Dataset[Any], shares: StepShares, *, pin_memory: bool) -> None:
        super().__init__(dataset, batch_sampler=shares, collate_fn=collate_share, pin_memory=pin_memory)  # type: ignore[arg-type]
        self._shares = shares

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self._shares.set_epoch(epoch)


def collate_share(features: Sequence[dict[str, list[int]]]) -> dict[str, Any]:
    """Collate a batch; an empty one becomes a row of two tokens without loss, marked ``filler``."""
    if features:
        return collate(features)
    return {**collate([{"input_ids": [0, 0], "labels": [-100, -100]}]), "filler": True}
