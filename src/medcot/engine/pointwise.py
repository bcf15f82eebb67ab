"""Norm, rotary embedding and SwiGLU with their backward passes written out.

Why: on a CPU the plain decoder layer spends about as long in these small operations as in half a matrix product,
because autograd replays every cast and product one memory pass at a time and keeps float32 copies for it. Each class
here saves only what its derivative needs, in the model's own dtype, and works in place where the input is a fresh
projection output that nothing else reads. They are plain torch, so the same code runs on every device.

Axes are those of ``reference.py``, which holds the twin of each.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class RmsNorm(torch.autograd.Function):
    """``y = w · x / rms(x)`` for a frozen ``w``.

    With ``r = 1/rms(x)`` and ``h = dy · w``: ``dx = r·h - x · r³/D · Σ(h·x)``.
    """

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """Return the normed (T, D) in x's dtype; keeps x and one float32 a token."""
        mean_square_T1 = torch.linalg.vector_norm(x_TD, dim=-1, keepdim=True, dtype=torch.float32).square_()
        r_T1 = mean_square_T1.div_(x_TD.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x_TD, weight_D, r_T1)
        return (x_TD * r_T1).to(x_TD.dtype).mul_(weight_D)

    @staticmethod
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        """Return dx; the products are taken in float32 and rounded once."""
        x_TD, weight_D, r_T1 = ctx.saved_tensors
        h_TD = dy_TD.float().mul_(weight_D)
        x32_TD = x_TD.float()
        dot_T1 = torch.linalg.vecdot(h_TD, x32_TD).unsqueeze_(-1)
        coefficient_T1 = dot_T1.mul_(r_T1.pow(3)).div_(-x_TD.shape[-1])
        return h_TD.mul_(r_T1).addcmul_(x32_TD, coefficient_T1).to(x_TD.dtype), None, None


class RotaryInPlace(torch.autograd.Function):
    """Rotate the first ``num_rotated`` heads of a fused (T, heads, C) buffer, in place.

    A rotation's derivative is the rotation back, so nothing but the angles is kept, and the incoming gradient, which no
    one else reads, is rotated in place too.
    """

    @staticmethod
    def forward(ctx: Any, heads_THC: Tensor, cos_TC: Tensor, sin_TC: Tensor, num_rotated: int) -> Tensor:
        """Return the same buffer with its first heads rotated."""
        ctx.save_for_backward(cos_TC, sin_TC)
        ctx.num_rotated = num_rotated
        _rotate(heads_THC[:, :num_rotated], cos_TC, sin_TC)
        ctx.mark_dirty(heads_THC)
        return heads_THC

    @staticmethod
    def backward(ctx: Any, dy_THC: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        """Return the gradient rotated back."""
        cos_TC, sin_TC = ctx.saved_tensors
        _rotate(dy_THC[:, : ctx.num_rotated], cos_TC, -sin_TC)
        return dy_THC, None, None, None


def _rotate(x_THC: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> None:
    half = x_THC.shape[-1] // 2
    cos, sin = cos_TC[:, None, :half], sin_TC[:, None, :half]  # both halves of the angles are equal
    first, second = x_THC[..., :half], x_THC[..., half:]
    new_first = (first * cos).addcmul_(second, sin, value=-1)
    second.mul_(cos).addcmul_(first, sin)
    first.copy_(new_first)


class SwiGlu(torch.autograd.Function):
    """``silu(gate) · up`` on the fused (T, 2F) output of the gate and up projections.

    With ``s = sigmoid(gate)``: ``d up = dy · gate·s`` and ``d gate = dy · up · s·(1 + gate·(1 - s))``.
    """

    @staticmethod
    def forward(ctx: Any, gate_up_TN: Tensor) -> Tensor:
        """Return (T, F); keeps the fused input only."""
        ctx.save_for_backward(gate_up_TN)
        gate, up = gate_up_TN.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, dy_TF: Tensor) -> Tensor:  # type: ignore[override]
        """Return the gradient of both halves in one buffer."""
        (gate_up_TN,) = ctx.saved_tensors
        gate, up = gate_up_TN.chunk(2, -1)
        d_gate_up_TN = torch.empty_like(gate_up_TN)
        d_gate, d_up = d_gate_up_TN.chunk(2, -1)
        torch.mul(F.silu(gate), dy_TF, out=d_up)
        torch.ops.aten.silu_backward.grad_input(dy_TF * up, gate, grad_input=d_gate)
        return d_gate_up_TN


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last axis, for a frozen weight."""
    return RmsNorm.apply(x_TD, weight_D, eps)


def rotary_(heads_THC: Tensor, cos_TC: Tensor, sin_TC: Tensor, num_rotated: int) -> Tensor:
    """Rotate the first heads of a fused buffer in place; the buffer must have no other reader."""
    return RotaryInPlace.apply(heads_THC, cos_TC, sin_TC, num_rotated)


def swiglu(gate_up_TN: Tensor) -> Tensor:
    """``silu(gate) * up`` of a fused (T, 2F) tensor."""
    return SwiGlu.apply(gate_up_TN)
