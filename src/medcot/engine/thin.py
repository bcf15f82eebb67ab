"""LoRA's thin products in one pass, and SwiGLU both ways: the launchers of ``thin_kernels.py``.

They are part of ``launch.py``'s set, in a file of their own for the way they cut their work: programs own columns and
walk down ranges of rows. All sums are float32 and in a fixed order. float32 operands are multiplied in full, for tests:
such products have no matrix instructions, and the tiles are small.

Axes: T tokens, N outputs of a group, Nᵢ of one part, F intermediate, R rank of all parts together, r of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
from torch import Tensor

from medcot.engine import thin_kernels
from medcot.engine.terms import Rounded, Term

SUM_BLOCK, SUM_AT_ONCE = 512, 8
SCALE_ROWS, SCALE_AT_ONCE = 32, 64  # of a program that makes rows' scales: on an H200 5.5 µs where (64, 8) took 8.8
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


def thin_gradients(
    dy_TN: Tensor, u_TR: Tensor, B_Nr: Tensor, widths: Sequence[int], tiles: Tiles | None = None
) -> tuple[Tensor, Tensor]:
    """As ``pointwise.thin_gradients``, from one pass over ``dy_TN``.

    Args:
        dy_TN: gradient of the outputs, contiguous.
        u_TR: what the forward kept, contiguous.
        B_Nr: every s·Bᵢ, stacked.
        widths: Nᵢ, three at most.
        tiles: ``None`` for those that bench/gpu_thin.py found best.
    """
    return _thin_gradients(dy_TN, u_TR, B_Nr, widths, None, None, tiles)


def thin_gradients_rounded(
    dy_TN: Tensor, u_TR: Tensor, B_Nr: Tensor, widths: Sequence[int], columns_scale_N: Tensor, scale_T1: Tensor,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor, Rounded]:  # fmt: skip
    """As ``pointwise.thin_gradients_rounded``, from one pass over ``dy_TN``."""
    rounded = Rounded(torch.empty(dy_TN.shape, dtype=torch.float8_e4m3fn, device=dy_TN.device), scale_T1)
    return *_thin_gradients(dy_TN, u_TR, B_Nr, widths, columns_scale_N, rounded, tiles), rounded


def scale_rows(parts_PT: Tensor) -> Tensor:
    """Each row's scale, (T, 1), from the largest sizes of its parts."""
    num_parts, num_rows = parts_PT.shape
    scale_T1 = _floats(parts_PT, num_rows, 1)
    if num_rows:
        thin_kernels.row_scale_kernel[(triton.cdiv(num_rows, SCALE_ROWS),)](
            parts_PT, scale_T1, num_rows, num_parts, AT_ONCE=SCALE_AT_ONCE, BT=SCALE_ROWS, num_warps=2
        )
    return scale_T1


def _thin_gradients(
    dy_TN: Tensor, u_TR: Tensor, B_Nr: Tensor, widths: Sequence[int], columns_scale_N: Tensor | None,
    rounded: Rounded | None, tiles: Tiles | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    (num_rows, width), rank = dy_TN.shape, B_Nr.shape[1]
    assert 1 <= len(widths) <= MAX_PARTS and sum(widths) == width == len(B_Nr), "the parts make up the group"
    assert u_TR.shape == (num_rows, rank * len(widths)), "the ranks of the parts are equal"
    assert dy_TN.is_contiguous() and u_TR.is_contiguous() and B_Nr.is_contiguous(), "the kernel knows no strides"
    assert dy_TN.dtype == u_TR.dtype == B_Nr.dtype, "the matrix instructions take one dtype"
    if not num_rows:
        return torch.empty_like(u_TR), torch.zeros_like(B_Nr)
    tiles = tiles or _thin_tiles(dy_TN.dtype, rank, rounds=rounded is not None)
    blocks = [triton.cdiv(part, tiles.columns) for part in widths]
    rows_of_range, ranges = tiles.cut(num_rows, sum(blocks))
    du_parts = _floats(dy_TN, sum(blocks), num_rows, rank)
    dB_parts = _floats(dy_TN, ranges, width, rank)
    thin_kernels.thin_gradients_kernel[(sum(blocks), ranges)](
        dy_TN, u_TR, B_Nr, du_parts if columns_scale_N is None else columns_scale_N,
        du_parts if rounded is None else rounded.scale_T1, du_parts, dB_parts,
        dy_TN if rounded is None else rounded.codes_TN, num_rows, rows_of_range, width, *_first_two(widths), rank,
        u_TR.shape[1], ROUNDS=rounded is not None, RP=padded(rank), BT=tiles.rows, BN=tiles.columns,
        STAGES=tiles.stages, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return sum_parts(du_parts, dB_parts, blocks, dy_TN.dtype)


def swiglu(
    gate_up_TN: Tensor, term: Term | None = None, out_TF: Tensor | None = None, tiles: Tiles | None = None
) -> Tensor:
    """As ``pointwise.swiglu``, but ``gate_up_TN``, which must be contiguous, stays as it was."""
    num_rows, width = gate_up_TN.shape[0], gate_up_TN.shape[1] // 2
    assert gate_up_TN.is_contiguous(), "the kernel knows no strides"
    h_TF = gate_up_TN.new_empty(num_rows, width) if out_TF is None else out_TF
    assert h_TF.shape == (num_rows, width) and h_TF.is_contiguous(), "the kernel knows no strides"
    if not num_rows:
        return h_TF
    tiles = tiles or _swiglu_tiles(gate_up_TN.dtype, resident=3)
    num_blocks = triton.cdiv(width, tiles.columns)
    rows_of_range, ranges = tiles.cut(num_rows, num_blocks)
    thin_kernels.swiglu_kernel[(num_blocks, ranges)](
        gate_up_TN, *_factor(term, gate_up_TN), h_TF, num_rows, rows_of_range, width, term.rank if term else 0,
        HAS_LOW=term is not None, RP=padded(term.rank if term else 0),
        BT=tiles.rows, BN=tiles.columns, STAGES=tiles.stages, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return h_TF


def swiglu_grad(
    dh_TF: Tensor, down_term: Term | None, gate_up_TN: Tensor, term: Term | None, tiles: Tiles | None = None
) -> tuple[Tensor, Tensor | None]:
    """As ``pointwise.swiglu_grad``, with the term that ``swiglu`` was given, and written over ``gate_up_TN``.

    dA is a transposed view.
    """
    tiles = tiles or _swiglu_tiles(dh_TF.dtype, resident=2)
    return _swiglu_grad(dh_TF, down_term, gate_up_TN, term, None, None, tiles)


def swiglu_grad_scaled(
    dh_TF: Tensor, down_term: Term | None, gate_up_TN: Tensor, term: Term | None, columns_scale_N: Tensor,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    """As ``pointwise.swiglu_grad_scaled``."""
    tiles = tiles or _swiglu_tiles(dh_TF.dtype, resident=2)
    largest_PT = _floats(dh_TF, triton.cdiv(dh_TF.shape[1], tiles.columns), len(dh_TF))
    d_TN, dA = _swiglu_grad(dh_TF, down_term, gate_up_TN, term, columns_scale_N, largest_PT, tiles)
    return d_TN, dA, scale_rows(largest_PT)


def _swiglu_grad(
    dh_TF: Tensor, down_term: Term | None, gate_up_TN: Tensor, term: Term | None, columns_scale_N: Tensor | None,
    largest_PT: Tensor | None, tiles: Tiles,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    (num_rows, width), rank = dh_TF.shape, term.rank if term else 0
    rank_down = down_term.rank if down_term else 0
    assert dh_TF.is_contiguous() and gate_up_TN.is_contiguous(), "the kernel knows no strides"
    num_blocks = triton.cdiv(width, tiles.columns)
    rows_of_range, ranges = tiles.cut(max(num_rows, 1), num_blocks)
    out_TN = gate_up_TN  # every number is read by the program that writes its place, and before
    dA_parts = _floats(dh_TF, ranges, width, rank_down) if down_term else None
    thin_kernels.swiglu_grad_kernel[(num_blocks, ranges)](
        dh_TF, *_factor(down_term, dh_TF), gate_up_TN, *_factor(term, dh_TF),
        out_TN if columns_scale_N is None else columns_scale_N, out_TN, out_TN if dA_parts is None else dA_parts,
        out_TN if largest_PT is None else largest_PT, num_rows, rows_of_range, width, rank, rank_down,
        HAS_DOWN=down_term is not None, HAS_LOW=term is not None, MEASURES=largest_PT is not None,
        RP=padded(rank), RP_DOWN=padded(rank_down),
        BT=tiles.rows, BN=tiles.columns, STAGES=tiles.stages, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return out_TN, None if dA_parts is None else sum_parts(None, dA_parts, [], dh_TF.dtype)[1].T


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


def _thin_tiles(dtype: torch.dtype, rank: int, *, rounds: bool) -> Tiles:
    """Tiles of ``thin_gradients``: wide blocks, because they halve the partial sums of du.

    At rank 16, q, k and v take 31 µs; blocks of 128 columns 36, the library's products 64. Rounding gate's and up's
    gradient on the way takes 176 µs; with the tiles that are best without it, 223 (H200, bench/gpu_thin.py).
    """
    if dtype == torch.float32:
        return Tiles(rows=32, columns=64, stages=2)
    if rounds:
        return Tiles(rows=32, resident=2)
    return Tiles(columns=512 if padded(rank) == 16 else 256, warps=8)


def _swiglu_tiles(dtype: torch.dtype, *, resident: int) -> Tiles:
    """Tiles of SwiGLU both ways: 143 µs forward and 277 backward, against 157 and 313 of the next best."""
    if dtype == torch.float32:
        return Tiles(rows=32, columns=32, stages=2)
    return Tiles(columns=64, resident=resident)


def _first_two(sizes: Sequence[int]) -> tuple[int, int]:
    return sizes[0] if sizes else 0, sizes[1] if len(sizes) > 1 else 0


def _floats(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _factor(term: Term | None, stand_in: Tensor) -> tuple[Tensor, Tensor]:
    return (stand_in, stand_in) if term is None else (term.u_TR, term.factor)
