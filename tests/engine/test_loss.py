"""Cross-entropy in chunks against cross-entropy of all logits at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from medcot.engine import loss as loss_module
from medcot.engine import reference
from medcot.engine.frozen import DenseMatrix
from medcot.engine.loss import token_loss
from twins import assert_twins, randn

VOCAB, WIDTH = 89, 24


def make_case(num_tokens: int, dtype: torch.dtype, size: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    targets = torch.randint(VOCAB, (num_tokens,), generator=torch.Generator().manual_seed(5))
    return randn(num_tokens, WIDTH) * size, randn(VOCAB, WIDTH, seed=1).to(dtype), targets


def compare(
    num_tokens: int, dtype: torch.dtype, size: float = 1.0, share: float = 1.0, chunk_tokens: int | None = None
) -> None:
    hidden, head, targets = make_case(num_tokens, dtype, size)
    assert_twins(
        lambda x: token_loss(x, head, targets, chunk_tokens) * share,
        lambda x: reference.token_loss(x, head.to(x.dtype), targets) * share,
        [hidden],
        dtype,
    )


# One token, and either side of every size that a chunk may have.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [1, 31, 63, 64, 65, 127, 128, 129, 255, 256, 257, 513])
def test_at_the_borders_of_chunks(num_tokens: int, dtype: torch.dtype) -> None:
    compare(num_tokens, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_tokens", [1, 2, 7, 33, 159, 160, 1000])
@pytest.mark.parametrize("num_tokens", [1, 2, 34, 160, 161])
def test_chunks_of_any_size(num_tokens: int, chunk_tokens: int, dtype: torch.dtype) -> None:
    compare(num_tokens, dtype, chunk_tokens=chunk_tokens)


def test_chunks_are_even_and_no_larger_than_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    real = loss_module._loss_and_gradient
    monkeypatch.setattr(
        loss_module, "_loss_and_gradient", lambda logits, targets: sizes.append(len(logits)) or real(logits, targets)
    )
    hidden, head, targets = make_case(100, torch.float32)
    token_loss(hidden, head, targets, 33)
    assert sizes == [25, 25, 25, 25]
    sizes.clear()
    token_loss(hidden, head, targets, 40)
    assert sizes == [34, 34, 32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [1 / 3, 1 / 640, 1 / 16_001])
def test_the_step_divides_by_its_trained_tokens(share: float, dtype: torch.dtype) -> None:
    compare(70, dtype, share=share)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_far_apart(dtype: torch.dtype) -> None:
    compare(50, dtype, size=40.0)  # logits of ±700: most targets' probabilities are 0 in float32, the loss is not


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sum_is_kept_in_float32(dtype: torch.dtype) -> None:
    hidden, head, targets = make_case(300, dtype)
    loss = token_loss(hidden.to(dtype), head, targets)
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert float(loss) == pytest.approx(float(reference.token_loss(hidden.to(dtype), head, targets)), rel=1e-5)


def test_no_trained_token_gives_zero_and_zero_gradient() -> None:
    hidden, head, targets = make_case(0, torch.float32)
    hidden.requires_grad_()
    loss = token_loss(hidden, head, targets)
    loss.backward()
    assert loss.item() == 0.0 and hidden.grad is not None and hidden.grad.shape == (0, WIDTH)


def test_without_gradients() -> None:
    hidden, head, targets = make_case(130, torch.float32)
    with torch.no_grad():
        loss = token_loss(hidden, head, targets)
    assert not loss.requires_grad
    assert float(loss) == pytest.approx(float(reference.token_loss(hidden, head, targets)), rel=1e-6)


def test_two_backward_passes_add_up() -> None:
    hidden, head, targets = make_case(20, torch.float32)
    hidden.requires_grad_()
    loss = token_loss(hidden, head, targets)
    loss.backward(retain_graph=True)
    assert hidden.grad is not None
    once = hidden.grad.clone()
    loss.backward()
    assert torch.allclose(hidden.grad, 2 * once)


def test_a_matrix_of_the_engines_own_is_as_good_as_the_weight() -> None:
    hidden, head, targets = make_case(50, torch.float32)
    assert torch.equal(token_loss(hidden, DenseMatrix(head), targets), token_loss(hidden, head, targets))


def test_the_head_and_the_hidden_states_stay_as_they_were() -> None:
    hidden, head, targets = make_case(50, torch.float32)
    before = hidden.clone(), head.clone()
    hidden.requires_grad_()
    token_loss(hidden, head, targets, 7).backward()
    assert torch.equal(hidden, before[0]) and torch.equal(head, before[1])
