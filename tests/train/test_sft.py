"""Training: however a step is split, the gradient is one; a resumed run is the run; a checkpoint is whole or absent."""

from __future__ import annotations

import copy
import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import tiny_models
from medcot.data.packing import build_dataset, collate, flatten_rows
from medcot.engine import accelerate, engine_of
from medcot.engine.memory import Keep, Memory
from medcot.records import Row
from medcot.train import sft, trainer

# Lengths from 5 to 64 tokens, so that rows weigh very differently: a mean of means would be far off.
LENGTHS = (5, 64, 17, 40, 8, 31, 50, 23)
# float32; the splits add the same numbers in another order. Observed: 3e-7.
GRADIENT_TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def tokenizer(tiny_folder: Path) -> PreTrainedTokenizerBase:
    """Only saved beside checkpoints here: the rows are random ids."""
    return AutoTokenizer.from_pretrained(tiny_folder)


@pytest.fixture(scope="module")
def base_model() -> Any:
    return tiny_models.build_model("llama")


def _rows(lengths=LENGTHS, seed: int = 2) -> list[Row]:
    rows = []
    for number, (ids, labels) in enumerate(tiny_models.make_rows(lengths, seed)):
        length = len(ids)
        spans = {"question": (0, 1), "think": (1, length - 2), "answer": (length - 2, length - 1)}
        rows.append(
            Row(id=str(number), input_ids=ids.tolist(), labels=labels.tolist(), eos=(length - 1, length), **spans)
        )
    return rows


def _plan(**settings: Any) -> sft.Plan:
    defaults = {"num_steps": 1, "batch_size": 8, "micro_batch_size": 8, "warmup_steps": 0, "logging_steps": 1}
    return sft.Plan(**{**defaults, "learning_rate": 1e-2, "max_grad_norm": 1e9, **settings})


def _train(model: Any, tokenizer: Any, folder: Path, rows: list[Row] | None = None, **settings: Any):
    """Train a copy; return it, the metrics of its logging steps, and the summed gradients of all backward passes."""
    model = copy.deepcopy(model)
    if settings.pop("fast", True):
        assert accelerate(model).fast
    sums: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            sums[name] = torch.zeros_like(parameter)
            parameter.register_hook(functools.partial(_add, sums[name]))
    logged: list[sft.Metrics] = []
    resume_from, stop_at = settings.pop("resume_from", None), settings.pop("stop_at", None)

    def on_step(step: int, metrics: sft.Metrics | None) -> None:
        if metrics is not None:
            logged.append(metrics)
        if step == stop_at:
            raise KeyboardInterrupt

    plan = _plan(**settings)
    sft.train(model, tokenizer, rows or _rows(), plan, folder, resume_from=resume_from, on_step=on_step)
    return model, logged, sums


def _add(total: Tensor, gradient: Tensor) -> None:
    total += gradient


def _weights(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


# Invariance -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference(base_model) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the whole step, by plain transformers, one unpadded forward a row."""
    model = copy.deepcopy(base_model)
    rows = tiny_models.make_rows(LENGTHS)
    loss = tiny_models.plain_loss(model, rows) / sum(int((labels[1:] != -100).sum()) for _, labels in rows)
    loss.backward()
    return float(loss.detach()), tiny_models.gradients(model)


@pytest.mark.parametrize("fast", [True, False], ids=["engine", "plain"])
@pytest.mark.parametrize("micro_batch_size", [8, 4, 2, 1])
def test_any_split_of_a_step_gives_the_reference_gradient(
    base_model, tokenizer, tmp_path, reference, micro_batch_size, fast
):
    loss, gradients = reference
    _, logged, got = _train(base_model, tokenizer, tmp_path, micro_batch_size=micro_batch_size, fast=fast)
    assert tiny_models.distance(got, gradients) < GRADIENT_TOLERANCE
    assert logged[0].loss == pytest.approx(loss, rel=1e-5)
    assert logged[0].tokens == sum(LENGTHS)


@pytest.mark.parametrize(
    "memory", [Memory(Keep.LEAN), Memory(Keep.INPUT), Memory(Keep.HOST, 16, 7)], ids=["lean", "input", "host"]
)
@pytest.mark.parametrize("fast", [True, False], ids=["engine", "plain"])
def test_keeping_less_gives_the_same_gradient(base_model, tokenizer, tmp_path, reference, memory, fast):
    _, _, got = _train(base_model, tokenizer, tmp_path, micro_batch_size=4, fast=fast, memory=memory)
    assert tiny_models.distance(got, reference[1]) < GRADIENT_TOLERANCE


def test_the_split_does_not_matter_to_a_model_whose_forward_takes_no_token_count(
    base_model, tokenizer, tmp_path, reference
):
    model = copy.deepcopy(base_model)
    model.get_base_model().accepts_loss_kwargs = False  # how transformers marks such a model
    _, _, got = _train(model, tokenizer, tmp_path, micro_batch_size=2, fast=False)
    assert tiny_models.distance(got, reference[1]) < GRADIENT_TOLERANCE


def test_splits_end_in_the_same_adapter(base_model, tokenizer, tmp_path):
    # Gradients that differ by rounding make AdamW steps that do, and four steps of 1e-2 move every weight by some 0.03.
    ends = []
    for micro_batch_size in (8, 4, 2):
        folder = tmp_path / str(micro_batch_size)
        model, _, _ = _train(base_model, tokenizer, folder, micro_batch_size=micro_batch_size, num_steps=4)
        ends.append(_weights(model))
    moved = tiny_models.distance(ends[0], _weights(base_model))
    assert moved > 0.1
    assert max(tiny_models.distance(end, ends[0]) for end in ends[1:]) < 1e-3 * moved


# Packing --------------------------------------------------------------------------------------------------------------


def test_a_batch_is_rows_end_to_end():
    rows = _rows((3, 5))
    batch = flatten_rows(rows)
    assert batch["input_ids"].tolist() == [rows[0].input_ids + rows[1].input_ids]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3, 4]]
    assert batch["lengths"] == [3, 5]


def test_the_first_token_of_a_row_is_never_predicted():
    ids = [7, 8, 9]
    batch = collate([{"input_ids": ids, "labels": ids}, {"input_ids": ids, "labels": ids}])
    assert batch["labels"].tolist() == [[-100, 8, 9, -100, 8, 9]]


def test_a_dataset_holds_the_rows_in_order():
    rows = _rows()
    dataset = build_dataset(rows)
    assert dataset["input_ids"][:] == [row.input_ids for row in rows]
    assert dataset["labels"][:] == [row.labels for row in rows]


@pytest.mark.parametrize("family", list(tiny_models.SIZES))
def test_packed_logits_are_padded_logits_on_the_plain_path(family):
    # Tolerance: float32, the same products in matrices of other shapes. Observed: 1e-6 of the largest logit.
    model = tiny_models.build_model(family)
    rows = tiny_models.make_rows(LENGTHS)
    width = max(LENGTHS)
    ids = torch.stack([torch.nn.functional.pad(ids, (0, width - len(ids))) for ids, _ in rows])
    mask = (torch.arange(width)[None] < torch.tensor(LENGTHS)[:, None]).long()
    batch = flatten_rows(_rows())
    with torch.no_grad():
        padded = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        packed = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[0]
        joined = model(input_ids=batch["input_ids"], use_cache=False).logits[0]
    wanted = torch.cat([row[:length] for row, length in zip(padded, LENGTHS, strict=True)])
    assert tiny_models.relative(packed, wanted) < 1e-5
    assert tiny_models.relative(joined, wanted) > 0.1, "rows that see each other must show in this test"


@pytest.mark.parametrize("fast", [True, False], ids=["engine", "plain"])
def test_packed_loss_is_padded_loss(base_model, tokenizer, tmp_path, fast):
    model = copy.deepcopy(base_model)
    if fast:
        accelerate(model)
    rows = tiny_models.make_rows(LENGTHS)
    with torch.no_grad():
        wanted = float(tiny_models.plain_loss(base_model, rows))
    plan, counter = _plan(), sft.Counter()
    built = sft._build_trainer(model, tokenizer, _rows(), plan, counter, tmp_path, pytest.fail, model.device)
    with torch.no_grad():
        got, num_trained = built._summed_loss(model, (batch := flatten_rows(_rows())), batch["labels"][0])
    assert float(got) == pytest.approx(wanted, rel=1e-5)
    assert num_trained == sum(row.num_trained_tokens for row in _rows())


# Checkpoints and resuming ---------------------------------------------------------------------------------------------

TEN_ROWS = (12, 30, 9, 22, 17, 26, 14, 8, 19, 25)
RUN = {"num_steps": 7, "batch_size": 4, "micro_batch_size": 2, "warmup_steps": 2, "save_steps": 2}  # 3 steps an epoch


@pytest.mark.parametrize("fast", [True, False], ids=["engine", "plain"])
def test_a_resumed_run_is_the_run_bit_for_bit(base_model, tokenizer, tmp_path, fast):
    settings = {"rows": _rows(TEN_ROWS), "fast": fast, **RUN}
    whole, logged, _ = _train(base_model, tokenizer, tmp_path / "whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        _train(base_model, tokenizer, tmp_path / "cut", stop_at=5, **settings)
    checkpoint = sft.list_checkpoints(tmp_path / "cut")[-1]
    assert checkpoint.name == "checkpoint-4"  # in the second epoch
    resumed, rest, _ = _train(base_model, tokenizer, tmp_path / "cut", resume_from=checkpoint, **settings)
    wanted, got = _weights(whole), _weights(resumed)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert [(m.step, m.loss, m.learning_rate) for m in rest] == [
        (m.step, m.loss, m.learning_rate) for m in logged if m.step > 4
    ]


@pytest.mark.parametrize("fast", [True, False], ids=["engine", "plain"])
def test_resuming_at_the_last_step_takes_no_further_one(base_model, tokenizer, tmp_path, fast):
    settings = {"rows": _rows(TEN_ROWS), "fast": fast, **RUN}
    whole, _, _ = _train(base_model, tokenizer, tmp_path, **settings)
    checkpoint = sft.list_checkpoints(tmp_path)[-1]
    resumed, rest, _ = _train(base_model, tokenizer, tmp_path, resume_from=checkpoint, **settings)
    wanted, got = _weights(whole), _weights(resumed)
    assert checkpoint.name == "checkpoint-7" and rest == []
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_checkpoints_are_kept_as_many_as_asked(base_model, tokenizer, tmp_path):
    _train(base_model, tokenizer, tmp_path, rows=_rows(TEN_ROWS), keep_checkpoints=2, **RUN)
    assert [path.name for path in sft.list_checkpoints(tmp_path)] == ["checkpoint-6", "checkpoint-7"]
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-6", "checkpoint-7"}


def test_no_checkpoint_without_save_steps(base_model, tokenizer, tmp_path):
    _train(base_model, tokenizer, tmp_path, num_steps=2)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_half_written_is_no_checkpoint(base_model, tokenizer, tmp_path, monkeypatch):
    renamed = []

    def killed_at_the_second(source: Path, target: Path) -> None:
        if renamed:
            raise KeyboardInterrupt
        renamed.append(source.rename(target))

    monkeypatch.setattr(trainer.os, "replace", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        _train(base_model, tokenizer, tmp_path, rows=_rows(TEN_ROWS), **RUN)
    monkeypatch.undo()
    assert (tmp_path / sft.STAGING / "checkpoint-4" / "adapter_model.safetensors").exists()
    assert [path.name for path in sft.list_checkpoints(tmp_path)] == ["checkpoint-2"]
    checkpoint = sft.list_checkpoints(tmp_path)[-1]
    _train(base_model, tokenizer, tmp_path, rows=_rows(TEN_ROWS), resume_from=checkpoint, **RUN)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-6", "checkpoint-7"}


def test_checkpoints_are_listed_by_number(tmp_path):
    for name in ("checkpoint-10", "checkpoint-9", "checkpoint-best", ".writing", "checkpoint-100"):
        (tmp_path / name).mkdir()
    assert [path.name for path in sft.list_checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10", "checkpoint-100"]
    assert sft.list_checkpoints(tmp_path / "none") == []


# What is reported -----------------------------------------------------------------------------------------------------


def test_metrics_count_every_token_once(base_model, tokenizer, tmp_path):
    rows = _rows(TEN_ROWS)
    settings = {**RUN, "num_steps": 6, "save_steps": None, "logging_steps": 2}
    _, logged, _ = _train(base_model, tokenizer, tmp_path, rows=rows, **settings)
    assert [m.step for m in logged] == [1, 2, 4, 6]
    assert logged[-1].tokens == 2 * sum(TEN_ROWS)  # two epochs
    assert logged[-1].trained_tokens == 2 * sum(row.num_trained_tokens for row in rows)
    assert logged[-1].epoch == pytest.approx(2)
    assert [m.learning_rate for m in logged] == pytest.approx([0, 5e-3, 7.5e-3, 2.5e-3])
    assert all(m.grad_norm > 0 and m.tokens_per_s >= m.trained_tokens_per_s > 0 and m.memory_gb > 0 for m in logged)
    times = [m.elapsed_s for m in logged]
    assert times == sorted(times)


def test_the_result_adds_up(base_model, tokenizer, tmp_path):
    model = copy.deepcopy(base_model)
    result = sft.train(model, tokenizer, _rows(), _plan(num_steps=3, learning_rate=0.05), tmp_path)
    assert result.steps == 3 and result.loss_last < result.loss_first
    assert result.tokens_per_s == pytest.approx(3 * sum(LENGTHS) / result.seconds)


@pytest.mark.parametrize("fast", [True, False], ids=["engine", "plain"])
def test_a_diverged_run_stops_with_a_word(base_model, tokenizer, tmp_path, fast):
    with pytest.raises(sft.DivergedError, match=r"lower train\.learning_rate"):
        _train(base_model, tokenizer, tmp_path, num_steps=5, learning_rate=1e30, fast=fast)


def test_training_leaves_the_base_and_the_dtype_alone(base_model, tokenizer, tmp_path):
    model, _, _ = _train(base_model, tokenizer, tmp_path, num_steps=2)
    before = dict(base_model.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name
    assert engine_of(model) is not None


def test_adapters_on_a_16_bit_base_stay_in_float32(tokenizer, tmp_path):
    # An update of 1e-4 of a weight is lost in bf16, whose steps are 1/256.
    model = tiny_models.build_model("llama", torch.bfloat16)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    for fast in (True, False):
        trained, _, _ = _train(model, tokenizer, tmp_path, num_steps=2, learning_rate=1e-5, fast=fast)
        before, after = _weights(model), _weights(trained)
        assert all(0 < float((after[name] - before[name]).abs().max()) < 1e-4 for name in before)


# Small sums -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_rows", "batch_size", "max_steps", "epochs", "steps"),
    [
        (500, 8, 60, None, 60),
        (500, 8, None, 1, 63),  # the last step takes the four rows left
        (500, 8, None, 2.5, 158),
        (500, 8, None, None, 63),
        (3, 8, None, 1, 1),
        (80, 8, None, 0.01, 1),
    ],
)
def test_steps_of_a_run(num_rows, batch_size, max_steps, epochs, steps):
    assert sft.count_steps(num_rows, batch_size, max_steps=max_steps, epochs=epochs) == steps


@pytest.mark.parametrize(
    ("warmup", "steps", "wanted"), [(5, 60, 5), (0, 60, 0), (0.03, 100, 3), (0.05, 450, 23), (1, 60, 1), (0.5, 1, 0)]
)
def test_warmup_is_steps_or_a_share(warmup, steps, wanted):
    assert sft.count_warmup(warmup, steps) == wanted


def test_the_optimizer_follows_the_device():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert sft.choose_optimizer("auto", cpu) == sft.choose_optimizer("adamw_torch", cuda) == "adamw_torch_fused"
    assert sft.choose_optimizer("auto", cuda) == sft.choose_optimizer("adamw_8bit", cpu) == "adamw_8bit"


def test_peak_memory_is_plausible():
    assert 0.05 < sft.peak_memory_gb(torch.device("cpu")) < 64
    assert math.isfinite(sft.process_peak_gb())


def test_trained_biases_in_16_bit_have_an_optimizer(base_model, tokenizer, tmp_path):
    """lora.bias=all trains the base's own biases, which are not float32; they take no weight decay."""
    model = tiny_models.attach(tiny_models.build_base("qwen2", torch.bfloat16), bias="all")
    assert any(p.dtype == torch.bfloat16 for p in model.parameters() if p.requires_grad)
    with pytest.warns(UserWarning, match="one by one"):
        _, logged, _ = _train(model, tokenizer, tmp_path, fast=False, optimizer="adamw_8bit", num_steps=2)
    assert len(logged) == 2


def test_the_8_bit_optimizer_resumes_from_a_checkpoint(base_model, tokenizer, tmp_path):
    settings = {"num_steps": 4, "optimizer": "adamw_8bit", "save_steps": 2, "learning_rate": 1e-3}
    whole, _, _ = _train(base_model, tokenizer, tmp_path / "whole", **settings)
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    resumed, _, _ = _train(base_model, tokenizer, tmp_path / "again", resume_from=checkpoint, **settings)
    wanted, got = whole.state_dict(), resumed.state_dict()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted if "lora_" in name)
