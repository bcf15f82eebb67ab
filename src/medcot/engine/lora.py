"""LoRA projections that share an input, as one operation over a frozen base.

q, k and v read the same activation, and so do gate and up. The plain path multiplies each of them separately, casts
the activation to the adapter's float32 once per adapter, and keeps every copy for the backward pass. Here the frozen
weights of a group act as one (N, D) matrix (``frozen.py``), so the base costs one GEMM; the low-rank products are added
into its output in place; the activation is kept once.

Backward, for ``y = x Wᵀ + s · (x Aᵢᵀ) Bᵢᵀ`` with W frozen (Hu et al. 2021, arXiv:2106.09685), and ``uᵢ = s · x Aᵢᵀ``:

    dBᵢ = dyᵢᵀ uᵢ          duᵢ = s · dyᵢ Bᵢ          dAᵢ = duᵢᵀ x          dx = dy W + Σ duᵢ Aᵢ

There is no ``dW``. ``uᵢ`` is kept (R columns a projection); the concatenated A of a group makes all ``uᵢ`` one GEMM,
and all ``dAᵢ`` another. The adapter stays in its own dtype (float32 master weights) and is cast to the activation's
for the products, as autocast would.

Axes: T tokens, D inputs, N outputs of the group, Nᵢ of one projection, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcot.engine.frozen import FrozenWeight, build_weight, fuse_parameters, unknown_storage
from medcot.errors import ModelError


class LoraLinear(torch.autograd.Function):
    """The fused operation; ``adapters`` is ``A₁, B₁, A₂, B₂, …`` or nothing at all for a bare base."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weight: FrozenWeight, bias_N: Tensor | None, scale: float, *adapters: Tensor
    ) -> Tensor:
        """Return (T, N)."""
        y_TN = F.linear(x_TD, weight.dense(), bias_N)
        As, Bs = adapters[0::2], adapters[1::2]
        A_RD = _stack(As, x_TD.dtype)
        B_list = [B.to(x_TD.dtype) for B in Bs]
        u_TR = add_low_rank_(y_TN, x_TD, A_RD, B_list, scale)
        ctx.save_for_backward(x_TD, A_RD, u_TR, *B_list)
        ctx.weight, ctx.scale = weight, scale  # frozen: autograd need not watch it
        ctx.adapter_dtypes = [adapter.dtype for adapter in adapters]
        return y_TN

    @staticmethod
    def backward(ctx: Any, dy_TN: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Return dx and every dA, dB; see the head of the file."""
        x_TD, A_RD, u_TR, *B_list = ctx.saved_tensors
        columns = _columns(dy_TN, u_TR, B_list)
        dBs = [dy_columns.T @ u_columns for dy_columns, u_columns, _ in columns]
        du_TR = _join([dy_columns @ B for dy_columns, _, B in columns])
        if ctx.scale != 1:
            du_TR *= ctx.scale
        dA_RD = du_TR.T @ x_TD
        dx_TD = None
        if ctx.needs_input_grad[0]:
            dx_TD = (dy_TN @ ctx.weight.dense()).addmm_(du_TR, A_RD)
        dAs = dA_RD.split([B.shape[1] for B in B_list])
        gradients = [gradient for pair in zip(dAs, dBs, strict=True) for gradient in pair]
        typed = [gradient.to(dtype) for gradient, dtype in zip(gradients, ctx.adapter_dtypes, strict=True)]
        return dx_TD, None, None, None, *typed


def add_low_rank_(y_TN: Tensor, x_TD: Tensor, A_RD: Tensor, Bs: Sequence[Tensor], scale: float) -> Tensor:
    """Add each projection's ``scale · (x Aᵢᵀ) Bᵢᵀ`` to its columns of y, in place; return ``scale · x Aᵀ``, stacked."""
    u_TR = x_TD @ A_RD.T
    if scale != 1:
        u_TR *= scale
    for y_columns, u_columns, B in _columns(y_TN, u_TR, Bs):
        y_columns.addmm_(u_columns, B.T)
    return u_TR


def _stack(As: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return As[0].to(dtype) if len(As) == 1 else torch.cat([A.to(dtype) for A in As])


def _join(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), -1)


def _split_ranks(u_TR: Tensor, Bs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return u_TR.split([B.shape[1] for B in Bs], -1)


def _columns(y_TN: Tensor, u_TR: Tensor, Bs: Sequence[Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Pair each projection's columns of y and u with its B."""
    ys = y_TN.split([B.shape[0] for B in Bs], -1)
    return list(zip(ys, _split_ranks(u_TR, Bs), Bs, strict=True))


class FrozenLinear(torch.autograd.Function):
    """The base alone, for when no adapter is on: gradients still pass through to the input."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight: FrozenWeight, bias_N: Tensor | None) -> Tensor:
        """Return (T, N); keeps nothing."""
        ctx.weight = weight
        return F.linear(x_TD, weight.dense(), bias_N)

    @staticmethod
    def backward(ctx: Any, dy_TN: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        """Return ``dx = dy W``."""
        return dy_TN @ ctx.weight.dense(), None, None


@dataclass(frozen=True)
class Adapter:
    """The live LoRA pair of one projection."""

    A: Tensor
    B: Tensor
    scale: float


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
        self.weight = build_weight(bases, dtype)
        biases = [base.bias for base in bases if base.bias is not None]
        assert len(biases) in (0, len(bases)), "a group has biases on all of its projections or on none"
        self.bias_N = fuse_parameters(biases) if biases else None

    def __call__(self, x_TD: Tensor) -> Tensor:
        """Return the group's outputs side by side, (T, N), with adapters as PEFT has them switched now."""
        live = self._live_adapters()
        if not live:
            return FrozenLinear.apply(x_TD, self.weight, self.bias_N)
        pairs = [tensor for adapter in live for tensor in (adapter.A, adapter.B)]
        return LoraLinear.apply(x_TD, self.weight, self.bias_N, live[0].scale, *pairs)

    def bind(self, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        """Return the projection as it stands now, casts done once: for decoding, where they would cost every token."""
        live = self._live_adapters()
        if not live:
            return lambda x_TD: F.linear(x_TD, self.weight.dense(), self.bias_N)
        A_RD = _stack([adapter.A for adapter in live], dtype)
        Bs = [adapter.B.to(dtype) for adapter in live]

        def project(x_TD: Tensor) -> Tensor:
            y_TN = F.linear(x_TD, self.weight.dense(), self.bias_N)
            add_low_rank_(y_TN, x_TD, A_RD, Bs, live[0].scale)
            return y_TN

        return project

    def _live_adapters(self) -> list[Adapter]:
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
