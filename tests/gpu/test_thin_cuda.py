"""The one-pass thin products and SwiGLU on CUDA, against the plain products. Run with ``-m gpu``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from medcot.engine import pointwise
from medcot.engine.devices import has_triton
from medcot.engine.lora import Adapter, Pairs, Term, cast_adapters
from twins import largest, randn, typical

CUDA = torch.device("cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or not has_triton(CUDA), reason="needs Triton on a CUDA device"),
]
TIGHT = 1e-5  # float32; sums run in another order
HALF = {torch.bfloat16: 2**-8, torch.float16: 2**-11}  # half a step of each: what one rounding may cost
WIDTHS = [(4096,), (1000, 264), (520, 264, 8)]
RANKS = [4, 16, 20, 64]
SHAPES = [(1, 264), (77, 264), (1000, 1096)]


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Memory handed out uninitialised holds NaN; float32 is float32, not TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3, device=CUDA).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def thin() -> ModuleType:
    """The launchers; imported here, because a CPU's torch may lack Triton."""
    from medcot.engine import thin

    return thin


def on_gpu(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return randn(*shape, seed=seed).to(CUDA, dtype)


def make_pairs(widths: Sequence[int], rank: int, dtype: torch.dtype) -> Pairs:
    group = [
        Adapter(randn(rank, 8, seed=i).to(CUDA), randn(n, rank, seed=10 + i).to(CUDA), 1.0)
        for i, n in enumerate(widths)
    ]
    (pairs,) = cast_adapters([group], dtype, CUDA)
    assert pairs is not None and pairs.stacked_Nr is not None
    return pairs


def plain_thin(dy: Tensor, u: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """du and the stacked dB in float64, of the rounded operands."""
    widths, rank = [len(B) for B in pairs.Bs], pairs.Bs[0].shape[1]
    dys = dy.double().split(widths, -1)
    du = torch.cat([part @ B.double() for part, B in zip(dys, pairs.Bs, strict=True)], -1)
    return du, torch.cat([part.T @ own for part, own in zip(dys, u.double().split(rank, -1), strict=True)])


def assert_near(got: Tensor, wanted: Tensor) -> None:
    """To rounding in float32; to one rounding of the result in 16 bits."""
    assert not got.isnan().any()
    if got.dtype == torch.float32:
        assert largest(got, wanted) < TIGHT
    else:
        assert typical(got.double(), wanted.double()) < HALF[got.dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("num_rows", [1, 64, 1000])
def test_thin_gradients(thin: Any, num_rows: int, widths: tuple[int, ...], rank: int, dtype: torch.dtype) -> None:
    pairs = make_pairs(widths, rank, dtype)
    dy = on_gpu(num_rows, sum(widths), seed=1, dtype=dtype)
    u = on_gpu(num_rows, rank * len(widths), seed=2, dtype=dtype)
    wanted = plain_thin(dy, u, pairs)
    for tiles in (
        None,
        thin.Tiles(rows=32, columns=32, stages=2) if dtype == torch.float32 else thin.Tiles(columns=64),
    ):
        first, again = (thin.thin_gradients(dy, u, pairs.stacked_Nr, widths, tiles) for _ in range(2))
        for got, repeated, true in zip(first, again, wanted, strict=True):
            assert_near(got, true)
            assert torch.equal(got, repeated), "the order of the sums is fixed"


def test_rows_beyond_32_bits(thin: Any) -> None:
    """A batch whose elements cannot be counted in 32 bits."""
    num_rows, width = 80_000, 28_672
    pairs = make_pairs((width // 2,) * 2, 16, torch.bfloat16)
    dy = torch.zeros(num_rows, width, device=CUDA, dtype=torch.bfloat16)
    dy[-100:] = on_gpu(100, width, seed=1, dtype=torch.bfloat16)
    u = on_gpu(num_rows, 32, seed=2, dtype=torch.bfloat16)
    du, dB = thin.thin_gradients(dy, u, pairs.stacked_Nr, (width // 2,) * 2)
    wanted = plain_thin(dy[-100:], u[-100:], pairs)
    assert torch.equal(du[:-100], torch.zeros_like(du[:-100]))
    assert_near(du[-100:], wanted[0])
    assert_near(dB, wanted[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rank", "rank_down"), [(None, None), (4, None), (None, 16), (16, 16), (20, 64)])
@pytest.mark.parametrize(("num_rows", "width"), SHAPES)
def test_swiglu_both_ways_and_the_down_projections_gradient(
    thin: Any, num_rows: int, width: int, rank: int | None, rank_down: int | None, dtype: torch.dtype
) -> None:
    gate_up, dh = on_gpu(num_rows, 2 * width, seed=1, dtype=dtype), on_gpu(num_rows, width, seed=2, dtype=dtype)
    pairs = make_pairs((width, width), rank, dtype) if rank else None
    term = pairs.term(on_gpu(num_rows, 2 * (rank or 0), seed=3, dtype=dtype) / 8) if pairs else None
    A = on_gpu(rank_down, width, seed=4, dtype=dtype) / 8 if rank_down else None
    down = Term(on_gpu(num_rows, rank_down, seed=5, dtype=dtype), A) if rank_down and A is not None else None
    exact, exact_dh = gate_up.float().clone(), dh.float().clone()  # the twin, which works in place, in float32
    exact_h = pointwise.swiglu(exact, _widened(term))
    exact_d, _ = pointwise.swiglu_grad(exact_dh, _widened(down), exact, None)
    h = thin.swiglu(gate_up, term)
    assert_near(h, exact_h)
    d, dA = thin.swiglu_grad(dh, down, gate_up, term)
    assert_near(d, exact_d)
    if down is None:
        assert dA is None
    else:
        assert_near(dA, down.u_TR.double().T @ h.double())  # the product is rounded there as it was here


def _widened(term: Term | None) -> Term | None:
    return None if term is None else Term(term.u_TR.float(), term.factor.float(), term.widths)
