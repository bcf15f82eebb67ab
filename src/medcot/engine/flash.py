"""Flash attention of our own for Hopper GPUs, over the Triton kernels of ``flash_kernels.py``.

``TritonAttended`` stands in the same place as ``attention.FlashAttended``: the same call, the same gradients. The
essay of ``flash_kernels.py`` says what it does differently. Here are the tables that tell each program its tile, and
the tile sizes. On an H200, forward and backward, 8 rows of 760 tokens of Llama 8B's heads take 0.48 ms where
``varlen_attn`` takes 0.89, and a row of 16,384 tokens 17.0 against 24.4 (bench/gpu_attention.py). Triton is imported
when a kernel is first called.

Axes: T tokens of all rows; H query heads; G key/value heads; N = H + 2G; C channels; M = T·H/G, a token's H/G heads
side by side; B rows; I tiles.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from medcot.engine.devices import has_triton, send

if TYPE_CHECKING:
    from medcot.engine.attention import Layout

MAX_GROUP = 32  # query heads a key head; all of a token's must fit into one tile


@dataclass(frozen=True)
class Tiling:
    """How a kernel cuts its work.

    Attributes:
        rows: query rows of a tile, BM; the heads that share a key head are rows of their own.
        keys: keys of a tile, BN.
        warps: of a program.
        stages: depth of the pipeline of loads.
        split: a loop of its own for the tiles that no mask touches, rather than one loop that masks them all.
        registers: the most a thread may have, so that two programs share a multiprocessor and one's softmax runs beside
            the other's products; ``None`` for as many as it wants.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    split: bool
    registers: int | None = None


class Tilings(NamedTuple):
    """Those of the three kernels."""

    attend: Tiling
    query_grad: Tiling
    key_grad: Tiling


# By channels of a head, and whether tiles are fetched as boxes (``Problem.boxes``): pointers cost registers. Those of
# 128 channels in boxes were timed, the others chosen for keeping no more than a few registers in memory, to which
# tests/gpu holds them; at 256 channels every size tried keeps many.
TILINGS: dict[tuple[int, bool], Tilings] = {
    (64, True): Tilings(Tiling(128, 128, 8, 2, True), Tiling(128, 64, 8, 2, True), Tiling(64, 128, 8, 2, True)),
    (128, True): Tilings(Tiling(128, 64, 8, 2, True, 128), Tiling(128, 64, 8, 3, True), Tiling(64, 64, 4, 2, True)),
    (64, False): Tilings(Tiling(128, 128, 8, 2, True), Tiling(128, 64, 8, 2, True), Tiling(32, 64, 4, 2, True)),
    (96, False): Tilings(Tiling(128, 64, 8, 2, True), Tiling(128, 64, 8, 2, True), Tiling(32, 64, 4, 3, True)),
    (128, False): Tilings(Tiling(128, 64, 8, 2, True), Tiling(128, 64, 8, 2, True), Tiling(32, 64, 4, 3, True)),
}


@cache
def _is_hopper(device: torch.device) -> bool:
    """Whether the tile sizes are for this GPU: others have less shared memory, or other matrix units."""
    return has_triton(device) and torch.cuda.get_device_capability(device)[0] == 9


def is_made_for(device: torch.device, dtype: torch.dtype, channels: int, group: int) -> bool:
    """Whether ``TritonAttended`` takes heads of so many channels, so many queries a key head."""
    is_16_bit = dtype in (torch.float16, torch.bfloat16)
    return is_16_bit and (channels, False) in TILINGS and group <= MAX_GROUP and _is_hopper(device)


def fits(heads_TNC: Tensor, num_kv: int) -> bool:
    """Whether ``TritonAttended`` is made for this device, type, and shape."""
    group = (heads_TNC.shape[1] - 2 * num_kv) // num_kv
    return is_made_for(heads_TNC.device, heads_TNC.dtype, heads_TNC.shape[2], group)


class TritonAttended:
    """Our kernels' state: the forward's input and output, and the logarithms of its rows' sums."""

    def __init__(self, problem: Problem, out_THC: Tensor, lse_GM: Tensor) -> None:
        self._problem, self._out_THC, self._lse_GM = problem, out_THC, lse_GM

    @classmethod
    def attend(
        cls, heads_TNC: Tensor, layout: Layout, num_kv: int, window: int | None
    ) -> tuple[Tensor, TritonAttended]:
        """See ``attention.attend``."""
        problem = Problem(heads_TNC.detach().contiguous(), layout.lengths, num_kv, window)
        out_THC, lse_GM = compute_attention(problem, TILINGS[problem.key].attend)
        return out_THC, cls(problem, out_THC, lse_GM)

    def gradients(self, d_out_THC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See ``attention.Attended``."""
        problem, d_out_THC, tilings = self._problem, d_out_THC.contiguous(), TILINGS[self._problem.key]
        dq_THC, delta_GM = compute_query_grad(problem, self._out_THC, d_out_THC, self._lse_GM, tilings.query_grad)
        dk_TGC, dv_TGC = compute_key_grad(problem, d_out_THC, self._lse_GM, delta_GM, tilings.key_grad)
        return dq_THC, dk_TGC, dv_TGC


@dataclass(frozen=True)
class Problem:
    """What is attended to.

    Attributes:
        heads_TNC: query, key and value heads of every token on one axis, contiguous.
        lengths: tokens of each row; they add up to T.
        num_kv: G.
        window: keys a query sees, itself included; ``None`` for all.
    """

    heads_TNC: Tensor
    lengths: tuple[int, ...]
    num_kv: int
    window: int | None

    @property
    def channels(self) -> int:
        """C."""
        return self.heads_TNC.shape[2]

    @property
    def num_heads(self) -> int:
        """H."""
        return self.heads_TNC.shape[1] - 2 * self.num_kv

    @property
    def group(self) -> int:
        """J, query heads that share a key head."""
        return self.num_heads // self.num_kv

    @property
    def boxes(self) -> bool:
        """Whether the tensor memory accelerator can fetch a tile: its boxes measure powers of two."""
        return not any(size & (size - 1) for size in (self.group, self.channels))

    @property
    def key(self) -> tuple[int, bool]:
        """Where ``TILINGS`` has this problem's."""
        return self.channels, self.boxes

    def empty(self, num_heads: int) -> Tensor:
        """Uninitialised heads, (T, num_heads, C)."""
        return self.heads_TNC.new_empty(len(self.heads_TNC), num_heads, self.channels)

    def empty_packed(self) -> Tensor:
        """An uninitialised float32 number for each query of each head, (G, M)."""
        num_packed = len(self.heads_TNC) * self.group
        return self.heads_TNC.new_empty(self.num_kv, num_packed, dtype=torch.float32)


def compute_attention(problem: Problem, tiling: Tiling) -> tuple[Tensor, Tensor]:
    """The output (T, H, C), and of each query the logarithm (base 2) of its sum of exponentials, float32 (G, M)."""
    out_THC, lse_GM = problem.empty(problem.num_heads), problem.empty_packed()
    _launch("attend_kernel", problem, tiling, _query_tiles(problem, tiling), None, out_THC, lse_GM)
    return out_THC, lse_GM


def compute_query_grad(
    problem: Problem, out_THC: Tensor, d_out_THC: Tensor, lse_GM: Tensor, tiling: Tiling
) -> tuple[Tensor, Tensor]:
    """The gradient of q (T, H, C), and each query's sum of ``d_out · out``, float32 (G, M); both must be contiguous."""
    dq_THC, delta_GM = problem.empty(problem.num_heads), problem.empty_packed()
    tiles = _query_tiles(problem, tiling)
    _launch("query_grad_kernel", problem, tiling, tiles, None, out_THC, d_out_THC, lse_GM, delta_GM, dq_THC)
    return dq_THC, delta_GM


def compute_key_grad(
    problem: Problem, d_out_THC: Tensor, lse_GM: Tensor, delta_GM: Tensor, tiling: Tiling
) -> tuple[Tensor, Tensor]:
    """The gradients of k and v, (T, G, C), from what the forward and ``compute_query_grad`` returned."""
    dk_TGC, dv_TGC = problem.empty(problem.num_kv), problem.empty(problem.num_kv)
    tiles = build_tiles(problem.lengths, tiling.keys, Longest.FIRST, problem.heads_TNC.device)
    _launch("key_grad_kernel", problem, tiling, tiles, d_out_THC, lse_GM, delta_GM, dk_TGC, dv_TGC)
    return dk_TGC, dv_TGC


class Longest(Enum):
    """Which tiles of a row have most to do."""

    FIRST = "first"  # of keys: every later query looks at the first
    LAST = "last"  # of queries: the last looks at every key


def _query_tiles(problem: Problem, tiling: Tiling) -> Tensor:
    return build_tiles(problem.lengths, tiling.rows // problem.group, Longest.LAST, problem.heads_TNC.device)


@lru_cache(maxsize=64)
def build_tiles(lengths: tuple[int, ...], step: int, longest: Longest, device: torch.device) -> Tensor:
    """Cut every row into tiles of ``step`` tokens, those with most to do first; shared by the layers of a forward.

    Returns:
        int32 (tiles, 3): the row's first token in the batch, its length, and the tile's first token in the row.
    """
    lengths_B = torch.tensor(lengths, dtype=torch.int64)
    starts_B = lengths_B.cumsum(0) - lengths_B
    counts_B = (lengths_B + step - 1) // step
    row_I = torch.repeat_interleave(torch.arange(len(lengths)), counts_B)
    first_I = (torch.arange(len(row_I)) - (counts_B.cumsum(0) - counts_B)[row_I]) * step
    work_I = lengths_B[row_I] - first_I if longest is Longest.FIRST else (first_I + step).minimum(lengths_B[row_I])
    order_I = work_I.argsort(descending=True, stable=True)
    tiles_I3 = torch.stack((starts_B[row_I], lengths_B[row_I], first_I), 1)[order_I]
    return send(tiles_I3.to(torch.int32), device)


def _launch(
    kernel: str, problem: Problem, tiling: Tiling, tiles_I3: Tensor, d_out_THC: Tensor | None, *buffers: Tensor
) -> None:
    """Start a kernel; the buffers are its own, in its order. With ``d_out_THC``, queries and it come tile by tile."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    from medcot.engine import flash_kernels

    if not len(tiles_I3):
        return
    channels, window = problem.channels, problem.window or 0
    queries: Any = problem.heads_TNC
    keys: Any = problem.heads_TNC
    d_out: Any = d_out_THC
    if problem.boxes:
        keys = TensorDescriptor.from_tensor(keys.flatten(1), [tiling.keys, channels])
        if d_out is not None:
            box = [tiling.rows // problem.group, problem.group, channels]
            queries, d_out = (TensorDescriptor.from_tensor(source, box) for source in (queries, d_out))
    getattr(flash_kernels, kernel)[(len(tiles_I3) * problem.num_kv,)](
        queries, keys, *(() if d_out is None else (d_out,)), tiles_I3, *buffers, len(problem.heads_TNC), window,
        H=problem.num_heads, G=problem.num_kv, C=channels, CP=1 << (channels - 1).bit_length(),
        SCALE=channels**-0.5, BM=tiling.rows, BN=tiling.keys, BOXES=problem.boxes, SPLIT=tiling.split,
        WINDOWED=0 < window < max(problem.lengths), num_warps=tiling.warps, num_stages=tiling.stages,
        maxnreg=tiling.registers,
    )  # fmt: skip
