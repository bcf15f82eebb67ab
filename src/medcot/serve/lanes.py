"""Lanes: the slots of one adapter, and how their rows are read and stepped.

All lanes share the base's weights. A lane binds the adapter that is switched on when it is opened (``BoundLayer``), so
the base and several adapters are written side by side, each in steps of its own, and no switch is thrown again. One
batch over rows of different adapters would save reading the base's weights twice where two lanes are busy at once; it
would cost every row the products of every adapter. A lane takes its memory when it is first asked for.

Rows sit in the lowest free slots, and a step takes the slots up to the highest that is taken: one row alone costs the
step of one row. ``decoding.Decoder`` has both on a CPU or an older GPU. On CUDA with Triton, ``graph_decoding.Stepper``
replays a recorded step of all slots; tokens are drawn outside of the graph there, since each row has its own
temperature, and the host must see each token anyway to tell it.

Axes: B rows; R of them read together; V vocabulary.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from medcot.engine import engine_of
from medcot.engine.attention import round_up
from medcot.engine.decoding import Decoder, fit_slots, has_graphs
from medcot.engine.slots import split_to_read
from medcot.generate import Sampling, draw, generate
from medcot.serve.jobs import Ending

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from medcot.serve.rows import Row


# Steps are of a multiple of so many slots: a CPU's library compiles its products anew for every number, and keeps them.
WIDTH_STEP = 8


class Lane(Protocol):
    """The slots of one adapter."""

    rows: dict[int, Row]  # by slot

    @property
    def num_free(self) -> int:
        """Slots that nobody has."""

    def admit(self, rows: Sequence[Row]) -> None:
        """Give rows slots, and write the first token of each; there must be enough."""

    def turn(self) -> None:
        """Write one token of each row; rows that have ended leave."""


class EngineLane:
    """Slots of a model that the engine knows.

    Args:
        model: accelerated, its adapter switched as this lane's rows shall have it.
        num_slots: rows at once; on a GPU fewer where memory has no room for them.
        row_tokens: of prompt and answer together.
    """

    def __init__(self, model: Any, num_slots: int, row_tokens: int) -> None:
        engine = engine_of(model)
        assert engine is not None, "only an accelerated model has a decoder"
        num_slots = fit_slots(engine, num_slots, row_tokens, [row_tokens])
        self._decoder: Any
        if has_graphs(engine):
            from medcot.engine.graph_decoding import Stepper

            self._decoder = Stepper(engine, num_slots, row_tokens)
        else:
            self._decoder = Decoder(engine, num_slots, row_tokens)
            for cache in (*self._decoder.keys, *self._decoder.values):
                cache.zero_()  # taken from the system now, and not bit by bit while answers are written
        self.rows: dict[int, Row] = {}
        self._free = list(range(num_slots))
        self._next = [0] * num_slots  # each slot's last token, which the next step reads

    @property
    def num_free(self) -> int:
        """Slots that nobody has."""
        return len(self._free)

    def admit(self, rows: Sequence[Row]) -> None:
        """Give rows slots, and write the first token of each."""
        for row in rows:
            if row.must_close:  # a cap of no tokens
                row.close()
        places = [heapq.heappop(self._free) for _ in rows]
        self.rows |= dict(zip(places, rows, strict=True))
        self._leave()
        self._read([place for place in places if place in self.rows])

    @torch.no_grad()
    def turn(self) -> None:
        """Write one token of each row."""
        closing = [place for place, row in sorted(self.rows.items()) if row.must_close and not row.ended]
        for place in closing:
            self.rows[place].close()
        self._leave()
        self._read([place for place in closing if place in self.rows])
        if self.rows:
            width = min(round_up(max(self.rows) + 1, WIDTH_STEP), len(self._next))
            if resting := [place for place in self._free if place < width]:
                self._decoder.rest(resting)
            logits_BV = self._decoder.step(torch.tensor(self._next[:width], device=self._decoder.device))
            self._take(sorted(self.rows), logits_BV)
            self._leave()

    @torch.no_grad()
    def _read(self, places: Sequence[int]) -> None:
        """Let slots read their rows from the beginning, and write the next token of each."""
        prompts = [self.rows[place].ids for place in places]
        for piece in split_to_read([len(prompt) for prompt in prompts]):
            some = [places[i] for i in piece]
            logits_RV = self._decoder.read(some, [prompts[i] for i in piece])
            self._take(some, logits_RV, by_place=False)
        self._leave()

    def _take(self, places: Sequence[int], logits: Tensor, *, by_place: bool = True) -> None:
        """Draw the next token of these slots; ``logits`` have a row for every slot, or one for each of these."""
        rows = [self.rows[place] for place in places]
        some = logits[list(places)] if by_place and len(places) < len(logits) else logits
        for place, row, token in zip(places, rows, draw_each(some, rows), strict=True):
            self._next[place] = token
            row.take(token)

    def _leave(self) -> None:
        for place in [place for place, row in self.rows.items() if row.ended]:
            del self.rows[place]
            heapq.heappush(self._free, place)


class PlainLane:
    """A model that the engine does not know: transformers' own generate, one row after the other.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        switched: switches its adapter as the rows shall have it, for as long as the block lasts.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        switched: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._model, self._tokenizer, self._switched = model, tokenizer, switched
        self.rows: dict[int, Row] = {}

    @property
    def num_free(self) -> int:
        """Whether nobody is being answered."""
        return 1 - len(self.rows)

    def admit(self, rows: Sequence[Row]) -> None:
        """Take the row; it is written at the next turn."""
        (self.rows[0],) = rows

    def turn(self) -> None:
        """Write the row to its end."""
        row = self.rows.pop(0, None)
        with self._switched():
            while row is not None and not row.ended:
                if row.must_close:
                    row.close()
                else:
                    self._go_on(row)

    def _go_on(self, row: Row) -> None:
        """Write until it ends, or its thinking must be closed."""

        def take(_: int, token: int) -> None:
            if row.job.cancelled.is_set():
                row.end(Ending.CANCELLED)
            elif row.job.is_late:
                row.end(Ending.LENGTH, timed_out=True)
            else:
                row.take(token)
            if row.ended or row.must_close:
                raise _StopWriting

        try:
            generate(
                self._model,
                self._tokenizer,
                [row.ids],
                max_new_tokens=row.job.max_tokens - len(row.written),
                sampling=row.job.sampling,
                seed=row.job.seed + len(row.written),
                batch_size=1,
                on_token=take,
            )
        except _StopWriting:
            return


class _StopWriting(Exception):
    """Ends transformers' generate from within."""


def draw_each(logits_BV: Tensor, rows: Sequence[Row]) -> list[int]:
    """Draw each row's next token as its own job says."""
    by_sampling: dict[Sampling, list[int]] = {}
    for index, row in enumerate(rows):
        by_sampling.setdefault(row.job.sampling, []).append(index)
    tokens = [0] * len(rows)
    for sampling, indices in by_sampling.items():
        some_BV = logits_BV if len(indices) == len(rows) else logits_BV[indices]
        chances_B = torch.tensor([rows[index].chance for index in indices], device=logits_BV.device)
        for index, token in zip(indices, draw(some_BV, sampling, chances_B).tolist(), strict=True):
            tokens[index] = token
    return tokens
