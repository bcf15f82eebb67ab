"""The kernels of ``thin_kernels.py``, through Triton's interpreter on the CPU, against the plain products.

As ``interpreted_kernels.py``: in a process of their own, which ``test_kernels.py`` starts with TRITON_INTERPRET=1 set.
The tiles are small, so that small tensors have several blocks of columns and several ranges of rows, the last of each
incomplete.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from medcot.engine import pointwise
from medcot.engine.lora import Adapter, Pairs, Term, cast_adapters
from twins import largest, randn

pytestmark = pytest.mark.skipif(
    "TRITON_INTERPRET" not in os.environ, reason="needs a process of its own: test_kernels.py"
)
TIGHT = 3e-6  # float32; sums run in another order
RANKS = [4, 16, 20, 64]
ROWS = [1, 16, 77]
SMALL = {"rows": 16, "columns": 32, "stages": 2}


@pytest.fixture(scope="module")
def thin() -> Any:
    from medcot.engine import thin

    return thin


def make_pairs(widths: Sequence[int], rank: int, width_in: int = 8) -> Pairs:
    group = [Adapter(randn(rank, width_in, seed=i), randn(n, rank, seed=10 + i), 1.0) for i, n in enumerate(widths)]
    (pairs,) = cast_adapters([group], torch.float32, torch.device("cpu"))
    assert pairs is not None and pairs.stacked_Nr is not None
    return pairs


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("widths", [(70,), (32, 97), (96, 33, 5)])
@pytest.mark.parametrize("num_rows", ROWS)
def test_thin_gradients(thin: Any, num_rows: int, widths: tuple[int, ...], rank: int) -> None:
    pairs = make_pairs(widths, rank)
    dy, u = randn(num_rows, sum(widths), seed=1), randn(num_rows, rank * len(widths), seed=2)
    wanted = pointwise.thin_gradients(dy, u, pairs.stacked_Nr, widths)
    for tiles in (thin.Tiles(**SMALL, ranges=1), thin.Tiles(**SMALL, ranges=3), None):
        du, dB = thin.thin_gradients(dy, u, pairs.stacked_Nr, widths, tiles)
        assert largest(du, wanted[0]) < TIGHT and largest(dB, wanted[1]) < TIGHT


def test_no_rows(thin: Any) -> None:
    """Nothing in, no gradient."""
    pairs = make_pairs((40, 24), 4)
    du, dB = thin.thin_gradients(randn(0, 64), randn(0, 8), pairs.stacked_Nr, (40, 24))
    assert du.shape == (0, 8) and torch.equal(dB, torch.zeros(64, 4))
    assert thin.swiglu(randn(0, 64)).shape == (0, 32)


@pytest.mark.parametrize("rank", [None, 4, 16, 64])
@pytest.mark.parametrize("num_rows", ROWS[1:])
def test_swiglu(thin: Any, num_rows: int, rank: int | None) -> None:
    width = 70
    gate_up = randn(num_rows, 2 * width)
    term = Term(randn(num_rows, 2 * rank, seed=1), randn(2 * width, rank, seed=2), (width,) * 2) if rank else None
    wanted = pointwise.swiglu(gate_up.clone(), term)
    for tiles in (thin.Tiles(**SMALL, ranges=2), None):
        assert largest(thin.swiglu(gate_up, term, tiles=tiles), wanted) < TIGHT


@pytest.mark.parametrize(("rank", "rank_down"), [(None, None), (None, 16), (4, None), (20, 4), (16, 16), (64, 20)])
@pytest.mark.parametrize("num_rows", ROWS[1:])
def test_swiglus_gradient_and_the_down_projections(
    thin: Any, num_rows: int, rank: int | None, rank_down: int | None
) -> None:
    width = 70
    gate_up, dh = randn(num_rows, 2 * width), randn(num_rows, width, seed=4)
    pairs = make_pairs((width, width), rank) if rank else None
    term = pairs.term(randn(num_rows, 2 * (rank or 0), seed=1)) if pairs else None
    down = Term(randn(num_rows, rank_down, seed=5), randn(rank_down, width, seed=6)) if rank_down else None
    added = gate_up.clone()
    pointwise.swiglu(added, term)
    wanted, wanted_dA = pointwise.swiglu_grad(dh.clone(), down, added, None)
    for tiles in (thin.Tiles(**SMALL, ranges=2), None):
        d, dA = thin.swiglu_grad(dh, down, gate_up.clone(), term, tiles)
        assert largest(d, wanted) < TIGHT
        assert (dA is None) if wanted_dA is None else largest(dA, wanted_dA) < TIGHT


@pytest.mark.parametrize("num_rows", [1, 63, 64, 65, 6352, 70000])
def test_ranges_cover_the_rows_in_whole_tiles(thin: Any, num_rows: int) -> None:
    """Every row lies in one range, and none is empty."""
    for ranges in (None, 1, 3):
        tiles = thin.Tiles(ranges=ranges)
        for num_blocks in (1, 16, 56, 224):
            rows, count = tiles.cut(num_rows, num_blocks)
            assert rows % tiles.rows == 0 and (count - 1) * rows < num_rows <= count * rows
            assert ranges is None or count <= ranges


def test_ranges_keep_an_h200_busy(thin: Any) -> None:
    """At the job's shapes the program that ends last works at most a fifth longer than the mean."""
    for columns, width, resident in ((256, 4096, 2), (512, 28672, 1), (256, 6144, 2), (64, 14336, 3), (128, 14336, 1)):
        tiles, num_blocks = thin.Tiles(columns=columns, resident=resident), width // columns
        rows, ranges = tiles.cut(6352, num_blocks)
        places = thin.MULTIPROCESSORS * resident
        waves = -(-num_blocks * ranges // places)
        assert waves * rows * places / (num_blocks * 6352) < 1.2


def assert_rounded(got: Any, written: torch.Tensor, factors: torch.Tensor | None) -> None:
    """The scales and the bytes that rounding ``written`` by itself would give."""
    wanted = pointwise.quantise_rows(written, factors)
    assert torch.equal(got.scale_T1, wanted.scale_T1)
    assert torch.equal(got.codes_TN.view(torch.uint8), wanted.codes_TN.view(torch.uint8))


def uneven(*shape: int, seed: int) -> torch.Tensor:
    """Rows of different sizes, the third of them zero."""
    x = randn(*shape, seed=seed) * 100 ** randn(shape[0], 1, seed=seed + 50)
    x[2:3] = 0
    return x


@pytest.mark.parametrize("rank", [4])
@pytest.mark.parametrize("widths", [(70,), (64, 33, 5)])
@pytest.mark.parametrize("num_rows", [1, 37])
def test_thin_gradients_round_what_they_read(thin: Any, num_rows: int, widths: tuple[int, ...], rank: int) -> None:
    pairs = make_pairs(widths, rank)
    dy, u = uneven(num_rows, sum(widths), seed=1), randn(num_rows, rank * len(widths), seed=2)
    factors = 0.01 + randn(sum(widths), seed=3).abs()
    scale = pointwise.quantise_rows(dy, factors).scale_T1
    tiles = thin.Tiles(**SMALL, ranges=2)
    *got, rounded = thin.thin_gradients_rounded(dy, u, pairs.stacked_Nr, widths, factors, scale, tiles)
    wanted = thin.thin_gradients(dy, u, pairs.stacked_Nr, widths, tiles)
    assert all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))
    assert_rounded(rounded, dy, factors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_rows", [1, 37])
def test_swiglus_gradient_leaves_the_scales_of_its_rows(thin: Any, num_rows: int, dtype: torch.dtype) -> None:
    width, rank = 70, None if dtype == torch.bfloat16 else 4  # the interpreter has no products of bfloat16
    gate_up, dh = uneven(num_rows, 2 * width, seed=1).to(dtype), uneven(num_rows, width, seed=2).to(dtype)
    pairs = make_pairs((width, width), rank) if rank else None
    term = pairs.term(randn(num_rows, 2 * (rank or 0), seed=3)) if pairs else None
    factors = 0.01 + randn(2 * width, seed=4).abs()
    tiles = thin.Tiles(**SMALL, ranges=2)
    d, nothing, scale = thin.swiglu_grad_scaled(dh, None, gate_up.clone(), term, factors, tiles)
    assert nothing is None and torch.equal(d, thin.swiglu_grad(dh, None, gate_up, term, tiles)[0])
    assert torch.equal(scale, pointwise.quantise_rows(d, factors).scale_T1)
