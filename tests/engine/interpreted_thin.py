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
from torch import Tensor

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


@pytest.fixture(autouse=True)
def loops_over_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.6's interpreter turns a loop's bounds into numbers in a way that NumPy 2.4 no longer allows."""
    from triton.runtime import interpreter

    before = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        before(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch)


def make_pairs(widths: Sequence[int], rank: int, width_in: int = 8) -> Pairs:
    group = [Adapter(randn(rank, width_in, seed=i), randn(n, rank, seed=10 + i), 1.0) for i, n in enumerate(widths)]
    (pairs,) = cast_adapters([group], torch.float32, torch.device("cpu"))
    assert pairs is not None and pairs.stacked_Nr is not None
    return pairs


def plain_thin(pairs: Pairs, dy: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """du and the stacked dB, as ``Pairs`` makes them."""
    du = pairs.thin_gradient(dy)
    gradients = pairs.gradients(dy, dy.new_zeros(len(dy), pairs.A_RD.shape[1]), u, du)
    return du, torch.cat(gradients[1::2])


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("widths", [(70,), (32, 97), (96, 33, 5)])
@pytest.mark.parametrize("num_rows", ROWS)
def test_thin_gradients(thin: Any, num_rows: int, widths: tuple[int, ...], rank: int) -> None:
    pairs = make_pairs(widths, rank)
    dy, u = randn(num_rows, sum(widths), seed=1), randn(num_rows, rank * len(widths), seed=2)
    wanted = plain_thin(pairs, dy, u)
    for tiles in (thin.Tiles(**SMALL, ranges=1), thin.Tiles(**SMALL, ranges=3), None):
        du, dB = thin.thin_gradients(dy, u, pairs.stacked_Nr, widths, tiles)
        assert largest(du, wanted[0]) < TIGHT and largest(dB, wanted[1]) < TIGHT


def test_no_rows(thin: Any) -> None:
    """Nothing in, no gradient."""
    pairs = make_pairs((40, 24), 4)
    du, dB = thin.thin_gradients(randn(0, 64), randn(0, 8), pairs.stacked_Nr, (40, 24))
    assert du.shape == (0, 8) and torch.equal(dB, torch.zeros(64, 4))
    h, u = thin.swiglu(randn(0, 64), None, randn(4, 32))
    assert h.shape == (0, 32) and u.shape == (0, 4)


@pytest.mark.parametrize(("rank", "rank_down"), [(None, None), (None, 16), (4, None), (20, 4), (16, 16), (64, 20)])
@pytest.mark.parametrize("num_rows", ROWS[1:])
def test_swiglu_and_the_down_projections_u(thin: Any, num_rows: int, rank: int | None, rank_down: int | None) -> None:
    width = 70
    gate_up = randn(num_rows, 2 * width)
    term = Term(randn(num_rows, 2 * rank, seed=1), randn(2 * width, rank, seed=2), (width,) * 2) if rank else None
    A = randn(rank_down, width, seed=3) if rank_down else None
    wanted = pointwise.swiglu(gate_up.clone(), term)
    for tiles in (thin.Tiles(**SMALL, ranges=2), None):
        h, u = thin.swiglu(gate_up, term, A, tiles)
        assert largest(h, wanted) < TIGHT
        assert (u is None) if A is None else largest(u, wanted @ A.T) < TIGHT


@pytest.mark.parametrize("wants_h", [False, True])
@pytest.mark.parametrize(("rank", "rank_down"), [(None, None), (None, 16), (4, None), (20, 4), (16, 16), (64, 20)])
@pytest.mark.parametrize("num_rows", ROWS[1:])
def test_swiglu_gradient_and_its_thin_products(
    thin: Any, num_rows: int, rank: int | None, rank_down: int | None, wants_h: bool
) -> None:
    width = 70
    gate_up, dh = randn(num_rows, 2 * width), randn(num_rows, width, seed=4)
    pairs = make_pairs((width, width), rank) if rank else None
    u = randn(num_rows, 2 * (rank or 0), seed=1)
    term = pairs.term(u) if pairs else None
    down = Term(randn(num_rows, rank_down, seed=5), randn(rank_down, width, seed=6)) if rank_down else None
    added = gate_up.clone()
    h = pointwise.swiglu(added, term)
    wanted, _ = pointwise.swiglu_grad(dh.clone(), down, added, None, wants_h=False)
    for tiles in (thin.Tiles(**SMALL, ranges=2), None):
        wants = {"wants_h": wants_h, "wants_du": rank is not None, "wants_dA": rank_down is not None}
        got = thin.swiglu_grad(dh, down, gate_up, term, **wants, tiles=tiles)
        assert largest(got.d_gate_up_TN, wanted) < TIGHT
        assert largest(got.h_TF, h) < TIGHT if wants_h else got.h_TF is None
        if pairs is not None:
            du, dB = plain_thin(pairs, wanted, u)
            assert largest(got.du_TR, du) < TIGHT and largest(got.dB_Nr, dB) < TIGHT
        else:
            assert got.du_TR is None and got.dB_Nr is None
        assert (got.dA_RF is None) if down is None else largest(got.dA_RF, down.u_TR.T @ h) < TIGHT
        alone = thin.swiglu_grad(dh, down, gate_up, term, wants_h=False, tiles=tiles)
        assert torch.equal(alone.d_gate_up_TN, got.d_gate_up_TN) and alone[1:] == (None,) * 4


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
