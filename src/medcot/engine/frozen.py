"""Frozen weight matrices behind one small interface: dense 16/32-bit, bitsandbytes NF4, or FP8 of our own making.

The engine multiplies by a frozen weight twice, forward and backward, and never trains it. A group's weight is opened
for a layer's work and gives a ``Matrix`` with those two products:

- A dense weight is simply there.
- NF4 (Dettmers et al. 2023, arXiv:2305.14314) is unpacked into one matrix for the whole group, used while it is open
  and dropped; keeping it would cost the memory that quantisation saved.
- FP8 multiplies in 8 bit: twice the rate of 16 bit on Hopper. Weights are rounded once to e4m3 with a scale for each
  output channel, activations on the way with a scale for each token. The scale of an output channel is a factor of the
  sum in the forward product, but a factor inside it in the backward one, ``dx = Σₙ dyₙ sₙ w8ₙ``; so it is folded into
  dy before that is rounded. FP8 products want both operands contiguous along the summed axis, hence a transposed copy
  for the backward product: two bytes a weight in all, as 16 bit. ``Fp8`` says which products are in 8 bit. Whoever
  writes an operand may bring it rounded (``rounding.py``). Without Triton the rounding is plain torch's, for tests.

Axes: T tokens, D inputs, N outputs of the group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from medcot.engine import pointwise
from medcot.engine.devices import has_triton
from medcot.engine.terms import Rounded

FP8_STEP = 16  # cuBLAS multiplies in 8 bit where both sizes of a weight are multiples of this
# So many products are added up with 14 bits. Only the sums of a head's backward are longer: of SmolLM2, they take that
# gradient off by 6 %, the same way for all tokens, and every other product by 0.1 % (emulated by bench/fp8_sums.py).
LONGEST_FAST_SUM = 32_768
SCALE_ADDRESS = 16  # cuBLAS takes rows' scales that begin at a multiple of this many bytes


class Matrix(Protocol):
    """A weight that is open."""

    def multiply(self, x_TD: Tensor, bias_N: Tensor | None) -> Tensor:
        """``x Wᵀ + b``, (T, N)."""

    def multiply_back(self, dy_TN: Tensor) -> Tensor:
        """``dy W``, (T, D)."""


class FrozenWeight(Protocol):
    """What the engine needs of a group's weights, stacked along the output axis."""

    @property
    def out_features(self) -> list[int]:
        """Outputs of each projection in the group."""

    def dense(self) -> Tensor:
        """The (N, D) matrix in the compute dtype."""

    def open(self) -> Matrix:
        """The matrix, ready for products; close it by forgetting it."""


class DenseMatrix:
    """A matrix in the compute dtype."""

    def __init__(self, weight_ND: Tensor) -> None:
        self._weight_ND = weight_ND

    def multiply(self, x_TD: Tensor, bias_N: Tensor | None) -> Tensor:
        """``x Wᵀ + b``."""
        return nn.functional.linear(x_TD, self._weight_ND, bias_N)

    def multiply_back(self, dy_TN: Tensor) -> Tensor:
        """``dy W``."""
        return dy_TN @ self._weight_ND


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

    def open(self) -> Matrix:
        """The matrix itself."""
        return DenseMatrix(self.dense())

    def _fuse(self) -> None:
        self._weight_ND = fuse_parameters([part.weight for part in self._parts])
        self._places = [part.weight.data_ptr() for part in self._parts]


class Nf4Weight:
    """bitsandbytes 4-bit parameters, kept packed; opening unpacks the group into one fresh matrix.

    Attributes:
        keeps_unpacked: keep that matrix from then on, for as long as this is set: where a card has room for the weights
            in 16 bit too, unpacking them twice a step (3 % of it on an H200) can be spared. The numbers are the same.
    """

    def __init__(self, parts: Sequence[nn.Linear], dtype: torch.dtype) -> None:
        self.out_features = [part.out_features for part in parts]
        self._parts: list[Any] = list(parts)
        self._shape = (sum(self.out_features), parts[0].in_features)
        self._dtype = dtype
        self.keeps_unpacked = False
        self._unpacked: DenseMatrix | None = None

    @property
    def parameters(self) -> list[Any]:
        """The packed parameters as they are now, each with the ``quant_state`` that bitsandbytes adds."""
        return [part.weight for part in self._parts]

    def dense(self) -> Tensor:
        """Unpack every part into its rows of one matrix."""
        weight_ND = torch.empty(self._shape, dtype=self._dtype, device=self.parameters[0].device)
        _unpack(self.parameters, weight_ND)
        return weight_ND

    def open(self) -> Matrix:
        """The unpacked matrix."""
        if not self.keeps_unpacked:
            return DenseMatrix(self.dense())
        if self._unpacked is None:
            self._unpacked = DenseMatrix(self.dense())
        return self._unpacked

    def forget_unpacked(self) -> None:
        """Drop the matrix, and keep none from now on."""
        self.keeps_unpacked, self._unpacked = False, None


def _unpack(parameters: Sequence[Any], weight_ND: Tensor) -> None:
    """Write packed weights into a matrix, one below the other."""
    states = [parameter.quant_state for parameter in parameters]
    if has_triton(weight_ND.device) and len({_block_sizes(state) for state in states}) == 1:
        from medcot.engine.launch import unpack_nf4

        unpack_nf4([parameter.data for parameter in parameters], states, weight_ND)
        return
    from bitsandbytes.functional import dequantize_4bit

    parts = weight_ND.split([state.shape[0] for state in states])
    for parameter, state, rows in zip(parameters, states, parts, strict=True):
        rows.copy_(dequantize_4bit(parameter.data, state))


def _block_sizes(state: Any) -> tuple[int, int]:
    """Weights that share a scale, and scales that share one of their own, or 0."""
    return state.blocksize, state.state2.blocksize if state.nested else 0


class Fp8Linear(nn.Linear):
    """A frozen linear layer whose weights are rows of its group's ``Fp8Weight``.

    The plain model still runs, from weights unpacked on the way. The parameter shows the bytes of the float8 numbers:
    PEFT rounds a new adapter to its base's dtype where that is a floating one, and A would start with 17 different
    values. Merging an adapter into it raises, as it must: PyTorch adds no float to bytes.

    Args:
        group: the weight of the projections that share this layer's input.
        index: which of them this is.
        bias: the layer's own.
    """

    def __init__(self, group: Fp8Weight, index: int, bias: nn.Parameter | None) -> None:
        nn.Module.__init__(self)
        self.group, self.index = group, index
        self.register_parameter("bias", bias)
        self.in_features, self.out_features = group.in_features, group.out_features[index]
        rows_ND = group.rows_ND.split(group.out_features)[index]
        self.weight = nn.Parameter(rows_ND.view(torch.uint8), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        """``x Wᵀ + b`` with the rounded weights and x as it is: what the 8-bit product approximates."""
        scale_N1 = self.group.scale_N.split(self.group.out_features)[self.index][:, None]
        weight_ND = (self.weight.view(torch.float8_e4m3fn).to(torch.float32) * scale_N1).to(input.dtype)
        return nn.functional.linear(input, weight_ND, self.bias)


@dataclass(frozen=True)
class Fp8:
    """What a model over an FP8 base computes in 8 bit; bench/gpu_curves.py shows each choice's loss curve.

    Attributes:
        forward: the layers' products; otherwise in 16 bit, with the weights as rounded.
        backward: the gradients' products with the layers' weights; otherwise as ``forward``.
        head_forward: the logits.
        head_backward: the gradient of the hidden states that the logits were made of.
        fast_accum: sums stay in the tensor cores' own registers, with about 14 bits, over their whole length; otherwise
            they are added up in float32 on the way, which takes longer.
        fast_backward: so too in backward products; of no account where ``fast_accum`` is off.
        longest_fast_sum: sums of more products are never made so.
    """

    forward: bool = True
    backward: bool = True
    head_forward: bool = True
    head_backward: bool = True
    fast_accum: bool = True
    fast_backward: bool = True
    longest_fast_sum: int = LONGEST_FAST_SUM


class Fp8Weight:
    """A group's weights in float8 e4m3 with a float32 scale for each output.

    Args:
        weights: (Nᵢ, D), 16 or 32 bit, one for each part.
        dtype: what products return, and ``dense()`` unpacks to.

    Attributes:
        choice: what is computed in 8 bit; ``choose_fp8`` changes it.
    """

    def __init__(self, weights: Sequence[Tensor], dtype: torch.dtype) -> None:
        self.out_features = [len(weight) for weight in weights]
        self.in_features = weights[0].shape[1]
        self.dtype, self.choice = dtype, Fp8()
        self.rows_ND = torch.empty(
            sum(self.out_features), self.in_features, dtype=torch.float8_e4m3fn, device=weights[0].device
        )
        scales = []
        for weight, rows in zip(weights, self.rows_ND.split(self.out_features), strict=True):
            rounded = quantise(weight)
            rows.copy_(rounded.codes_TN)
            scales.append(rounded.scale_T1[:, 0])
        self.scale_N = torch.cat(scales)
        self._columns_DN = self.rows_ND.view(torch.uint8).T.contiguous().view(torch.float8_e4m3fn)
        self._one_1D = torch.ones(1, self.in_features, dtype=torch.float32, device=weights[0].device)

    def dense(self) -> Tensor:
        """The (N, D) matrix that the rounded weights stand for, up to the rounding of ``dtype``."""
        return self.rows_ND.to(self.dtype).mul_(self.scale_N[:, None])

    def open(self) -> Matrix:
        """Itself: it is always ready."""
        return self

    def multiply(self, x_TD: Tensor, bias_N: Tensor | None) -> Tensor:
        """``x Wᵀ + b`` in 8 bit, sums in float32."""
        if not self.choice.forward:
            return nn.functional.linear(x_TD, self.dense(), bias_N)
        return self._product(quantise(x_TD), self.rows_ND, self.scale_N[None], bias_N, fast=True)

    def multiply_back(self, dy_TN: Tensor) -> Tensor:
        """``dy W`` in 8 bit, the outputs' scales folded into dy."""
        if not self.choice.backward:
            return dy_TN @ self.dense()
        return self.multiply_back_rounded(quantise(dy_TN, self.scale_N))

    def multiply_back_rounded(self, dy_TN: Rounded) -> Tensor:
        """``multiply_back`` of a gradient that has been rounded with ``scale_N`` as its columns' factors."""
        assert self.choice.backward, "a backward product in 16 bit rounds nothing"
        return self._product(dy_TN, self._columns_DN, self._one_1D, None, fast=self.choice.fast_backward)

    def _product(
        self, rounded: Rounded, rows_ND: Tensor, scale_1N: Tensor, bias_N: Tensor | None, *, fast: bool
    ) -> Tensor:
        return torch._scaled_mm(
            rounded.codes_TN,
            rows_ND.T,
            scale_a=_on_a_boundary(rounded.scale_T1),
            scale_b=scale_1N,
            bias=bias_N,
            out_dtype=self.dtype,
            use_fast_accum=fast and self.choice.fast_accum and rows_ND.shape[1] <= self.choice.longest_fast_sum,
        )


def _on_a_boundary(scale_T1: Tensor) -> Tensor:
    """The scales where cuBLAS reads them, from an address that is a multiple of 16: a tile's may begin between two."""
    return scale_T1.clone() if scale_T1.data_ptr() % SCALE_ADDRESS else scale_T1


class Fp8Head:
    """An output head, each of whose two products is in 8 bit or in the head's own dtype.

    Args:
        weight_VD: the head.
        dtype: what products return.
        choice: which of them is in 8 bit.
    """

    def __init__(self, weight_VD: Tensor, dtype: torch.dtype, choice: Fp8) -> None:
        self._eight, self._dense, self._choice = Fp8Weight([weight_VD], dtype), DenseMatrix(weight_VD), choice
        self._eight.choice = replace(choice, forward=True, backward=True)

    def multiply(self, x_TD: Tensor, bias_N: Tensor | None) -> Tensor:
        """``x Wᵀ + b``."""
        matrix: Matrix = self._eight if self._choice.head_forward else self._dense
        return matrix.multiply(x_TD, bias_N)

    def multiply_back(self, dy_TN: Tensor) -> Tensor:
        """``dy W``."""
        matrix: Matrix = self._eight if self._choice.head_backward else self._dense
        return matrix.multiply_back(dy_TN)


def choose_fp8(model: nn.Module, choice: Fp8) -> None:
    """Say what a model over an FP8 base computes in 8 bit from now on."""
    for module in model.modules():
        if isinstance(module, Fp8Linear):
            module.group.choice = choice


def quantise(x_TN: Tensor, columns_scale_N: Tensor | None = None) -> Rounded:
    """``pointwise.quantise_rows``, or the same by ``launch`` where Triton is."""
    if has_triton(x_TN.device):
        from medcot.engine.launch import quantise_rows

        return quantise_rows(x_TN, columns_scale_N)
    return pointwise.quantise_rows(x_TN, columns_scale_N)


def dense_weight(base: Any, dtype: torch.dtype) -> Tensor:
    """A linear layer's weight as a dense matrix: the parameter itself, or an NF4 one unpacked."""
    if type(base) is nn.Linear:
        return base.weight
    weight_ND = torch.empty(base.out_features, base.in_features, dtype=dtype, device=base.weight.device)
    _unpack([base.weight], weight_ND)
    return weight_ND


def compute_dtype(base: Any) -> torch.dtype:
    """The dtype that a base layer's product is taken in."""
    if isinstance(base, Fp8Linear):
        return base.group.dtype
    if type(base) is nn.Linear:
        return base.weight.dtype
    chosen = base.compute_dtype or base.weight.quant_state.dtype  # bitsandbytes settles it at the first input
    return cast("torch.dtype", chosen)


def build_weight(parts: Sequence[nn.Linear], dtype: torch.dtype) -> FrozenWeight:
    """Return the group's weights in the form they are stored in; ``plain_reason`` has checked that we know it."""
    if isinstance(parts[0], Fp8Linear):
        return parts[0].group
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
    if type(base) is nn.Linear or isinstance(base, Fp8Linear):
        return None
    if type(base).__name__ == "Linear4bit" and next(base.parameters()).device.type == "cuda":
        quant_type = cast(Any, base).weight.quant_type
        return None if quant_type == "nf4" else f"its base is quantised as {quant_type}"
    return f"its base is {type(base).__name__} on {next(base.parameters()).device.type}"
