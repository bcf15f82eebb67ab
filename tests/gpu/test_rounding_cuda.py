"""Rounding to 8 bit by the kernels that write or read a tensor anyway, against rounding by itself. Run with ``-m gpu``.

On one GPU the two must agree to the bit: the same numbers, the same scale, the same multiplications.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from medcot.engine import pointwise
from medcot.engine.devices import has_fp8, has_triton
from medcot.engine.frozen import Fp8, Fp8Head
from medcot.engine.terms import Term
from twins import randn, typical

CUDA = torch.device("cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or not has_triton(CUDA) or not has_fp8(CUDA), reason="needs FP8 and Triton"
    ),
]
SIZES = [(1, 64), (37, 576), (515, 4096)]
RANK = 16


@pytest.fixture(scope="module")
def launch() -> ModuleType:
    from medcot.engine import launch

    return launch


def uneven(*shape: int, seed: int = 0) -> Tensor:
    """Rows of different sizes, the third of them zero."""
    x = randn(*shape, seed=seed) * 100 ** randn(shape[0], 1, seed=seed + 50)
    x[2:3] = 0
    return x.to(CUDA, torch.bfloat16)


def factors(width: int) -> Tensor:
    return (0.01 + randn(width, seed=9).abs()).cuda()


def assert_rounded(launch: ModuleType, got: Any, written: Tensor, columns: Tensor | None) -> None:
    wanted = launch.quantise_rows(written, columns)
    assert torch.equal(got.scale_T1, wanted.scale_T1)
    assert torch.equal(got.codes_TN.view(torch.uint8), wanted.codes_TN.view(torch.uint8))


@pytest.mark.parametrize(("num_rows", "width"), SIZES)
@pytest.mark.parametrize("scaled", [False, True])
def test_rounding_by_itself_is_the_twins(launch: ModuleType, num_rows: int, width: int, scaled: bool) -> None:
    x, columns = uneven(num_rows, width), factors(width) if scaled else None
    got, wanted = launch.quantise_rows(x, columns), pointwise.quantise_rows(x, columns)
    assert float((got.scale_T1 / wanted.scale_T1 - 1).abs().max()) < 1e-6
    same = got.codes_TN.view(torch.uint8) == wanted.codes_TN.view(torch.uint8)
    assert float(same.float().mean()) > 0.999  # a division that is off by a bit turns a tie the other way


@pytest.mark.parametrize(("num_rows", "width"), SIZES)
def test_the_norms_gradient(launch: ModuleType, num_rows: int, width: int) -> None:
    x, y, weight = uneven(num_rows, width), uneven(num_rows, width, seed=1), factors(width).bfloat16()
    r = launch.add_norm(x, None, None, weight, 1e-6)[2]
    dn, columns = uneven(num_rows, width, seed=4), factors(width)
    dx, rounded = launch.norm_grad_rounded(dn, None, x, weight, r, y, columns)
    # Compiled apart, the two may order a sum otherwise: a few numbers in ten thousand round to their neighbours.
    wanted = launch.norm_grad(dn, None, x, weight, r, y)
    assert float((dx != wanted).float().mean()) < 1e-3
    assert torch.allclose(dx.float(), wanted.float(), rtol=2**-7, atol=2**-7 * float(wanted.float().abs().amax()))
    assert_rounded(launch, rounded, dx, columns)


@pytest.mark.parametrize(("num_rows", "width"), [(1, 64), (37, 1536), (515, 14336)])
def test_swiglus_gradient_and_the_thin_products_that_read_it(launch: ModuleType, num_rows: int, width: int) -> None:
    gate_up = randn(num_rows, 2 * width).to(CUDA, torch.bfloat16)
    term = Term(randn(num_rows, 2 * RANK, seed=1).to(gate_up), randn(2 * width, RANK, seed=2).to(gate_up), (width,) * 2)
    A = (0.1 * randn(RANK, width, seed=3)).to(gate_up)
    dh, columns = uneven(num_rows, width, seed=4), factors(2 * width)
    down = Term(uneven(num_rows, RANK, seed=5), A)
    d, dA, scale = launch.swiglu_grad_scaled(dh, down, gate_up.clone(), term, columns)
    wanted, wanted_dA = launch.swiglu_grad(dh, down, gate_up, term)
    assert torch.equal(d, wanted) and torch.equal(dA, wanted_dA)
    *got, rounded = launch.thin_gradients_rounded(d, term.u_TR, term.factor, term.widths, columns, scale)
    # The tiles are others, and with them the order of the sums.
    wanted = launch.thin_gradients(d, term.u_TR, term.factor, term.widths)
    for one, other in zip(got, wanted, strict=True):
        assert typical(one.float(), other.float()) < 2**-8
    assert_rounded(launch, rounded, d, columns)


def test_a_head_with_logits_in_sixteen_bits() -> None:
    dense, x = randn(512, 64).to(CUDA, torch.bfloat16), randn(37, 64, seed=1).to(CUDA, torch.bfloat16)
    head = Fp8Head(dense, torch.bfloat16, Fp8(head_forward=False))
    assert torch.equal(head.multiply(x, None), x @ dense.T)
    dy = randn(37, 512, seed=2).to(CUDA, torch.bfloat16)
    assert 1e-3 < typical(head.multiply_back(dy).float(), dy.float() @ dense.float()) < 0.05
