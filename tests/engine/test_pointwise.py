"""Norm, rotary embedding and SwiGLU against their twins: each raw forward with its raw gradient.

``tests/gpu/test_engine_cuda.py`` holds the Triton kernels against the same twins.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from medcot.engine import pointwise, reference
from medcot.engine.lora import Term
from twins import (
    add_norm_pair,
    add_norm_twin,
    assert_twins,
    largest,
    low_rank,
    mlp_pair,
    mlp_twin,
    norm_then_lora_pair,
    norm_then_lora_twin,
    randn,
    rotation_pair,
    rotation_twin,
    swiglu_pair,
    swiglu_twin,
)

DTYPES = [torch.float32, torch.bfloat16]
RANK = 5
EPS = 1e-6


def norm_weight(width: int) -> Tensor:
    # Of bfloat16's own values, so that the judge in float32 has the same weight.
    return (1 + 0.5 * randn(width, seed=1)).bfloat16().float()


def angles(num_tokens: int, channels: int, stretch: float = 1.0) -> tuple[Tensor, Tensor]:
    """Cosine and sine (T, C), both halves alike; ``stretch`` is the factor YaRN puts on them."""
    frequencies = 10_000 ** -(torch.arange(0, channels, 2) / channels)
    half = torch.arange(num_tokens)[:, None] * frequencies
    both = torch.cat((half, half), -1)
    return both.cos() * stretch, both.sin() * stretch


# --- norm -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_sum", [True, False], ids=["sum", "last"])  # the last norm's sum has no other reader
@pytest.mark.parametrize("given", ["x", "x y", "x y low"])
@pytest.mark.parametrize("shape", [(1, 64), (33, 63), (21, 16)])
@pytest.mark.parametrize("size", [1.0, 30.0, 1e-3])  # at 1e-3 epsilon is as large as the mean square
def test_add_norm(shape: tuple[int, int], size: float, given: str, with_sum: bool, dtype: torch.dtype) -> None:
    num_rows, width = shape
    weight = norm_weight(width)
    tensors = [randn(*shape) * size, randn(*shape, seed=2) * size]
    tensors += [randn(num_rows, RANK, seed=3) * size, randn(width, RANK, seed=4)]
    tensors = tensors[: {"x": 1, "x y": 2, "x y low": 4}[given]]
    fast = add_norm_pair(pointwise, weight, EPS, with_sum=with_sum)
    assert_twins(fast, add_norm_twin(weight, EPS, with_sum=with_sum), tensors, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [1, 33])
def test_the_norms_gradient_takes_a_low_rank_part(num_rows: int, dtype: torch.dtype) -> None:
    weight, width = norm_weight(24), 24
    tensors = [randn(num_rows, width), randn(40, width, seed=2), randn(RANK, width, seed=3), randn(40, RANK, seed=4)]
    assert_twins(norm_then_lora_pair(pointwise, weight, EPS), norm_then_lora_twin(weight, EPS), tensors, dtype)


def test_the_norm_without_a_sum_leaves_its_input() -> None:
    x, weight = randn(5, 16), norm_weight(16)
    before = x.clone()
    total, _, _ = pointwise.add_norm(x, None, None, weight, EPS)
    assert total is x and torch.equal(x, before)


def test_add_norm_leaves_the_residual_stream() -> None:
    x, y = randn(5, 16), randn(5, 16, seed=1)
    before = x.clone()
    pointwise.add_norm(x, y, Term(randn(5, 2), randn(16, 2), (16,)), norm_weight(16), EPS)
    assert torch.equal(x, before)  # the layer before keeps it for its gradient


def test_the_decoders_norm_is_the_norm() -> None:
    x, weight = randn(5, 16), norm_weight(16)
    assert largest(pointwise.rms_norm(x, weight, EPS), reference.rms_norm(x, weight, EPS)) < 1e-6


# --- rotary embedding -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [None, RANK])
@pytest.mark.parametrize(("num_tokens", "num_heads", "num_kv"), [(1, 1, 1), (19, 4, 1), (19, 2, 2), (33, 6, 2)])
@pytest.mark.parametrize("stretch", [1.0, 1.25])
def test_rotation(
    num_tokens: int, num_heads: int, num_kv: int, stretch: float, rank: int | None, dtype: torch.dtype
) -> None:
    cos, sin = (part.bfloat16().float() for part in angles(num_tokens, 24, stretch))
    width = num_heads + 2 * num_kv
    tensors = [randn(num_tokens, width, 24)]
    if rank is not None:
        tensors += [randn(num_tokens, 3 * rank, seed=3), randn(width * 24, rank, seed=4)]
    assert_twins(rotation_pair(pointwise, cos, sin, num_kv), rotation_twin(cos, sin, num_kv), tensors, dtype)


def test_rotation_back_undoes_it_and_leaves_what_it_is_given() -> None:
    cos, sin = angles(7, 8)
    heads = randn(7, 5, 8)
    parts = pointwise.rotate_(heads.clone(), None, cos, sin, 1).split([3, 1, 1], 1)
    before = [part.clone() for part in parts]
    assert largest(pointwise.rotate_back(*parts, cos, sin), heads) < 1e-6
    assert all(torch.equal(part, other) for part, other in zip(parts, before, strict=True))


@pytest.mark.parametrize(("heads", "rotated"), [(3, 2), (6, 4)])
def test_the_decoders_rotary_works_on_the_buffer_itself(heads: int, rotated: int) -> None:
    cos, sin = angles(3, 8)
    buffer = randn(3, heads, 8)
    wanted = torch.cat((reference.rotary(buffer[:, :rotated], cos, sin), buffer[:, rotated:]), 1)
    assert pointwise.rotary_(buffer, cos, sin, rotated).data_ptr() == buffer.data_ptr()
    assert largest(buffer, wanted) < 1e-6


# --- SwiGLU -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [None, RANK])
@pytest.mark.parametrize("shape", [(1, 2), (1, 224), (37, 66)])
@pytest.mark.parametrize("size", [1.0, 40.0])  # at 40 the sigmoid is 0 or 1
def test_swiglu(shape: tuple[int, int], size: float, rank: int | None, dtype: torch.dtype) -> None:
    num_rows, wide = shape
    tensors = [randn(*shape) * size]
    if rank is not None:
        tensors += [randn(num_rows, 2 * rank, seed=3), randn(wide, rank, seed=4)]
    assert_twins(swiglu_pair(pointwise), swiglu_twin, tensors, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [1, 37])
def test_swiglu_between_adapted_projections(num_rows: int, dtype: torch.dtype) -> None:
    width, out, down_rank = 33, 20, 3
    tensors = [randn(num_rows, 2 * width), randn(num_rows, 2 * RANK, seed=2), randn(2 * width, RANK, seed=3)]
    tensors += [randn(out, width, seed=4), randn(down_rank, width, seed=5), randn(out, down_rank, seed=6)]
    assert_twins(mlp_pair(pointwise), mlp_twin, tensors, dtype)


# --- terms ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("widths", [(7,), (6, 2, 2), (5, 5)])
def test_a_term_is_its_product(widths: tuple[int, ...]) -> None:
    target, u, B = randn(9, sum(widths)), randn(9, 3 * len(widths), seed=1), randn(sum(widths), 3, seed=2)
    wanted = target + low_rank(u, B, widths)
    term = Term(u, B, widths)
    term.add_to(target)
    assert term.rank == 3 and largest(target, wanted) < 1e-6


def test_a_backward_term_is_its_product() -> None:
    target, du, A = randn(9, 12), randn(9, 6, seed=1), randn(6, 12, seed=2)
    wanted = target + du @ A
    term = Term(du, A)
    term.add_to(target)
    assert term.rank == 6 and largest(target, wanted) < 1e-6
