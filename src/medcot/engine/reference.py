"""The plain-torch twin of every fast operation: the definition that the engine is tested against.

Nothing here is tuned. Each function is the shortest honest statement of its formula, differentiable by autograd, and
follows transformers' own order of casts, so that in 16-bit types the twin shows the error a plain model would make.

Axes: T tokens of all rows of a batch, one after another; D hidden; N outputs of a projection; R LoRA rank; H query
heads; G key/value heads; C channels of a head; V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm (Zhang & Sennrich 2019, arXiv:1910.07467), statistics in float32."""
    x32_TD = x_TD.float()
    normed_TD = x32_TD * torch.rsqrt(x32_TD.pow(2).mean(-1, keepdim=True) + eps)
    return weight_D * normed_TD.to(x_TD.dtype)


def rotary(x_THC: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
    """Rotary position embedding in the half-split layout (Su et al. 2021, arXiv:2104.09864)."""
    first, second = x_THC.chunk(2, -1)
    rotated_THC = torch.cat((-second, first), -1)
    return x_THC * cos_TC[:, None] + rotated_THC * sin_TC[:, None]


def swiglu(gate_up_TN: Tensor) -> Tensor:
    """``silu(gate) * up`` (Shazeer 2020, arXiv:2002.05202); gate and up are the two halves of the last axis."""
    gate, up = gate_up_TN.chunk(2, -1)
    return F.silu(gate) * up


def lora_linear(
    x_TD: Tensor, weight_ND: Tensor, bias_N: Tensor | None, As: Sequence[Tensor], Bs: Sequence[Tensor], scale: float
) -> Tensor:
    """Projections that share an input, side by side: ``x Wᵀ + b + scale · [x A₁ᵀ B₁ᵀ | x A₂ᵀ B₂ᵀ | …]``.

    LoRA is Hu et al. 2021, arXiv:2106.09685. ``As[i]`` is (R, D) and ``Bs[i]`` (Nᵢ, R); the Nᵢ add up to N.
    """
    low_rank = [(x_TD @ A.to(x_TD.dtype).T) @ B.to(x_TD.dtype).T * scale for A, B in zip(As, Bs, strict=True)]
    return F.linear(x_TD, weight_ND, bias_N) + torch.cat(low_rank, -1)


def attention(
    q_THC: Tensor, k_TGC: Tensor, v_TGC: Tensor, row_lengths: Sequence[int], window: int | None = None
) -> Tensor:
    """Causal attention in which no row sees another; (T, H, C). ``window``: keys a query sees, itself included."""
    outputs, start = [], 0
    for length in row_lengths:
        rows = slice(start, start + length)
        q, k, v = (part[rows].transpose(0, 1) for part in (q_THC, k_TGC, v_TGC))
        groups = q.shape[0] // k.shape[0]
        k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
        scores = (q.float() @ k.float().transpose(-1, -2)) * q.shape[-1] ** -0.5
        seen = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
        if window is not None:
            seen = seen.triu(1 - window)
        probabilities = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        outputs.append((probabilities @ v.float()).to(q.dtype).transpose(0, 1))
        start += length
    return torch.cat(outputs)


def token_loss(hidden_TD: Tensor, head_VD: Tensor, targets_T: Tensor) -> Tensor:
    """Summed cross-entropy of the given targets, in float32; -100 marks tokens that carry no loss."""
    return F.cross_entropy((hidden_TD @ head_VD.T).float(), targets_T, ignore_index=-100, reduction="sum")
