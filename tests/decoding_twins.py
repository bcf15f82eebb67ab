"""Plain-torch twins of the kernels that write answers, for the interpreter's tests and the GPU's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from medcot.engine import reference
from twins import randn

SCALE_BLOCK = 64


def interleave(x_BD: Tensor) -> Tensor:
    """As ``gemv`` wants its input: element d at (d % 8) · D/8 + d // 8."""
    return x_BD.float().unflatten(-1, (-1, 8)).transpose(-1, -2).flatten(-2).contiguous()


def quantise(weight_ND: Tensor, *, nested: bool = True) -> Any:
    """A weight as bitsandbytes keeps it: ``data`` and ``quant_state``."""
    from bitsandbytes.functional import quantize_4bit

    data, state = quantize_4bit(weight_ND, blocksize=SCALE_BLOCK, compress_statistics=nested, quant_type="nf4")
    return SimpleNamespace(data=data, quant_state=state, device=weight_ND.device)


def pack(parameters: Sequence[Any]) -> tuple[list[Tensor], Tensor, Tensor]:
    """Words, scales and code, as ``nf4_gemv`` takes them."""
    from medcot.engine.products import unpack_scales

    words = [p.data.flatten().view(torch.int32) for p in parameters]
    scales = torch.cat([unpack_scales(p.quant_state) for p in parameters])
    return words, scales, parameters[0].quant_state.code.float()


def attend(
    fused_BNC: Tensor,
    keys_BGSC: Tensor,
    values_BGSC: Tensor,
    lengths: Sequence[int],
    angles: tuple[Tensor, Tensor],
    window: int | None,
    head_norms: tuple[Tensor, Tensor, float] | None,
) -> Tensor:
    """One new token of each row, (B, H, C): row by row, through the reference attention of its whole row."""
    num_kv = keys_BGSC.shape[1]
    num_queries = fused_BNC.shape[1] - 2 * num_kv
    outputs = []
    for row, length in enumerate(lengths):
        q, k, v = fused_BNC[row : row + 1].split([num_queries, num_kv, num_kv], 1)
        if head_norms is not None:
            q_norm, k_norm, eps = head_norms
            q, k = reference.rms_norm(q, q_norm, eps), reference.rms_norm(k, k_norm, eps)
        cos, sin = (angle[length : length + 1] for angle in angles)
        q, k = reference.rotary(q, cos, sin), reference.rotary(k, cos, sin)
        keys = torch.cat((keys_BGSC[row, :, :length].transpose(0, 1), k))
        values = torch.cat((values_BGSC[row, :, :length].transpose(0, 1), v))
        queries = torch.cat((q.new_zeros(length, *q.shape[1:]), q))
        outputs.append(reference.attention(queries, keys, values, [length + 1], window)[-1:])
    return torch.cat(outputs)


def nucleus(logits_V: Tensor, temperature: float, top_p: float) -> Tensor:
    """Each token's share of the draws, by its definition, in float64; of equal tokens the first come first."""
    shares = (logits_V.double() / temperature).softmax(-1)
    ordered, ids = shares.sort(descending=True, stable=True)
    inside = ordered.cumsum(0) - ordered < top_p
    kept = torch.zeros_like(shares).scatter(0, ids[inside], ordered[inside])
    return kept / kept.sum()


def make_angles(slots: int, channels: int) -> tuple[Tensor, Tensor]:
    angle = torch.arange(slots)[:, None] * 100 ** -(torch.arange(channels // 2) / channels)
    return torch.cat((angle, angle), -1).cos(), torch.cat((angle, angle), -1).sin()


def make_cache(num_rows: int, num_kv: int, slots: int, channels: int, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Keys and values, NaN in every slot that is not filled."""
    pair = []
    for seed in (11, 12):
        filled = randn(num_rows, num_kv, slots, channels, seed=seed)
        for row, length in enumerate(lengths):
            filled[row, :, length:] = math.nan
        pair.append(filled)
    return pair[0], pair[1]
