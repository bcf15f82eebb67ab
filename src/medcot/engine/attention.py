"""Causal attention over rows laid end to end, none of which sees another.

On a GPU from Ampere on, in 16 bit, this is PyTorch's own ``varlen_attn``. Elsewhere (a CPU, a T4, float32) PyTorch has
no such kernel, and on a CPU its flash kernel's backward is slow for short rows: 20.3 ms for 12 rows of 80 tokens, nine
heads, forward and backward, against 4.1 ms for the batched products below on two Zen 4 cores (bench/cpu_ops.py). So the
portable path pads inside attention only (q, k and v are gathered into a rectangle and the output is gathered back;
every other operation sees real tokens alone), folds the query heads that share a key head into the rows of one product,
and works through blocks of queries so that no score beyond the causal diagonal's block is computed. Padding stands at a
row's end, where a causal mask already hides it from every real query.

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
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from medcot.engine.devices import has_flash, send
from medcot.engine.flash import TritonAttended, fits

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
        tables: the portable path's tables, by query and key heads; filled when first asked for.
    """

    lengths: tuple[int, ...]
    padded_length: int
    cu_seqlens: Tensor
    to_padded: Tensor
    to_flat: Tensor
    is_padding: Tensor
    tables: dict[tuple[int, int], Tables] = field(default_factory=dict, compare=False)

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
        send(torch.tensor(starts, dtype=torch.int32), device),
        send(to_padded, device),
        send(to_flat, device),
        send((~real_BL).flatten(), device),
    )


@dataclass(frozen=True)
class Tables:
    """Where every head of every token lies, flat and padded; with these, each move is one gather of whole rows of C.

    Flat order is (T, N), N = H + 2G. Padded order is all of q as (G, B, J, L), then k and v as (G, B, L).

    Attributes:
        to_padded: flat row of each padded row, for q, k and v.
        to_flat: padded row of each flat row, for q, k and v.
        queries_to_padded: flat (T, H) row of each padded row of q.
        queries_to_flat: padded row of q of each flat (T, H) row.
    """

    to_padded: Tensor
    to_flat: Tensor
    queries_to_padded: Tensor
    queries_to_flat: Tensor


def _find_tables(layout: Layout, num_heads: int, num_kv: int) -> Tables:
    key = (num_heads, num_kv)
    if key not in layout.tables:
        layout.tables[key] = _build_tables(layout, num_heads, num_kv)
    return layout.tables[key]


def _build_tables(layout: Layout, num_heads: int, num_kv: int) -> Tables:
    device = layout.to_padded.device
    num_rows, length, groups = len(layout.lengths), layout.padded_length, num_heads // num_kv
    width = num_heads + 2 * num_kv
    token_BL = layout.to_padded.view(num_rows, length)
    head_GJ = torch.arange(num_heads, device=device).view(num_kv, groups)
    kv_G = torch.arange(num_kv, device=device)
    token_1B1L, head_G1J1 = token_BL[None, :, None], head_GJ[:, None, :, None]
    q = (token_1B1L * width + head_G1J1).flatten()
    k, v = (
        (token_BL[None] * width + (first + kv_G)[:, None, None]).flatten() for first in (num_heads, num_heads + num_kv)
    )
    row_T, slot_T = layout.to_flat // length, layout.to_flat % length
    q_TH = ((head_GJ // groups * num_rows + row_T[:, None, None]) * groups + head_GJ % groups) * length
    q_TH = (q_TH + slot_T[:, None, None]).flatten(1)
    k_TG = (kv_G * num_rows + row_T[:, None]) * length + slot_T[:, None] + len(q)
    return Tables(
        to_padded=torch.cat((q, k, v)),
        to_flat=torch.cat((q_TH, k_TG, k_TG + len(k)), 1).flatten(),
        queries_to_padded=(token_1B1L * num_heads + head_G1J1).flatten(),
        queries_to_flat=q_TH.flatten(),
    )


def attend(heads_TNC: Tensor, layout: Layout, num_kv: int, window: int | None) -> tuple[Tensor, Attended]:
    """Causal attention within each row, and what its gradient needs.

    Args:
        heads_TNC: query, key and value heads of every token on one axis, (T, H + 2G, C), rotary already applied.
        layout: where the rows lie.
        num_kv: G, key/value heads.
        window: keys a query sees, itself included; ``None`` for all.

    Returns:
        (T, H, C), and the state, whose ``gradients`` gives those of q, k and v.
    """
    state: Any = PaddedAttended
    if fits(heads_TNC, num_kv):
        state = TritonAttended
    elif has_flash(heads_TNC.device, heads_TNC.dtype):
        state = FlashAttended
    return cast("tuple[Tensor, Attended]", state.attend(heads_TNC, layout, num_kv, window))


class Attended(Protocol):
    """What attention keeps for its gradient."""

    def gradients(self, d_out_THC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q (T, H, C), k and v (T, G, C); may be asked once."""


class FlashAttended:
    """PyTorch's own kernel, which keeps its log-sums in a graph of autograd's; this holds both ends of that graph."""

    def __init__(self, parts: tuple[Tensor, Tensor, Tensor], out_THC: Tensor) -> None:
        self._parts, self._out_THC = parts, out_THC

    @classmethod
    def attend(cls, heads_TNC: Tensor, layout: Layout, num_kv: int, window: int | None) -> tuple[Tensor, FlashAttended]:
        """See ``attend``."""
        from torch.nn.attention.varlen import varlen_attn

        split = heads_TNC.split([heads_TNC.shape[1] - 2 * num_kv, num_kv, num_kv], 1)
        q, k, v = (part.detach().requires_grad_() for part in split)
        cu, longest = layout.cu_seqlens, layout.longest
        gqa: dict[str, Any] = {"enable_gqa": True} if _varlen_takes_gqa() else {}
        left = -1 if window is None else window - 1
        with torch.enable_grad():
            out_THC = cast("Tensor", varlen_attn(q, k, v, cu, cu, longest, longest, window_size=(left, 0), **gqa))
        return out_THC.detach(), cls((q, k, v), out_THC)

    def gradients(self, d_out_THC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See ``Attended``."""
        dq, dk, dv = torch.autograd.grad(self._out_THC, self._parts, d_out_THC)
        return dq, dk, dv


class PaddedAttended:
    """The portable path: what the padded forward kept."""

    def __init__(self, padded_RC: Tensor, probabilities: list[Tensor], layout: Layout, num_kv: int, window: int | None):
        self._padded_RC, self._probabilities = padded_RC, probabilities
        self._layout, self._num_kv, self._window = layout, num_kv, window

    @classmethod
    def attend(
        cls, heads_TNC: Tensor, layout: Layout, num_kv: int, window: int | None
    ) -> tuple[Tensor, PaddedAttended]:
        """See ``attend``."""
        num_heads, channels = heads_TNC.shape[1] - 2 * num_kv, heads_TNC.shape[2]
        tables = _find_tables(layout, num_heads, num_kv)
        padded_RC = heads_TNC.reshape(-1, channels).index_select(0, tables.to_padded)
        q, k, v = _views(padded_RC, layout, num_heads, num_kv)
        keep = num_heads * len(layout.lengths) * layout.padded_length**2 <= KEEP_PROBABILITIES
        out = torch.empty_like(q)
        kept = []
        for start in range(0, layout.padded_length, QUERY_BLOCK):
            p, keys = _probabilities(q, k, start, window)
            out[:, :, start : start + QUERY_BLOCK] = torch.bmm(p, v[:, keys]).unflatten(1, (q.shape[1], -1))
            if keep:
                kept.append(p)
        out_THC = out.view(-1, channels).index_select(0, tables.queries_to_flat).view(-1, num_heads, channels)
        return out_THC, cls(padded_RC, kept, layout, num_kv, window)

    def gradients(self, d_out_THC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See ``Attended``; the three are parts of one buffer."""
        layout, padded_RC = self._layout, self._padded_RC
        num_heads, channels = d_out_THC.shape[1:]
        tables = _find_tables(layout, num_heads, self._num_kv)
        q, k, v = _views(padded_RC, layout, num_heads, self._num_kv)
        d_padded_RC = torch.zeros_like(padded_RC)
        dq, dk, dv = _views(d_padded_RC, layout, num_heads, self._num_kv)
        d_out = d_out_THC.reshape(-1, channels).index_select(0, tables.queries_to_padded).view(q.shape)
        # Padding's gradient is zero, so that it adds nothing to dK and dV.
        hidden_1B1L1 = layout.is_padding.view(1, len(layout.lengths), 1, layout.padded_length, 1)
        d_out.unflatten(0, (self._num_kv, -1)).masked_fill_(hidden_1B1L1, 0)
        for number, start in enumerate(range(0, layout.padded_length, QUERY_BLOCK)):
            block = slice(start, start + QUERY_BLOCK)
            if self._probabilities:
                p, keys = self._probabilities[number], _keys(start, q.shape[2], self._window)
            else:
                p, keys = _probabilities(q, k, start, self._window)
            d_out_block = d_out[:, :, block].flatten(1, 2)
            dv[:, keys].baddbmm_(p.transpose(1, 2), d_out_block)
            dp = torch.bmm(d_out_block, v[:, keys].transpose(1, 2))
            ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype).mul_(channels**-0.5)
            dq[:, :, block] = torch.bmm(ds, k[:, keys]).unflatten(1, (q.shape[1], -1))
            dk[:, keys].baddbmm_(ds.transpose(1, 2), q[:, :, block].flatten(1, 2))
        d_heads_TNC = d_padded_RC.index_select(0, tables.to_flat).view(len(d_out_THC), -1, channels)
        dq, dk, dv = d_heads_TNC.split([num_heads, self._num_kv, self._num_kv], 1)
        return dq, dk, dv


def _views(padded_RC: Tensor, layout: Layout, num_heads: int, num_kv: int) -> tuple[Tensor, Tensor, Tensor]:
    """The padded buffer as q (G·B, J, L, C), k and v (G·B, L, C)."""
    num_rows, length, channels = len(layout.lengths), layout.padded_length, padded_RC.shape[1]
    sizes = [num_heads * num_rows * length, *2 * [num_kv * num_rows * length]]
    q, k, v = padded_RC.split(sizes)
    kv_shape = (num_kv * num_rows, length, channels)
    return q.view(num_kv * num_rows, num_heads // num_kv, length, channels), k.view(kv_shape), v.view(kv_shape)


class _Kind(NamedTuple):
    dtype: torch.dtype
    device: torch.device


def _keys(start: int, longest: int, window: int | None) -> slice:
    """Keys that the block of queries from ``start`` can see at all."""
    first = 0 if window is None else max(0, start - window + 1)
    return slice(first, min(start + QUERY_BLOCK, longest))


def _probabilities(q: Tensor, k: Tensor, start: int, window: int | None) -> tuple[Tensor, slice]:
    """Softmax of one block of queries, (G·B, J·block, keys), and the keys it covers."""
    longest = q.shape[2]
    keys = _keys(start, longest, window)
    queries = q[:, :, start : start + QUERY_BLOCK]
    kind = _Kind(q.dtype, q.device)
    mask = _mask(start, queries.shape[2], queries.shape[1], (keys.start, keys.stop), window, kind)
    scores = torch.baddbmm(mask, queries.flatten(1, 2), k[:, keys].transpose(1, 2), alpha=q.shape[-1] ** -0.5)
    return torch.softmax(scores, -1), keys


@lru_cache(maxsize=64)
def _mask(start: int, num_queries: int, groups: int, keys: tuple[int, int], window: int | None, like: _Kind) -> Tensor:
    """0 where a query may look, -inf elsewhere; (J·block, keys). The layers of a model, and its steps, share it."""
    query = torch.arange(start, start + num_queries, device=like.device)[:, None]
    key = torch.arange(*keys, device=like.device)[None]
    hidden = key > query
    if window is not None:
        hidden |= key <= query - window
    mask = torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill_(hidden, float("-inf"))
    return mask.repeat(groups, 1)


@cache
def _varlen_takes_gqa() -> bool:
    """Whether varlen_attn must be told of grouped heads: torch 2.11 accepts them without a word, later ones ask."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def attention(heads_TNC: Tensor, layout: Layout, num_kv: int, window: int | None = None) -> Tensor:
    """``attend`` where no gradient is asked for, as in reading a prompt; (T, H, C)."""
    return attend(heads_TNC, layout, num_kv, window)[0]
