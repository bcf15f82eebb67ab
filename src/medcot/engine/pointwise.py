"""Norm, rotary embedding and SwiGLU in plain torch: each forward, and the gradient written out.

Why written out: on a CPU the plain decoder layer spends about as long in these small operations as in half a matrix
product, because autograd replays every cast and product one memory pass at a time and keeps float32 copies for it. The
functions here keep only what the derivative needs, in the model's own dtype, and work in place where nothing else
reads. ``launch.py`` has the same functions over Triton kernels, for GPUs; ``layers.py`` uses either by these names.

Where a projection's output or gradient comes with a low-rank term (``lora.Term``) that has not been added yet, it is
added here first, in place.

Axes are those of ``reference.py``, which holds the twin of each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from medcot.engine.terms import Rounded, Term


def add_norm(
    x_TD: Tensor, y_TD: Tensor | None, term: Term | None, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Residual sum and its root-mean-square norm.

    Args:
        x_TD: the residual stream.
        y_TD: what is added to it; ``None`` for nothing. It is used up.
        term: the low-rank part of y.
        weight_D: the norm's frozen weight.
        eps: added to the mean square.

    Returns:
        The sum (x itself where there is no y), the normed (T, D), and ``r = 1/rms`` in float32, (T).
    """
    if y_TD is not None:
        if term is not None:
            term.add_to(y_TD)
        x_TD = y_TD.add_(x_TD)
    mean_square_T1 = torch.linalg.vector_norm(x_TD, dim=-1, keepdim=True, dtype=torch.float32).square_()
    r_T1 = mean_square_T1.div_(x_TD.shape[-1]).add_(eps).rsqrt_()
    return x_TD, (x_TD * r_T1).to(x_TD.dtype).mul_(weight_D), r_T1[..., 0]


def norm_grad(
    dn_TD: Tensor, term: Term | None, x_TD: Tensor, weight_D: Tensor, r_T: Tensor, d_sum_TD: Tensor | None
) -> Tensor:
    """Gradient of ``add_norm``'s sum, from that of the normed and of the sum itself.

    With ``h = dn · w``: ``dx = r·h - x · r³/D · Σ(h·x) + d_sum``, in float32 and rounded once.

    Args:
        dn_TD: gradient of the normed; it is used up.
        term: its low-rank part.
        x_TD: the sum.
        weight_D: the norm's frozen weight.
        r_T: what ``add_norm`` returned.
        d_sum_TD: gradient that reaches the sum by its other ways.
    """
    if term is not None:
        term.add_to(dn_TD)
    r_T1 = r_T[..., None]
    h_TD = dn_TD.float().mul_(weight_D)
    x32_TD = x_TD.float()
    dot_T1 = torch.linalg.vecdot(h_TD, x32_TD).unsqueeze_(-1)
    dx_TD = h_TD.mul_(r_T1).addcmul_(x32_TD, dot_T1.mul_(r_T1.pow(3)).div_(-x_TD.shape[-1]))
    return (dx_TD if d_sum_TD is None else dx_TD.add_(d_sum_TD)).to(x_TD.dtype)


def norm_grad_rounded(
    dn_TD: Tensor, term: Term | None, x_TD: Tensor, weight_D: Tensor, r_T: Tensor, d_sum_TD: Tensor | None,
    columns_scale_D: Tensor,
) -> tuple[Tensor, Rounded]:  # fmt: skip
    """As ``norm_grad``, and the gradient rounded to 8 bit as ``quantise_rows`` does it, with factors of its columns."""
    dx_TD = norm_grad(dn_TD, term, x_TD, weight_D, r_T, d_sum_TD)
    return dx_TD, quantise_rows(dx_TD, columns_scale_D)


def quantise_rows(x_TN: Tensor, columns_scale_N: Tensor | None = None) -> Rounded:
    """Round rows to float8 e4m3, each with its own scale: its largest size becomes e4m3's largest number, 448.

    Args:
        x_TN: 16 or 32 bit.
        columns_scale_N: float32 factors of the columns, applied first.
    """
    return _round(x_TN, columns_scale_N, _row_scale(x_TN, columns_scale_N))


def _row_scale(x_TN: Tensor, columns_scale_N: Tensor | None) -> Tensor:
    """Each row's scale, (T, 1)."""
    value_TN = x_TN.float() if columns_scale_N is None else x_TN.float() * columns_scale_N
    largest_T1 = value_TN.abs().amax(1, keepdim=True)
    return torch.where(largest_T1 > 1e-30, largest_T1 / 448, 1.0)


def _round(x_TN: Tensor, columns_scale_N: Tensor | None, scale_T1: Tensor) -> Rounded:
    value_TN = x_TN.float() if columns_scale_N is None else x_TN.float() * columns_scale_N
    return Rounded((value_TN * (1 / scale_T1)).to(torch.float8_e4m3fn), scale_T1)


def rotate_(heads_TNC: Tensor, term: Term | None, cos_TC: Tensor, sin_TC: Tensor, num_kv: int) -> Tensor:
    """Rotate the query and key heads of a fused (T, H + 2G, C) buffer in place; return it."""
    if term is not None:
        term.add_to(heads_TNC.flatten(1))
    _turn(heads_TNC[:, :-num_kv], cos_TC, sin_TC)
    return heads_TNC


def rotate_back(dq_THC: Tensor, dk_TGC: Tensor, dv_TGC: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
    """Gradient of the fused buffer before its rotation: a rotation's derivative is the rotation back."""
    d_heads_TNC = torch.cat((dq_THC, dk_TGC, dv_TGC), 1)
    _turn(d_heads_TNC[:, : -dv_TGC.shape[1]], cos_TC, -sin_TC)
    return d_heads_TNC


def _turn(x_THC: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> None:
    half = x_THC.shape[-1] // 2
    cos, sin = cos_TC[:, None, :half], sin_TC[:, None, :half]  # both halves of the angles are equal
    first, second = x_THC[..., :half], x_THC[..., half:]
    new_first = (first * cos).addcmul_(second, sin, value=-1)
    second.mul_(cos).addcmul_(first, sin)
    first.copy_(new_first)


def swiglu(gate_up_TN: Tensor, term: Term | None = None, out_TF: Tensor | None = None) -> Tensor:
    """``silu(gate) · up`` of the fused (T, 2F) output of the gate and up projections, (T, F).

    The term, if any, is added into ``gate_up_TN`` for good; ``swiglu_grad`` must then be given none. The product is
    written to ``out_TF`` where that is given.
    """
    if term is not None:
        term.add_to(gate_up_TN)
    gate, up = gate_up_TN.chunk(2, -1)
    silu = F.silu(gate)
    return silu.mul_(up) if out_TF is None else torch.mul(silu, up, out=out_TF)


def swiglu_grad(
    dh_TF: Tensor, down_term: Term | None, gate_up_TN: Tensor, term: Term | None
) -> tuple[Tensor, Tensor | None]:
    """Gradient of gate and up in one (T, 2F) buffer, and the dA (R, F) of the projection that reads the product.

    With ``s = sigmoid(gate)``: ``d up = dh · gate·s`` and ``d gate = dh · up · s·(1 + gate·(1 - s))``. The product is
    made again on the way, so that nobody has to keep it for ``dA = duᵀ (gate·s·up)``.

    Args:
        dh_TF: gradient of the product; it is used up.
        down_term: its low-rank part, the down projection's du and A; ``None`` where that has no adapter, and no dA.
        gate_up_TN: what ``swiglu`` was given; it may be used up.
        term: the low-rank part of gate and up, where ``KEEPS_TERMS`` says that it is still to be added.
    """
    assert term is None, "swiglu() has added it"
    if down_term is not None:
        down_term.add_to(dh_TF)
    gate, up = gate_up_TN.chunk(2, -1)
    d_gate_up_TN = torch.empty_like(gate_up_TN)
    d_gate, d_up = d_gate_up_TN.chunk(2, -1)
    silu = F.silu(gate)
    torch.mul(silu, dh_TF, out=d_up)
    torch.ops.aten.silu_backward.grad_input(dh_TF * up, gate, grad_input=d_gate)
    return d_gate_up_TN, None if down_term is None else down_term.u_TR.T @ silu.mul_(up)


def thin_gradients(dy_TN: Tensor, u_TR: Tensor, B_Nr: Tensor, widths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Gradients of a group's u and B from that of its outputs: ``duᵢ = dyᵢ Bᵢ`` and ``dBᵢ = dyᵢᵀ uᵢ``.

    Args:
        dy_TN: gradient of the outputs.
        u_TR: what the forward kept.
        B_Nr: every s·Bᵢ, stacked.
        widths: Nᵢ.

    Returns:
        du (T, R), and dB/s (N, r), both in the gradient's dtype.
    """
    if len(widths) == 1:
        return dy_TN @ B_Nr, dy_TN.T @ u_TR
    rank = B_Nr.shape[1]
    du_TR, dB_Nr = torch.empty_like(u_TR), torch.empty_like(B_Nr)
    parts = (dy_TN.split(widths, -1), u_TR.split(rank, -1), B_Nr.split(widths), du_TR.split(rank, -1))
    for dy, u, B, du, dB in zip(*parts, dB_Nr.split(widths), strict=True):
        torch.mm(dy, B, out=du)
        torch.mm(dy.T, u, out=dB)
    return du_TR, dB_Nr


def swiglu_grad_scaled(
    dh_TF: Tensor, down_term: Term | None, gate_up_TN: Tensor, term: Term | None, columns_scale_N: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """As ``swiglu_grad``, and the scales (T, 1) with which ``quantise_rows`` would round the first."""
    d_TN, dA = swiglu_grad(dh_TF, down_term, gate_up_TN, term)
    return d_TN, dA, _row_scale(d_TN, columns_scale_N)


def thin_gradients_rounded(
    dy_TN: Tensor, u_TR: Tensor, B_Nr: Tensor, widths: Sequence[int], columns_scale_N: Tensor, scale_T1: Tensor
) -> tuple[Tensor, Tensor, Rounded]:
    """As ``thin_gradients``, and the gradient of the outputs rounded to 8 bit with the given factors and scales."""
    return *thin_gradients(dy_TN, u_TR, B_Nr, widths), _round(dy_TN, columns_scale_N, scale_T1)


# Whether ``swiglu`` leaves gate_up_TN as it was, so that its term must be given to ``swiglu_grad`` again.
KEEPS_TERMS = False


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last axis, for decoding."""
    return add_norm(x_TD, None, None, weight_D, eps)[1]


def rotary_(heads_THC: Tensor, cos_TC: Tensor, sin_TC: Tensor, num_rotated: int) -> Tensor:
    """Rotate the first heads of a fused buffer in place, for decoding; the buffer must have no other reader."""
    return rotate_(heads_THC, None, cos_TC, sin_TC, heads_THC.shape[1] - num_rotated)
