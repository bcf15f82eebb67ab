"""What travels beside a tensor: a low-rank product on its way to it (``lora.py``), its rounding to 8 bit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class Rounded(NamedTuple):
    """Rows in float8 e4m3, and the float32 scales (T, 1) that multiply them back."""

    codes_TN: Tensor
    scale_T1: Tensor


@dataclass(frozen=True)
class Term:
    """A low-rank product that is still to be added to its target.

    Attributes:
        u_TR: the thin factor.
        factor: forward, every Bᵢ stacked, (N, r), part i belonging to columns i·r to (i+1)·r of u; backward, A, (R, D).
        widths: forward, Nᵢ; empty backward.
    """

    u_TR: Tensor
    factor: Tensor
    widths: tuple[int, ...] = ()

    @property
    def rank(self) -> int:
        """Columns of u that one part of the target needs."""
        return self.u_TR.shape[1] // max(len(self.widths), 1)

    def add_to(self, target: Tensor) -> None:
        """Add the product in place."""
        if not self.widths:
            target.addmm_(self.u_TR, self.factor)
            return
        us = self.u_TR.split(self.rank, -1)
        for columns, u, B in zip(target.split(self.widths, -1), us, self.factor.split(self.widths), strict=True):
            columns.addmm_(u, B.T)
