"""Answers: batched generation with the model that is in memory, before and after training.

An accelerated model decodes through the engine's static cache: step by step (``engine/decoding.py``), or on CUDA as a
recorded graph that runs a few steps ahead of this loop (``engine/graph_decoding.py``). Rows share nothing but the step:
when one ends, its slot takes the next prompt (``engine/slots.py``). Any other model is written by transformers' own
``generate``, batch by batch, where no slot is filled anew.

Draws are a row's own. Each row has a stream of uniform numbers that follows from its seed alone; the number of its n-th
token picks that token, the first in the order of ids at which the sum of chances passes it. So a row is given the same
answer, up to rounding of the logits, whatever its batch, slot and neighbours, and on every path: the portable ``draw``
below, the kernel ``step_ops.sample``, and transformers' loop, which is handed the choice by a logits processor. The
usual generator for a batch gives each row whatever its place and the others' ends leave for it.

R1-style sampling is temperature 0.6 and top_p 0.95 with no system prompt (DeepSeek-R1's model card); greedy decoding of
these models loops, which is why questions are sampled and only short graded answers are decoded greedily.

Axes: B rows; V vocabulary; T steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from medcot.engine import Engine, engine_of
from medcot.engine.decoding import Decoder, fit_slots, has_graphs, tokens_read
from medcot.engine.slots import Piece, Slots
from medcot.records import Finish

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

DEFAULT_TEMPERATURE = 0.6
DEFAULT_TOP_P = 0.95
# Tokens among which a nucleus is looked for first; of a draw at temperature 0.6 it nearly always lies there.
LIKELIEST = 512
# Finished rows are dropped from the cache once they are this share of it: dropping copies the cache.
DROP_SHARE = 0.25

Generated = tuple[list[int], Finish]
OnToken = Callable[[int, int], None]  # row, token id
OnProgress = Callable[[int, int], None]  # rows done, rows in all
OnWritten = Callable[[int, Generated], None]  # row, what it came to


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; temperature 0 is greedy."""

    temperature: float
    top_p: float


def sampling_defaults(model: Any) -> Sampling:
    """Return the model's own generation_config's temperature and top_p, where it samples; else 0.6 and 0.95."""
    config = model.generation_config
    if not config.do_sample:
        return Sampling(DEFAULT_TEMPERATURE, DEFAULT_TOP_P)
    return Sampling(
        DEFAULT_TEMPERATURE if config.temperature is None else config.temperature,
        DEFAULT_TOP_P if config.top_p is None else config.top_p,
    )


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | Sequence[int],
    sampling: Sampling,
    seed: int | Sequence[int],
    batch_size: int,
    stop_at_eos: bool = True,
    on_progress: OnProgress | None = None,
    on_token: OnToken | None = None,
    on_written: OnWritten | None = None,
) -> list[Generated]:
    """Continue each prompt until EOS or its limit.

    Args:
        model: the model, accelerated or not; adapters as they are switched now.
        tokenizer: gives the EOS id.
        prompts: token ids, one list a prompt, none empty.
        max_new_tokens: limit for all, or one for each; at least 1.
        sampling: how tokens are drawn.
        seed: of the draws: one for each prompt, or one from which each prompt's follows by its number, ``row_seed``.
        batch_size: slots: prompts decoded together. Fewer on a GPU that has no room for their cache.
        stop_at_eos: false writes every row to its limit, for measuring speed.
        on_progress: called with rows done and rows in all.
        on_token: called with row and token as each is drawn.
        on_written: called with row and answer as each row ends, once for each, in the order in which they end.

    Returns:
        For each prompt its new token ids, EOS included where it came, and why it stopped.
    """
    job = _Job(
        prompts,
        [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens),
        [row_seed(seed, row) for row in range(len(prompts))] if isinstance(seed, int) else list(seed),
        sampling,
        eos_token_ids(model, tokenizer) if stop_at_eos else set(),
        _Listeners(on_token, on_progress, on_written),
    )
    assert len(job.rooms) == len(job.seeds) == len(prompts) and all(room > 0 for room in job.rooms)
    if not prompts:
        return []
    engine = engine_of(model)
    was_training = model.training
    model.eval()
    try:
        if engine is None:
            return _decode_plain(model, job, batch_size)
        decode = _decode_on_cuda if has_graphs(engine) else _decode_portably
        return decode(engine, job, fit_slots(engine, min(batch_size, len(prompts)), job.row_tokens, job.lengths))
    finally:
        model.train(was_training)


def eos_token_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """All ids that end an answer: the tokenizer's EOS and those of the model's generation_config."""
    configured = model.generation_config.eos_token_id
    ids = set(configured) if isinstance(configured, list) else {configured}
    return {int(i) for i in ids | {tokenizer.eos_token_id} if i is not None}


def row_seed(seed: int, row: int) -> int:
    """The seed of a row's draws, where one was given for all: neighbouring seeds share no row's."""
    return (seed * 1_000_003 + row) % 2**63


def make_chances(seed: int, num: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The first numbers of a row's stream, in [0, 1): Philox (Salmon et al. 2011), whose streams are the seed's own.

    PyTorch's CPU generator takes 32 bits of a seed only, too few to tell the rows of a large evaluation apart.
    """
    return np.random.Generator(np.random.Philox(key=seed)).random(num, dtype=np.float32)


@dataclass(frozen=True)
class _Listeners:
    token: OnToken | None
    progress: OnProgress | None
    written: OnWritten | None


@dataclass(frozen=True)
class _Job:
    """What is to be written, row by row, and whom to tell."""

    prompts: Sequence[Sequence[int]]
    rooms: list[int]
    seeds: list[int]
    sampling: Sampling
    eos_ids: set[int]
    listeners: _Listeners

    @property
    def lengths(self) -> list[int]:
        return [len(prompt) for prompt in self.prompts]

    @property
    def row_tokens(self) -> int:
        """What the cache of any row must have room for."""
        return max(len(prompt) + room for prompt, room in zip(self.prompts, self.rooms, strict=True))

    def chances(self, rows: Sequence[int]) -> Tensor:
        """The numbers of these rows' streams, (B, T); 0 behind a row's room, and no columns where nothing is drawn."""
        width = max(self.rooms) if self.sampling.temperature else 1
        table_BT = torch.zeros(len(rows), width)
        for place, row in enumerate(rows):
            if self.sampling.temperature:
                table_BT[place, : self.rooms[row]] = torch.from_numpy(make_chances(self.seeds[row], self.rooms[row]))
        return table_BT

    def read_as(self, piece: Piece) -> list[Sequence[int]]:
        """A piece's prompts."""
        return [self.prompts[row] for row in piece.rows]


class _Answers:
    """What has been written so far.

    Attributes:
        slots: which row is where.
        written: tokens of each row.
        done: what each row came to, once it has ended.
    """

    def __init__(self, job: _Job, num_slots: int) -> None:
        self.slots = Slots(job.lengths, num_slots)
        self.written: list[list[int]] = [[] for _ in job.prompts]
        self.done: dict[int, Generated] = {}
        self._job = job

    def take(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        """Add a step's tokens; those of rows that have ended are a surplus, and are dropped."""
        told = self._job.listeners
        for row, token in zip(rows, tokens, strict=True):
            if row not in self.slots.running:
                continue
            self.written[row].append(token)
            if told.token is not None:
                told.token(row, token)
            if token in self._job.eos_ids or len(self.written[row]) == self._job.rooms[row]:
                self.slots.end(row)
                self.done[row] = _finished(self.written[row], self._job.eos_ids)
                if told.written is not None:
                    told.written(row, self.done[row])
        if told.progress is not None:
            told.progress(len(self.done), len(self.written))

    def in_order(self) -> list[Generated]:
        """What every row came to."""
        return [self.done[row] for row in range(len(self.written))]


def _decode_on_cuda(engine: Engine, job: _Job, num_slots: int) -> list[Generated]:
    from medcot.engine.graph_decoding import DROP_SHARE as SHARE
    from medcot.engine.graph_decoding import LAG, GraphDecoder, Steps

    answers = _Answers(job, num_slots)
    slots, sampling = answers.slots, job.sampling
    steps = Steps(
        engine,
        num_slots,
        job.row_tokens,
        max(job.rooms) if sampling.temperature else 1,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        read_tokens=tokens_read(job.lengths),
    )
    decoder = GraphDecoder(steps)
    launched = [0] * len(job.prompts)  # of each row, read or not

    def wanted() -> bool:
        return any(launched[row] < job.rooms[row] for row in slots.running)

    try:
        while slots.busy:
            for piece in slots.fill():
                decoder.read(piece.places, piece.rows, job.read_as(piece), job.chances(piece.rows))
                for row in piece.rows:
                    launched[row] += 1
                if not decoder.recorded:
                    answers.take(*decoder.collect())  # the first token is told before the step is recorded
            while decoder.in_flight <= LAG and wanted():
                decoder.launch(slots.rows)
                for row in slots.running:
                    launched[row] += 1
            if decoder.in_flight:
                answers.take(*decoder.collect())
            if wanted() and (kept := slots.drop(SHARE)) is not None:
                decoder.keep(kept)
    finally:
        decoder.close()
    return answers.in_order()


def _decode_portably(engine: Engine, job: _Job, num_slots: int) -> list[Generated]:
    answers = _Answers(job, num_slots)
    slots = answers.slots
    decoder = Decoder(engine, num_slots, job.row_tokens)
    chances: dict[int, Tensor] = {}  # of the rows in the cache, (T) each

    def choose(logits_BV: Tensor, rows: Sequence[int]) -> Tensor:
        """Each row's next token, (B); rows that have ended are given any."""
        if job.sampling.temperature == 0:
            return draw(logits_BV, job.sampling, logits_BV.new_zeros(len(rows)))
        steps = [len(answers.written[row]) if row in slots.running else 0 for row in rows]
        drawn = torch.stack([chances[row][step] for row, step in zip(rows, steps, strict=True)])
        return draw(logits_BV, job.sampling, drawn.to(decoder.device))

    ids_B = torch.zeros(num_slots, dtype=torch.long, device=decoder.device)
    while slots.busy:
        for piece in slots.fill():
            chances |= dict(zip(piece.rows, job.chances(piece.rows), strict=True))
            first_R = choose(decoder.read(piece.places, job.read_as(piece)), piece.rows)
            ids_B[piece.places] = first_R
            answers.take(piece.rows, first_R.tolist())
        if not slots.running:
            continue  # all of them ended at their first token
        kept = slots.drop(DROP_SHARE)
        if kept is not None:
            decoder.keep(kept)
            ids_B = ids_B[kept]
        chances = {row: chances[row] for row in slots.rows}
        ids_B = choose(decoder.step(ids_B), slots.rows)
        answers.take(slots.rows, ids_B.tolist())
    return answers.in_order()


def draw(logits_BV: Tensor, sampling: Sampling, chances_B: Tensor) -> Tensor:
    """Draw one token a row, (B): the likeliest at temperature 0, else by the row's number from the top_p nucleus.

    The nucleus is the smallest set of likeliest tokens whose probability reaches top_p, the first of equals (Holtzman
    et al. 2020, arXiv:1904.09751). The token is the first, in the order of ids, at which the sum of the nucleus's
    probabilities passes the row's share of them; the kernel ``step_ops.sample`` does the same.

    Args:
        logits_BV: of the next token.
        sampling: temperature and top_p.
        chances_B: float32 in [0, 1), not used at temperature 0.
    """
    if sampling.temperature == 0:
        return logits_BV.float().argmax(-1)  # on a CPU 2.5 ms for 100 rows; straight from bf16, 8.8
    chances_BV = (logits_BV.float() / sampling.temperature).softmax(-1)
    if sampling.top_p >= 1:
        return _pick(chances_BV, chances_B)
    if chances_BV.shape[1] <= LIKELIEST:
        return _pick(_nucleus(chances_BV, sampling.top_p)[0], chances_B)
    # Sorting a whole vocabulary takes ten times as long as finding its likeliest. By id: equals keep their order.
    ids_BK = chances_BV.topk(LIKELIEST, sorted=False).indices.sort(-1).values
    kept_BK, has_all_B = _nucleus(chances_BV.gather(1, ids_BK), sampling.top_p)
    tokens_B = ids_BK.gather(1, _pick(kept_BK, chances_B)[:, None])[:, 0]
    flat = (~has_all_B).nonzero()[:, 0]
    if len(flat):
        tokens_B[flat] = _pick(_nucleus(chances_BV[flat], sampling.top_p)[0], chances_B[flat])
    return tokens_B


def _nucleus(chances_BK: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Return the chances with 0 for all outside of the nucleus, and whether a row's nucleus ends before its least, (B).

    Where it does not, a token that is not among these might have been in it.
    """
    sorted_BK, order_BK = chances_BK.sort(stable=True, dim=-1, descending=True)
    outside_BK = sorted_BK.cumsum(-1) - sorted_BK >= top_p
    has_all_B = (outside_BK | (sorted_BK > sorted_BK[:, -1:])).all(-1)
    outside_BK = torch.zeros_like(outside_BK).scatter_(-1, order_BK, outside_BK)
    return chances_BK.masked_fill(outside_BK, 0), has_all_B


def _pick(chances_BK: Tensor, chances_B: Tensor) -> Tensor:
    """The place in each row at which the sum passes the row's share of the whole, (B)."""
    sums_BK = chances_BK.double().cumsum_(-1)
    goal_B1 = sums_BK[:, -1:] * chances_B[:, None].double()
    return torch.searchsorted(sums_BK, goal_B1, right=True)[:, 0]


def _decode_plain(model: Any, job: _Job, batch_size: int) -> list[Generated]:
    """Transformers' own generate, left-padded, batch by batch."""
    results: list[Generated] = []
    for start in range(0, len(job.prompts), batch_size):
        rows = range(start, min(start + batch_size, len(job.prompts)))
        written = _write_batch(model, job, rows)
        for row, tokens in zip(rows, written, strict=True):
            results.append(_finished(tokens[: job.rooms[row]], job.eos_ids))
            if job.listeners.written is not None:
                job.listeners.written(row, results[row])
        if job.listeners.progress is not None:
            job.listeners.progress(len(results), len(job.prompts))
    return results


def _write_batch(model: Any, job: _Job, rows: range) -> list[list[int]]:
    """What transformers writes; behind a row's EOS or limit, anything."""
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

    longest, num_rows = max(len(job.prompts[row]) for row in rows), len(rows)
    ids = torch.zeros((num_rows, longest), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(rows):
        prompt = job.prompts[row]
        ids[place, longest - len(prompt) :] = torch.tensor(prompt)
        mask[place, longest - len(prompt) :] = 1
    rooms = [job.rooms[row] for row in rows]
    config = GenerationConfig(
        max_new_tokens=max(rooms),
        do_sample=False,  # the processor below chooses
        eos_token_id=sorted(job.eos_ids) or None,
        pad_token_id=0,
        use_cache=True,
    )
    processors: list[Any] = [_Choice(job, rows, longest)] if job.sampling.temperature else []
    criteria: list[Any] = [_Rooms(rooms, longest)]
    on_token = job.listeners.token
    with _generation_config_of(model, config):
        output = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=config,
            logits_processor=LogitsProcessorList(processors),
            stopping_criteria=StoppingCriteriaList(criteria),
            streamer=_Streamer(on_token, rows[0]) if on_token is not None and num_rows == 1 else None,
        )
    written: list[list[int]] = output[:, longest:].tolist()
    return written


class _Choice:
    """transformers' logits processor protocol: leaves each row the one token that its own stream picks."""

    def __init__(self, job: _Job, rows: range, start: int) -> None:
        self._sampling, self._chances_BT, self._start = job.sampling, job.chances(rows), start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores, -inf but for the choice; ``input_ids`` are prompts and tokens so far."""
        step = min(input_ids.shape[1] - self._start, self._chances_BT.shape[1] - 1)  # it may run on past the limits
        chosen_B1 = draw(scores, self._sampling, self._chances_BT[:, step].to(scores.device))[:, None]
        return torch.full_like(scores, float("-inf")).scatter_(1, chosen_B1, 0.0)


class _Rooms:
    """transformers' stopping criterion protocol: a row ends at its own limit."""

    def __init__(self, rooms: list[int], start: int) -> None:
        self._rooms, self._start = torch.tensor(rooms), start

    def __call__(self, input_ids: Tensor, scores: object, **_: object) -> Tensor:
        """Return which rows have ended."""
        return (self._rooms <= input_ids.shape[1] - self._start).to(input_ids.device)


@contextmanager
def _generation_config_of(model: Any, config: GenerationConfig) -> Iterator[None]:
    """Lend a model these settings: whatever they leave at ``None``, transformers would take from the model's own.

    An EOS that is to be passed over would come back that way, and a repetition penalty that the other path ignores.
    """
    from peft import PeftModel

    owner = model.get_base_model() if isinstance(model, PeftModel) else model
    own, owner.generation_config = owner.generation_config, config
    try:
        yield
    finally:
        owner.generation_config = own


class _Streamer:
    """transformers' streamer protocol: called with the prompt first, then with each token."""

    def __init__(self, on_token: OnToken, row: int) -> None:
        self._on_token, self._row = on_token, row
        self._saw_prompt = False

    def put(self, value: Tensor) -> None:
        """Take the next ids."""
        if self._saw_prompt:
            self._on_token(self._row, int(value.flatten()[0]))
        self._saw_prompt = True

    def end(self) -> None:
        """Nothing is buffered."""


def _finished(tokens: list[int], eos_ids: set[int]) -> Generated:
    """Cut what follows the first EOS (padding), and say why the row stopped."""
    for position, token in enumerate(tokens):
        if token in eos_ids:
            return tokens[: position + 1], Finish.EOS
    return tokens, Finish.LENGTH
