"""One decoder layer of the Llama family, on flattened rows, forward and backward written out.

Llama, Qwen2, Qwen3 and Mistral name their parts alike; what differs is a line of ``FAMILIES`` (Qwen3 norms its query
and key heads; biases and windows are found on the modules and in the configuration). A new family of this build is a
row there. Hidden states have no batch axis: (T, D), the rows of a batch end to end.

Why not let autograd write the backward pass: it would keep every intermediate until its turn, and it meets each sum of
gradients as a kernel of its own. Written out, a layer frees what it has used, adds residual gradients inside the norm's
kernel, leaves low-rank terms to whoever reads their target (``lora.Term``), and can be told how much to remember
(``memory.Keep``): all it may need, all but what is cheap to make again, or its input alone. When a layer is computed
again for its gradient, the product of its down projection, a quarter of its arithmetic, is left out: no gradient
depends on it.

The residual stream x and the last projection's output y travel apart from layer to layer, because the kernel that adds
them also makes the next norm.

Axes: T tokens, D hidden, F intermediate, N outputs, H query heads, G key/value heads, C channels, R rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from medcot.engine import rounding
from medcot.engine.attention import Attended, Layout, attend
from medcot.engine.frozen import FrozenWeight, Matrix, compute_dtype
from medcot.engine.lora import Pairs, Projection, base_of, plain_reason
from medcot.engine.memory import Keep
from medcot.engine.rounding import Gradient
from medcot.engine.terms import Term


@dataclass(frozen=True)
class Family:
    """What sets one model family apart from Llama."""

    norms_heads: bool = False


FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(norms_heads=True),
}

GROUPS = (
    ("self_attn", ("q_proj", "k_proj", "v_proj")),
    ("self_attn", ("o_proj",)),
    ("mlp", ("gate_proj", "up_proj")),
    ("mlp", ("down_proj",)),
)


@dataclass(frozen=True)
class Step:
    """What every layer of one forward shares.

    Attributes:
        layout: where the rows lie.
        cos_TC: cosine of the rotary angles, both halves equal.
        sin_TC: their sine.
        ops: ``pointwise`` or ``launch``.
        keep: what a layer keeps for its gradient.
        tile_tokens: tokens that the MLP takes at a time when it is computed again; ``None`` for all.
        one_weight: the MLP has one of its weights open at a time, and the product or its gradient for all tokens.
    """

    layout: Layout
    cos_TC: Tensor
    sin_TC: Tensor
    ops: ModuleType
    keep: Keep
    tile_tokens: int | None = None
    one_weight: bool = False


class LayerPairs(NamedTuple):
    """A layer's adapters as they are cast for one forward, in the order of ``GROUPS``."""

    qkv: Pairs | None
    out: Pairs | None
    gate_up: Pairs | None
    down: Pairs | None


_Value = TypeVar("_Value")
Gradients = list[Tensor]  # of one group's adapters: A₁, B₁, A₂, …
ProductGradient = Callable[[slice], Tensor]  # of the product of gate and up, (T, F), for some of the tokens


@dataclass
class MlpTrace:
    """What the MLP keeps of its forward."""

    normed_TD: Tensor | None
    gate_up_TN: Tensor
    u_TR: Tensor | None
    u_down_TR: Tensor | None = None


@dataclass
class AttentionTrace:
    """What attention keeps of its forward; ``raw_TN`` and the two r only where heads are normed."""

    normed_TD: Tensor | None
    u_TR: Tensor | None
    state: Attended
    attended_TN: Tensor
    u_out_TR: Tensor | None
    raw_TN: Tensor | None = None
    r_heads: tuple[Tensor, Tensor] | None = None


@dataclass
class Trace:
    """What a layer keeps of its forward: the residual stream at its two norms, and its two halves' own."""

    x_TD: Tensor
    r_T: Tensor | None = None
    middle_TD: Tensor | None = None
    r_middle_T: Tensor | None = None
    attention: AttentionTrace | None = None
    mlp: MlpTrace | None = None


class FastLayer:
    """A decoder layer's own weights, run through the engine's operations.

    Args:
        layer: the transformers decoder layer; its modules are used, not copied.
        family: the row of ``FAMILIES``.
        window: keys a query sees, itself included, or ``None``.
        dtype: compute dtype.
    """

    def __init__(self, layer: Any, family: Family, window: int | None, dtype: torch.dtype) -> None:
        self.layer, self.family, self.window = layer, family, window
        self.projections = [Projection(parts, dtype) for parts in _groups(layer)]
        self.qkv, self.out, self.gate_up, self.down = self.projections
        self.channels: int = self.layer.self_attn.head_dim
        self.num_heads = sum(self.qkv.weight.out_features) // self.channels
        self.num_kv = self.qkv.weight.out_features[1] // self.channels

    def forward(
        self, x_TD: Tensor, y_TD: Tensor | None, term: Term | None, pairs: LayerPairs, step: Step
    ) -> tuple[Tensor, Tensor, Term | None, Trace]:
        """Run the layer.

        Args:
            x_TD: the residual stream, without the last layer's output.
            y_TD: the last layer's output, which is used up; ``None`` before the first.
            term: its low-rank part.
            pairs: the layer's adapters.
            step: what the layers share.

        Returns:
            The residual stream, this layer's output, its low-rank part, and what the backward pass needs.
        """
        trace, normed_TD = self._run_attention(x_TD, y_TD, term, pairs, step)
        middle_TD = _there(trace.middle_TD)
        if step.keep.recomputes:
            y_TD, term = self._run_mlp(normed_TD, pairs, step)
            return middle_TD, y_TD, term, Trace(trace.x_TD)
        trace.mlp, product_TF = self._widen(normed_TD, pairs, step, self.gate_up.weight.open())
        y_TD, trace.mlp.u_down_TR, term = self.down.project(product_TF, pairs.down, self.down.weight.open())
        if step.keep is Keep.LEAN:
            _there(trace.attention).normed_TD = trace.mlp.normed_TD = None
        return middle_TD, y_TD, term, trace

    def backward(
        self, trace: Trace, d_out: Gradient, pairs: LayerPairs, step: Step, below: FastLayer | None, *, wants_dx: bool
    ) -> tuple[Gradient | None, list[Gradients]]:
        """Return the gradient of the layer's input, and those of its adapters in the order of ``GROUPS``.

        Args:
            trace: what ``forward`` returned; it is taken apart on the way.
            d_out: gradient of residual stream and output together; it may be written over.
            pairs: as in the forward.
            step: as in the forward.
            below: the layer that takes the gradient next.
            wants_dx: false for the first layer, whose input is not trained.
        """
        normed_TD = None
        if step.keep.recomputes:
            trace, normed_TD = self._run_attention(trace.x_TD, None, None, pairs, step)
        d_middle, mlp_gradients = self._mlp_backward(trace, normed_TD, d_out, pairs, step)
        del d_out
        reader = below.down.weight if below is not None else None
        dx, attention_gradients = self._attention_backward(trace, d_middle, pairs, step, reader, wants_dx=wants_dx)
        return dx, attention_gradients + mlp_gradients

    # --- attention ---

    def _run_attention(
        self, x_TD: Tensor, y_TD: Tensor | None, term: Term | None, pairs: LayerPairs, step: Step
    ) -> tuple[Trace, Tensor]:
        """The layer's first half, up to the second norm: its trace, and that norm's output."""
        first, second = self.layer.input_layernorm, self.layer.post_attention_layernorm
        x_TD, normed_TD, r_T = step.ops.add_norm(x_TD, y_TD, term, first.weight, first.variance_epsilon)
        trace = Trace(x_TD, r_T)
        trace.attention, o_TD, o_term = self._attend(normed_TD, pairs, step)
        trace.middle_TD, normed_TD, trace.r_middle_T = step.ops.add_norm(
            x_TD, o_TD, o_term, second.weight, second.variance_epsilon
        )
        return trace, normed_TD

    def _attend(self, normed_TD: Tensor, pairs: LayerPairs, step: Step) -> tuple[AttentionTrace, Tensor, Term | None]:
        """Project, rotate, attend and project back: the trace, the output and its low-rank part."""
        raw_TN, u_TR, term = self.qkv.project(normed_TD, pairs.qkv, self.qkv.weight.open())
        heads_TNC = raw_TN.unflatten(-1, (self.num_heads, self.channels))
        r_heads = None
        if self.family.norms_heads:
            if term is not None:
                term.add_to(raw_TN)
                term = None
            heads_TNC, r_heads = self._norm_heads(heads_TNC, step)
        heads_TNC = step.ops.rotate_(heads_TNC, term, step.cos_TC, step.sin_TC, self.num_kv)
        attended_THC, state = attend(heads_TNC, step.layout, self.num_kv, self.window)
        attended_TN = attended_THC.flatten(1)
        o_TD, u_out_TR, o_term = self.out.project(attended_TN, pairs.out, self.out.weight.open())
        raw = raw_TN if self.family.norms_heads else None
        return AttentionTrace(normed_TD, u_TR, state, attended_TN, u_out_TR, raw, r_heads), o_TD, o_term

    def _attention_backward(
        self, trace: Trace, d_middle: Gradient, pairs: LayerPairs, step: Step, reader: FrozenWeight | None, *,
        wants_dx: bool,
    ) -> tuple[Gradient | None, list[Gradients]]:  # fmt: skip
        kept, ops = _there(trace.attention), step.ops
        trace.attention = None
        d_middle_TD = d_middle.d_TD
        d_attended_TN = rounding.multiply_back(self.out.weight.open(), *d_middle)
        del d_middle
        term, out_gradients, _ = rounding.adapter_gradients(
            pairs.out, d_middle_TD, kept.attended_TN, kept.u_out_TR, ops
        )
        if term is not None:
            term.add_to(d_attended_TN)
        kept.attended_TN = kept.u_out_TR = None  # type: ignore[assignment]  # freed before the heads' gradients come
        d_heads = kept.state.gradients(d_attended_TN.unflatten(-1, (-1, self.channels)))
        del d_attended_TN
        kept.state = None  # type: ignore[assignment]
        d_heads_TNC = ops.rotate_back(*d_heads, step.cos_TC, step.sin_TC)
        del d_heads
        if self.family.norms_heads:
            d_heads_TNC = self._norm_heads_back(d_heads_TNC, kept, step)
        d_raw_TN = d_heads_TNC.flatten(1)
        norm = self.layer.input_layernorm
        if kept.normed_TD is None:
            kept.normed_TD = ops.add_norm(trace.x_TD, None, None, norm.weight, norm.variance_epsilon)[1]
        term, qkv_gradients, _ = rounding.adapter_gradients(pairs.qkv, d_raw_TN, kept.normed_TD, kept.u_TR, ops)
        if not wants_dx:
            return None, [qkv_gradients, out_gradients]
        d_normed_TD = self.qkv.weight.open().multiply_back(d_raw_TN)
        r_T = _there(trace.r_T)
        dx = rounding.norm_grad_for(reader, d_normed_TD, term, trace.x_TD, norm.weight, r_T, d_middle_TD, ops)
        return dx, [qkv_gradients, out_gradients]

    def _norm_heads(self, heads_TNC: Tensor, step: Step) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Norm each query and key head; the fused buffer anew, and the two norms' r."""
        attn = self.layer.self_attn
        q, k, v = heads_TNC.split([self.num_heads - 2 * self.num_kv, self.num_kv, self.num_kv], 1)
        normed = []
        for norm, part in ((attn.q_norm, q), (attn.k_norm, k)):
            _, out, r = step.ops.add_norm(
                part.reshape(-1, self.channels), None, None, norm.weight, norm.variance_epsilon
            )
            normed.append((out.view(part.shape), r))
        (q, r_q), (k, r_k) = normed
        return torch.cat((q, k, v), 1), (r_q, r_k)

    def _norm_heads_back(self, d_heads_TNC: Tensor, kept: AttentionTrace, step: Step) -> Tensor:
        attn = self.layer.self_attn
        sizes = [self.num_heads - 2 * self.num_kv, self.num_kv, self.num_kv]
        raw_TNC = _there(kept.raw_TN).unflatten(-1, (self.num_heads, self.channels))
        norms, rs = (attn.q_norm, attn.k_norm), _there(kept.r_heads)
        d_parts = list(d_heads_TNC.split(sizes, 1))
        for i, (norm, r, raw) in enumerate(zip(norms, rs, raw_TNC.split(sizes, 1)[:2], strict=True)):
            d_part, raw = (x.reshape(-1, self.channels) for x in (d_parts[i], raw))
            d_parts[i] = step.ops.norm_grad(d_part, None, raw, norm.weight, r, None).view(d_parts[i].shape)
        return torch.cat(d_parts, 1)

    # --- MLP ---

    def _widen(
        self, normed_TD: Tensor, pairs: LayerPairs, step: Step, wide: Matrix, out_TF: Tensor | None = None
    ) -> tuple[MlpTrace, Tensor]:
        """Gate and up, and their product (T, F); nobody keeps that: its one later use is in down's dA."""
        gate_up_TN, u_TR, term = self.gate_up.project(normed_TD, pairs.gate_up, wide)
        return MlpTrace(normed_TD, gate_up_TN, u_TR), step.ops.swiglu(gate_up_TN, term, out_TF)

    def _widen_again(self, normed_TD: Tensor, pairs: LayerPairs, step: Step, wide: Matrix) -> MlpTrace:
        """The trace of a forward that kept none."""
        mlp, product_TF = self._widen(normed_TD, pairs, step, wide)
        if pairs.down:
            mlp.u_down_TR = product_TF @ pairs.down.A_RD.T
        return mlp

    def _run_mlp(self, normed_TD: Tensor, pairs: LayerPairs, step: Step) -> tuple[Tensor, Term | None]:
        """The MLP's output, nothing kept, by tiles where the step says so."""
        tiles = _tiles(len(normed_TD), step)
        wide = self.gate_up.weight.open()
        if len(tiles) == 1 or step.one_weight:
            product_TF = normed_TD.new_empty(len(normed_TD), sum(self.gate_up.weight.out_features) // 2)
            for rows in tiles:
                self._widen(normed_TD[rows], pairs, step, wide, product_TF[rows])
            del wide
            y_TD, _, term = self.down.project(product_TF, pairs.down, self.down.weight.open())
            return y_TD, term
        narrow = self.down.weight.open()
        y_TD = torch.empty_like(normed_TD)
        for rows in tiles:
            product_TF = self._widen(normed_TD[rows], pairs, step, wide)[1]
            part_TD, _, term = self.down.project(product_TF, pairs.down, narrow)
            if term is not None:
                term.add_to(part_TD)
            y_TD[rows] = part_TD
        return y_TD, None

    def _mlp_backward(
        self, trace: Trace, normed_TD: Tensor | None, d_out: Gradient, pairs: LayerPairs, step: Step
    ) -> tuple[Gradient, list[Gradients]]:
        """Gradient of the residual stream between the two halves; by tiles, each computed again, where asked to."""
        product_gradient = self._product_gradient(d_out, step)
        wide = self.gate_up.weight.open()
        middle_TD, r_T = _there(trace.middle_TD), _there(trace.r_middle_T)
        trace.middle_TD = trace.r_middle_T = None
        tiles = _tiles(len(middle_TD), step)
        if trace.mlp is not None or len(tiles) == 1:
            mlp, trace.mlp = trace.mlp, None
            if mlp is None:
                mlp = self._widen_again(_there(normed_TD), pairs, step, wide)
            every = slice(0, len(middle_TD))
            return self._mlp_part_backward(mlp, middle_TD, r_T, d_out.d_TD, product_gradient(every), pairs, step, wide)
        del normed_TD  # each tile makes its own
        norm = self.layer.post_attention_layernorm
        total: list[Gradients] = []  # in float32: a sum of dozens of 16-bit parts would lose their last bits
        for rows in tiles:
            tile_TD = step.ops.add_norm(middle_TD[rows], None, None, norm.weight, norm.variance_epsilon)[1]
            mlp = self._widen_again(tile_TD, pairs, step, wide)
            d_part, gradients = self._mlp_part_backward(
                mlp, middle_TD[rows], r_T[rows], d_out.d_TD[rows], product_gradient(rows), pairs, step, wide
            )
            d_out.d_TD[rows] = d_part.d_TD  # these rows' own gradient has been read for the last time
            if not total:
                total = [[g.float() for g in own] for own in gradients]
                continue
            for sums, new in zip(total, gradients, strict=True):
                if sums:
                    torch._foreach_add_(sums, [g.float() for g in new])
        return Gradient(d_out.d_TD, None), total

    def _product_gradient(self, d_out: Gradient, step: Step) -> ProductGradient:
        """The way back through down: at once for all tokens, and its weight closed, or tile by tile, as they come."""
        narrow = self.down.weight.open()
        if not step.one_weight:
            return lambda rows: rounding.multiply_back(narrow, *d_out.rows(rows))
        dh_TF = rounding.multiply_back(narrow, *d_out)
        return lambda rows: dh_TF[rows]

    def _mlp_part_backward(
        self, mlp: MlpTrace, middle_TD: Tensor, r_T: Tensor, d_out_TD: Tensor, dh_TF: Tensor, pairs: LayerPairs,
        step: Step, wide: Matrix,
    ) -> tuple[Gradient, list[Gradients]]:  # fmt: skip
        norm, ops = self.layer.post_attention_layernorm, step.ops
        if mlp.normed_TD is None:
            mlp.normed_TD = ops.add_norm(middle_TD, None, None, norm.weight, norm.variance_epsilon)[1]
        down_term: Term | None = None
        dBs: list[Tensor] = []
        if pairs.down:
            du_TR, dBs = pairs.down.thin_gradients(d_out_TD, _there(mlp.u_down_TR), ops)
            down_term = Term(du_TR, pairs.down.A_RD)
        kept_term = pairs.gate_up.term(_there(mlp.u_TR)) if pairs.gate_up and ops.KEEPS_TERMS else None
        thin = rounding.thin_back_reader(self.gate_up.weight, pairs.gate_up)
        d_gate_up_TN, dA_RF, scale_T1 = rounding.swiglu_grad_for(thin, dh_TF, down_term, mlp.gate_up_TN, kept_term, ops)
        del dh_TF
        down_gradients = pairs.down.in_order(_there(dA_RF), dBs) if pairs.down else []
        kept_TD, u_TR = mlp.normed_TD, mlp.u_TR
        del mlp
        term, gate_up_gradients, rounded = rounding.adapter_gradients(
            pairs.gate_up, d_gate_up_TN, kept_TD, u_TR, ops, thin, scale_T1
        )
        d_normed_TD = rounding.multiply_back(wide, d_gate_up_TN, rounded)
        del d_gate_up_TN, rounded
        d_middle = rounding.norm_grad_for(
            self.out.weight, d_normed_TD, term, middle_TD, norm.weight, r_T, d_out_TD, ops
        )
        return d_middle, [gate_up_gradients, down_gradients]


def _tiles(num_tokens: int, step: Step) -> list[slice]:
    """The MLP's tiles, as even as they come: a thin last one would be a slow one.

    They begin at multiples of 16 tokens: cuBLAS takes no 8-bit operand whose rows' scales begin elsewhere.
    """
    count = -(-num_tokens // (step.tile_tokens or num_tokens))
    even = -(-num_tokens // (count * 16)) * 16
    return [slice(start, start + even) for start in range(0, num_tokens, even)]


def _there(value: _Value | None) -> _Value:
    """A value that the trace is known to hold."""
    assert value is not None, "the trace lacks what this step keeps"
    return value


def window_of(config: Any, index: int) -> int | None:
    """The sliding window of layer ``index``: Qwen lists a type for each layer, Mistral has one window for all."""
    window = config.to_dict().get("sliding_window")
    layer_types = config.to_dict().get("layer_types")
    if layer_types is not None and layer_types[index] != "sliding_attention":
        return None
    return window


def layer_reason(layer: nn.Module, hidden_act: str, dtype: torch.dtype) -> str | None:
    """Say why a decoder layer must stay on the plain path, or ``None``."""
    if hidden_act not in ("silu", "swish"):
        return f"its activation is {hidden_act}, not SwiGLU's silu"
    for parts, (_, names) in zip(_groups(layer), GROUPS, strict=True):
        reason = plain_reason(parts)
        computed = {compute_dtype(base_of(part)) for part in parts} if reason is None else {dtype}
        if computed != {dtype}:
            reason = f"its products are in {', '.join(map(str, computed))} and the model's norms in {dtype}"
        if reason is not None:
            return f"{'/'.join(names)}: {reason}"
    if any(p.requires_grad for name, p in layer.named_parameters() if "norm" in name):
        return "its norms are being trained"
    return None


def _groups(layer: nn.Module) -> list[list[nn.Module]]:
    return [[layer.get_submodule(f"{owner}.{name}") for name in names] for owner, names in GROUPS]
