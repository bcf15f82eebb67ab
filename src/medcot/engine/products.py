"""A layer's matrix products while answers are written: adapters as they stand, cast once, whatever the base is.

Training's products are in ``lora.py``; they serve thousands of tokens and keep what a backward pass needs. One step of
decoding has a row or a hundred, no gradients, and the same weights again a moment later. So:

- LoRA is two small products for a whole group: every A stacked, and every B on the diagonal of one matrix, scale
  included. The zeros cost less than three launches would.
- Weights that are not stored dense are made dense once and kept while decoding lasts, as far as memory allows; what
  does not fit is made dense at each product. A step then costs 2 bytes a weight, shared by all rows, and by all who
  decode with the same base at once: a server's adapters.
- One or two rows of NF4 take ``gemv.py``, which reads 0.56 bytes a weight for each of them: ``ThinProduct``.

Axes: T tokens; B rows; D inputs, N outputs of a group; R ranks of its adapters, end to end; P partial sums.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from medcot.engine.frozen import DenseWeight, FrozenWeight, Nf4Weight
from medcot.engine.lora import Adapter, Projection, base_of

# Memory left alone when weights are made dense: one group's weights at a time, the graph, cuBLAS.
RESERVE_BYTES = 2 * 2**30
# Weights made dense, for as long as a product holds them.
_KEPT: WeakKeyDictionary[FrozenWeight, WeakValueDictionary[torch.dtype, Tensor]] = WeakKeyDictionary()
# Weights that share a scale in the NF4 that gemv.py reads.
SCALE_BLOCK = 64


class Product:
    """A group's product in plain torch.

    Args:
        projection: the group.
        dtype: of its inputs and outputs.
    """

    # What the kernel that makes this product's input must know; ThinProduct differs.
    interleaved = False
    A_RD: Tensor | None = None

    def __init__(self, projection: Projection, dtype: torch.dtype) -> None:
        self.weight, self.bias_N, self._dtype = projection.weight, projection.bias_N, dtype
        adapters = projection.adapters()
        self._pair: tuple[Tensor, Tensor] | None = None
        if adapters:
            A_RD = torch.cat([adapter.A.detach().to(dtype) for adapter in adapters])
            self._pair = A_RD, torch.block_diag(*(_scaled(adapter).to(dtype) for adapter in adapters))
        self._dense_ND = self.weight.dense() if isinstance(self.weight, DenseWeight) else self._kept().get(dtype)
        self._size = sum(self.weight.out_features) * base_of(projection.parts[0]).in_features

    @property
    def dense_bytes(self) -> int:
        """What ``keep_dense`` would allocate."""
        return 0 if self._dense_ND is not None else self._size * self._dtype.itemsize

    def keep_dense(self) -> None:
        """Make the weights dense for as long as this product lives."""
        self._dense_ND = self._dense()
        self._kept()[self._dtype] = self._dense_ND

    def __call__(self, x_TD: Tensor) -> Tensor:
        """Return the group's outputs side by side, (T, N)."""
        y_TN = F.linear(x_TD, self._dense(), self.bias_N)
        if self._pair is not None:
            A_RD, B_NR = self._pair
            y_TN.addmm_(x_TD @ A_RD.T, B_NR.T)
        return y_TN

    def multiply(self, x_BD: Tensor, u_BPR: Tensor | None) -> Tensor:
        """As ``__call__``, as one part: (1, B, N)."""
        assert u_BPR is None, "a plain product makes its own"
        return self(x_BD)[None]

    def _kept(self) -> WeakValueDictionary[torch.dtype, Tensor]:
        """The dense matrices of this weight that somebody holds now."""
        return _KEPT.setdefault(self.weight, WeakValueDictionary())

    def _dense(self) -> Tensor:
        return self.weight.dense().to(self._dtype) if self._dense_ND is None else self._dense_ND


class ThinProduct:
    """A group's product for a row or two, from packed weights; see ``gemv.py``.

    Args:
        projection: a group for which ``can_be_thin``.
        dtype: of the adapters.

    Attributes:
        interleaved: the input is float32 with each word's values apart, as ``decode_kernels`` writes it.
        A_RD: the stacked A by which that input's maker multiplies it; ranks padded to the largest. ``None``: no LoRA.
    """

    interleaved = True

    def __init__(self, projection: Projection, dtype: torch.dtype) -> None:
        assert isinstance(projection.weight, Nf4Weight)
        weight = projection.weight
        states = [parameter.quant_state for parameter in weight.parameters]
        self.words = [p.data.view(torch.uint8).flatten().view(torch.int32) for p in weight.parameters]
        self.scales = torch.cat([unpack_scales(state) for state in states])
        self.code = states[0].code.float().contiguous()
        self.widths = list(weight.out_features)
        self.inputs = base_of(projection.parts[0]).in_features
        self.bias_N = projection.bias_N
        adapters = projection.adapters()
        self.rank = max((adapter.A.shape[0] for adapter in adapters), default=0)
        self.A_RD: Tensor | None = None
        self.B_NR: Tensor | None = None
        if adapters:
            self.A_RD, self.B_NR = self._padded(adapters, dtype)

    def multiply(self, x_BD: Tensor, u_BPR: Tensor | None) -> Tensor:
        """Return the product in float32 parts to be added, (splits, B, N), from x and the partial sums of u."""
        from medcot.engine.step_ops import nf4_gemv

        lora = None
        if u_BPR is not None and self.B_NR is not None:
            lora = u_BPR, self.B_NR
        return nf4_gemv(x_BD, self.words, self.widths, self.scales, self.code, lora, self.bias_N)

    def _padded(self, adapters: Sequence[Adapter], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        rank = self.rank
        A_RD = torch.cat([F.pad(a.A.detach().to(dtype), (0, 0, 0, rank - a.A.shape[0])) for a in adapters])
        B_NR = torch.cat([F.pad(_scaled(a).to(dtype), (0, rank - a.B.shape[1])) for a in adapters])
        return A_RD, B_NR


def can_be_thin(projection: Projection) -> bool:
    """Whether ``gemv.py`` reads a group's weights: NF4 in blocks of 64 that do not cross a row's end."""
    weight = projection.weight
    if not isinstance(weight, Nf4Weight) or base_of(projection.parts[0]).in_features % SCALE_BLOCK:
        return False
    states = [parameter.quant_state for parameter in weight.parameters]
    return all(state.quant_type == "nf4" and state.blocksize == SCALE_BLOCK for state in states)


def unpack_scales(state: Any) -> Tensor:
    """The float32 scale of each block of a bitsandbytes tensor, its own quantisation undone.

    Args:
        state: a ``QuantState``; a nested one has 8-bit scales, their table, a scale for each block of them, an offset.
    """
    if not state.nested:
        return state.absmax.float()
    inner = state.state2
    values = inner.code[state.absmax.flatten().int()].float()
    outer = inner.absmax.repeat_interleave(inner.blocksize)[: values.numel()]
    return values * outer + state.offset


def keep_what_fits(products: Iterable[Product], device: torch.device, reserve_bytes: int) -> None:
    """Make weights dense for the time of decoding, group by group, while memory lasts; ``reserve_bytes`` stay free."""
    budget = free_bytes(device) - RESERVE_BYTES - reserve_bytes
    for product in products:
        budget -= product.dense_bytes
        if budget < 0:
            return
        if product.dense_bytes:
            product.keep_dense()


def free_bytes(device: torch.device) -> int:
    """Bytes that PyTorch's allocator could still hand out, its own limit considered."""
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    allowed = int(torch.cuda.get_per_process_memory_fraction(device) * total) - reserved
    return min(free, allowed) + reserved - torch.cuda.memory_allocated(device)


def _scaled(adapter: Adapter) -> Tensor:
    return adapter.B.detach() * adapter.scale
