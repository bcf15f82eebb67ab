"""One decoder layer of the Llama family, on flattened rows, with every fast part in its place.

Llama, Qwen2, Qwen3 and Mistral name their parts alike; what differs is a line of ``FAMILIES`` (Qwen3 norms its query
and key heads; biases and windows are found on the modules and in the configuration). A new family of this build is a
row there. Hidden states have no batch axis: (T, D), the rows of a batch end to end.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from medcot.engine.attention import Layout, attention
from medcot.engine.lora import Projection, plain_reason
from medcot.engine.pointwise import rms_norm, rotary_, swiglu

Project = Callable[[Tensor], Tensor]


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


class FastLayer:
    """A decoder layer's own weights, run through the engine's operations.

    Args:
        layer: the transformers decoder layer; its modules are used, not copied.
        family: the row of ``FAMILIES``.
        window: keys a query sees, itself included, or ``None``.
        dtype: compute dtype.
    """

    def __init__(self, layer: Any, family: Family, window: int | None, dtype: torch.dtype) -> None:
        self.layer = layer
        self.family = family
        self.window = window
        projections = [Projection(parts, dtype) for parts in _groups(layer)]
        self._projections = projections
        self.qkv: Project
        self.out: Project
        self.gate_up: Project
        self.down: Project
        self.qkv, self.out, self.gate_up, self.down = projections
        self.channels: int = self.layer.self_attn.head_dim
        self.num_heads = sum(projections[0].weight.out_features) // self.channels
        self.num_kv = projections[0].weight.out_features[1] // self.channels

    def heads(self, hidden_TD: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
        """Norm, project and rotate: the fused (T, H + 2G, C) buffer of query, key and value heads."""
        normed_TD = norm(self.layer.input_layernorm, hidden_TD)
        fused_THC = self.qkv(normed_TD).unflatten(-1, (self.num_heads, self.channels))
        num_rotated = self.num_heads - self.num_kv
        if self.family.norms_heads:
            num_queries = num_rotated - self.num_kv
            q, k, v = fused_THC.split([num_queries, self.num_kv, self.num_kv], 1)
            attn = self.layer.self_attn
            fused_THC = torch.cat((norm(attn.q_norm, q), norm(attn.k_norm, k), v), 1)
        return rotary_(fused_THC, cos_TC, sin_TC, num_rotated)

    def finish(self, hidden_TD: Tensor, attended_THC: Tensor) -> Tensor:
        """Output projection, residual, norm, MLP, residual."""
        hidden_TD = hidden_TD + self.out(attended_THC.flatten(1))
        normed_TD = norm(self.layer.post_attention_layernorm, hidden_TD)
        return hidden_TD + self.down(swiglu(self.gate_up(normed_TD)))

    def bind(self, dtype: torch.dtype) -> FastLayer:
        """Return this layer with its adapters as they stand now, cast once; for decoding without gradients."""
        bound = copy.copy(self)
        bound.qkv, bound.out, bound.gate_up, bound.down = (p.bind(dtype) for p in self._projections)
        return bound

    def __call__(self, hidden_TD: Tensor, cos_TC: Tensor, sin_TC: Tensor, layout: Layout) -> Tensor:
        """The whole layer, (T, D) to (T, D)."""
        fused_THC = self.heads(hidden_TD, cos_TC, sin_TC)
        return self.finish(hidden_TD, attention(fused_THC, layout, self.num_kv, self.window))


def norm(module: Any, x: Tensor) -> Tensor:
    """Apply a transformers RMSNorm module's weight and epsilon."""
    return rms_norm(x, module.weight, module.variance_epsilon)


def window_of(config: Any, index: int) -> int | None:
    """The sliding window of layer ``index``: Qwen lists a type for each layer, Mistral has one window for all."""
    window = config.to_dict().get("sliding_window")
    layer_types = config.to_dict().get("layer_types")
    if layer_types is not None and layer_types[index] != "sliding_attention":
        return None
    return window


def layer_reason(layer: nn.Module, hidden_act: str) -> str | None:
    """Say why a decoder layer must stay on the plain path, or ``None``."""
    if hidden_act not in ("silu", "swish"):
        return f"its activation is {hidden_act}, not SwiGLU's silu"
    for parts, (_, names) in zip(_groups(layer), GROUPS, strict=True):
        reason = plain_reason(parts)
        if reason is not None:
            return f"{'/'.join(names)}: {reason}"
    if any(p.requires_grad for name, p in layer.named_parameters() if "norm" in name):
        return "its norms are being trained"
    return None


def _groups(layer: nn.Module) -> list[list[nn.Module]]:
    return [[layer.get_submodule(f"{owner}.{name}") for name in names] for owner, names in GROUPS]
