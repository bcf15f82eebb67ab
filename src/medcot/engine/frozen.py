"""Frozen weight matrices behind one small interface: dense 16/32-bit, or bitsandbytes NF4 made dense on the way.

The engine multiplies by a frozen weight twice, forward and backward, and never trains it. All it asks of a weight is
``dense()``: the (N, D) matrix in the compute dtype. A 16-bit weight is simply there. An NF4 weight (Dettmers et al.
2023, arXiv:2305.14314) is dequantised into one matrix for the whole group, used for a single product and dropped;
keeping it would cost the memory that quantisation saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn


class FrozenWeight(Protocol):
    """What the engine needs of a group's weights, stacked along the output axis."""

    @property
    def out_features(self) -> list[int]:
        """Outputs of each projection in the group."""

    def dense(self) -> Tensor:
        """The (N, D) matrix."""


class DenseWeight:
    """Plain parameters, fused into one matrix of which they become views: no copy is kept.

    Whoever gives a parameter new storage (a safe merge, a copied model) takes it out of the matrix; then it is fused
    anew.
    """

    def __init__(self, parts: Sequence[nn.Linear]) -> None:
        self.out_features = [part.out_features for part in parts]
        self._parts = list(parts)
        self._fuse()

    def dense(self) -> Tensor:
        """The matrix itself."""
        if any(part.weight.data_ptr() != place for part, place in zip(self._parts, self._places, strict=True)):
            self._fuse()
        return self._weight_ND

    def _fuse(self) -> None:
        self._weight_ND = fuse_parameters([part.weight for part in self._parts])
        self._places = [part.weight.data_ptr() for part in self._parts]


class Nf4Weight:
    """bitsandbytes 4-bit parameters, kept packed; dense() unpacks the group into one fresh matrix."""

    def __init__(self, parts: Sequence[nn.Linear], dtype: torch.dtype) -> None:
        self.out_features = [part.out_features for part in parts]
        self._parameters: list[Any] = [part.weight for part in parts]  # with the quant_state that bitsandbytes adds
        self._shape = (sum(self.out_features), parts[0].in_features)
        self._dtype = dtype

    def dense(self) -> Tensor:
        """Dequantise every part into its rows of one matrix."""
        from bitsandbytes.functional import dequantize_4bit

        weight_ND = torch.empty(self._shape, dtype=self._dtype, device=self._parameters[0].device)
        for parameter, rows in zip(self._parameters, weight_ND.split(self.out_features), strict=True):
            state = parameter.quant_state
            if state.dtype == self._dtype:
                dequantize_4bit(parameter.data, state, out=rows)
            else:  # a checkpoint quantised for another compute dtype
                rows.copy_(dequantize_4bit(parameter.data, state))
        return weight_ND


def build_weight(parts: Sequence[nn.Linear], dtype: torch.dtype) -> FrozenWeight:
    """Return the group's weights in the form they are stored in; ``plain_reason`` has checked that we know it."""
    return DenseWeight(parts) if type(parts[0]) is nn.Linear else Nf4Weight(parts, dtype)


def fuse_parameters(parameters: Sequence[Tensor]) -> Tensor:
    """Return the parameters stacked in one tensor, and point each of them at its part of it."""
    if len(parameters) == 1:
        return parameters[0].data
    fused = torch.cat([parameter.data for parameter in parameters])
    for parameter, part in zip(parameters, fused.split([p.shape[0] for p in parameters]), strict=True):
        parameter.data = part
    return fused


def unknown_storage(base: nn.Module) -> str | None:
    """Say why a base layer's storage is not one we know, or ``None``."""
    if type(base) is nn.Linear:
        return None
    if type(base).__name__ == "Linear4bit" and next(base.parameters()).device.type == "cuda":
        quant_type = cast(Any, base).weight.quant_type
        return None if quant_type == "nf4" else f"its base is quantised as {quant_type}"
    return f"its base is {type(base).__name__} on {next(base.parameters()).device.type}"
