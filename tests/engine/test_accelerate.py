"""The accelerated model computes the same function as the plain one: logits, loss and every LoRA gradient.

Tolerances: in float32 1e-5 of the largest value (measured: below 1e-6 for logits, below 3e-6 for any gradient); in
bfloat16 no further from float32 on the same weights than 1.5 times what plain bfloat16 is (measured: 0.9 to 1.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from medcot.engine import attention, engine_of
from medcot.engine.memory import FASTEST, Keep, Memory
from tiny_models import (
    MIXED_WINDOWS,
    build_base,
    build_model,
    distance,
    flatten,
    gradients,
    make_rows,
    pair,
    plain_logits,
    plain_loss,
    relative,
)

FP32 = 1e-5
BF16 = 1.5

YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "num_hidden_layers": 3}),
    ("llama", {"tie_word_embeddings": True, "rope_parameters": YARN}),
    ("mistral", {}),
    ("mistral", {"sliding_window": None}),
    ("qwen2", {}),
    ("qwen2", MIXED_WINDOWS),
    ("qwen3", {}),
    ("qwen3", MIXED_WINDOWS),
]
families = pytest.mark.parametrize(("family", "sizes"), CASES, ids=[f"{f}-{'-'.join(s) or 'usual'}" for f, s in CASES])
one_of_each = pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])

LENGTHS = [23, 1, 40, 9, 2]
Rows = Sequence[tuple[Tensor, Tensor]]


def fast_loss(model: Any, rows: Rows, memory: Memory = FASTEST) -> Tensor:
    ids, labels, lengths = flatten(rows)
    engine = engine_of(model)
    assert engine is not None
    loss, num_trained = engine.summed_loss(ids, labels, lengths, memory=memory)
    assert num_trained == sum(int((labels != -100).sum()) for _, labels in rows)
    return loss


def fast_logits(model: Any, rows: Rows) -> Tensor:
    ids, _, lengths = flatten(rows)
    engine = engine_of(model)
    assert engine is not None
    return engine.logits(engine.hidden_states(ids, lengths))


def loss_and_gradients(loss: Tensor, model: Any) -> tuple[float, dict[str, Tensor]]:
    loss.backward()
    return float(loss.detach()), gradients(model)


@families
def test_logits_loss_and_gradients_in_float32(family: str, sizes: dict[str, Any]) -> None:
    fast, plain = pair(build_model(family, **sizes))
    rows = make_rows(LENGTHS)
    assert relative(fast_logits(fast, rows), torch.cat(plain_logits(plain, rows))) < FP32
    loss, got = loss_and_gradients(fast_loss(fast, rows), fast)
    plain_sum, wanted = loss_and_gradients(plain_loss(plain, rows), plain)
    assert loss == pytest.approx(plain_sum, rel=1e-6)
    assert got.keys() == wanted.keys() and len(got) == 14 * fast.config.num_hidden_layers
    assert max(relative(got[name], wanted[name]) for name in wanted) < FP32


@families
def test_logits_loss_and_gradients_in_bfloat16(family: str, sizes: dict[str, Any]) -> None:
    fast, plain = pair(build_model(family, torch.bfloat16, **sizes))
    exact, rows = pair(build_model(family, torch.bfloat16, **sizes))[1].float(), make_rows(LENGTHS * 2)
    _, wanted = loss_and_gradients(plain_loss(exact, rows), exact)
    _, got = loss_and_gradients(fast_loss(fast, rows), fast)
    _, usual = loss_and_gradients(plain_loss(plain, rows), plain)
    assert distance(got, wanted) < BF16 * distance(usual, wanted) < 0.05
    logits = torch.cat(plain_logits(exact, rows))
    off, usual_off = ((x - logits).norm() for x in (fast_logits(fast, rows), torch.cat(plain_logits(plain, rows))))
    assert off < BF16 * usual_off


MEMORIES = {
    "lean": Memory(Keep.LEAN),
    "input": Memory(Keep.INPUT),
    "tiles": Memory(Keep.INPUT, tile_tokens=32, chunk_tokens=7),
    "host": Memory(Keep.HOST),
    "host-tiles": Memory(Keep.HOST, tile_tokens=16, one_weight=True),
}


@one_of_each
@pytest.mark.parametrize("memory", MEMORIES.values(), ids=list(MEMORIES))
def test_keeping_less_gives_the_same_gradients(family: str, memory: Memory) -> None:
    fast, _ = pair(build_model(family))
    rows = make_rows(LENGTHS)
    loss, wanted = loss_and_gradients(fast_loss(fast, rows), fast)
    for _ in range(2):  # the second time, the host's buffers are there
        again, got = loss_and_gradients(fast_loss(fast, rows, memory), fast)
        assert again == pytest.approx(loss, rel=1e-6)
        assert max(relative(got[name], wanted[name]) for name in wanted) < FP32


@one_of_each
def test_packed_padded_and_single_are_one(family: str) -> None:
    """The plain model in a padded rectangle and packed by position_ids, the fast one packed and row by row."""
    fast, plain = pair(build_model(family))
    rows = make_rows([12, 31, 5])
    ids, _, lengths = flatten(rows)
    rectangle = torch.nn.utils.rnn.pad_sequence([r[0] for r in rows], batch_first=True)
    real = torch.arange(rectangle.shape[1])[None] < torch.tensor(lengths)[:, None]
    wanted = plain(input_ids=rectangle, attention_mask=real.long()).logits[real]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    packed = plain(input_ids=ids[None], position_ids=positions, use_cache=False).logits[0]
    assert relative(packed, wanted) < FP32
    assert relative(fast_logits(fast, rows), wanted) < FP32
    assert relative(torch.cat([fast_logits(fast, [row]) for row in rows]), wanted) < FP32
    assert relative(fast_logits(fast, rows[::-1])[-12:], wanted[:12]) < FP32


@one_of_each
def test_rows_of_one_token_and_totals_that_are_no_round_number(family: str) -> None:
    fast, plain = pair(build_model(family))
    for lengths in ([1], [1, 1], [15], [16], [17], [1, 31, 1]):
        rows = make_rows(lengths)
        assert relative(fast_logits(fast, rows), torch.cat(plain_logits(plain, rows))) < FP32, lengths


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_row_longer_than_a_block_of_queries(family: str) -> None:
    fast, plain = pair(build_model(family))
    rows = make_rows([attention.QUERY_BLOCK + 30, 11])
    assert relative(fast_logits(fast, rows), torch.cat(plain_logits(plain, rows))) < FP32
    _, got = loss_and_gradients(fast_loss(fast, rows), fast)
    _, wanted = loss_and_gradients(plain_loss(plain, rows), plain)
    assert distance(got, wanted) < FP32


def test_positions_start_again_at_each_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotary angles are relative, so results would hide it until far positions lost their last bits."""
    fast, _ = pair(build_model("llama"))
    engine = engine_of(fast)
    assert engine is not None
    seen, embed = [], engine.embed
    monkeypatch.setattr(engine, "embed", lambda ids, positions: seen.append(positions) or embed(ids, positions))
    engine.hidden_states(torch.arange(9), [4, 5])
    assert seen[0].tolist()[:9] == [0, 1, 2, 3, 0, 1, 2, 3, 4]


def test_micro_batches_of_a_step_add_up_to_one_gradient() -> None:
    """8 rows as 2x4, 4x2 and 8x1: divided by the step's trained tokens, not by each forward's."""
    fast, _ = pair(build_model("llama"))
    rows = make_rows([3, 50, 8, 21, 2, 34, 17, 5])
    num_trained = sum(int((labels != -100).sum()) for _, labels in rows)

    def step(size: int) -> dict[str, Tensor]:
        for start in range(0, len(rows), size):
            (fast_loss(fast, rows[start : start + size]) / num_trained).backward()
        return gradients(fast)

    at_once = step(8)
    for size in (4, 2, 1):
        assert distance(step(size), at_once) < FP32
    means = [fast_loss(fast, [row]) / max(1, int((row[1] != -100).sum())) for row in rows]
    torch.stack(means).mean().backward()
    assert distance(gradients(fast), at_once) > 0.05  # the mean of the rows' means is another gradient


def test_only_the_trained_tokens_count() -> None:
    fast, plain = pair(build_model("llama"))
    ((ids, labels),) = make_rows([20])
    labels = torch.full_like(labels, -100)
    labels[[4, 19]] = ids[[4, 19]]
    log_p = F.log_softmax(plain_logits(plain, [(ids, labels)])[0].detach(), -1)
    wanted = -float(log_p[3, ids[4]] + log_p[18, ids[19]])
    assert fast_loss(fast, [(ids, labels)]).item() == pytest.approx(wanted, rel=1e-5)
    nothing = fast_loss(fast, [(ids, torch.full_like(ids, -100))])
    nothing.backward()
    assert nothing.item() == 0 and not any(gradient.any() for gradient in gradients(fast).values())


def test_adapters_switched_off_give_the_base_and_back_on_the_adapter() -> None:
    fast, plain = pair(build_model("qwen3"))
    rows = make_rows([14, 6])
    adapted = fast_logits(fast, rows)
    with fast.disable_adapter(), plain.disable_adapter():
        base = fast_logits(fast, rows)
        assert relative(base, torch.cat(plain_logits(plain, rows))) < FP32
    assert relative(base, torch.cat(plain_logits(build_base("qwen3"), rows))) < FP32
    assert relative(base, adapted) > 0.01
    assert torch.equal(fast_logits(fast, rows), adapted)


def test_a_bare_model_without_adapters() -> None:
    from medcot.engine import accelerate

    base = build_base("qwen2")
    rows = make_rows([14, 6])
    wanted = torch.cat(plain_logits(base, rows))
    assert accelerate(base).fast
    assert relative(fast_logits(base, rows), wanted) < FP32


def test_a_step_of_the_adapter_is_seen_at_once() -> None:
    fast, plain = pair(build_model("llama"))
    rows = make_rows([20, 9])
    before = fast_logits(fast, rows)
    for model, loss in ((fast, fast_loss(fast, rows)), (plain, plain_loss(plain, rows))):
        loss.backward()
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.data.sub_(parameter.grad, alpha=1e-2)
    assert relative(fast_logits(fast, rows), torch.cat(plain_logits(plain, rows))) < FP32
    assert relative(fast_logits(fast, rows), before) > 0.01


def test_the_loss_uses_the_head_as_it_is_now() -> None:
    """A vocabulary resized after accelerate() is the one that the loss is taken over."""
    fast, plain = build_model("llama"), build_model("llama")
    from medcot.engine import accelerate

    accelerate(fast)
    for model in (fast, plain):
        torch.manual_seed(0)
        model.get_base_model().resize_token_embeddings(128, mean_resizing=False)
        model.requires_grad_(False)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
    rows = make_rows([9, 14])
    assert float(fast_loss(fast, rows)) == pytest.approx(float(plain_loss(plain, rows)), rel=1e-5)


def test_norms_in_another_dtype_than_the_products_take_the_plain_path() -> None:
    """As after PEFT's prepare_model_for_kbit_training: the engine computes in one dtype."""
    from medcot.engine import accelerate

    model = build_model("llama", torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = parameter.data.float()
    explanation = accelerate(model)
    assert not explanation.fast and "norms in torch.float32" in str(explanation)
