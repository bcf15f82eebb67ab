"""The functions of ``pointwise.py`` over the Triton kernels of ``kernels.py``: same names, arguments and results.

A low-rank term that has not been added yet (``lora.Term``) is added by the kernel that reads the tensor anyway. Tile
sizes were chosen on an H200.

Axes are those of ``kernels.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from medcot.engine import kernels
from medcot.engine.terms import Rounded, Term
from medcot.engine.thin import (
    MAX_PARTS,
    padded,
    swiglu,
    swiglu_grad,
    swiglu_grad_scaled,
    thin_gradients,
    thin_gradients_rounded,
)

# The row tile is Triton's least for a matrix product: the norms want many programs rather than large ones.
NORM_ROWS, NORM_COLUMNS = 16, 256
ROTARY_ROWS = 32
QUANTISE_COLUMNS = 32768  # a row that fits is read once
QUANTISE_ROWS = 4  # that share one reading of the columns' factors
ENTROPY_COLUMNS = 8192
UNPACK_BYTES = 2048  # of packed weights, a program

KEEPS_TERMS = True
__all__ = [
    "KEEPS_TERMS", "add_norm", "cross_entropy_", "norm_grad", "norm_grad_rounded", "quantise_rows", "rotate_",
    "rotate_back", "swiglu", "swiglu_grad", "swiglu_grad_scaled", "thin_gradients", "thin_gradients_rounded",
    "unpack_nf4",
]  # fmt: skip


def add_norm(
    x_TD: Tensor, y_TD: Tensor | None, term: Term | None, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``pointwise.add_norm``."""
    x_TD = x_TD.contiguous()
    num_rows, width = x_TD.shape
    sum_TD = x_TD if y_TD is None else torch.empty_like(x_TD)
    normed_TD, r_T = torch.empty_like(x_TD), torch.empty(num_rows, dtype=torch.float32, device=x_TD.device)
    if num_rows:
        kernels.add_norm_kernel[(triton.cdiv(num_rows, NORM_ROWS),)](
            x_TD, x_TD if y_TD is None else y_TD, *_factor(term, x_TD), weight_D, sum_TD, normed_TD, r_T,
            num_rows, term.rank if term else 0, eps,
            D=width, HAS_Y=y_TD is not None, HAS_LOW=term is not None, RP=_padded(term),
            BT=NORM_ROWS, BD=min(NORM_COLUMNS, triton.next_power_of_2(width)),
            num_warps=8 if width > 1024 else 4, num_stages=2,
        )  # fmt: skip
    return sum_TD, normed_TD, r_T


def norm_grad(
    dn_TD: Tensor, term: Term | None, x_TD: Tensor, weight_D: Tensor, r_T: Tensor, d_sum_TD: Tensor | None
) -> Tensor:
    """As ``pointwise.norm_grad``."""
    return _norm_grad(dn_TD, term, x_TD, weight_D, r_T, d_sum_TD, None, None)


def norm_grad_rounded(
    dn_TD: Tensor, term: Term | None, x_TD: Tensor, weight_D: Tensor, r_T: Tensor, d_sum_TD: Tensor | None,
    columns_scale_D: Tensor,
) -> tuple[Tensor, Rounded]:  # fmt: skip
    """As ``pointwise.norm_grad_rounded``, in one kernel."""
    rounded = _empty_rounded(x_TD)
    return _norm_grad(dn_TD, term, x_TD, weight_D, r_T, d_sum_TD, columns_scale_D, rounded), rounded


def _norm_grad(
    dn_TD: Tensor, term: Term | None, x_TD: Tensor, weight_D: Tensor, r_T: Tensor, d_sum_TD: Tensor | None,
    columns_scale_D: Tensor | None, rounded: Rounded | None,
) -> Tensor:  # fmt: skip
    num_rows, width = x_TD.shape
    out_TD = torch.empty_like(x_TD)
    if term is not None:
        term.add_to(dn_TD)
    if num_rows:
        kernels.norm_grad_kernel[(num_rows,)](
            dn_TD, x_TD, weight_D, r_T, out_TD if d_sum_TD is None else d_sum_TD, out_TD,
            r_T if columns_scale_D is None else columns_scale_D, *(rounded or (out_TD, r_T)), num_rows,
            D=width, HAS_SUM=d_sum_TD is not None, ROUNDS=rounded is not None, BD=triton.next_power_of_2(width),
            num_warps=4 if width <= 4096 else 8,
        )  # fmt: skip
    return out_TD


def rotate_(heads_TNC: Tensor, term: Term | None, cos_TC: Tensor, sin_TC: Tensor, num_kv: int) -> Tensor:
    """As ``pointwise.rotate_``."""
    num_rows, num_heads, channels = heads_TNC.shape
    half = channels // 2
    # Value heads are not rotated; without a term there is nothing to do for them.
    grid = (triton.cdiv(num_rows, ROTARY_ROWS), num_heads if term else num_heads - num_kv)
    kernels.rotate_kernel[grid](
        heads_TNC, *_factor(term, heads_TNC), cos_TC, sin_TC, num_rows, num_heads, num_heads - 2 * num_kv, num_kv,
        term.rank if term else 0, cos_TC.stride(0),
        HALF=half, HP=max(16, triton.next_power_of_2(half)), HAS_LOW=term is not None, RP=_padded(term),
        BT=ROTARY_ROWS, num_warps=4,
    )  # fmt: skip
    return heads_TNC


def rotate_back(dq_THC: Tensor, dk_TGC: Tensor, dv_TGC: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
    """As ``pointwise.rotate_back``."""
    num_rows, num_queries, channels = dq_THC.shape
    num_kv = dk_TGC.shape[1]
    num_heads = num_queries + 2 * num_kv
    out_TNC = torch.empty(num_rows, num_heads, channels, dtype=dq_THC.dtype, device=dq_THC.device)
    half = channels // 2
    kernels.rotate_back_kernel[(triton.cdiv(num_rows, ROTARY_ROWS), num_heads)](
        dq_THC.contiguous(), dk_TGC.contiguous(), dv_TGC.contiguous(), cos_TC, sin_TC, out_TNC,
        num_rows, num_heads, num_queries, num_kv, cos_TC.stride(0),
        HALF=half, HP=max(16, triton.next_power_of_2(half)), BT=ROTARY_ROWS, num_warps=4,
    )  # fmt: skip
    return out_TNC


def cross_entropy_(logits_BV: Tensor, targets_B: Tensor) -> Tensor:
    """Each row's float32 loss, (B); the logits become ``softmax - onehot(target)``, their gradient."""
    num_rows, vocabulary = logits_BV.shape
    losses_B = torch.empty(num_rows, dtype=torch.float32, device=logits_BV.device)
    kernels.cross_entropy_kernel[(num_rows,)](
        logits_BV, targets_B, losses_B, V=vocabulary,
        BV=min(ENTROPY_COLUMNS, triton.next_power_of_2(vocabulary)), num_warps=32,
    )  # fmt: skip
    return losses_B


def unpack_nf4(packed: Sequence[Tensor], states: Sequence[Any], out: Tensor) -> None:
    """Write bitsandbytes' 4-bit tensors one after another, to the bits of its ``functional.dequantize_4bit``.

    Args:
        packed: uint8, two weights a byte; three tensors at most.
        states: the ``QuantState`` of each, all with blocks of one size.
        out: contiguous, of the weights' number of elements in all.
    """
    nested, blocksize = states[0].nested, states[0].blocksize
    assert 1 <= len(packed) == len(states) <= MAX_PARTS
    parts = [_packed_part(tensor, state) for tensor, state in zip(packed, states, strict=True)]
    parts += [(*parts[0][:-1], 0)] * (MAX_PARTS - len(parts))
    kernels.unpack_nf4_kernel[(sum(triton.cdiv(part[-1], UNPACK_BYTES) for part in parts),)](
        *parts[0], *parts[1], *parts[2], out,
        NESTED=nested, BLOCKSIZE=blocksize, NESTED_BLOCKSIZE=states[0].state2.blocksize if nested else 1,
        BLOCK=UNPACK_BYTES, num_warps=4,
        enable_fp_fusion=False,  # bitsandbytes rounds the product of the scales before it adds the offset
    )  # fmt: skip


def _packed_part(packed: Tensor, state: Any) -> tuple[Any, ...]:
    """What the kernel is given of a matrix: packed weights, scales and what these are stored with, number of bytes."""
    if not state.nested:
        return packed, state.absmax, state.code, state.code, state.code, state.code, packed.numel()
    inner = state.state2
    return packed, state.absmax, state.code, inner.code, inner.absmax, state.offset, packed.numel()


def quantise_rows(x_TN: Tensor, columns_scale_N: Tensor | None = None) -> Rounded:
    """As ``pointwise.quantise_rows``."""
    num_rows, width = x_TN.shape
    rounded = _empty_rounded(x_TN)
    rows = 1 if columns_scale_N is None else QUANTISE_ROWS
    if num_rows:
        kernels.quantise_rows_kernel[(triton.cdiv(num_rows, rows),)](
            x_TN.contiguous(), rounded.scale_T1 if columns_scale_N is None else columns_scale_N, *rounded, num_rows,
            N=width, HAS_SCALE=columns_scale_N is not None, ROWS=rows,
            BLOCK=min(QUANTISE_COLUMNS, triton.next_power_of_2(width)),
            num_warps=4 if width <= 8192 else 8 if width <= 16384 else 16,
        )  # fmt: skip
    return rounded


def _empty_rounded(like_TN: Tensor) -> Rounded:
    codes_TN = torch.empty(like_TN.shape, dtype=torch.float8_e4m3fn, device=like_TN.device)
    return Rounded(codes_TN, torch.empty(len(like_TN), 1, dtype=torch.float32, device=like_TN.device))


def _factor(term: Term | None, stand_in: Tensor) -> tuple[Tensor, Tensor]:
    return (stand_in, stand_in) if term is None else (term.u_TR, term.factor)


def _padded(term: Term | None) -> int:
    return padded(term.rank if term else 0)
