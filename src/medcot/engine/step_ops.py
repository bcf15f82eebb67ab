"""Launches the kernels of ``decode_kernels.py`` and ``gemv.py``: one function for each, tensors in and out.

An ``Input`` is what a product reads: the activation as that product wants it, and the low-rank sums where whoever made
the activation makes them too. Tile sizes are the kernels' own business and stay here.

Axes: B rows; D hidden; F intermediate; N = H + 2G heads of C channels; S cache slots; P partial sums; R ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import triton
from torch import Tensor
from triton import knobs

from medcot.engine import decode_kernels as kernels
from medcot.engine import gemv

# Cache slots that a step of the attention loop reads.
SLOT_BLOCK = 64
# Channels of the activation that a program of swiglu handles.
CHANNEL_BLOCK = 512
# Logits that the sampler reads at a time.
SAMPLE_BLOCK = 8192
# Output rows and packed words of a tile of the NF4 product. A program is one warp, each lane with 16 bytes of every
# row: then x, loaded once a tile, is where its lane needs it, and no barrier is met. The words follow from that.
GEMV_ROWS, GEMV_WORDS = 4, 128
# Such a product is split along its inputs until it has about as many programs as a large GPU holds.
GEMV_PROGRAMS = 2048
# Attention is split over the cache until it has as many programs as two for each processor of a large GPU.
WANTED_PROGRAMS, MAX_SPLITS = 264, 32


class Reader(Protocol):
    """What the maker of a product's input asks that product."""

    @property
    def interleaved(self) -> bool:
        """Whether it wants float32, with the values of a packed word apart."""

    @property
    def A_RD(self) -> Tensor | None:
        """The matrix whose product with the input it wants beside it."""


class Input(NamedTuple):
    """A product's input (B, D), and ``u`` as partial sums (B, P, R) where the product asked for it."""

    x_BD: Tensor
    u_BPR: Tensor | None


@dataclass(frozen=True)
class Cache:
    """One layer's keys and values, (B, G, S, C) each."""

    keys: Tensor
    values: Tensor


@dataclass(frozen=True)
class Rows:
    """Where the rows are; all of it on the device, moved on by ``sample``.

    Attributes:
        ids_B: int64, the token each row reads next.
        lengths_B: int32, tokens in its cache.
        steps_B: int32, tokens it has been given.
    """

    ids_B: Tensor
    lengths_B: Tensor
    steps_B: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        """All three."""
        return self.ids_B, self.lengths_B, self.steps_B

    def select(self, rows: Tensor) -> Rows:
        """These rows only."""
        return Rows(*(tensor[rows] for tensor in self.tensors()))

    def put(self, places: Tensor, rows: Rows) -> None:
        """Take over other rows at these places, in these very tensors: a recorded graph knows no others."""
        for mine, theirs in zip(self.tensors(), rows.tensors(), strict=True):
            mine.index_copy_(0, places, theirs)


def add_norm(
    hidden_BD: Tensor, delta_PBD: Tensor | None, weight_D: Tensor, eps: float, reader: Reader | None
) -> tuple[Tensor, Input]:
    """Return ``hidden + Σ delta`` and its RMSNorm, as ``reader`` wants it; ``None`` wants it plain."""
    num_rows, width = hidden_BD.shape
    sum_BD = torch.empty_like(hidden_BD)
    to = _prepare(hidden_BD, width, 1, reader)
    ranks = 0 if to.u_BPR is None else to.u_BPR.shape[2]
    kernels.add_norm_kernel[(num_rows, max(ranks, 1))](
        hidden_BD, hidden_BD if delta_PBD is None else delta_PBD, 0 if delta_PBD is None else delta_PBD.stride(0),
        weight_D, sum_BD, to.x_BD, *_low_rank(to, reader), eps,
        D=width, BLOCK=triton.next_power_of_2(width), SPLITS=0 if delta_PBD is None else len(delta_PBD), RANKS=ranks,
        INTERLEAVED=reader is not None and reader.interleaved, num_warps=8 if width > 1024 else 4,
    )  # fmt: skip
    return sum_BD, to


def swiglu(gate_up_PBN: Tensor, like: Tensor, reader: Reader) -> Input:
    """``silu(gate) · up``, as ``reader`` wants it; plain ones have the dtype of ``like``."""
    num_parts, num_rows, wide = gate_up_PBN.shape
    width = wide // 2
    block = min(CHANNEL_BLOCK, triton.next_power_of_2(width))
    num_blocks = triton.cdiv(width, block)
    to = _prepare(like, width, num_blocks, reader)
    kernels.swiglu_kernel[(num_rows, num_blocks)](
        gate_up_PBN, gate_up_PBN.stride(0), to.x_BD, *_low_rank(to, reader),
        F=width, BLOCK=block, SPLITS=num_parts, RANKS=0 if to.u_BPR is None else to.u_BPR.shape[2],
        INTERLEAVED=reader.interleaved, num_warps=4,
    )  # fmt: skip
    return to


def attend(
    fused_PBN: Tensor,
    rows: Rows,
    angles: tuple[Tensor, Tensor],
    cache: Cache,
    window: int | None,
    head_norms: tuple[Tensor, Tensor, float] | None,
    reader: Reader,
) -> Input:
    """One token of attention a row: head norms, rotary, cache, attention over the cache and the new token.

    Args:
        fused_PBN: query, key and value heads of each row's new token, in parts to be added.
        rows: the new token's slot is ``lengths_B``; it is written there.
        angles: cosine and sine of every position, (S, C).
        cache: of this layer.
        window: keys a query sees, itself included.
        head_norms: weights of the query and key norms and their epsilon, in families that have them.
        reader: the output projection.

    Returns:
        (B, H·C) as ``reader`` wants it.
    """
    num_parts, num_rows, _ = fused_PBN.shape
    _, num_kv, slots, channels = cache.keys.shape
    num_queries = fused_PBN.shape[2] // channels - 2 * num_kv
    most, splits = most_splits(num_rows * num_kv), choose_splits(num_rows * num_kv, slots)
    if reader.interleaved or reader.A_RD is not None:
        most, splits = max(most, 2), max(splits, 2)  # combine makes what it wants
    to = _prepare(cache.keys, num_queries * channels, num_queries, reader, rows=num_rows)
    parts = torch.empty(num_rows, num_queries, splits, channels, dtype=torch.float32, device=fused_PBN.device)
    stats = torch.empty(num_rows, num_queries, splits, 2, dtype=torch.float32, device=fused_PBN.device)
    q_norm, k_norm, eps = (fused_PBN, fused_PBN, 0.0) if head_norms is None else head_norms
    half, wide = (max(16, triton.next_power_of_2(c)) for c in (channels // 2, channels))
    kernels.attend_kernel[(num_rows, num_kv, splits)](
        fused_PBN, fused_PBN.stride(0), rows.lengths_B, *angles, q_norm, k_norm, eps, cache.keys, cache.values, slots,
        parts, stats, to.x_BD, channels**-0.5, splits,
        H=num_queries, G=num_kv, C=channels, J_BLOCK=max(16, triton.next_power_of_2(num_queries // num_kv)),
        HALF=half, C_BLOCK=wide, BLOCK=SLOT_BLOCK, IN_SPLITS=num_parts, IS_SPLIT=splits > 1, WINDOW=window or 0,
        NORMS=head_norms is not None, num_warps=4, num_stages=2,
    )  # fmt: skip
    if splits > 1:
        kernels.combine_kernel[(num_rows, num_queries)](
            parts, stats, to.x_BD, *_low_rank(to, reader), splits,
            H=num_queries, C=channels, C_BLOCK=wide, MOST=most,
            RANKS=0 if to.u_BPR is None else to.u_BPR.shape[2], INTERLEAVED=reader.interleaved, num_warps=4,
        )  # fmt: skip
    return to


def choose_splits(num_programs: int, slots: int) -> int:
    """Shares of the cache, a power of two: enough to fill a GPU, none smaller than a block when the cache is full."""
    return min(most_splits(num_programs), 2 ** math.ceil(math.log2(max(slots / SLOT_BLOCK, 1))))


def most_splits(num_programs: int) -> int:
    """Shares of a cache of any length; kernels are compiled for these, and not again for each length."""
    return 2 ** max(0, math.ceil(math.log2(min(WANTED_PROGRAMS / num_programs, MAX_SPLITS))))


def sample(logits_BV: Tensor, rows: Rows, chances_BT: Tensor, last: int, temperature: float, top_p: float) -> None:
    """Pick each row's next token and move the row on.

    The token is the likeliest at temperature 0. Else it is the first, in the order of ids, at which the sum of the
    nucleus's probabilities passes the row's chance at this step; the nucleus is the smallest set of likeliest tokens
    that reaches ``top_p``, the first of equals.

    A row that has ended may be stepped on: it stays at the last place of its cache, and at its last chance.

    Args:
        logits_BV: 16 bit, contiguous.
        rows: their state, changed in place.
        chances_BT: float32 in [0, 1), contiguous, of each row by its step.
        last: the last place of a row's cache.
        temperature: 0 for greedy.
        top_p: 1 for all tokens.
    """
    num_rows, vocabulary = logits_BV.shape
    assert logits_BV.dtype.itemsize == 2 and logits_BV.is_contiguous() and chances_BT.is_contiguous()
    greedy, whole = temperature == 0, top_p >= 1
    margin = 0.0 if greedy or whole else temperature * (math.log(vocabulary) - math.log1p(-top_p))
    kernels.sample_kernel[(num_rows,)](
        logits_BV.view(torch.int16), vocabulary, chances_BT, chances_BT.shape[1], rows.steps_B, rows.lengths_B,
        rows.ids_B, last, 0.0 if greedy else 1 / temperature, float(top_p), margin,
        BLOCK=min(SAMPLE_BLOCK, triton.next_power_of_2(vocabulary)), IS_BF16=logits_BV.dtype == torch.bfloat16,
        GREEDY=greedy, WHOLE_VOCABULARY=whole, num_warps=16,
    )  # fmt: skip


def nf4_gemv(
    x_BD: Tensor,
    words: Sequence[Tensor],
    widths: Sequence[int],
    scales: Tensor,
    code: Tensor,
    lora: tuple[Tensor, Tensor] | None,
    bias_N: Tensor | None,
    *,
    shuffles: bool | None = None,
    splits: int | None = None,
) -> Tensor:
    """Multiply each row by up to three packed matrices, their outputs side by side.

    Args:
        x_BD: float32, interleaved; D a multiple of 64.
        words: int32 packed weights of each matrix.
        widths: outputs of each.
        scales: float32, one for each 64 weights, of all matrices end to end.
        code: the 16 float32 values of a nibble.
        lora: u (B, P, parts · r) in float32, its P to be added, and B (N, r) with the scale in it; ``None`` for none.
        bias_N: of all outputs.
        shuffles: look values up by shuffles; by default wherever there is a GPU.
        splits: shares of the inputs; by default what the number of outputs asks for.

    Returns:
        float32 parts to be added, (splits, B, N).
    """
    num_rows, num_inputs = x_BD.shape
    widths = [*widths, 0, 0][:3]
    tiles = sum(triton.cdiv(width, GEMV_ROWS) for width in widths)
    steps = triton.cdiv(num_inputs // 8, GEMV_WORDS)
    if splits is None:
        splits = max(1, min(steps // 2, round(GEMV_PROGRAMS / (tiles * num_rows))))
    y = torch.empty(splits, num_rows, sum(widths), dtype=torch.float32, device=x_BD.device)
    u, B_NR = (x_BD, x_BD) if lora is None else lora
    rank, partials = (0, 1) if lora is None else (B_NR.shape[1], u.shape[1])
    gemv.nf4_gemv_kernel[(tiles, splits, num_rows)](
        x_BD, *[words[min(i, len(words) - 1)] for i in range(3)], scales, code, u, B_NR,
        x_BD if bias_N is None else bias_N, y, y.stride(0),
        N0=widths[0], N1=widths[1], N2=widths[2], D=num_inputs, SPLITS=splits,
        RANK=rank, RANK_BLOCK=triton.next_power_of_2(max(rank, 1)),
        PARTIALS=partials, PARTIALS_BLOCK=triton.next_power_of_2(partials),
        NUM_PARTS=len(words), HAS_BIAS=bias_N is not None, ROWS=GEMV_ROWS, WORDS=GEMV_WORDS,
        SHUFFLES=not knobs.runtime.interpret if shuffles is None else shuffles, num_warps=1,
    )  # fmt: skip
    return y


def _prepare(like: Tensor, width: int, partials: int, reader: Reader | None, rows: int | None = None) -> Input:
    num_rows = len(like) if rows is None else rows
    interleaved = reader is not None and reader.interleaved
    dtype = torch.float32 if interleaved else like.dtype
    x_BD = torch.empty(num_rows, width, dtype=dtype, device=like.device)
    if reader is None or reader.A_RD is None:
        return Input(x_BD, None)
    shape = (num_rows, partials, len(reader.A_RD))
    return Input(x_BD, torch.empty(shape, dtype=torch.float32, device=like.device))


def _low_rank(to: Input, reader: Reader | None) -> tuple[Tensor, Tensor]:
    if to.u_BPR is None or reader is None or reader.A_RD is None:
        return to.x_BD, to.x_BD
    return reader.A_RD, to.u_BPR
