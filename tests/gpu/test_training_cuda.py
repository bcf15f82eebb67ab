"""Training on CUDA: the flat optimizer, one gradient for every split, and an adapter that plain libraries open."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from medcot.engine import accelerate, engine_of
from medcot.engine.memory import FASTEST, Keep, Memory
from medcot.records import Row
from medcot.train import sft
from medcot.train.optimizer import as_one
from optimizer_twins import SHAPES, assert_a_loaded_state_goes_on, assert_equals_bitsandbytes
from tiny_models import attach, build_base, distance, flatten, gradients, make_rows, plain_logits, plain_loss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
LENGTHS = (5, 64, 17, 40, 8, 31, 50, 23)
BF16 = 1.5  # times what plain bfloat16 is off float32 on the same weights


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """Float32 is float32 here, not TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(scope="module")
def tokenizer(tiny_folder: Path) -> Any:
    """Only saved beside checkpoints here: the rows are random ids."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_folder)


def build(dtype: torch.dtype = torch.bfloat16, family: str = "llama") -> Any:
    """The plain model on the GPU; its adapter is in float32."""
    return attach(build_base(family, dtype, **({"head_dim": 16} if family == "qwen3" else {})).cuda())


def to_rows(lengths: Sequence[int] = LENGTHS) -> list[Row]:
    spans = {"question": (0, 1), "think": (1, 2), "answer": (2, 3), "eos": (3, 4)}
    return [
        Row(id=str(number), input_ids=ids.tolist(), labels=labels.tolist(), **spans)
        for number, (ids, labels) in enumerate(make_rows(lengths))
    ]


def train(
    plain: Any, tokenizer: Any, folder: Path, *, fast: bool = True, resume_from: Path | None = None, **settings: Any
) -> tuple[Any, list[sft.Metrics], dict[str, Tensor]]:
    """Train a copy; return it, its metrics, and the summed gradients of all backward passes."""
    model = copy.deepcopy(plain)
    if fast:
        assert accelerate(model).fast
    sums: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            sums[name] = torch.zeros_like(parameter)
            parameter.register_hook(functools.partial(_add, sums[name]))
    logged: list[sft.Metrics] = []
    defaults = {"num_steps": 1, "batch_size": 8, "micro_batch_size": 8, "warmup_steps": 0, "logging_steps": 1}
    plan = sft.Plan(**{**defaults, "learning_rate": 1e-2, "max_grad_norm": 1e9, "optimizer": "adamw_8bit", **settings})
    sft.train(
        model, tokenizer, to_rows(), plan, folder, resume_from=resume_from,
        on_step=lambda step, metrics: logged.append(metrics) if metrics else None,
    )  # fmt: skip
    return model, logged, {name: total.float().cpu() for name, total in sums.items()}


def _add(total: Tensor, gradient: Tensor) -> None:
    total += gradient  # and nothing is returned: that would take the gradient's place


def weights(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().float().cpu() for name, p in model.named_parameters() if p.requires_grad}


def whole_step(model: Any) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the whole step by plain transformers, one unpadded forward a row."""
    rows = [(ids.cuda(), labels.cuda()) for ids, labels in make_rows(LENGTHS)]
    loss = plain_loss(model, rows) / sum(int((labels[1:] != -100).sum()) for _, labels in rows)
    loss.backward()
    return loss.item(), gradients(model)


# --- the optimizer ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_five_steps_are_those_of_bitsandbytes(weight_decay: float) -> None:
    assert_equals_bitsandbytes("cuda", lr=1e-2, weight_decay=weight_decay)


@pytest.mark.parametrize(
    "shapes", [SHAPES, [(5, 7), (3, 100), (1, 1), (64, 16)]], ids=["whole blocks", "shared blocks"]
)
def test_a_loaded_state_goes_on_as_if_never_saved(shapes: list[tuple[int, int]]) -> None:
    assert_a_loaded_state_goes_on("cuda", shapes)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_optimizer_finds_all_gradients_in_one_block(family: str) -> None:
    model = build(family=family)
    accelerate(model)
    engine = engine_of(model)
    assert engine is not None
    engine.summed_loss(*flatten(make_rows([9, 7])))[0].backward()
    found = [p.grad for p in model.parameters() if p.requires_grad]
    assert found[0] is not None and as_one(found).data_ptr() == found[0].data_ptr()


# --- one gradient -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [FASTEST, Memory(Keep.HOST, 16, 7)], ids=["all", "host"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_split_of_a_step_gives_one_gradient(
    dtype: torch.dtype, memory: Memory, tokenizer: Any, tmp_path: Path
) -> None:
    plain = build(dtype)
    exact_loss, exact = whole_step(copy.deepcopy(plain).float())
    _, usual = whole_step(copy.deepcopy(plain))
    allowed = 1e-5 if dtype == torch.float32 else BF16 * distance(usual, exact)
    got = []
    for micro_batch_size in (8, 4, 2):
        _, logged, summed = train(plain, tokenizer, tmp_path, micro_batch_size=micro_batch_size, memory=memory)
        assert distance(summed, exact) < allowed, micro_batch_size
        assert logged[0].loss == pytest.approx(exact_loss, rel=1e-5 if dtype == torch.float32 else 1e-2)
        assert logged[0].tokens == sum(LENGTHS)
        got.append(summed)
    assert max(distance(one, got[0]) for one in got[1:]) < allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_of_the_fast_and_the_plain_path_run_together(dtype: torch.dtype, tokenizer: Any, tmp_path: Path) -> None:
    plain = build(dtype)
    curves = []
    for fast in (True, False):
        _, logged, _ = train(plain, tokenizer, tmp_path, fast=fast, num_steps=12, learning_rate=3e-3)
        curves.append([metrics.loss for metrics in logged])
    assert curves[0] == pytest.approx(curves[1], rel=1e-3 if dtype == torch.float32 else 2e-2)
    assert curves[0][-1] < 0.95 * curves[0][0]


def test_half_precision_trains_with_a_scaled_loss(tokenizer: Any, tmp_path: Path) -> None:
    """As a T4 does it: first steps that overflow are left out, and the scale falls."""
    plain = build(torch.float16)
    exact_loss, _ = whole_step(copy.deepcopy(plain).float())
    model, logged, _ = train(plain, tokenizer, tmp_path, num_steps=20, learning_rate=3e-3)
    assert logged[0].loss == pytest.approx(exact_loss, rel=1e-2)
    assert logged[-1].loss < 0.95 * logged[0].loss
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_a_resumed_run_ends_where_the_whole_one_does(tokenizer: Any, tmp_path: Path) -> None:
    """In float32, whose path on CUDA sums in an order that may differ from run to run: to rounding."""
    plain = build(torch.float32)
    settings: dict[str, Any] = {"num_steps": 6, "batch_size": 4, "micro_batch_size": 2, "save_steps": 3}
    whole, logged, _ = train(plain, tokenizer, tmp_path, **settings)
    (checkpoint,) = (path for path in sft.list_checkpoints(tmp_path) if path.name == "checkpoint-3")
    resumed, rest, _ = train(plain, tokenizer, tmp_path / "again", resume_from=checkpoint, **settings)
    moved = distance(weights(whole), weights(plain))
    assert moved > 0.05 and distance(weights(resumed), weights(whole)) < 1e-2 * moved
    assert [m.loss for m in rest] == pytest.approx([m.loss for m in logged if m.step > 3], rel=1e-3)


# --- what is saved ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_trained_adapter_opens_in_plain_peft_with_the_same_logits(
    family: str, tokenizer: Any, tmp_path: Path
) -> None:
    from peft import PeftModel

    plain = build(family=family)
    rows = [(ids.cuda(), labels) for ids, labels in make_rows([40, 9, 64])]
    start = torch.cat(plain_logits(plain, rows)).float()
    fast, _, _ = train(plain, tokenizer, tmp_path / "run", num_steps=3)
    fast.eval().save_pretrained(tmp_path / "adapter")
    sizes = {"head_dim": 16} if family == "qwen3" else {}
    base = build_base(family, torch.bfloat16, **sizes)
    opened = PeftModel.from_pretrained(copy.deepcopy(base).cuda(), tmp_path / "adapter").eval()
    exact = PeftModel.from_pretrained(base.float().cuda(), tmp_path / "adapter").eval()
    engine = engine_of(fast)
    assert engine is not None
    ids, _, lengths = flatten(rows)
    with torch.no_grad():
        wanted = torch.cat(plain_logits(exact, rows)).float()
        usual = torch.cat(plain_logits(opened, rows)).float()
        got = engine.logits(engine.hidden_states(ids.cpu(), lengths)).float()
        assert torch.equal(torch.cat(plain_logits(fast, rows)).float(), usual)  # the model's own forward, to the bit
    off, allowed = (float((x - wanted).norm() / wanted.norm()) for x in (got, usual))
    assert off < BF16 * allowed < 0.05
    assert float((start - wanted).norm() / wanted.norm()) > 0.1  # it has learned something
