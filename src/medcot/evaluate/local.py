r"""Answers written token by token where we hold the tokens: the model in memory, and vLLM.

What is done with tokens is the same for both, and stands here once: the frame around the question, the empty thinking
block of the no-thinking control, closing the block at the cap, asking for the answer, comparing the choices. A
``Writer`` only continues prompts. The forced close is written with the very ids that a training row of the same style
has there (``\n</think>\n\nFinal answer:`` in the chat style), so a tuned model meets nothing that it never saw.

With ``Ending.FORCED`` or ``LIKELIHOOD`` a row is written in two goes. First up to the thinking cap; then a row that has
not closed its thinking, cut at the cap or ended without, gets the forced close and one line, and a row that was cut
amid its answer is given the rest of its answer's tokens. A forced line ends at its line break: what a model adds behind
it is no part of a final answer. ``LIKELIHOOD`` puts every row behind ``Final answer:``, keeping its thinking alone.

Rows are sorted by length, so that a batch has little padding, and written a batch at a time. Greedy answers do not
depend on the batch. Draws of ``generate`` depend on the seed and a row's place in its batch, so a sampled answer can be
another in a batch of other rows; vLLM seeds each row by itself.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from medcot.engine import engine_of
from medcot.engine.decoding import Decoder
from medcot.errors import DataError
from medcot.evaluate.backends import Answer, Counts, Draws, Ending, Limits, OnAnswer, Request, answer_failed
from medcot.generate import Generated, Sampling, generate
from medcot.prompt import Style, decode, encode_prompt, split_completion
from medcot.prompt.frames import control_ids, frame_of, tokenise
from medcot.records import Finish

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ASK = "Final answer:"  # what the forced close ends with; the grading's own last line


class Writer(Protocol):
    """Continues prompts; the one thing that the model in memory and vLLM do each in their own way."""

    def write(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, sampling: Draws, seed: int
    ) -> list[Generated]:
        """Continue each prompt until EOS or the limit."""

    def score(self, prompts: Sequence[Sequence[int]], candidates: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return the log-probability of each of a prompt's candidates as its next token."""


class ModelWriter:
    """The model in memory.

    Args:
        model: accelerated or not; adapters as they are switched when it writes.
        tokenizer: its tokenizer.
    """

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer

    def write(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, sampling: Draws, seed: int
    ) -> list[Generated]:
        """Continue each prompt until EOS or the limit, all in one batch."""
        return generate(
            self.model,
            self.tokenizer,
            prompts,
            max_new_tokens=max_new_tokens,
            sampling=Sampling(sampling.temperature, sampling.top_p),
            seed=seed,
            batch_size=len(prompts),
        )

    @torch.no_grad()
    def score(self, prompts: Sequence[Sequence[int]], candidates: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return the log-probability of each of a prompt's candidates as its next token, from one forward pass."""
        was_training = self.model.training
        self.model.eval()
        try:
            log_probs_BV = self._next_logits(prompts).float().log_softmax(-1)
        finally:
            self.model.train(was_training)
        return [log_probs_BV[row, list(ids)].tolist() for row, ids in enumerate(candidates)]

    def _next_logits(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        engine = engine_of(self.model)
        if engine is not None:
            return Decoder(engine, prompts, 1).prefill()
        rows = [
            self.model(input_ids=torch.tensor([list(p)], device=self.model.device), logits_to_keep=1) for p in prompts
        ]
        return torch.stack([row.logits[0, -1] for row in rows])


@dataclass(slots=True)
class _Row:
    """A request on its way: ``written`` is all behind the prompt, whoever wrote it."""

    request: Request
    prompt_ids: list[int]
    written: list[int] = field(default_factory=list)
    finish: Finish = Finish.LENGTH
    forced: bool = False
    log_probs: dict[str, float] | None = None

    @property
    def ids(self) -> list[int]:
        return self.prompt_ids + self.written


class TokenBackend:
    """A back end over a ``Writer``.

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

    def prompt_of(self, request: Request) -> str:
        """Return the serving prompt; questions that cannot be put to the model have one too, and fail later."""
        return self._frame.head + request.question.strip() + self._frame.tail

    def answer(self, requests: Sequence[Request], on_answer: OnAnswer) -> None:
        """Answer all requests, a batch at a time.

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
        for batch in self._batches(rows):
            start = time.monotonic()
            self._answer_batch(batch)
            seconds = (time.monotonic() - start) / len(batch)
            for row in batch:
                on_answer(self._answer_of(row, seconds))

    def _check(self, request: Request) -> None:
        if request.limits.ending is Ending.LIKELIHOOD and len(request.choices) < 2:
            raise DataError(
                f"'{request.item_id}' has {len(request.choices)} choices",
                "Likelihoods are compared between the choices of a question",
                "Let such questions be answered in writing (ending=forced)",
            )

    def _batches(self, rows: Sequence[_Row]) -> Iterator[list[_Row]]:
        def kind(row: _Row) -> tuple[float, float, int, int, int, str]:
            request = row.request
            limits = request.limits
            budget = (limits.think_tokens, limits.answer_tokens, str(limits.ending))
            return (request.sampling.temperature, request.sampling.top_p, request.seed, *budget)

        for _, alike in itertools.groupby(sorted(rows, key=kind), kind):
            batch: list[_Row] = []
            for row in sorted(alike, key=lambda row: len(row.prompt_ids)):  # so the last is the longest
                if batch and (len(batch) == self.batch_size or not self._fits(row, len(batch) + 1)):
                    yield batch
                    batch = []
                batch.append(row)
            yield batch

    def _fits(self, longest: _Row, num_rows: int) -> bool:
        limits = longest.request.limits
        num_tokens = len(longest.prompt_ids) + limits.think_tokens + limits.answer_tokens + len(self._close(ASK))
        return self.batch_tokens is None or num_rows * num_tokens <= self.batch_tokens

    def _answer_batch(self, batch: list[_Row]) -> None:
        limits = batch[0].request.limits
        if limits.think_tokens == 0:
            for row in batch:
                row.written = self._close(ASK if limits.ending is Ending.FORCED else "", self._frame.before_think)
                row.forced = True
        if limits.ending is Ending.WRITTEN:
            self._go_on(batch, limits.think_tokens + limits.answer_tokens)
        else:
            if limits.think_tokens:
                self._go_on(batch, limits.think_tokens)
            if limits.ending is Ending.FORCED:
                self._force(batch, limits)
            else:
                self._compare(batch)

    def _go_on(self, rows: Sequence[_Row], max_new_tokens: int) -> None:
        if not rows:
            return
        first = rows[0].request
        results = self.writer.write([row.ids for row in rows], max_new_tokens, first.sampling, first.seed)
        for row, (tokens, finish) in zip(rows, results, strict=True):
            row.written += tokens
            row.finish = finish

    def _force(self, batch: Sequence[_Row], limits: Limits) -> None:
        """Close what is open and ask; let those that were cut amid their answer go on."""
        asked, cut = [], []
        for row in batch:
            think, answer = self._split(row)
            if think is None:
                row.written, row.forced = self._without_torn_tag(row) + self._close(ASK), True
            if row.forced:
                asked.append(row)
            elif row.finish is Finish.LENGTH and answer < limits.answer_tokens:
                cut.append((row, limits.answer_tokens - answer))
        before = [len(row.written) for row in asked]
        self._go_on(asked, limits.answer_tokens)
        for row, start in zip(asked, before, strict=True):
            self._end_at_line(row, start)
        places = [(row, len(row.written) + room) for row, room in cut]
        self._go_on([row for row, _ in cut], max((room for _, room in cut), default=0))
        for row, stop in places:
            if len(row.written) > stop:
                row.written, row.finish = row.written[:stop], Finish.LENGTH

    def _compare(self, batch: Sequence[_Row]) -> None:
        """Put each row behind ``Final answer:`` and take the likeliest of its choices."""
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

    def _tell_apart(self, choices: Sequence[str], *, closed: bool) -> tuple[list[int], list[list[int]]]:
        """Return the ids before the choices part, and each choice's from there on.

        Raises:
            DataError: two choices begin with the same token there.
        """
        texts = [f"{ASK} {choice}" for choice in choices]
        whole = [self._answer_ids(text) if closed else self._close(text) for text in texts]
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
        kept, tag = self._plain(row), list(self._frame.close_ids)
        num_torn = next((n for n in range(len(tag) - 1, 1, -1) if kept[-n:] == tag[:n]), 0)
        return kept[: len(kept) - num_torn]

    def _close(self, answer: str, before: str = "") -> list[int]:
        """The ids that end thinking and begin an answer, as a training row has them; ``before`` opens an empty one."""
        end = tokenise(before + self._frame.after_think, self.tokenizer)[0]
        return [*end, *self._frame.close_ids, *self._answer_ids(answer)]

    def _answer_ids(self, answer: str) -> list[int]:
        return tokenise(self._frame.before_answer + answer, self.tokenizer)[0]

    def _end_at_line(self, row: _Row, start: int) -> None:
        """Cut a forced answer at the first line break behind it."""
        for stop in range(start + 1, len(row.written) + 1):
            if "\n" in decode(row.written[start:stop], self.tokenizer).lstrip():
                row.written, row.finish = row.written[:stop], Finish.EOS
                return

    def _answer_of(self, row: _Row, seconds: float) -> Answer:
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
            seconds=seconds,
            forced=row.forced,
            log_probs=row.log_probs,
        )
