"""How an operation is held against its plain-torch twin.

In float32 both must agree to rounding. In bfloat16 neither is right, so the judge is the twin in float32 on the same
(already rounded) inputs, and the fast operation may not stray further from it than the bfloat16 twin does, up to a
factor. Results are compared output by output and gradient by gradient.

The engine's layers are raw functions, a forward and a gradient apiece, of which autograd knows nothing. ``raw_pair``
makes an operation of two of them; the pairs below do so for each, over ``pointwise`` or ``launch`` as they are given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from medcot.engine import pointwise, reference
from medcot.engine.attention import attend
from medcot.engine.layers import LayerPairs
from medcot.engine.lora import Adapter, Projection, Term, cast_adapters
from medcot.engine.stack import GradientBlock

Operation = Callable[..., Tensor]
Forward = Callable[..., tuple[Tensor, Any]]
Backward = Callable[[Any, Tensor], Sequence[Tensor]]

FP32 = 1e-5  # largest difference as a share of the largest value; two correct orders of summation differ by about 1e-6
BF16 = 1.5  # times the bfloat16 twin's own error
FLOOR = 1e-3  # a share of the values' size; an error below a quarter of bfloat16's step (2^-8) is none


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def results(
    operation: Operation, tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype], device: str = "cpu"
) -> list[Tensor]:
    """The output, then the gradient of each tensor, for an incoming gradient that is always the same."""
    pairs = zip(tensors, dtypes, strict=True)
    leaves = [tensor.to(device, dtype, copy=True).requires_grad_() for tensor, dtype in pairs]
    out = operation(*leaves)
    out.backward(randn(*out.shape, seed=99).to(out))
    for leaf in leaves:
        assert leaf.grad is not None and leaf.grad.dtype == leaf.dtype
    return [out.detach().float(), *(leaf.grad.float() for leaf in leaves if leaf.grad is not None)]


def assert_twins(
    fast: Operation,
    twin: Operation,
    tensors: Sequence[Tensor],
    dtype: torch.dtype,
    *,
    masters: int = 0,
    yardstick: Operation | None = None,
    device: str = "cpu",
) -> None:
    """Compare an operation with its twin, forward and backward.

    The last ``masters`` tensors stay in float32 whatever the dtype, as adapter weights do. ``yardstick`` is the plain
    operation whose bfloat16 error is the measure, where that is not the twin.
    """
    half = len(tensors) - masters
    dtypes = [dtype] * half + [torch.float32] * masters
    rounded = [tensor.to(dtype).float() for tensor in tensors[:half]] + list(tensors[half:])
    exact = results(twin, rounded, [torch.float32] * len(tensors), device)
    got = results(fast, rounded, dtypes, device)
    if dtype == torch.float32:
        errors = [largest(one, other) for one, other in zip(got, exact, strict=True)]
        assert max(errors) <= FP32, errors
        return
    plain = results(yardstick or twin, rounded, dtypes, device)
    allowed = [BF16 * typical(one, other) + FLOOR for one, other in zip(plain, exact, strict=True)]
    errors = [typical(one, other) for one, other in zip(got, exact, strict=True)]
    assert all(error <= limit for error, limit in zip(errors, allowed, strict=True)), (errors, allowed)


def largest(got: Tensor, wanted: Tensor) -> float:
    """Largest difference as a share of the largest value; NaN anywhere is infinite."""
    return _share((got - wanted).abs().amax(), wanted.abs().amax())


def typical(got: Tensor, wanted: Tensor) -> float:
    """Root-mean-square difference as a share of the values' own."""
    return _share((got - wanted).norm(), wanted.norm())


def _share(difference: Tensor, size: Tensor) -> float:
    share = difference / size.clamp_min(1e-6)
    return float("inf") if share.isnan() else float(share)


# --- raw pairs: a forward and a gradient that know nothing of autograd ------------------------------------------------


class _RawPair(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, forward: Forward, backward: Backward, *tensors: Tensor) -> Tensor:
        out, ctx.kept = forward(*(tensor.detach().clone() for tensor in tensors))
        ctx.backward_of = backward
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return None, None, *ctx.backward_of(ctx.kept, d_out.clone())


def raw_pair(forward: Forward, backward: Backward) -> Operation:
    """Make one operation of a forward that returns (out, what it keeps) and a backward of (kept, d_out).

    Both are given copies, because the raw functions may use their arguments up.
    """
    return lambda *tensors: _RawPair.apply(forward, backward, *tensors)


def low_rank(u: Tensor, B: Tensor, widths: Sequence[int]) -> Tensor:
    """What a forward ``Term`` stands for: ``[u₁ B₁ᵀ | u₂ B₂ᵀ | …]``."""
    us = u.split(u.shape[1] // len(widths), -1)
    return torch.cat([part @ rows.T for part, rows in zip(us, B.split(list(widths)), strict=True)], -1)


def _low_rank_gradients(kept: tuple[Tensor, ...], d: Tensor, widths: Sequence[int]) -> list[Tensor]:
    """Gradients of u and B, as ``Pairs`` has them; none where there was no term."""
    if not kept:
        return []
    (u, B), parts = kept, d.split(list(widths), -1)
    us, Bs = u.split(u.shape[1] // len(widths), -1), B.split(list(widths))
    du = torch.cat([part @ rows for part, rows in zip(parts, Bs, strict=True)], -1)
    return [du, torch.cat([part.T @ one for part, one in zip(parts, us, strict=True)])]


def _term(low: tuple[Tensor, ...], widths: Sequence[int]) -> Term | None:
    return Term(*low, tuple(widths)) if low else None


def add_norm_pair(ops: Any, weight: Tensor, eps: float, *, with_sum: bool = True) -> Operation:
    """(x), (x, y) or (x, y, u, B) to the residual sum and its norm side by side, or to the norm alone."""

    def forward(x: Tensor, y: Tensor | None = None, *low: Tensor) -> tuple[Tensor, Any]:
        total, normed, r = ops.add_norm(x, y, _term(low, [x.shape[-1]]), weight.to(x.dtype), eps)
        assert r.dtype == torch.float32 and r.shape == x.shape[:1]
        return torch.cat((total, normed), -1) if with_sum else normed, (total, r, y is not None, low)

    def backward(kept: Any, d_out: Tensor) -> list[Tensor]:
        total, r, has_y, low = kept
        d_sum, dn = (d.contiguous() for d in d_out.chunk(2, -1)) if with_sum else (None, d_out)
        d = ops.norm_grad(dn, None, total, weight.to(total.dtype), r, d_sum)
        return [d, *([d] if has_y else []), *_low_rank_gradients(low, d, [total.shape[-1]])]

    return raw_pair(forward, backward)


def add_norm_twin(weight: Tensor, eps: float, *, with_sum: bool = True) -> Operation:
    def twin(x: Tensor, y: Tensor | None = None, *low: Tensor) -> Tensor:
        total = x if y is None else x + (y + low_rank(*low, [x.shape[-1]]) if low else y)
        normed = reference.rms_norm(total, weight.to(x.dtype), eps)
        return torch.cat((total, normed), -1) if with_sum else normed

    return twin


def norm_then_lora_pair(ops: Any, weight: Tensor, eps: float) -> Operation:
    """(x, W, A, B): a norm whose gradient comes from an adapted projection, its low-rank part still to be added."""

    def forward(x: Tensor, W: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Any]:
        total, normed, r = ops.add_norm(x, None, None, weight.to(x.dtype), eps)
        return normed @ W.T + (normed @ A.T) @ B.T, (total, normed, r, W, A, B)

    def backward(kept: Any, d_out: Tensor) -> list[Tensor]:
        total, normed, r, W, A, B = kept
        du = d_out @ B
        dx = ops.norm_grad(d_out @ W, Term(du, A), total, weight.to(total.dtype), r, None)
        return [dx, d_out.T @ normed, du.T @ normed, d_out.T @ (normed @ A.T)]

    return raw_pair(forward, backward)


def norm_then_lora_twin(weight: Tensor, eps: float) -> Operation:
    return lambda x, W, A, B: reference.lora_linear(
        reference.rms_norm(x, weight.to(x.dtype), eps), W, None, [A], [B], 1.0
    )


def rotation_pair(ops: Any, cos: Tensor, sin: Tensor, num_kv: int) -> Operation:
    """(heads) or (heads, u, B) of a fused (T, H + 2G, C) buffer."""

    def forward(heads: Tensor, *low: Tensor) -> tuple[Tensor, Any]:
        widths = [n * heads.shape[-1] for n in (heads.shape[1] - 2 * num_kv, num_kv, num_kv)]
        angles = cos.to(heads.dtype), sin.to(heads.dtype)
        turned = ops.rotate_(heads, _term(low, widths), *angles, num_kv)
        assert turned.data_ptr() == heads.data_ptr(), "it works in place"
        return turned, (angles, widths, low)

    def backward(kept: Any, d_out: Tensor) -> list[Tensor]:
        angles, widths, low = kept
        parts = d_out.split([d_out.shape[1] - 2 * num_kv, num_kv, num_kv], 1)
        d_heads = ops.rotate_back(*parts, *angles)
        return [d_heads, *_low_rank_gradients(low, d_heads.flatten(1), widths)]

    return raw_pair(forward, backward)


def rotation_twin(cos: Tensor, sin: Tensor, num_kv: int) -> Operation:
    def twin(heads: Tensor, *low: Tensor) -> Tensor:
        if low:
            widths = [n * heads.shape[-1] for n in (heads.shape[1] - 2 * num_kv, num_kv, num_kv)]
            heads = heads + low_rank(*low, widths).view(heads.shape)
        turned = reference.rotary(heads[:, :-num_kv], cos.to(heads.dtype), sin.to(heads.dtype))
        return torch.cat((turned, heads[:, -num_kv:]), 1)

    return twin


def swiglu_pair(ops: Any) -> Operation:
    """(gate_up) or (gate_up, u, B)."""

    def forward(gate_up: Tensor, *low: Tensor) -> tuple[Tensor, Any]:
        term = _term(low, [gate_up.shape[1] // 2] * 2)
        return ops.swiglu(gate_up, term), (gate_up, term if ops.KEEPS_TERMS else None, low)

    def backward(kept: Any, d_out: Tensor) -> list[Tensor]:
        gate_up, term, low = kept
        d, nothing = ops.swiglu_grad(d_out.clone(), None, gate_up, term)
        assert nothing is None
        return [d, *_low_rank_gradients(low, d, [d_out.shape[1]] * 2)]

    return raw_pair(forward, backward)


def swiglu_twin(gate_up: Tensor, *low: Tensor) -> Tensor:
    return reference.swiglu(gate_up + low_rank(*low, [gate_up.shape[1] // 2] * 2) if low else gate_up)


def mlp_pair(ops: Any) -> Operation:
    """(gate_up, u, B, W, A_down, B_down): SwiGLU between two adapted projections, all low-rank parts left to it."""

    def forward(gate_up: Tensor, u: Tensor, B: Tensor, W: Tensor, A: Tensor, B_down: Tensor) -> tuple[Tensor, Any]:
        term = Term(u, B, (gate_up.shape[1] // 2,) * 2)
        h = ops.swiglu(gate_up, term)
        return h @ W.T + (h @ A.T) @ B_down.T, (gate_up, term, h, W, A, B_down)

    def backward(kept: Any, d_out: Tensor) -> list[Tensor]:
        gate_up, term, h, W, A, B_down = kept
        du, dB_down = ops.thin_gradients(d_out.contiguous(), h @ A.T, B_down, [len(B_down)])
        d, dA = ops.swiglu_grad(d_out @ W, Term(du, A), gate_up, term if ops.KEEPS_TERMS else None)
        own = _low_rank_gradients((term.u_TR, term.factor), d, term.widths)
        return [d, *own, d_out.T @ h, dA, dB_down]

    return raw_pair(forward, backward)


def mlp_twin(gate_up: Tensor, u: Tensor, B: Tensor, W: Tensor, A: Tensor, B_down: Tensor) -> Tensor:
    return reference.lora_linear(swiglu_twin(gate_up, u, B), W, None, [A], [B_down], 1.0)


def attention_pair(layout: Any, num_kv: int, window: int | None) -> Operation:
    """(heads) of a fused (T, H + 2G, C) buffer to (T, H, C)."""

    def backward(state: Any, d_out: Tensor) -> list[Tensor]:
        return [torch.cat(state.gradients(d_out), 1)]

    return raw_pair(lambda heads: attend(heads, layout, num_kv, window), backward)


def projection_pair(projection: Projection, scale: float, *, adapted: bool = True) -> Operation:
    """(x, A₁, B₁, A₂, …) through a group's own weights; (x) alone where adapters are off."""

    def forward(x: Tensor, *adapters: Tensor) -> tuple[Tensor, Any]:
        group = [Adapter(A, B, scale) for A, B in zip(adapters[0::2], adapters[1::2], strict=True)]
        (pairs,) = cast_adapters([group], x.dtype, x.device)
        assert (pairs is not None) is adapted
        y, u, term = projection.project(x, pairs, projection.weight.open())
        if term is not None:
            term.add_to(y)
        return y, (x, adapters, pairs, u)

    def backward(kept: Any, dy: Tensor) -> list[Tensor]:
        x, adapters, pairs, u = kept
        dx = projection.weight.open().multiply_back(dy)
        if pairs is None:
            return [dx]
        du, dBs = pairs.thin_gradients(dy, u, pointwise)
        Term(du, pairs.A_RD).add_to(dx)
        block = GradientBlock(adapters)
        block.put(pairs.in_order(du.T @ x, dBs), LayerPairs(pairs, None, None, None))
        return [dx, *block.parts]

    return raw_pair(forward, backward)
