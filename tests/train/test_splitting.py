"""When memory runs out: the same rows again, in smaller pieces, and still one gradient.

A CPU has no such limit, so the errors here are raised by hand above a number of tokens; ``tests/gpu`` has real ones.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny_models
from medcot.data.packing import collate
from medcot.engine import accelerate, engine_of
from medcot.engine.memory import FASTEST, Keep, Memory
from medcot.records import Row
from medcot.train import sft
from medcot.train.splitting import Budget

LENGTHS = (5, 64, 17, 40, 8, 31, 50, 23)
SMALL = Memory(Keep.HOST, tile_tokens=16, chunk_tokens=7)


class Card:
    """A forward and backward with a memory: a limit of tokens for each way of keeping."""

    def __init__(self, **limits: float) -> None:
        self.limits = limits
        self.done: list[tuple[dict[str, Any], Memory]] = []
        self.failed: list[tuple[list[int], Memory]] = []

    def __call__(self, piece: dict[str, Any], memory: Memory) -> Tensor:
        if sum(piece["lengths"]) > self.limits.get(memory.keep, 0):
            self.failed.append((list(piece["lengths"]), memory))
            raise torch.OutOfMemoryError("by hand")
        self.done.append((piece, memory))
        return piece["input_ids"].sum().double()

    @property
    def lengths(self) -> list[list[int]]:
        return [list(piece["lengths"]) for piece, _ in self.done]


def make_batch(lengths: Sequence[int]) -> dict[str, Any]:
    """Every token has a number of its own; labels and positions can be told from it."""
    features, start = [], 1
    for length in lengths:
        ids = list(range(start, start + length))
        features.append({"input_ids": ids, "labels": [-number for number in ids]})
        start += length
    return collate(features)


def make_budget(memory: Memory = FASTEST, **settings: Any) -> tuple[Budget, list[str]]:
    said: list[str] = []
    return Budget(memory, SMALL, announce=said.append, **settings), said


def assert_whole(card: Card, batch: dict[str, Any]) -> None:
    """The pieces are the batch: every row once, in order, whole, and with its own labels and positions."""
    for name in ("input_ids", "labels", "position_ids"):
        parts = [piece[name] for piece, _ in card.done]
        assert all(part.shape[0] == 1 for part in parts)
        assert torch.equal(torch.cat(parts, 1), batch[name])
    assert [length for lengths in card.lengths for length in lengths] == batch["lengths"]
    for piece, _ in card.done:
        assert piece["input_ids"].shape[1] == sum(piece["lengths"])


# --- the budget -------------------------------------------------------------------------------------------------------


def test_what_fits_is_one_forward() -> None:
    budget, said = make_budget()
    batch, card = make_batch(LENGTHS), Card(all=math.inf)
    total = budget.run(batch, card)
    assert card.lengths == [list(LENGTHS)] and card.done[0][0] is batch and not said
    assert float(total) == sum(range(1, sum(LENGTHS) + 1)) and budget.max_tokens is None


@pytest.mark.parametrize("limit", [64, 65, 70, 119, 120, 200, 237])
@pytest.mark.parametrize("lengths", [LENGTHS, LENGTHS[::-1], (60, 60), (1,) * 40 + (64,), (64, 1)])
def test_pieces_are_the_batch_whatever_the_limit(lengths: tuple[int, ...], limit: int) -> None:
    budget, said = make_budget()
    batch, card = make_batch(lengths), Card(all=limit)
    total = budget.run(batch, card)
    assert_whole(card, batch)
    assert float(total) == sum(range(1, sum(lengths) + 1))  # what the pieces return is added up
    assert all(sum(own) <= limit for own in card.lengths)
    assert budget.memory == FASTEST  # rows that fit one by one are no reason to keep less
    assert len(said) == len(card.failed)
    # Each failure halves, down to the longest row.
    limits = [sum(own) for own, _ in card.failed]
    assert limits == sorted(limits, reverse=True) and len(set(limits)) == len(limits)
    assert len(card.failed) <= math.log2(sum(lengths)) + 1


def test_a_failure_halves_the_tokens_of_a_forward() -> None:
    budget, said = make_budget()
    card = Card(all=120)
    budget.run(make_batch(LENGTHS), card)  # 238 tokens
    assert budget.max_tokens == 119
    assert card.lengths == [[5, 64, 17], [40, 8, 31], [50, 23]]
    assert said == ["out of memory at 238 tokens: forwards now take 119 at most"]


def test_half_is_never_less_than_the_longest_row() -> None:
    budget, _ = make_budget()
    card = Card(all=64)
    budget.run(make_batch([64, 2, 2]), card)
    assert budget.max_tokens == 64 and card.lengths == [[64], [2, 2]]


def test_what_was_done_before_a_failure_is_not_done_again() -> None:
    """The second piece fails: the first one's gradients are there already."""
    budget, _ = make_budget(max_tokens=100)
    batch, card = make_batch([50, 50, 10, 60, 30]), Card(all=100)
    real, seen = card.__call__, []

    def second_fails(piece: dict[str, Any], memory: Memory) -> Tensor:
        seen.append(list(piece["lengths"]))
        if len(seen) == 2:
            raise torch.OutOfMemoryError("by hand")
        return real(piece, memory)

    total = budget.run(batch, second_fails)
    assert seen == [[50, 50], [10, 60, 30], [10], [60], [30]]
    assert_whole(card, batch)
    assert float(total) == sum(range(1, 201))


def test_what_was_learned_holds_for_the_next_batch() -> None:
    budget, said = make_budget()
    budget.run(make_batch(LENGTHS), Card(all=120))
    card, batch = Card(all=120), make_batch((100, 19, 1, 110))
    budget.run(batch, card)
    assert card.lengths == [[100, 19], [1, 110]] and not card.failed and len(said) == 1
    longer = Card(all=500)
    budget.run(make_batch((300, 10)), longer)  # a row that is longer than the limit is a piece of its own
    assert longer.lengths == [[300], [10]] and len(said) == 1


def test_one_row_keeps_less_and_less() -> None:
    budget, said = make_budget()
    batch, card = make_batch([100]), Card(all=10, input=50, host=100)
    budget.run(batch, card)
    assert [memory for _, memory in card.failed] == [FASTEST, Memory(Keep.INPUT)]
    assert card.done[0][1] == SMALL == budget.memory
    assert said == [
        "out of memory at one row of 100 tokens: layers now keep less (input)",
        "out of memory at one row of 100 tokens: layers now keep less (host)",
    ]
    assert_whole(card, batch)


def test_lean_layers_keep_their_input_next() -> None:
    budget, _ = make_budget(Memory(Keep.LEAN))
    card = Card(lean=10, input=100)
    budget.run(make_batch([100]), card)
    assert card.done[0][1] == Memory(Keep.INPUT)


def test_rows_are_split_first_and_kept_less_of_after() -> None:
    budget, said = make_budget()
    batch, card = make_batch([30, 90, 20, 95]), Card(all=40, input=92, host=100)
    budget.run(batch, card)
    assert_whole(card, batch)
    assert len(said) == len(card.failed)
    assert card.failed[0][0] == [30, 90, 20, 95] and budget.memory == SMALL
    assert [memory.keep for _, memory in card.done] == [Keep.ALL, Keep.INPUT, Keep.INPUT, Keep.HOST]


@pytest.mark.parametrize("memory", [FASTEST, Memory(Keep.LEAN), Memory(Keep.INPUT), SMALL])
def test_a_row_that_fits_nowhere_raises(memory: Memory) -> None:
    budget, _ = make_budget(memory)
    with pytest.raises(torch.OutOfMemoryError):
        budget.run(make_batch([10, 100, 10]), Card(all=50, lean=50, input=50, host=50))
    assert budget.memory == SMALL


def test_other_errors_are_not_caught() -> None:
    def broken(piece: dict[str, Any], memory: Memory) -> Tensor:
        raise RuntimeError("a bug")

    budget, said = make_budget()
    with pytest.raises(RuntimeError, match="a bug"):
        budget.run(make_batch(LENGTHS), broken)
    assert not said and budget.max_tokens is None


# --- through the trainer ----------------------------------------------------------------------------------------------


def make_rows(lengths: Sequence[int] = LENGTHS) -> list[Row]:
    spans = {"question": (0, 1), "think": (1, 2), "answer": (2, 3), "eos": (3, 4)}
    return [
        Row(id=str(number), input_ids=ids.tolist(), labels=labels.tolist(), **spans)
        for number, (ids, labels) in enumerate(tiny_models.make_rows(lengths))
    ]


Limit = Callable[[int, Memory], bool]


def train(folder: Path, tokenizer: Any, too_much: Limit | None = None, **settings: Any) -> tuple[Any, list[str], list]:
    """Two steps of a tiny model whose forward runs out of memory where ``too_much`` says so, before or after its work.

    Every second failure comes from the backward pass, as half of the real ones do.
    """
    model = copy.deepcopy(tiny_models.build_model("llama"))
    assert accelerate(model).fast
    engine: Any = engine_of(model)
    summed_loss, calls, said = engine.summed_loss, [], []

    def limited(ids: Tensor, labels: Tensor, lengths: list[int], *, memory: Memory) -> tuple[Tensor, int]:
        fails = too_much is not None and too_much(sum(lengths), memory)
        calls.append((list(lengths), memory, fails))
        if fails and sum(failed for *_, failed in calls) % 2:
            raise torch.OutOfMemoryError("by hand, forward")
        loss, num_trained = summed_loss(ids, labels, lengths, memory=memory)
        return (_Exploding.apply(loss) if fails else loss), num_trained

    engine.summed_loss = limited
    defaults = {"num_steps": 2, "batch_size": 8, "micro_batch_size": 8, "warmup_steps": 0, "logging_steps": 1}
    plan = sft.Plan(**{**defaults, "learning_rate": 1e-3, "max_grad_norm": 1e9, "small": SMALL, **settings})
    logged: list[sft.Metrics] = []
    sft.train(
        model, tokenizer, make_rows(), plan, folder, announce=said.append,
        on_step=lambda step, metrics: logged.append(metrics) if metrics else None,
    )  # fmt: skip
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    return (weights, logged), said, calls


class _Exploding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> Tensor:  # type: ignore[override]
        raise torch.OutOfMemoryError("by hand, backward")


@pytest.fixture(scope="module")
def tokenizer(tiny_folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_folder)


@pytest.fixture(scope="module")
def unlimited(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], list[sft.Metrics]]:
    ended, said, calls = train(tmp_path_factory.mktemp("unlimited"), tokenizer)
    assert not said and len(calls) == 2
    return ended


LIMITS: dict[str, Limit] = {
    "half": lambda tokens, memory: tokens > 130,
    "rows": lambda tokens, memory: tokens > 64,
    "input": lambda tokens, memory: tokens > (30 if memory.keep is Keep.ALL else 64),
    "host": lambda tokens, memory: tokens > {Keep.ALL: 30, Keep.INPUT: 45}.get(memory.keep, 64),
}
KEPT = {"half": Keep.ALL, "rows": Keep.ALL, "input": Keep.INPUT, "host": Keep.HOST}


@pytest.mark.parametrize("micro_batch_size", [8, 4])
@pytest.mark.parametrize("case", LIMITS)
def test_the_same_adapter_whatever_the_memory(
    case: str, micro_batch_size: int, unlimited: Any, tokenizer: Any, tmp_path: Path
) -> None:
    (weights, logged), said, calls = train(tmp_path, tokenizer, LIMITS[case], micro_batch_size=micro_batch_size)
    wanted, wanted_logs = unlimited
    # The pieces add the same numbers in another order; AdamW's first steps turn that into as much of a step.
    moved = tiny_models.distance(wanted, initial_weights())
    assert tiny_models.distance(weights, wanted) < 1e-4 * moved
    assert [m.loss for m in logged] == pytest.approx([m.loss for m in wanted_logs], rel=1e-5)
    assert [m.grad_norm for m in logged] == pytest.approx([m.grad_norm for m in wanted_logs], rel=1e-4)
    done = [lengths for lengths, _, failed in calls if not failed]
    assert sorted(length for lengths in done for length in lengths) == sorted(2 * LENGTHS)
    assert logged[-1].tokens == 2 * sum(LENGTHS)  # rows taken again are counted once
    assert len(said) == sum(failed for *_, failed in calls) > 0
    assert calls[-1][1].keep is KEPT[case]


def initial_weights() -> dict[str, Tensor]:
    model = tiny_models.build_model("llama")
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def test_training_ends_where_nothing_fits(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        train(tmp_path, tokenizer, lambda tokens, memory: tokens > 40)
