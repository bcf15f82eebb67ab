"""How an operation is held against its plain-torch twin.

In float32 both must agree to rounding. In bfloat16 neither is right, so the judge is the twin in float32 on the same
(already rounded) inputs, and the fast operation may not stray further from it than the bfloat16 twin does, up to a
factor. Results are compared output by output and gradient by gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Operation = Callable[..., Tensor]

FP32 = 1e-5  # largest difference as a share of the largest value; two correct orders of summation differ by about 1e-6
BF16 = 1.5  # times the bfloat16 twin's own error
FLOOR = 1e-3  # a share of the values' size; an error below a quarter of bfloat16's step (2^-8) is none


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def results(
    operation: Operation, tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype], device: str = "cpu"
) -> list[Tensor]:
    """The output, then the gradient of each tensor, for an incoming gradient that is always the same."""
    pairs = zip(tensors, dtypes, strict=True)
    leaves = [tensor.to(device, dtype, copy=True).requires_grad_() for tensor, dtype in pairs]
    out = operation(*leaves)
    out.backward(randn(*out.shape, seed=99).to(out))
    for leaf in leaves:
        assert leaf.grad is not None and leaf.grad.dtype == leaf.dtype
    return [out.detach().float(), *(leaf.grad.float() for leaf in leaves if leaf.grad is not None)]


def assert_twins(
    fast: Operation,
    twin: Operation,
    tensors: Sequence[Tensor],
    dtype: torch.dtype,
    *,
    masters: int = 0,
    yardstick: Operation | None = None,
    device: str = "cpu",
) -> None:
    """Compare an operation with its twin, forward and backward.

    The last ``masters`` tensors stay in float32 whatever the dtype, as adapter weights do. ``yardstick`` is the plain
    operation whose bfloat16 error is the measure, where that is not the twin.
    """
    half = len(tensors) - masters
    dtypes = [dtype] * half + [torch.float32] * masters
    rounded = [tensor.to(dtype).float() for tensor in tensors[:half]] + list(tensors[half:])
    exact = results(twin, rounded, [torch.float32] * len(tensors), device)
    got = results(fast, rounded, dtypes, device)
    if dtype == torch.float32:
        errors = [largest(one, other) for one, other in zip(got, exact, strict=True)]
        assert max(errors) <= FP32, errors
        return
    plain = results(yardstick or twin, rounded, dtypes, device)
    allowed = [BF16 * typical(one, other) + FLOOR for one, other in zip(plain, exact, strict=True)]
    errors = [typical(one, other) for one, other in zip(got, exact, strict=True)]
    assert all(error <= limit for error, limit in zip(errors, allowed, strict=True)), (errors, allowed)


def largest(got: Tensor, wanted: Tensor) -> float:
    """Largest difference as a share of the largest value; NaN anywhere is infinite."""
    return _share((got - wanted).abs().amax(), wanted.abs().amax())


def typical(got: Tensor, wanted: Tensor) -> float:
    """Root-mean-square difference as a share of the values' own."""
    return _share((got - wanted).norm(), wanted.norm())


def _share(difference: Tensor, size: Tensor) -> float:
    share = difference / size.clamp_min(1e-6)
    return float("inf") if share.isnan() else float(share)
