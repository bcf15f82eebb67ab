"""Answers: batched generation with the model that is in memory, before and after training.

An accelerated model decodes through the engine's static cache: step by step (``engine/decoding.py``), or on CUDA as a
recorded graph that runs a few steps ahead of this loop (``engine/graph_decoding.py``); any other uses transformers' own
``generate``. All give a row the same answer whatever batch it is in, up to rounding. Sampling draws from a generator of
its own, seeded by the caller, so that the same questions get the same draws before and after training.

R1-style sampling is temperature 0.6 and top_p 0.95 with no system prompt (DeepSeek-R1's model card); greedy decoding of
these models loops, which is why questions are sampled and only short graded answers are decoded greedily.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from medcot.engine import Engine, engine_of
from medcot.engine.decoding import Decoder, has_graphs
from medcot.records import Finish

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

DEFAULT_TEMPERATURE = 0.6
DEFAULT_TOP_P = 0.95
# Finished rows are dropped from the cache once they are this share of it: dropping copies the cache.
DROP_SHARE = 0.25

Generated = tuple[list[int], Finish]
OnToken = Callable[[int, int], None]  # row, token id
OnProgress = Callable[[int, int], None]  # rows done, rows in all


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
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    batch_size: int,
    stop_at_eos: bool = True,
    on_progress: OnProgress | None = None,
    on_token: OnToken | None = None,
) -> list[Generated]:
    """Continue each prompt until EOS or ``max_new_tokens``.

    Args:
        model: the model, accelerated or not; adapters as they are switched now.
        tokenizer: gives the EOS id.
        prompts: token ids, one list a prompt.
        max_new_tokens: limit for each.
        sampling: how tokens are drawn.
        seed: of the draws; each batch starts from it anew, so a prompt's draws depend on its batch only.
        batch_size: prompts decoded together.
        stop_at_eos: false writes every row to the limit, for measuring speed.
        on_progress: called with rows done and rows in all.
        on_token: called with row and token as each is drawn.

    Returns:
        For each prompt its new token ids, EOS included where it came, and why it stopped.
    """
    engine = engine_of(model)
    eos_ids = eos_token_ids(model, tokenizer) if stop_at_eos else set()
    was_training = model.training
    model.eval()
    results: list[Generated] = []
    try:
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            emit = None if on_token is None else _offset(on_token, start)
            report = None if on_progress is None else _offset_progress(on_progress, start, len(prompts))
            if engine is not None:
                results += _decode_fast(engine, batch, max_new_tokens, sampling, seed, eos_ids, emit, report)
            else:
                results += _decode_plain(model, batch, max_new_tokens, sampling, seed, eos_ids, emit)
                if on_progress is not None:
                    on_progress(len(results), len(prompts))
    finally:
        model.train(was_training)
    return results


def eos_token_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """All ids that end an answer: the tokenizer's EOS and those of the model's generation_config."""
    configured = model.generation_config.eos_token_id
    ids = set(configured) if isinstance(configured, list) else {configured}
    return {int(i) for i in ids | {tokenizer.eos_token_id} if i is not None}


def _decode_fast(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    eos_ids: set[int],
    on_token: OnToken | None,
    on_progress: OnProgress | None,
) -> list[Generated]:
    answers = _Answers(len(prompts), max_new_tokens, eos_ids, on_token, on_progress)
    decode = _decode_on_cuda if has_graphs(engine) else _decode_portably
    decode(engine, prompts, max_new_tokens, sampling, seed, answers)
    return [_finished(tokens, eos_ids) for tokens in answers.written]


class _Answers:
    """What a batch has written so far, and whom to tell.

    Attributes:
        written: tokens of each row.
        running: rows that have not ended.
    """

    def __init__(
        self,
        num_rows: int,
        max_new_tokens: int,
        eos_ids: set[int],
        on_token: OnToken | None,
        on_progress: OnProgress | None,
    ) -> None:
        self.written: list[list[int]] = [[] for _ in range(num_rows)]
        self.running = set(range(num_rows))
        self._limit, self._eos_ids = max_new_tokens, eos_ids
        self._on_token, self._on_progress = on_token, on_progress

    def take(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        """Add a step's tokens; those of rows that have ended are a surplus, and are dropped."""
        for row, token in zip(rows, tokens, strict=True):
            if row not in self.running:
                continue
            self.written[row].append(token)
            if self._on_token is not None:
                self._on_token(row, token)
            if token in self._eos_ids or len(self.written[row]) == self._limit:
                self.running.remove(row)
        if self._on_progress is not None:
            self._on_progress(len(self.written) - len(self.running), len(self.written))

    def survivors(self, rows: Sequence[int], drop_share: float) -> list[int] | None:
        """The rows still running, where ``drop_share`` of these have ended; else ``None``."""
        if not self.running or len(self.running) > (1 - drop_share) * len(rows):
            return None
        return [row for row in rows if row in self.running]


def _decode_on_cuda(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    answers: _Answers,
) -> None:
    from medcot.engine.graph_decoding import DROP_SHARE as SHARE
    from medcot.engine.graph_decoding import LAG, GraphDecoder, Steps

    decoder = GraphDecoder(
        Steps(engine, prompts, max_new_tokens, temperature=sampling.temperature, top_p=sampling.top_p, seed=seed)
    )
    try:
        decoder.launch()
        answers.take(*decoder.read())  # the first token is told before the step is recorded
        while answers.running:
            while decoder.launched < max_new_tokens and decoder.in_flight <= LAG:
                decoder.launch()
            answers.take(*decoder.read())
            kept = answers.survivors(decoder.rows, SHARE)
            if kept is not None and decoder.launched < max_new_tokens:
                decoder.keep(kept)
    finally:
        decoder.close()


def _decode_portably(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    answers: _Answers,
) -> None:
    decoder = Decoder(engine, prompts, max_new_tokens)
    generator = torch.Generator(device=decoder.device).manual_seed(seed)
    cache_rows = list(range(len(prompts)))  # which prompt each row of the cache belongs to
    logits_BV = decoder.prefill()
    while True:
        next_B = draw(logits_BV, sampling, generator)
        answers.take(cache_rows, next_B.tolist())
        if not answers.running:
            return
        kept = answers.survivors(cache_rows, DROP_SHARE)
        if kept is not None:
            places = torch.tensor([cache_rows.index(row) for row in kept], device=decoder.device)
            decoder.keep(places)
            next_B, cache_rows = next_B[places], kept
        logits_BV = decoder.step(next_B)


def draw(logits_BV: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Draw one token a row, (B): the most likely at temperature 0, else from the top_p nucleus; the portable path's.

    The nucleus is the smallest set of most likely tokens whose probability reaches top_p (Holtzman et al. 2020,
    arXiv:1904.09751).
    """
    if sampling.temperature == 0:
        return logits_BV.float().argmax(-1)  # on a CPU 2.5 ms for 100 rows; straight from bf16, 8.8
    probabilities_BV = (logits_BV.float() / sampling.temperature).softmax(-1)
    if sampling.top_p < 1:
        sorted_BV, ids_BV = probabilities_BV.sort(-1, descending=True)
        before_BV = sorted_BV.cumsum(-1) - sorted_BV
        sorted_BV = sorted_BV.masked_fill(before_BV >= sampling.top_p, 0)
        choice_B1 = torch.multinomial(sorted_BV, 1, generator=generator)
        return ids_BV.gather(1, choice_B1)[:, 0]
    return torch.multinomial(probabilities_BV, 1, generator=generator)[:, 0]


def _decode_plain(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    eos_ids: set[int],
    on_token: OnToken | None,
) -> list[Generated]:
    """Transformers' own generate, left-padded."""
    from transformers import GenerationConfig

    longest = max(len(prompt) for prompt in prompts)
    ids = torch.zeros((len(prompts), longest), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    greedy = sampling.temperature == 0
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=not greedy,
        temperature=None if greedy else sampling.temperature,
        top_p=None if greedy else sampling.top_p,
        top_k=None if greedy else 0,
        eos_token_id=sorted(eos_ids) or None,
        pad_token_id=0,
        use_cache=True,
    )
    forked = torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else [])
    with forked, _generation_config_of(model, config):
        torch.manual_seed(seed)
        output = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=config,
            streamer=_Streamer(on_token) if on_token is not None and len(prompts) == 1 else None,
        )
    return [_finished(row[longest:].tolist(), eos_ids) for row in output]


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

    def __init__(self, on_token: OnToken) -> None:
        self._on_token = on_token
        self._saw_prompt = False

    def put(self, value: Tensor) -> None:
        """Take the next ids."""
        if self._saw_prompt:
            self._on_token(0, int(value.flatten()[0]))
        self._saw_prompt = True

    def end(self) -> None:
        """Nothing is buffered."""


def _finished(tokens: list[int], eos_ids: set[int]) -> Generated:
    """Cut what follows the first EOS (padding), and say why the row stopped."""
    for position, token in enumerate(tokens):
        if token in eos_ids:
            return tokens[: position + 1], Finish.EOS
    return tokens, Finish.LENGTH


def _offset(on_token: OnToken, start: int) -> OnToken:
    return lambda row, token: on_token(start + row, token)


def _offset_progress(on_progress: OnProgress, start: int, total: int) -> OnProgress:
    return lambda done, _: on_progress(start + done, total)
