"""LoRA's thin products in one pass: the launchers of ``thin_kernels.py``.

``thin_gradients`` stands for ``Pairs.thin_gradient`` and the dB of ``Pairs.gradients``, which read the gradient of a
group's outputs once each. ``swiglu`` and ``swiglu_grad`` stand for those of ``launch.py`` and also return thin products
of what passes through them: the down projection's u, its dA, and du and dB of gate and up. Each product that is asked
for there spares a pass over a (T, F) or (T, 2F) tensor. Which of these pay ``bench/gpu_thin.py`` has yet to say; no
forward uses them before.

All sums are float32 and in a fixed order. float32 operands are multiplied in full, for tests: such products have no
matrix instructions, and the tiles are small.

Axes: T tokens, N outputs of a group, Nᵢ of one part, F intermediate, R rank of all parts together, r of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from medcot.engine import thin_kernels
from medcot.engine.terms import Term

SUM_BLOCK, SUM_AT_ONCE = 512, 8
MAX_PARTS = 3
START_TILES = 2  # what a program's start costs, in tiles
MULTIPROCESSORS = 132  # of an H200; another card's number costs balance, not correctness


@dataclass(frozen=True)
class Tiles:
    """How a kernel cuts its work.

    Attributes:
        rows: of a tile.
        columns: of a tile, and so of a program.
        warps: of a program.
        stages: tiles on their way at once.
        resident: programs that a multiprocessor holds at once, by registers and shared memory.
        ranges: at most so many ranges of rows; ``None`` for as many as end soonest.
    """

    rows: int = 64
    columns: int = 256
    warps: int = 4
    stages: int = 3
    resident: int = 1
    ranges: int | None = None

    def cut(self, num_rows: int, num_blocks: int) -> tuple[int, int]:
        """Return the rows of a range, a multiple of a tile's, and how many ranges there are."""
        return _cut(self, num_rows, num_blocks)


@lru_cache(maxsize=1024)
def _cut(tiles: Tiles, num_rows: int, num_blocks: int) -> tuple[int, int]:
    """As ``Tiles.cut``: the fewest ranges with which the last program ends first, all tiles taking the same time."""
    num_tiles = triton.cdiv(num_rows, tiles.rows)
    places = MULTIPROCESSORS * tiles.resident

    def duration(tiles_of_range: int) -> int:
        waves = triton.cdiv(num_blocks * triton.cdiv(num_tiles, tiles_of_range), places)
        return waves * (tiles_of_range + START_TILES)

    lengths = range(num_tiles, 0, -1) if tiles.ranges is None else [triton.cdiv(num_tiles, tiles.ranges)]
    rows_of_range = min(lengths, key=duration) * tiles.rows
    return rows_of_range, triton.cdiv(num_rows, rows_of_range)


class SwigluGradients(NamedTuple):
    """What ``swiglu_grad`` returns; ``None`` for what was not asked for.

    Attributes:
        d_gate_up_TN: gradient of gate and up.
        h_TF: the product, computed again.
        du_TR: gradient of gate's and up's u.
        dB_Nr: their dB/s, stacked.
        dA_RF: the down projection's dA, a transposed view.
    """

    d_gate_up_TN: Tensor
    h_TF: Tensor | None
    du_TR: Tensor | None
    dB_Nr: Tensor | None
    dA_RF: Tensor | None


def thin_gradients(
    dy_TN: Tensor, u_TR: Tensor, B_Nr: Tensor, widths: Sequence[int], tiles: Tiles | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of a group's u and B from one pass over that of its outputs: ``duᵢ = dyᵢ Bᵢ``, ``dBᵢ = dyᵢᵀ uᵢ``.

    Args:
        dy_TN: gradient of the outputs, contiguous.
        u_TR: what the forward kept, contiguous.
        B_Nr: every s·Bᵢ, stacked, as ``Pairs.stacked_Nr``.
        widths: Nᵢ, three at most.
        tiles: ``None`` for those chosen by registers and bytes moved; bench/gpu_thin.py has yet to time them.

    Returns:
        du (T, R), and dB/s (N, r), both in the gradient's dtype.
    """
    (num_rows, width), rank = dy_TN.shape, B_Nr.shape[1]
    assert 1 <= len(widths) <= MAX_PARTS and sum(widths) == width == len(B_Nr), "the parts make up the group"
    assert u_TR.shape == (num_rows, rank * len(widths)), "the ranks of the parts are equal"
    assert dy_TN.is_contiguous() and u_TR.is_contiguous() and B_Nr.is_contiguous(), "the kernel knows no strides"
    assert dy_TN.dtype == u_TR.dtype == B_Nr.dtype, "the matrix instructions take one dtype"
    if not num_rows:
        return torch.empty_like(u_TR), torch.zeros_like(B_Nr)
    tiles = tiles or _thin_tiles(dy_TN.dtype, rank, width)
    blocks = [triton.cdiv(part, tiles.columns) for part in widths]
    rows_of_range, ranges = tiles.cut(num_rows, sum(blocks))
    du_parts = _floats(dy_TN, sum(blocks), num_rows, rank)
    dB_parts = _floats(dy_TN, ranges, width, rank)
    thin_kernels.thin_gradients_kernel[(sum(blocks), ranges)](
        dy_TN, u_TR, B_Nr, du_parts, dB_parts, num_rows, rows_of_range, width, *_first_two(widths), rank,
        u_TR.shape[1], RP=padded(rank), BT=tiles.rows, BN=tiles.columns, STAGES=tiles.stages,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return sum_parts(du_parts, dB_parts, blocks, dy_TN.dtype)


def swiglu(
    gate_up_TN: Tensor, term: Term | None, A_RF: Tensor | None = None, tiles: Tiles | None = None
) -> tuple[Tensor, Tensor | None]:
    """As ``launch.swiglu``, and the down projection's ``u = h Aᵀ`` where its A is given.

    Args:
        gate_up_TN: the fused (T, 2F) output of gate and up, contiguous; it stays as it was.
        term: its low-rank part.
        A_RF: the down projection's A.
        tiles: ``None`` for those chosen by registers and bytes moved; bench/gpu_thin.py has yet to time them.

    Returns:
        The product h (T, F), and u (T, R) or ``None``.
    """
    num_rows, width = gate_up_TN.shape[0], gate_up_TN.shape[1] // 2
    assert gate_up_TN.is_contiguous(), "the kernel knows no strides"
    h_TF = torch.empty(num_rows, width, dtype=gate_up_TN.dtype, device=gate_up_TN.device)
    rank_down = 0 if A_RF is None else len(A_RF)
    if not num_rows:
        return h_TF, None if A_RF is None else h_TF.new_empty(0, rank_down)
    tiles = tiles or _swiglu_tiles(gate_up_TN.dtype, with_down=A_RF is not None)
    num_blocks = triton.cdiv(width, tiles.columns)
    rows_of_range, ranges = tiles.cut(num_rows, num_blocks)
    u_parts = h_TF if A_RF is None else _floats(h_TF, num_blocks, num_rows, rank_down)
    thin_kernels.swiglu_down_kernel[(num_blocks, ranges)](
        gate_up_TN, *_factor(term, gate_up_TN), gate_up_TN if A_RF is None else A_RF, h_TF, u_parts,
        num_rows, rows_of_range, width, term.rank if term else 0, rank_down,
        HAS_LOW=term is not None, HAS_DOWN=A_RF is not None, RP=padded(term.rank if term else 0),
        RP_DOWN=padded(rank_down), BT=tiles.rows, BN=tiles.columns, STAGES=tiles.stages,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    if A_RF is None:
        return h_TF, None
    return h_TF, sum_parts(u_parts, None, [num_blocks], h_TF.dtype)[0]


def swiglu_grad(
    dh_TF: Tensor, down_term: Term | None, gate_up_TN: Tensor, term: Term | None, *, wants_h: bool,
    wants_du: bool = False, wants_dA: bool = False, tiles: Tiles | None = None,
) -> SwigluGradients:  # fmt: skip
    """As ``launch.swiglu_grad``, and thin products of what it makes.

    Args:
        dh_TF: gradient of the product, contiguous, without its low-rank part.
        down_term: that part: the down projection's du and A.
        gate_up_TN: what ``swiglu`` was given.
        term: the low-rank part of gate and up.
        wants_h: return the product, computed again.
        wants_du: return du and dB of gate and up; ``term`` must be given.
        wants_dA: return dA of the down projection; ``down_term`` must be given.
        tiles: ``None`` for those chosen by registers and bytes moved; bench/gpu_thin.py has yet to time them.
    """
    (num_rows, width), rank = dh_TF.shape, term.rank if term else 0
    rank_down = down_term.rank if down_term else 0
    assert (term or not wants_du) and (down_term or not wants_dA), "a thin product needs its factor"
    assert dh_TF.is_contiguous() and gate_up_TN.is_contiguous(), "the kernel knows no strides"
    tiles = tiles or _swiglu_grad_tiles(dh_TF.dtype, wants_du=wants_du)
    num_blocks = triton.cdiv(width, tiles.columns)
    rows_of_range, ranges = tiles.cut(max(num_rows, 1), num_blocks)
    out_TN, h_TF = torch.empty_like(gate_up_TN), torch.empty_like(dh_TF) if wants_h else None
    du_parts = _floats(dh_TF, 2 * num_blocks, num_rows, rank) if wants_du else None
    dB_parts = _floats(dh_TF, ranges, 2 * width, rank) if wants_du else None
    dA_parts = _floats(dh_TF, ranges, width, rank_down) if wants_dA else None
    stands = [out_TN if part is None else part for part in (h_TF, du_parts, dB_parts, dA_parts)]
    thin_kernels.swiglu_thin_grad_kernel[(num_blocks, ranges)](
        dh_TF, *_factor(down_term, dh_TF), gate_up_TN, *_factor(term, dh_TF), out_TN, *stands,
        num_rows, rows_of_range, width, rank, rank_down,
        HAS_DOWN=down_term is not None, HAS_LOW=term is not None, WANTS_H=wants_h, WANTS_DU=wants_du,
        WANTS_DA=wants_dA, RP=padded(rank), RP_DOWN=padded(rank_down),
        BT=tiles.rows, BN=tiles.columns, STAGES=tiles.stages, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    du_TR, dB_Nr = sum_parts(du_parts, dB_parts, [num_blocks] * 2, dh_TF.dtype) if wants_du else (None, None)
    dA_Fr = sum_parts(None, dA_parts, [], dh_TF.dtype)[1] if wants_dA else None
    return SwigluGradients(out_TN, h_TF, du_TR, dB_Nr, None if dA_Fr is None else dA_Fr.T)


def sum_parts(
    du_parts: Tensor | None, dB_parts: Tensor | None, blocks: Sequence[int], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Add what the programs of one kernel have written.

    Args:
        du_parts: float32 (blocks of columns of all parts, T, r); ``None`` for none.
        dB_parts: float32 (ranges of rows, N, r); ``None`` for none.
        blocks: how many of the first belong to each part.
        dtype: of the sums.

    Returns:
        (T, R) and (N, r), empty where there is nothing to add.
    """
    some = dB_parts if du_parts is None else du_parts
    assert some is not None, "there is something to add"
    rank = some.shape[2]
    num_rows = 0 if du_parts is None else du_parts.shape[1]
    ranges, width = (0, 0) if dB_parts is None else dB_parts.shape[:2]
    du_TR = torch.empty(num_rows, rank * len(blocks), dtype=dtype, device=some.device)
    dB_Nr = torch.empty(width, rank, dtype=dtype, device=some.device)
    programs = len(blocks) * triton.cdiv(num_rows * rank, SUM_BLOCK) + triton.cdiv(width * rank, SUM_BLOCK)
    if programs:
        thin_kernels.thin_sum_kernel[(programs,)](
            some if du_parts is None else du_parts, some if dB_parts is None else dB_parts, du_TR, dB_Nr,
            num_rows, ranges, width * rank, rank, du_TR.shape[1], *_first_two(blocks), sum(blocks),
            AT_ONCE=SUM_AT_ONCE, BLOCK=SUM_BLOCK, num_warps=4,
        )  # fmt: skip
    return du_TR, dB_Nr


def padded(rank: int) -> int:
    """A rank as Triton's matrix product takes it: a power of two, 16 or more."""
    return max(16, triton.next_power_of_2(rank))


def _thin_tiles(dtype: torch.dtype, rank: int, width: int) -> Tiles:
    """Tiles of ``thin_gradients``.

    Two programs a multiprocessor hide each other's waits. Twice the columns halve the partial sums of du, which matters
    where there are many blocks of columns.
    """
    if dtype == torch.float32:
        return Tiles(rows=32, columns=64, stages=2)
    if padded(rank) > 16:
        return Tiles(warps=8)
    return Tiles(resident=2) if width <= 8192 else Tiles(columns=512, warps=8)


def _swiglu_tiles(dtype: torch.dtype, *, with_down: bool) -> Tiles:
    if dtype == torch.float32:
        return Tiles(rows=32, columns=32, stages=2)
    return Tiles(columns=128, resident=2) if with_down else Tiles(columns=64, resident=3)


def _swiglu_grad_tiles(dtype: torch.dtype, *, wants_du: bool) -> Tiles:
    if dtype == torch.float32:
        return Tiles(rows=32, columns=32, stages=2)
    return Tiles(columns=128, warps=8, stages=2) if wants_du else Tiles(columns=64, resident=2)


def _first_two(sizes: Sequence[int]) -> tuple[int, int]:
    return sizes[0] if sizes else 0, sizes[1] if len(sizes) > 1 else 0


def _floats(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _factor(term: Term | None, stand_in: Tensor) -> tuple[Tensor, Tensor]:
    return (stand_in, stand_in) if term is None else (term.u_TR, term.factor)
