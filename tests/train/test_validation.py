"""The loss of held-out rows: right, the same however it is computed, and without a trace in what is trained."""

from __future__ import annotations

import copy
import itertools
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import tiny_models
from medcot.engine import accelerate
from medcot.engine.memory import Keep, Memory
from medcot.records import Row
from medcot.train import sft
from medcot.train.trainer import ReasoningTrainer
from medcot.train.validation import Validation

TRAINED = (12, 30, 9, 22, 17, 26, 14, 8, 19, 25)
HELD_OUT = (5, 64, 17, 40, 8, 31)
RUN = {"num_steps": 7, "batch_size": 4, "micro_batch_size": 2, "warmup_steps": 2}  # 3 steps an epoch


@pytest.fixture(scope="module")
def tokenizer(tiny_folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_folder)


@pytest.fixture(scope="module")
def base_model() -> Any:
    return tiny_models.build_model("llama")


def build_rows(lengths: tuple[int, ...], seed: int = 2) -> list[Row]:
    rows = []
    for number, (ids, labels) in enumerate(tiny_models.make_rows(lengths, seed)):
        spans = {"question": (0, 1), "think": (1, 2), "answer": (2, 3), "eos": (3, 4)}
        rows.append(Row(id=str(number), input_ids=ids.tolist(), labels=labels.tolist(), **spans))
    return rows


def train(
    model: Any, tokenizer: Any, folder: Path, *, fast: bool, held_out: tuple[int, ...] = (), **settings: Any
) -> tuple[Any, list[sft.Metrics], list[sft.Validated], sft.TrainResult]:
    model = copy.deepcopy(model)
    if fast:
        assert accelerate(model).fast
    logged: list[sft.Metrics] = []
    validated: list[sft.Validated] = []
    options = {key: settings.pop(key) for key in ("resume_from", "announce") if key in settings}
    stop_at = settings.pop("stop_at", None)

    def on_step(step: int, metrics: sft.Metrics | None) -> None:
        if metrics is not None:
            logged.append(metrics)
        if step == stop_at:
            raise KeyboardInterrupt

    plan = sft.Plan(**{"learning_rate": 1e-2, "max_grad_norm": 1e9, "logging_steps": 1, **RUN, **settings})
    result = sft.train(
        model, tokenizer, build_rows(TRAINED), plan, folder,
        validation=build_rows(held_out, seed=9), on_step=on_step, on_validation=validated.append, **options,
    )  # fmt: skip
    return model, logged, validated, result


def weights(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def mean_loss(model: Any, lengths: tuple[int, ...] = HELD_OUT) -> float:
    """By plain transformers, one unpadded forward a row."""
    rows = tiny_models.make_rows(lengths, 9)
    with torch.no_grad():
        return float(tiny_models.plain_loss(model, rows)) / sum(int((labels[1:] != -100).sum()) for _, labels in rows)


BOTH = pytest.mark.parametrize("fast", [True, False], ids=["engine", "plain"])


# The number -----------------------------------------------------------------------------------------------------------


@BOTH
def test_it_is_the_mean_over_all_trained_tokens_before_and_after(base_model, tokenizer, tmp_path, fast):
    model, _, validated, result = train(base_model, tokenizer, tmp_path, fast=fast, held_out=HELD_OUT)
    assert [v.step for v in validated] == [0, 7]
    # float32: the same products in matrices of other shapes. Observed: 2e-7.
    assert validated[0].validation_loss == pytest.approx(mean_loss(base_model), rel=1e-5)
    assert validated[1].validation_loss == pytest.approx(mean_loss(model.eval()), rel=1e-5)
    assert (result.validation_loss_first, result.validation_loss_last) == tuple(v.validation_loss for v in validated)


def test_the_engine_and_plain_transformers_agree(base_model, tokenizer, tmp_path):
    fast, plain = (
        train(base_model, tokenizer, tmp_path, fast=fast, held_out=HELD_OUT, validate_steps=2)[2]
        for fast in (True, False)
    )
    assert [v.step for v in fast] == [v.step for v in plain] == [0, 2, 4, 6, 7]
    losses = [[v.validation_loss for v in side] for side in (fast, plain)]
    # Adam makes more of the gradients' rounding. Observed: 1e-6.
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert len(set(losses[0])) == 5


@BOTH
@pytest.mark.parametrize("forward_tokens", [1, 70])
def test_batches_do_not_change_it(base_model, tokenizer, tmp_path, fast, forward_tokens):
    settings = {"num_steps": 1, "warmup_steps": 0, "forward_tokens": forward_tokens}
    _, _, validated, _ = train(base_model, tokenizer, tmp_path, fast=fast, held_out=HELD_OUT, **settings)
    assert validated[0].validation_loss == pytest.approx(mean_loss(base_model), rel=1e-5)


@pytest.mark.parametrize(
    "memory", [Memory(Keep.LEAN), Memory(Keep.INPUT), Memory(Keep.HOST, 16, 7)], ids=["lean", "input", "host"]
)
def test_what_layers_keep_does_not_change_it(base_model, tokenizer, tmp_path, memory):
    settings = {"num_steps": 1, "warmup_steps": 0, "memory": memory}
    _, _, validated, _ = train(base_model, tokenizer, tmp_path, fast=True, held_out=HELD_OUT, **settings)
    assert validated[0].validation_loss == pytest.approx(mean_loss(base_model), rel=1e-5)


@pytest.mark.parametrize("max_tokens", [1, 30, 64, 100, 1000])
def test_batches_hold_every_row_once_within_the_budget(max_tokens):
    rows = build_rows(HELD_OUT)
    batches = Validation(rows, max_tokens).batches
    assert sorted(row.id for batch in batches for row in batch) == [row.id for row in rows]
    for batch in batches:
        assert len(batch) == 1 or sum(row.num_tokens for row in batch) <= max_tokens
    assert batches[0][0].num_tokens == max(HELD_OUT)


# No trace -------------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("every", [1, 2])
def test_training_is_the_same_bit_for_bit(base_model, tokenizer, tmp_path, fast, every):
    without, logged, none, result = train(base_model, tokenizer, tmp_path, fast=fast)
    assert none == [] and result.validation_loss_first is None
    watched, again, validated, _ = train(
        base_model, tokenizer, tmp_path, fast=fast, held_out=HELD_OUT, validate_steps=every
    )
    assert len(validated) == {1: 8, 2: 5}[every]
    wanted, got = weights(without), weights(watched)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    for key in ("step", "loss", "learning_rate", "grad_norm", "tokens", "trained_tokens"):
        assert [getattr(m, key) for m in again] == [getattr(m, key) for m in logged]


def test_dropout_is_off_and_its_numbers_are_not_used_up(tokenizer, tmp_path):
    model = tiny_models.attach(tiny_models.build_base("llama"), lora_dropout=0.3)
    without, logged, _, _ = train(model, tokenizer, tmp_path, fast=False)
    watched, again, validated, _ = train(model, tokenizer, tmp_path, fast=False, held_out=HELD_OUT, validate_steps=1)
    wanted, got = weights(without), weights(watched)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert [m.loss for m in again] == [m.loss for m in logged]
    assert validated[0].validation_loss == pytest.approx(mean_loss(model), rel=1e-5)
    assert watched.training
    assert validated[-1].validation_loss == pytest.approx(mean_loss(watched.eval()), rel=1e-5)


@BOTH
def test_a_resumed_run_goes_on_with_the_same_losses(base_model, tokenizer, tmp_path, fast):
    settings = {"fast": fast, "held_out": HELD_OUT, "validate_steps": 2, "save_steps": 2}
    whole, logged, validated, _ = train(base_model, tokenizer, tmp_path / "whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        train(base_model, tokenizer, tmp_path / "cut", stop_at=5, **settings)
    checkpoint = sft.list_checkpoints(tmp_path / "cut")[-1]
    assert checkpoint.name == "checkpoint-4"
    resumed, rest, later, _ = train(base_model, tokenizer, tmp_path / "cut", resume_from=checkpoint, **settings)
    wanted, got = weights(whole), weights(resumed)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert [m.loss for m in rest] == [m.loss for m in logged if m.step > 4]
    after = [(v.step, v.validation_loss) for v in validated if v.step > 4]
    assert [(v.step, v.validation_loss) for v in later] == after and [step for step, _ in after] == [6, 7]


def test_its_time_is_not_the_training_s(base_model, tokenizer, tmp_path, monkeypatch):
    plain = ReasoningTrainer._validation_loss
    monkeypatch.setattr(ReasoningTrainer, "_validation_loss", lambda *args: (time.sleep(0.2), plain(*args))[1])
    started_s = time.monotonic()
    _, logged, validated, result = train(
        base_model, tokenizer, tmp_path, fast=True, held_out=HELD_OUT, validate_steps=1, forward_tokens=10_000
    )
    rest_s = time.monotonic() - started_s - 8 * 0.2
    assert len(validated) == 8 and all(v.validation_s >= 0.2 for v in validated)
    assert result.validation_s >= 1.6 and result.seconds < rest_s and logged[-1].elapsed_s < rest_s
    for before, now in itertools.pairwise(logged):
        passed_s = now.elapsed_s - before.elapsed_s
        assert now.tokens_per_s == pytest.approx((now.tokens - before.tokens) / passed_s)


def test_want_of_memory_in_validation_does_not_split_the_training(base_model, tokenizer, tmp_path, monkeypatch):
    from medcot.engine import Engine

    plain, sizes, said = Engine.summed_loss, [], []

    def small_card(self: Any, ids: Tensor, *args: Any, **options: Any) -> Any:
        if not torch.is_grad_enabled():
            sizes.append(len(ids))
            if len(ids) > 70:
                raise torch.OutOfMemoryError("as on a GPU")
        return plain(self, ids, *args, **options)

    monkeypatch.setattr(Engine, "summed_loss", small_card)
    settings = {"fast": True, "num_steps": 2, "forward_tokens": 10_000, "announce": said.append}
    watched, logged, validated, _ = train(base_model, tokenizer, tmp_path, held_out=HELD_OUT, **settings)
    assert sizes[0] == sum(HELD_OUT) and max(sizes[1:4]) > 70 and len(said) >= 2
    assert validated[0].validation_loss == pytest.approx(mean_loss(base_model), rel=1e-5)
    without, again, _, _ = train(base_model, tokenizer, tmp_path, **settings)
    wanted, got = weights(without), weights(watched)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert [m.loss for m in logged] == [m.loss for m in again]


# When -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_steps", "logging_steps", "wanted"),
    [(60, 10, 10), (284, 10, 30), (1000, 10, 100), (20, 1, 2), (5, 1, 1), (5, 10, 10), (3125, 10, 310), (95, 10, 10)],
)
def test_a_run_has_about_ten_at_logging_steps(num_steps, logging_steps, wanted):
    every = sft.choose_validate_steps(num_steps, logging_steps)
    assert every == wanted and every % logging_steps == 0


@pytest.mark.parametrize("num_steps", [6, 7])
def test_an_epoch_s_end_and_the_last_step_have_one_each(base_model, tokenizer, tmp_path, num_steps):
    """transformers looks twice at the end of an epoch, here after steps 3 and 6."""
    settings = {"num_steps": num_steps, "validate_steps": 3}
    _, _, validated, _ = train(base_model, tokenizer, tmp_path, fast=True, held_out=HELD_OUT, **settings)
    assert [v.step for v in validated] == [0, 3, 6, 7][: num_steps - 3]
