"""Norm, rotary embedding and SwiGLU against their twins."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from medcot.engine import reference
from medcot.engine.pointwise import rms_norm, rotary_, swiglu
from twins import assert_twins, largest, randn

DTYPES = [torch.float32, torch.bfloat16]


def angles(num_tokens: int, channels: int, stretch: float = 1.0) -> tuple[Tensor, Tensor]:
    """Cosine and sine (T, C), both halves alike; ``stretch`` is the factor YaRN puts on them."""
    frequencies = 10_000 ** -(torch.arange(0, channels, 2) / channels)
    half = torch.arange(num_tokens)[:, None] * frequencies
    both = torch.cat((half, half), -1)
    return both.cos() * stretch, both.sin() * stretch


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 64), (33, 63), (7, 3, 16)])
@pytest.mark.parametrize("size", [1.0, 30.0, 1e-3])  # at 1e-3 epsilon is as large as the mean square
def test_rms_norm(shape: tuple[int, ...], size: float, dtype: torch.dtype) -> None:
    weight = (1 + 0.5 * randn(shape[-1], seed=1)).to(dtype)
    assert_twins(
        lambda x: rms_norm(x, weight, 1e-6),
        lambda x: reference.rms_norm(x, weight.to(x.dtype), 1e-6),
        [randn(*shape) * size],
        dtype,
    )


def test_rms_norm_of_a_view_with_gaps() -> None:
    weight = 1 + 0.5 * randn(16, seed=1)  # Qwen3 norms the query heads of a fused buffer
    assert_twins(
        lambda x: rms_norm(x[:, 1:4], weight, 1e-6),
        lambda x: reference.rms_norm(x[:, 1:4], weight, 1e-6),
        [randn(5, 6, 16)],
        torch.float32,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_tokens", "heads", "rotated"), [(1, 3, 2), (19, 6, 4), (19, 4, 4)])
@pytest.mark.parametrize("stretch", [1.0, 1.25])
def test_rotary(num_tokens: int, heads: int, rotated: int, stretch: float, dtype: torch.dtype) -> None:
    cos, sin = (part.to(dtype) for part in angles(num_tokens, 24, stretch))

    def twin(x: Tensor) -> Tensor:
        turned = reference.rotary(x[:, :rotated], cos.to(x.dtype), sin.to(x.dtype))
        return torch.cat((turned, x[:, rotated:]), 1)

    assert_twins(lambda x: rotary_(x * 1, cos, sin, rotated), twin, [randn(num_tokens, heads, 24)], dtype)


def test_rotary_works_on_the_buffer_itself() -> None:
    cos, sin = angles(3, 8)
    buffer = randn(3, 2, 8)
    wanted = reference.rotary(buffer, cos, sin)
    assert rotary_(buffer, cos, sin, 2).data_ptr() == buffer.data_ptr()
    assert largest(buffer, wanted) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2), (1, 224), (37, 66)])
@pytest.mark.parametrize("size", [1.0, 40.0])  # at 40 the sigmoid is 0 or 1
def test_swiglu(shape: tuple[int, int], size: float, dtype: torch.dtype) -> None:
    assert_twins(swiglu, reference.swiglu, [randn(*shape) * size], dtype)
