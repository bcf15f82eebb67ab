"""LoRA projections that share an input, as one operation over a frozen base.

q, k and v read the same activation, and so do gate and up. The plain path multiplies each of them separately, casts
the activation to the adapter's float32 once per adapter, and keeps every copy for the backward pass. Here the frozen
weights of a group act as one (N, D) matrix (``frozen.py``), so the base costs one matrix product, and the activation is
kept once. The low-rank term is handed on beside the output, as a ``Term``: whoever reads the output next adds it on the
way, which spares a pass over the output (``kernels.py``), or in place where there is no such kernel.

Backward, for ``y = x Wᵀ + s · (x Aᵢᵀ) Bᵢᵀ`` with W frozen (Hu et al. 2021, arXiv:2106.09685), and ``uᵢ = x Aᵢᵀ``:

    dBᵢ = s · dyᵢᵀ uᵢ          duᵢ = dyᵢ (s Bᵢ)          dAᵢ = duᵢᵀ x          dx = dy W + Σ duᵢ Aᵢ

There is no ``dW``. ``uᵢ`` is kept (R columns a group); the concatenated A of a group makes all ``uᵢ`` one product, and
all ``dAᵢ`` another. The adapter stays in its own dtype (float32 master weights) and is cast to the activation's once a
forward, as autocast would, with the scale s taken into B.

Axes: T tokens, D inputs, N outputs of the group, Nᵢ of one projection, R rank of all of them, r of one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn

from medcot.engine.frozen import FrozenWeight, Matrix, build_weight, fuse_parameters, unknown_storage
from medcot.engine.terms import Term
from medcot.errors import ModelError


@dataclass(frozen=True)
class Adapter:
    """The live LoRA pair of one projection."""

    A: Tensor
    B: Tensor
    scale: float


@dataclass(frozen=True)
class Pairs:
    """A group's adapters, cast for one forward and its backward.

    Attributes:
        A_RD: every Aᵢ, stacked.
        Bs: every s·Bᵢ.
        stacked_Nr: the same in one tensor, where the ranks are equal.
        scale: s.
    """

    A_RD: Tensor
    Bs: tuple[Tensor, ...]
    stacked_Nr: Tensor | None
    scale: float

    def apply(self, x_TD: Tensor, y_TN: Tensor) -> tuple[Tensor, Term | None]:
        """Return u, and the term that y lacks; parts of different ranks are added to y at once."""
        u_TR = x_TD @ self.A_RD.T
        if self.stacked_Nr is not None:
            return u_TR, self.term(u_TR)
        for columns, u, B in zip(y_TN.split(self._widths, -1), self._split(u_TR), self.Bs, strict=True):
            columns.addmm_(u, B.T)
        return u_TR, None

    def term(self, u_TR: Tensor) -> Term | None:
        """The term of a kept u; ``None`` where the ranks differ, for then it has been added."""
        return None if self.stacked_Nr is None else Term(u_TR, self.stacked_Nr, self._widths)

    def thin_gradients(self, dy_TN: Tensor, u_TR: Tensor, ops: ModuleType) -> tuple[Tensor, list[Tensor]]:
        """Return du (T, R), and dB₁/s, dB₂/s, …, by the ``thin_gradients`` of ``pointwise`` or ``launch``."""
        if self.stacked_Nr is not None:
            du_TR, dB_Nr = ops.thin_gradients(dy_TN, u_TR, self.stacked_Nr, self._widths)
            return du_TR, list(dB_Nr.split(self._widths))
        dys, us = dy_TN.split(self._widths, -1), self._split(u_TR)  # parts of different ranks
        pairs = [
            ops.thin_gradients(dy.contiguous(), u.contiguous(), B, B.shape[:1])
            for dy, u, B in zip(dys, us, self.Bs, strict=True)
        ]
        return torch.cat([du for du, _ in pairs], -1), [dB for _, dB in pairs]

    def in_order(self, dA_RD: Tensor, dBs: list[Tensor]) -> list[Tensor]:
        """Return dA₁, dB₁/s, dA₂, … in the dtype of the products; see the head of the file."""
        dAs = dA_RD.split([B.shape[1] for B in self.Bs])
        return [g for pair in zip(dAs, dBs, strict=True) for g in pair]

    @property
    def _widths(self) -> tuple[int, ...]:
        return tuple(B.shape[0] for B in self.Bs)

    def _split(self, u_TR: Tensor) -> tuple[Tensor, ...]:
        return u_TR.split([B.shape[1] for B in self.Bs], -1)


def cast_adapters(groups: Sequence[Sequence[Adapter]], dtype: torch.dtype, device: torch.device) -> list[Pairs | None]:
    """Cast every live adapter of a model, group by group, into one block of memory.

    All at once, because a model has hundreds of them and each cast alone would be a kernel of a few microseconds.
    """
    flat = [tensor for group in groups for tensor in _in_order(group)]
    sources = [t.detach() for t in flat]
    block = torch.empty(sum(t.numel() for t in sources), dtype=dtype, device=device)
    places = [part.view(t.shape) for part, t in zip(block.split([t.numel() for t in sources]), sources, strict=True)]
    scales = [adapter.scale for group in groups for adapter in group]
    if any(scale != 1 for scale in scales):
        sources = _scaled(groups)
    if places:
        torch._foreach_copy_(places, sources)
    return list(_group(groups, block, places))


def _in_order(group: Sequence[Adapter]) -> list[Tensor]:
    """All A, then all B: so that each kind is one stacked tensor in memory."""
    return [adapter.A for adapter in group] + [adapter.B for adapter in group]


def _scaled(groups: Sequence[Sequence[Adapter]]) -> list[Tensor]:
    return [
        tensor
        for group in groups
        for tensor in ([a.A.detach() for a in group] + [a.B.detach() * a.scale for a in group])
    ]


def _group(groups: Sequence[Sequence[Adapter]], block: Tensor, places: list[Tensor]) -> Iterator[Pairs | None]:
    start, index = 0, 0
    for group in groups:
        if not group:
            yield None
            continue
        num = len(group)
        As, Bs = places[index : index + num], places[index + num : index + 2 * num]
        index += 2 * num
        size_A, size_B = sum(A.numel() for A in As), sum(B.numel() for B in Bs)
        ranks = {B.shape[1] for B in Bs}
        stacked = block[start + size_A : start + size_A + size_B].view(-1, Bs[0].shape[1]) if len(ranks) == 1 else None
        yield Pairs(
            A_RD=block[start : start + size_A].view(-1, As[0].shape[1]),
            Bs=tuple(Bs),
            stacked_Nr=stacked,
            scale=group[0].scale,
        )
        start += size_A + size_B


class Projection:
    """A group of projections that share an input, their frozen weights acting as one matrix.

    Args:
        parts: the modules of the group in order: PEFT LoRA layers over a linear layer, or bare linear layers.
        dtype: the compute dtype, which quantised weights are unpacked to.

    Dense parameters become views of the fused matrix, so names, state dicts and values are unchanged.
    """

    def __init__(self, parts: Sequence[nn.Module], dtype: torch.dtype) -> None:
        self.parts = list(parts)
        bases = [base_of(part) for part in self.parts]
        self.weight: FrozenWeight = build_weight(bases, dtype)
        biases = [base.bias for base in bases if base.bias is not None]
        assert len(biases) in (0, len(bases)), "a group has biases on all of its projections or on none"
        self.bias_N = fuse_parameters(biases) if biases else None

    def project(self, x_TD: Tensor, pairs: Pairs | None, matrix: Matrix) -> tuple[Tensor, Tensor | None, Term | None]:
        """Return the group's outputs side by side, (T, N), u, and the low-rank term that the outputs still lack."""
        y_TN = matrix.multiply(x_TD, self.bias_N)
        if pairs is None:
            return y_TN, None, None
        u_TR, term = pairs.apply(x_TD, y_TN)
        return y_TN, u_TR, term

    def adapters(self) -> list[Adapter]:
        """The adapters as PEFT has them switched now: one a part, or none."""
        adapters = [active_adapter(part) for part in self.parts]
        live = [adapter for adapter in adapters if adapter is not None]
        assert len(live) in (0, len(adapters)), "plain_reason() turns away groups that are adapted in part"
        return live


def base_of(module: nn.Module) -> nn.Linear:
    """Return the frozen linear under a PEFT layer, or the module itself."""
    from peft.tuners.lora import LoraLayer

    return module.base_layer if isinstance(module, LoraLayer) else module  # type: ignore[return-value]


def active_adapter(module: nn.Module) -> Adapter | None:
    """Return the one adapter PEFT would apply now; ``None`` when adapters are switched off, merged or absent.

    Raises:
        ModelError: a second adapter was switched on after the model was accelerated.
    """
    from peft.tuners.lora import LoraLayer

    if not isinstance(module, LoraLayer) or module.disable_adapters or module.merged:
        return None
    names = [name for name in module.active_adapters if name in module.lora_A]
    if not names:
        return None
    if len(names) > 1:
        raise ModelError(
            f"adapters {', '.join(names)} are active at once",
            "An accelerated model applies one adapter",
            "Call engine.release(model) before set_adapter, and engine.accelerate(model) again after it",
        )
    name = names[0]
    A, B = cast("nn.Linear", module.lora_A[name]), cast("nn.Linear", module.lora_B[name])
    return Adapter(A.weight, B.weight, module.scaling[name])


def plain_reason(parts: Sequence[nn.Module]) -> str | None:
    """Say why a group of projections must stay on the plain path, or ``None`` when it can be fused."""
    from peft.tuners.lora import LoraLayer

    for part in parts:
        base = base_of(part)
        reason = unknown_storage(base)
        if reason is None and any(p.requires_grad for p in base.parameters()):
            reason = "its base weights are being trained"
        if reason is None and isinstance(part, LoraLayer):
            reason = _unusual_lora(part)
        if reason is not None:
            return reason
    if len({isinstance(part, LoraLayer) for part in parts}) > 1:
        return "only some of the projections that share its input have an adapter"
    if len({tuple(part.scaling.values()) for part in parts if isinstance(part, LoraLayer)}) > 1:
        return "the projections that share its input have different LoRA scales"
    if len({type(base_of(part)) for part in parts}) > 1:
        return "the projections that share its input are stored in different ways"
    if len({base_of(part).bias is None for part in parts}) > 1:
        return "only some of the projections that share its input have a bias"
    return None


def _unusual_lora(layer: Any) -> str | None:
    if any(layer.use_dora.values()):
        return "DoRA rescales the merged weight"
    if any(isinstance(dropout, nn.Dropout) and dropout.p > 0 for dropout in layer.lora_dropout.values()):
        return "LoRA dropout is above 0"
    if not layer.lora_A or any(pair.bias is not None for pair in layer.lora_B.values()):
        return "its adapter is not a plain pair of A and B"
    if len([name for name in layer.active_adapters if name in layer.lora_A]) > 1:
        return "several adapters are active at once"
    return None
