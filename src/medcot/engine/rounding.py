"""Operands of 8-bit products, rounded by the kernel that makes or reads them rather than by one of their own.

Rounding by itself reads a tensor that has just been written: of Llama 8B's step of 6,300 tokens on an H200, 16 ms of
228. Two places are worth another way. The norms' gradient has whole rows in hand, so it rounds as it writes
(``kernels.py``). SwiGLU's gradient, the widest tensor of a layer, leaves its rows' scales, and LoRA's thin product,
which reads it next anyway, rounds it on the way (``thin_kernels.py``, which has the times); without an adapter it is
rounded by itself. Which operand goes to which weight is the layer's knowledge (``layers.py``), whether that weight
wants it rounded is ``frozen.py``'s; here the two meet. The codes are those of ``quantise_rows``, to the bit.

Axes: T tokens, D hidden, N outputs, F intermediate, R rank.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

from torch import Tensor

from medcot.engine.frozen import Fp8Weight, FrozenWeight, Matrix
from medcot.engine.lora import Pairs
from medcot.engine.terms import Rounded, Term


class Gradient(NamedTuple):
    """A gradient, and the same rounded for the product that reads it next, where that is in 8 bit."""

    d_TD: Tensor
    rounded: Rounded | None

    def rows(self, rows: slice) -> Gradient:
        """Those of a tile."""
        some = None if self.rounded is None else Rounded(self.rounded.codes_TN[rows], self.rounded.scale_T1[rows])
        return Gradient(self.d_TD[rows], some)


def multiply_back(matrix: Matrix, dy_TN: Tensor, rounded: Rounded | None) -> Tensor:
    """``dy W``, of a gradient that may have come rounded: then the 16-bit one is not read."""
    if rounded is None:
        return matrix.multiply_back(dy_TN)
    assert isinstance(matrix, Fp8Weight), "only for an 8-bit weight is a gradient rounded"
    return matrix.multiply_back_rounded(rounded)


def norm_grad_for(
    reader: FrozenWeight | None, dn_TD: Tensor, term: Term | None, x_TD: Tensor, weight_D: Tensor, r_T: Tensor,
    d_sum_TD: Tensor | None, ops: ModuleType,
) -> Gradient:  # fmt: skip
    """``pointwise.norm_grad`` for a weight that the gradient goes back through; rounded too if that wants it."""
    arguments = dn_TD, term, x_TD, weight_D, r_T, d_sum_TD
    if isinstance(reader, Fp8Weight) and reader.choice.backward:
        return Gradient(*ops.norm_grad_rounded(*arguments, reader.scale_N))
    return Gradient(ops.norm_grad(*arguments), None)


def thin_back_reader(weight: FrozenWeight, pairs: Pairs | None) -> Fp8Weight | None:
    """The weight, if the gradient that goes back through it is rounded, and a thin product in one piece reads it first.

    ``None`` otherwise.
    """
    has_thin = pairs is not None and pairs.stacked_Nr is not None
    return weight if has_thin and isinstance(weight, Fp8Weight) and weight.choice.backward else None


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
        assert term is not None, "thin_back_reader() has looked"
        B_Nr, widths = term.factor, term.widths
        du_TR, dB_Nr, rounded = ops.thin_gradients_rounded(dy_TN, u_TR, B_Nr, widths, reader.scale_N, scale_T1)
        dBs = list(dB_Nr.split(widths))
    else:
        du_TR, dBs = pairs.thin_gradients(dy_TN, u_TR, ops)
    return Term(du_TR, pairs.A_RD), pairs.in_order(du_TR.T @ x_TD, dBs), rounded
