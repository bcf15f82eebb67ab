"""Operands of 8-bit products, rounded by the kernel that makes them rather than by one of their own.

Rounding by itself reads a tensor that has just been written: of Llama 8B's step of 6,300 tokens on an H200, 16 ms of
228. The norms forward and backward have whole rows in hand, so they round as they write (``kernels.py``). SwiGLU both
ways and the rotation back do not: they leave the rows' scales, and LoRA's thin product, which reads the tensor next
anyway, rounds it on the way (``thin_kernels.py``); without an adapter it is rounded by itself. Which operand goes to
which weight is the layer's knowledge (``layers.py``), whether that weight wants it rounded is ``frozen.py``'s; here the
two meet. The codes are those of ``quantise_rows``, to the bit.

Axes: T tokens, D hidden, N outputs, F intermediate, R rank.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

from torch import Tensor

from medcot.engine.frozen import Fp8Weight, FrozenWeight, Matrix
from medcot.engine.lora import Pairs, Projection
from medcot.engine.terms import Rounded, Term


class Gradient(NamedTuple):
    """A gradient, and the same rounded for the product that reads it next, where that is in 8 bit."""

    d_TD: Tensor
    rounded: Rounded | None

    def rows(self, rows: slice) -> Gradient:
        """Those of a tile."""
        return Gradient(self.d_TD[rows], rows_of(self.rounded, rows))


class PreparedMatrix:
    """An 8-bit weight whose next operand has been rounded already.

    Args:
        weight: the weight.
        rounded: the operand of the one product that is asked for; the 16-bit one that comes with it is not read.
    """

    def __init__(self, weight: Fp8Weight, rounded: Rounded) -> None:
        self._weight, self._rounded = weight, rounded

    def multiply(self, x_TD: Tensor, bias_N: Tensor | None) -> Tensor:
        """``x Wᵀ + b``."""
        assert x_TD.shape == self._rounded.codes_TN.shape, "the rounded operand is of another product"
        return self._weight.multiply_rounded(self._rounded, bias_N)

    def multiply_back(self, dy_TN: Tensor) -> Tensor:
        """``dy W``."""
        assert dy_TN.shape == self._rounded.codes_TN.shape, "the rounded operand is of another product"
        return self._weight.multiply_back_rounded(self._rounded)


def prepare(matrix: Matrix, rounded: Rounded | None) -> Matrix:
    """The matrix for one product of an operand that may have come rounded."""
    if rounded is None:
        return matrix
    assert isinstance(matrix, Fp8Weight), "only an 8-bit weight has its operands rounded"
    return PreparedMatrix(matrix, rounded)


def rows_of(rounded: Rounded | None, rows: slice) -> Rounded | None:
    """Those of a tile."""
    return None if rounded is None else Rounded(rounded.codes_TN[rows], rounded.scale_T1[rows])


def norm_for(
    reader: FrozenWeight, norm: Any, x_TD: Tensor, y_TD: Tensor | None, term: Term | None, ops: ModuleType
) -> tuple[Tensor, Tensor, Tensor, Rounded | None]:
    """``pointwise.add_norm`` for a weight that reads the normed; rounded too if that wants it."""
    if isinstance(reader, Fp8Weight):
        rounded: tuple[Tensor, Tensor, Tensor, Rounded]
        rounded = ops.add_norm_rounded(x_TD, y_TD, term, norm.weight, norm.variance_epsilon)
        return rounded
    return *ops.add_norm(x_TD, y_TD, term, norm.weight, norm.variance_epsilon), None


def norm_grad_for(
    reader: FrozenWeight | None, dn_TD: Tensor, term: Term | None, x_TD: Tensor, weight_D: Tensor, r_T: Tensor,
    d_sum_TD: Tensor | None, ops: ModuleType,
) -> Gradient:  # fmt: skip
    """``pointwise.norm_grad`` for a weight that the gradient goes back through; rounded too if that wants it."""
    arguments = dn_TD, term, x_TD, weight_D, r_T, d_sum_TD
    if isinstance(reader, Fp8Weight) and reader.choice.backward:
        return Gradient(*ops.norm_grad_rounded(*arguments, reader.scale_N))
    return Gradient(ops.norm_grad(*arguments), None)


def thin_reader(weight: FrozenWeight, pairs: Pairs | None) -> Fp8Weight | None:
    """The weight, if its operands are rounded and a thin product in one piece reads them first; else ``None``."""
    has_thin = pairs is not None and pairs.stacked_Nr is not None
    return weight if has_thin and isinstance(weight, Fp8Weight) else None


def thin_back_reader(weight: FrozenWeight, pairs: Pairs | None) -> Fp8Weight | None:
    """As ``thin_reader``, for the gradient that goes back through the weight."""
    reader = thin_reader(weight, pairs)
    return reader if reader is not None and reader.choice.backward else None


def swiglu_for(
    reader: Fp8Weight | None, gate_up_TN: Tensor, term: Term | None, ops: ModuleType
) -> tuple[Tensor, Tensor | None]:
    """``pointwise.swiglu``, and its rows' scales if there is a reader for them."""
    if reader is None:
        return ops.swiglu(gate_up_TN, term), None
    h_TF, scale_T1 = ops.swiglu_scaled(gate_up_TN, term)
    return h_TF, scale_T1


def project_for(
    projection: Projection, x_TD: Tensor, scale_T1: Tensor | None, pairs: Pairs | None, matrix: Matrix, ops: ModuleType
) -> tuple[Tensor, Tensor | None, Term | None]:
    """``Projection.project``; where the input's scales are given, its thin product rounds it on the way."""
    if scale_T1 is None or pairs is None:
        return projection.project(x_TD, pairs, matrix)
    u_TR, rounded = ops.thin_product_rounded(x_TD, pairs.A_RD, scale_T1)
    y_TN = prepare(matrix, rounded).multiply(x_TD, projection.bias_N)
    return y_TN, u_TR, pairs.term(u_TR)


def swiglu_grad_for(
    reader: Fp8Weight | None, dh_TF: Tensor, down_term: Term | None, gate_up_TN: Tensor, term: Term | None,
    ops: ModuleType,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """``pointwise.swiglu_grad``, and the rows' scales of what it makes if there is a reader for them."""
    if reader is None:
        return *ops.swiglu_grad(dh_TF, down_term, gate_up_TN, term), None
    made: tuple[Tensor, Tensor | None, Tensor]
    made = ops.swiglu_grad_scaled(dh_TF, down_term, gate_up_TN, term, reader.scale_N)
    return made


def rotate_back_for(
    reader: Fp8Weight | None, d_heads: tuple[Tensor, Tensor, Tensor], cos_TC: Tensor, sin_TC: Tensor, ops: ModuleType
) -> tuple[Tensor, Tensor | None]:
    """``pointwise.rotate_back``, and its rows' scales if there is a reader for them."""
    if reader is None:
        return ops.rotate_back(*d_heads, cos_TC, sin_TC), None
    d_heads_TNC, scale_T1 = ops.rotate_back_scaled(*d_heads, cos_TC, sin_TC, reader.scale_N)
    return d_heads_TNC, scale_T1


def adapter_gradients(
    pairs: Pairs | None, dy_TN: Tensor, x_TD: Tensor | None, u_TR: Tensor | None, ops: ModuleType,
    reader: Fp8Weight | None = None, scale_T1: Tensor | None = None,
) -> tuple[Term | None, list[Tensor], Rounded | None]:  # fmt: skip
    """The low-rank term that a group's dx lacks, and its adapters' gradients; nothing where no adapter is on.

    Where the scales of the gradient's rows are given, it comes back rounded for its reader too.
    """
    if pairs is None:
        return None, [], None
    assert x_TD is not None and u_TR is not None, "the trace holds what an adapter's gradient is made of"
    rounded = None
    if reader is not None and scale_T1 is not None:
        term = pairs.term(u_TR)
        assert term is not None, "thin_reader() has looked"
        B_Nr, widths = term.factor, term.widths
        du_TR, dB_Nr, rounded = ops.thin_gradients_rounded(dy_TN, u_TR, B_Nr, widths, reader.scale_N, scale_T1)
        dBs = list(dB_Nr.split(widths))
    else:
        du_TR, dBs = pairs.thin_gradients(dy_TN, u_TR, ops)
    return Term(du_TR, pairs.A_RD), pairs.in_order(du_TR.T @ x_TD, dBs), rounded
