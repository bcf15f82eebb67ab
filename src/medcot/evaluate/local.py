r"""Answers written token by token where we hold the tokens: the model in memory, and vLLM.

What is done with tokens is the same for both, and stands here once: the frame around the question, the empty thinking
block of the no-thinking control, closing the block at the cap, asking for the answer, comparing the choices. A
``Writer`` only continues prompts. The forced close is written with the very ids that a training row of the same style
has there (``\n</think>\n\nFinal answer:`` in the chat style), so a tuned model meets nothing that it never saw.

With ``Ending.FORCED`` or ``LIKELIHOOD`` a row is written in two goes. First up to the thinking cap; then a row that has
not closed its thinking, cut at the cap or ended without, gets the forced close and one line, and a row that was cut
amid its answer is given the rest of its answer's tokens. A forced line ends at its line break: what a model adds behind
it is no part of a final answer. ``LIKELIHOOD`` puts every row behind ``Final answer:``, keeping its thinking alone.

Rows that are drawn and limited alike are written together, whatever their seeds. Each row's draws follow from its
request's seed and its item's id alone (``seed_of``): more questions, another order, another batch change nobody's. So
the thinking up to a small cap is the beginning of that up to a large one, and is not written twice: a back end keeps
what it wrote (4 bytes a token), and asks the largest caps first. Accuracy against thinking budgets costs one long go
and short answers. A server that is asked by text has no such memory, since it does not promise the same draws.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from medcot.engine import engine_of
from medcot.engine.decoding import next_logits
from medcot.errors import DataError
from medcot.evaluate.backends import Answer, Counts, Draws, Ending, Limits, OnAnswer, Request, answer_failed
from medcot.evaluate.writing import Shares, Thoughts, seed_of
from medcot.generate import Generated, OnWritten, Sampling, generate
from medcot.prompt import (
    Style,
    answer_ids,
    closing_ids,
    count_torn,
    decode,
    encode_prompt,
    split_completion,
)
from medcot.prompt.frames import control_ids, frame_of
from medcot.records import Finish

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ASK = "Final answer:"  # what the forced close ends with; the grading's own last line


# Rows whose answers take two goes are taken this many batches at a time: enough to keep slots filled, and what a killed
# evaluation has thought and not answered is lost.
BATCHES_AT_ONCE = 4


class Writer(Protocol):
    """Continues prompts; the one thing that the model in memory and vLLM do each in their own way."""

    def write(
        self,
        prompts: Sequence[Sequence[int]],
        rooms: Sequence[int],
        sampling: Draws,
        seeds: Sequence[int],
        on_written: OnWritten,
        *,
        batch_size: int,
    ) -> None:
        """Continue each prompt until EOS or its room is full; call ``on_written`` as each ends, once for each.

        A row's draws follow from its own seed. No more than ``batch_size`` need be written together.
        """

    def score(self, prompts: Sequence[Sequence[int]], candidates: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return the log-probability of each of a prompt's candidates as its next token."""


class ModelWriter:
    """The model in memory.

    Args:
        model: accelerated or not; adapters as they are switched when it writes.
        tokenizer: its tokenizer.
        stop_at_eos: false writes every row until its room is full, for measuring speed.
    """

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, *, stop_at_eos: bool = True) -> None:
        self.model, self.tokenizer, self.stop_at_eos = model, tokenizer, stop_at_eos

    def write(
        self,
        prompts: Sequence[Sequence[int]],
        rooms: Sequence[int],
        sampling: Draws,
        seeds: Sequence[int],
        on_written: OnWritten,
        *,
        batch_size: int,
    ) -> None:
        """Continue each prompt; a slot whose row has ended takes the next."""
        generate(
            self.model,
            self.tokenizer,
            prompts,
            max_new_tokens=rooms,
            sampling=Sampling(sampling.temperature, sampling.top_p),
            seed=seeds,
            batch_size=batch_size,
            stop_at_eos=self.stop_at_eos,
            on_written=on_written,
        )

    @torch.no_grad()
    def score(self, prompts: Sequence[Sequence[int]], candidates: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return the log-probability of each of a prompt's candidates as its next token, from one reading."""
        was_training = self.model.training
        self.model.eval()
        scores: list[list[float]] = []
        try:
            for logits_RV in self._next_logits(prompts):
                for logits_V in logits_RV:
                    scores.append(logits_V.float().log_softmax(-1)[list(candidates[len(scores)])].tolist())
        finally:
            self.model.train(was_training)
        return scores

    def _next_logits(self, prompts: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        engine = engine_of(self.model)
        if engine is not None:
            yield from next_logits(engine, prompts)
            return
        for prompt in prompts:
            ids = torch.tensor([list(prompt)], device=self.model.device)
            yield self.model(input_ids=ids, logits_to_keep=1).logits[:, -1]


@dataclass(slots=True)
class _Row:
    """A request on its way: ``written`` is all behind the prompt, whoever wrote it."""

    request: Request
    prompt_ids: list[int]
    written: list[int] = field(default_factory=list)
    finish: Finish = Finish.LENGTH
    forced: bool = False
    asked_at: int = 0  # where a forced answer begins in what is written
    seconds: float = 0.0
    log_probs: dict[str, float] | None = None

    @property
    def ids(self) -> list[int]:
        return self.prompt_ids + self.written


class TokenBackend:
    """A back end over a ``Writer``.

    It remembers what it wrote, so it speaks for one state of a model: make another one when the weights have changed or
    the adapter is switched.

    Args:
        writer: continues prompts.
        tokenizer: the model's.
        style: the prompt's style.
        batch_size: rows written together, at most.
        batch_tokens: what these may come to, prompt, thinking and answer together; what a key/value cache has room for.
    """

    def __init__(
        self,
        writer: Writer,
        tokenizer: PreTrainedTokenizerBase,
        style: Style,
        *,
        batch_size: int,
        batch_tokens: int | None = None,
    ) -> None:
        self.writer, self.tokenizer, self.style = writer, tokenizer, style
        self.batch_size, self.batch_tokens = batch_size, batch_tokens
        self._frame = frame_of(style, tokenizer)
        self._control = control_ids(tokenizer)
        self._thoughts = Thoughts()

    def prompt_of(self, request: Request) -> str:
        """Return the serving prompt; questions that cannot be put to the model have one too, and fail later."""
        return self._frame.head + request.question.strip() + self._frame.tail

    def answer(self, requests: Sequence[Request], on_answer: OnAnswer) -> None:
        """Answer all requests; those that may be longest first, else in the order given.

        Raises:
            DataError: choices are to be compared, and there are fewer than two.
        """
        rows = []
        for request in requests:
            self._check(request)
            try:
                rows.append(_Row(request, encode_prompt(request.question, self.style, self.tokenizer)))
            except DataError as error:  # this question alone would steer the model, or lose characters
                on_answer(answer_failed(request, str(error)))

        def kind(row: _Row) -> tuple[int, int, str, float, float]:
            limits, sampling = row.request.limits, row.request.sampling
            room = _first_room(limits)
            return -room, limits.answer_tokens, str(limits.ending), sampling.temperature, sampling.top_p

        for _, alike in itertools.groupby(sorted(rows, key=kind), kind):
            self._answer_alike(list(alike), on_answer)

    def _check(self, request: Request) -> None:
        if request.limits.ending is Ending.LIKELIHOOD and len(request.choices) < 2:
            raise DataError(
                f"'{request.item_id}' has {len(request.choices)} choices",
                "Likelihoods are compared between the choices of a question",
                "Let such questions be answered in writing (ending=forced)",
            )

    def _answer_alike(self, rows: Sequence[_Row], on_answer: OnAnswer) -> None:
        """Answer rows of one sampling and limits."""
        limits = rows[0].request.limits
        num_slots = self._count_slots(rows, limits)
        at_once = len(rows) if limits.ending is Ending.WRITTEN else BATCHES_AT_ONCE * num_slots
        for start in range(0, len(rows), at_once):
            self._answer_some(rows[start : start + at_once], limits, num_slots, on_answer)

    def _count_slots(self, rows: Sequence[_Row], limits: Limits) -> int:
        if self.batch_tokens is None:
            return self.batch_size
        longest = max(len(row.prompt_ids) for row in rows)
        num_tokens = longest + limits.think_tokens + limits.answer_tokens + len(self._close(ASK))
        return max(1, min(self.batch_size, self.batch_tokens // num_tokens))

    def _answer_some(self, rows: Sequence[_Row], limits: Limits, num_slots: int, on_answer: OnAnswer) -> None:
        if limits.think_tokens == 0:
            for row in rows:
                row.written = self._close(ASK if limits.ending is Ending.FORCED else "", self._frame.before_think)
                row.forced = True
        again: list[tuple[_Row, int]] = []  # and the tokens it is given in the second go

        def end_first(row: _Row) -> None:
            room = self._second_room(row, limits) if limits.ending is Ending.FORCED else 0
            if room:
                again.append((row, room))
            elif limits.ending is not Ending.LIKELIHOOD:
                on_answer(self._answer_of(row))

        def end_second(row: _Row) -> None:
            if row.forced:
                self._end_at_line(row)
            on_answer(self._answer_of(row))

        first_room = _first_room(limits)
        if first_room:
            self._write([(row, first_room) for row in rows], num_slots, end_first, remember=True)
        else:
            for row in rows:
                end_first(row)
        if limits.ending is Ending.LIKELIHOOD:
            self._compare(rows)
            for row in rows:
                on_answer(self._answer_of(row))
        self._write(again, num_slots, end_second, remember=False)

    def _write(
        self, rows: Sequence[tuple[_Row, int]], num_slots: int, on_end: Callable[[_Row], None], *, remember: bool
    ) -> None:
        """Let rows go on for as many tokens as each is given, and say when each has ended."""
        asked = []
        for row, room in rows:
            known = self._thoughts.find(_key(row), room) if remember else None
            if known is None:
                asked.append((row, room))
            else:
                row.written, row.finish = row.written + known[0], known[1]
                on_end(row)
        if not asked:
            return
        shares = Shares(len(asked), num_slots)

        def on_written(place: int, generated: Generated) -> None:
            row, (tokens, finish) = asked[place][0], generated
            if remember:
                self._thoughts.keep(_key(row), tokens, finish)
            row.written, row.finish = row.written + tokens, finish
            row.seconds += shares.end(place)
            on_end(row)

        self.writer.write(
            [row.ids for row, _ in asked],
            [room for _, room in asked],
            asked[0][0].request.sampling,
            [seed_of(row.request, "" if remember else ASK) for row, _ in asked],
            on_written,
            batch_size=num_slots,
        )

    def _second_room(self, row: _Row, limits: Limits) -> int:
        """How many tokens a row is given in the second go: close what is open and ask, let cut answers go on."""
        think, answer = self._split(row)
        if think is None:
            row.written, row.forced = self._without_torn_tag(row) + self._close(ASK), True
        if row.forced:
            row.asked_at = len(row.written)
            return limits.answer_tokens
        return max(0, limits.answer_tokens - answer) if row.finish is Finish.LENGTH else 0

    def _compare(self, batch: Sequence[_Row]) -> None:
        """Put each row behind ``Final answer:`` and take the likeliest of its choices."""
        start = time.monotonic()
        prompts, candidates, endings = [], [], []
        for row in batch:
            think, _ = self._split(row)
            kept = self._without_torn_tag(row) if think is None else self._plain(row)[:think]
            shared, rests = self._tell_apart(row.request.choices, closed=think is not None)
            row.written, row.forced = kept + shared, row.forced or think is None
            prompts.append(row.ids)
            candidates.append([rest[0] for rest in rests])
            endings.append(rests)
        for row, scores, rests in zip(batch, self.writer.score(prompts, candidates), endings, strict=True):
            row.log_probs = dict(zip(row.request.choices, scores, strict=True))
            row.written += rests[max(range(len(scores)), key=scores.__getitem__)]
            row.finish = Finish.EOS
        for row in batch:
            row.seconds += (time.monotonic() - start) / len(batch)

    def _tell_apart(self, choices: Sequence[str], *, closed: bool) -> tuple[list[int], list[list[int]]]:
        """Return the ids before the choices part, and each choice's from there on.

        Raises:
            DataError: two choices begin with the same token there.
        """
        texts = [f"{ASK} {choice}" for choice in choices]
        whole = [answer_ids(self._frame, self.tokenizer, text) if closed else self._close(text) for text in texts]
        parted = (place for place, ids in enumerate(zip(*whole, strict=False)) if len(set(ids)) > 1)
        num_shared = next(parted, min(map(len, whole)))
        rests = [ids[num_shared:] for ids in whole]
        if not all(rests) or len({rest[0] for rest in rests}) < len(rests):
            raise DataError(
                f"The choices {', '.join(choices)} begin alike to this model's tokenizer",
                "Likelihoods are compared by the first token that tells the choices apart",
                "Let such questions be answered in writing (ending=forced)",
            )
        return whole[0][:num_shared], rests

    def _split(self, row: _Row) -> tuple[int | None, int]:
        """Return how many tokens the closed thinking has (``None`` while it is open), and the answer."""
        found = split_completion(row.written, self.tokenizer, num_prompt_tokens=0, finish=row.finish)
        return (found.num_think_tokens if found.closed else None), found.num_answer_tokens

    def _plain(self, row: _Row) -> list[int]:
        return [token for token in row.written if token not in self._control]

    def _without_torn_tag(self, row: _Row) -> list[int]:
        """What was written, without the first tokens of a tag that the cap cut in two."""
        kept = self._plain(row)
        return kept[: len(kept) - count_torn(kept, self._frame)]

    def _close(self, answer: str, before: str = "") -> list[int]:
        return closing_ids(self._frame, self.tokenizer, answer, before)

    def _end_at_line(self, row: _Row) -> None:
        """Cut a forced answer at the first line break behind it."""
        for stop in range(row.asked_at + 1, len(row.written) + 1):
            if "\n" in decode(row.written[row.asked_at : stop], self.tokenizer).lstrip():
                row.written, row.finish = row.written[:stop], Finish.EOS
                return

    def _answer_of(self, row: _Row) -> Answer:
        found = split_completion(row.written, self.tokenizer, num_prompt_tokens=len(row.prompt_ids), finish=row.finish)
        return Answer(
            item_id=row.request.item_id,
            seed=row.request.seed,
            text=found.text,
            think=found.think,
            answer=found.answer,
            closed=found.closed,
            finish=found.finish,
            num_prompt_tokens=found.num_prompt_tokens,
            num_think_tokens=found.num_think_tokens,
            num_answer_tokens=found.num_answer_tokens,
            counts=Counts.EXACT,
            seconds=row.seconds,
            forced=row.forced,
            log_probs=row.log_probs,
        )


def _first_room(limits: Limits) -> int:
    """Tokens of the first go."""
    return limits.think_tokens + (limits.answer_tokens if limits.ending is Ending.WRITTEN else 0)


def _key(row: _Row) -> object:
    """What decides which tokens come first behind a row's prompt."""
    sampling = row.request.sampling
    draws = (sampling.temperature, sampling.top_p, seed_of(row.request)) if sampling.temperature else None
    return tuple(row.ids), draws
