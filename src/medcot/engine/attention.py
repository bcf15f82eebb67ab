"""Causal attention over rows laid end to end, none of which sees another.

On a GPU from Ampere on, in 16 bit, this is PyTorch's own ``varlen_attn``. Elsewhere (a CPU, a T4, float32) PyTorch has
no such kernel, and on a CPU its flash kernel's backward is slow for short rows: 18.8 ms for 12 rows of 80 tokens, nine
heads, forward and backward, against 5.0 ms for plain batched products on the same two Zen 4 cores. So the portable path
pads inside attention only (q, k and v are gathered into a rectangle and the output is gathered back; every other
operation sees real tokens alone), folds the query heads that share a key head into the rows of one product, and works
through blocks of queries so that no score beyond the causal diagonal's block is computed. Padding stands at a row's
end, where a causal mask already hides it from every real query.

Short rows keep their probabilities for the backward pass. Long ones, whose probabilities would fill memory, compute
them again: one extra product and softmax.

Backward, for ``P = softmax(s·QKᵀ + mask)`` and ``O = PV`` (Vaswani et al. 2017, arXiv:1706.03762):

    dV = Pᵀ dO        dP = dO Vᵀ        dS = P ∘ (dP - rowsum(dP ∘ P))        dQ = s·dS K        dK = s·dSᵀ Q

Axes: T tokens of all rows; B rows; L longest row; H query heads; G key/value heads; J = H/G query heads a key head;
C channels. A "fused" buffer holds the heads in the order q, k, v on one axis.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

# Queries are taken this many at a time: a block's scores then fit the L2 cache, and half the square is never computed.
QUERY_BLOCK = 256
# Probabilities are kept up to this many elements a layer (16 MB in bf16), and computed again beyond it.
KEEP_PROBABILITIES = 8_000_000
# oneDNN compiles each matrix product for its exact shape, about 0.5 ms apiece, and a step has some thirty of them.
# Numbers of tokens are therefore rounded up to this step on a CPU, so that the next step finds them compiled.
SHAPE_STEP = 16


def round_up(number: int, step: int) -> int:
    """The next multiple of ``step``."""
    return -(-number // step) * step


@dataclass(frozen=True)
class Layout:
    """Where each row lies in a flattened batch; made once a forward and shared by its layers.

    Attributes:
        lengths: tokens of each row.
        padded_length: L, slots a row has where rows are padded; at least the longest row.
        cu_seqlens: int32 (B + 1) row starts, on the batch's device.
        to_padded: (B·L) position in the flat batch of each padded slot; padding repeats token 0, and is never read.
        to_flat: (T) padded slot of each token.
        is_padding: (B·L) whether a padded slot holds no token.
    """

    lengths: tuple[int, ...]
    padded_length: int
    cu_seqlens: Tensor
    to_padded: Tensor
    to_flat: Tensor
    is_padding: Tensor

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(self.lengths)


def build_layout(lengths: Sequence[int], device: torch.device) -> Layout:
    """Build the layout of rows of the given lengths."""
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    padded_length = round_up(max(lengths), SHAPE_STEP)
    slots = torch.arange(padded_length)
    lengths_B1 = torch.tensor(list(lengths))[:, None]
    starts_B1 = torch.tensor(starts[:-1])[:, None]
    real_BL = slots[None] < lengths_B1
    to_padded = torch.where(real_BL, starts_B1 + slots[None], 0).flatten()
    to_flat = real_BL.flatten().nonzero().flatten()
    return Layout(
        tuple(lengths),
        padded_length,
        torch.tensor(starts, dtype=torch.int32, device=device),
        to_padded.to(device),
        to_flat.to(device),
        (~real_BL).flatten().to(device),
    )


class PaddedAttention(torch.autograd.Function):
    """The portable path on a fused (T, H + 2G, C) buffer; one gradient buffer comes back, no splits or joins."""

    @staticmethod
    def forward(ctx: Any, fused_TNC: Tensor, layout: Layout, num_kv: int, window: int | None) -> Tensor:
        """Return (T, H, C)."""
        q, k, v = _gather(fused_TNC, layout, num_kv)
        num_rows, longest = len(layout.lengths), layout.padded_length
        groups, num_heads = q.shape[1], fused_TNC.shape[1] - 2 * num_kv
        keep = num_heads * num_rows * longest * longest <= KEEP_PROBABILITIES
        out = torch.empty_like(q)
        kept = []
        for start in range(0, longest, QUERY_BLOCK):
            p, keys = _probabilities(q, k, start, window)
            block = torch.bmm(p, v[:, keys])
            out[:, :, start : start + QUERY_BLOCK] = block.view(len(q), groups, -1, q.shape[-1])
            if keep:
                kept.append(p)
        ctx.save_for_backward(q, k, v, *kept)
        ctx.layout, ctx.num_kv, ctx.window, ctx.shape = layout, num_kv, window, fused_TNC.shape
        return _scatter_queries(out, layout, num_kv)

    @staticmethod
    def backward(ctx: Any, d_out_THC: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        """Return the gradient of the fused buffer."""
        q, k, v, *kept = ctx.saved_tensors
        d_out = _gather_queries(d_out_THC, ctx.layout, ctx.num_kv)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        scale = q.shape[-1] ** -0.5
        for number, start in enumerate(range(0, ctx.layout.padded_length, QUERY_BLOCK)):
            block = slice(start, start + QUERY_BLOCK)
            if kept:
                p, keys = kept[number], _keys(start, q.shape[2], ctx.window)
            else:
                p, keys = _probabilities(q, k, start, ctx.window)
            d_out_block = d_out[:, :, block].flatten(1, 2)
            dv[:, keys].baddbmm_(p.transpose(1, 2), d_out_block)
            dp = torch.bmm(d_out_block, v[:, keys].transpose(1, 2))
            ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype).mul_(scale)
            dq[:, :, block] = torch.bmm(ds, k[:, keys]).view(len(q), q.shape[1], -1, q.shape[-1])
            dk[:, keys].baddbmm_(ds.transpose(1, 2), q[:, :, block].flatten(1, 2))
        return _scatter(dq, dk, dv, ctx.layout, ctx.num_kv, ctx.shape), None, None, None


def _keys(start: int, longest: int, window: int | None) -> slice:
    """Keys that the block of queries from ``start`` can see at all."""
    first = 0 if window is None else max(0, start - window + 1)
    return slice(first, min(start + QUERY_BLOCK, longest))


def _probabilities(q: Tensor, k: Tensor, start: int, window: int | None) -> tuple[Tensor, slice]:
    """Softmax of one block of queries, (G·B, J·block, keys), and the keys it covers."""
    longest = q.shape[2]
    keys = _keys(start, longest, window)
    queries = q[:, :, start : start + QUERY_BLOCK]
    mask = _mask(start, queries.shape[2], keys, window, q).repeat(queries.shape[1], 1)
    scores = torch.baddbmm(mask, queries.flatten(1, 2), k[:, keys].transpose(1, 2), alpha=q.shape[-1] ** -0.5)
    return torch.softmax(scores, -1), keys


def _mask(start: int, num_queries: int, keys: slice, window: int | None, like: Tensor) -> Tensor:
    """0 where a query may look, -inf elsewhere; (block, keys), in the dtype and on the device of ``like``."""
    query = torch.arange(start, start + num_queries, device=like.device)[:, None]
    key = torch.arange(keys.start, keys.stop, device=like.device)[None]
    hidden = key > query
    if window is not None:
        hidden |= key <= query - window
    return like.new_zeros(hidden.shape).masked_fill_(hidden, float("-inf"))


def _gather(fused_TNC: Tensor, layout: Layout, num_kv: int) -> tuple[Tensor, Tensor, Tensor]:
    """Flat to padded: q (G·B, J, L, C), k and v (G·B, L, C)."""
    num_heads = fused_TNC.shape[1] - 2 * num_kv
    padded = fused_TNC.index_select(0, layout.to_padded)
    padded = padded.view(len(layout.lengths), layout.padded_length, *fused_TNC.shape[1:])
    q, k, v = padded.split([num_heads, num_kv, num_kv], 2)
    k, v = (part.permute(2, 0, 1, 3).flatten(0, 1).contiguous() for part in (k, v))
    return _fold_queries(q, num_kv), k, v


def _fold_queries(q_BLHC: Tensor, num_kv: int) -> Tensor:
    num_rows, longest, num_heads, channels = q_BLHC.shape
    q = q_BLHC.unflatten(2, (num_kv, num_heads // num_kv)).permute(2, 0, 3, 1, 4)
    return q.reshape(num_kv * num_rows, num_heads // num_kv, longest, channels)


def _gather_queries(x_THC: Tensor, layout: Layout, num_kv: int) -> Tensor:
    """Flat gradients to the queries' padded layout, padding set to zero so that it adds nothing to dK and dV."""
    padded = x_THC.index_select(0, layout.to_padded)
    padded[layout.is_padding] = 0
    return _fold_queries(padded.view(len(layout.lengths), layout.padded_length, *x_THC.shape[1:]), num_kv)


def _scatter_queries(out: Tensor, layout: Layout, num_kv: int) -> Tensor:
    """Padded (G·B, J, L, C) back to flat (T, H, C)."""
    out = out.unflatten(0, (num_kv, len(layout.lengths))).permute(1, 3, 0, 2, 4)
    return out.reshape(len(layout.to_padded), -1, out.shape[-1]).index_select(0, layout.to_flat)


def _scatter(dq: Tensor, dk: Tensor, dv: Tensor, layout: Layout, num_kv: int, shape: torch.Size) -> Tensor:
    d_fused_TNC = dq.new_empty(shape)
    num_heads = shape[1] - 2 * num_kv
    d_fused_TNC[:, :num_heads] = _scatter_queries(dq, layout, num_kv)
    for number, part in enumerate((dk, dv)):
        first = num_heads + number * num_kv
        rows = part.unflatten(0, (num_kv, len(layout.lengths))).permute(1, 2, 0, 3)
        d_fused_TNC[:, first : first + num_kv] = rows.reshape(-1, num_kv, shape[-1]).index_select(0, layout.to_flat)
    return d_fused_TNC


@cache
def has_flash(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether ``varlen_attn`` runs there: its flash kernel wants 16 bit and compute capability 8.0."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def _varlen_takes_gqa() -> bool:
    """Whether varlen_attn must be told of grouped heads: torch 2.11 accepts them without a word, later ones ask."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def attention(fused_TNC: Tensor, layout: Layout, num_kv: int, window: int | None = None) -> Tensor:
    """Causal attention within each row.

    Args:
        fused_TNC: query, key and value heads of every token on one axis, (T, H + 2G, C), rotary already applied.
        layout: where the rows lie.
        num_kv: G, key/value heads.
        window: keys a query sees, itself included; ``None`` for all.

    Returns:
        (T, H, C).
    """
    if not has_flash(fused_TNC.device, fused_TNC.dtype):
        return PaddedAttention.apply(fused_TNC, layout, num_kv, window)
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = fused_TNC.split([fused_TNC.shape[1] - 2 * num_kv, num_kv, num_kv], 1)
    cu = layout.cu_seqlens
    gqa: dict[str, Any] = {"enable_gqa": True} if _varlen_takes_gqa() else {}
    left = -1 if window is None else window - 1
    longest = layout.longest
    return cast("Tensor", varlen_attn(q, k, v, cu, cu, longest, longest, window_size=(left, 0), **gqa))
