"""Decoding with a static key/value cache: the same layers as training, one token a row at a time.

transformers' default cache grows by concatenation, which copies every key and value of every layer at each token; at
100 rows that is most of the time on a CPU. Here the cache is one block, allocated once.

This file is what all devices share (a layer bound to its adapters, the reading of the prompts) and the portable
decoder, plain torch, for a CPU or an older GPU; ``graph_decoding.py`` is the one for CUDA. The portable decoder aligns
prompts at their right end, so that each new token of every row lands in the same slot and is written as one slice; a
mask hides the empty slots at the left of shorter prompts, and positions count from each row's own first token, so a
row's answer does not depend on its neighbours' lengths. Rows that have finished are dropped from the cache in batches.

Adapters are applied unmerged, as they are switched when decoding starts.

Axes: B rows; T tokens of all prompts; S cache slots; H query heads; G key/value heads; N = H + 2G; J = H/G;
C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from medcot.engine.attention import attention, build_layout, round_up
from medcot.engine.devices import has_triton
from medcot.engine.pointwise import rms_norm, rotary_, swiglu
from medcot.engine.products import Product

if TYPE_CHECKING:
    from medcot.engine import Engine

# Attention sees the cache up to the next multiple of this many slots, so that the CPU library compiles its product for
# one shape in 32 steps and not at every step.
SLOT_STEP = 32
# Rotary embeddings whose angles depend on how long the row has become; a table of angles made in advance would differ.
GROWING_ROTARY = ("dynamic", "longrope")


class BoundLayer:
    """A decoder layer's own modules with its products, bound to the adapters as they stand now.

    Args:
        engine: the model's fast forward.
        index: which of its layers.
    """

    def __init__(self, engine: Engine, index: int) -> None:
        fast: Any = engine.layers[index]
        self.window: int | None = fast.window
        self.num_kv: int = fast.num_kv
        self.num_heads: int = fast.num_heads
        self.channels: int = fast.channels
        self.projections = list(fast.projections)
        self.qkv, self.out, self.gate_up, self.down = (Product(p, engine.dtype) for p in self.projections)
        layer = engine.causal_lm.model.layers[index]
        self.input_norm, self.mlp_norm = layer.input_layernorm, layer.post_attention_layernorm
        attn = layer.self_attn
        self.head_norms = (attn.q_norm, attn.k_norm) if fast.family.norms_heads else None

    @property
    def products(self) -> tuple[Product, Product, Product, Product]:
        """In the order of ``projections``: q/k/v, output, gate/up, down."""
        return self.qkv, self.out, self.gate_up, self.down

    def heads(self, hidden_TD: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
        """Norm, project and rotate: the fused (T, N, C) buffer of query, key and value heads."""
        fused_TNC = self.qkv(norm(self.input_norm, hidden_TD)).unflatten(-1, (self.num_heads, self.channels))
        if self.head_norms is not None:
            q, k, v = self.split(fused_TNC)
            fused_TNC = torch.cat((norm(self.head_norms[0], q), norm(self.head_norms[1], k), v), 1)
        return rotary_(fused_TNC, cos_TC, sin_TC, self.num_heads - self.num_kv)

    def split(self, fused_TNC: Tensor) -> tuple[Tensor, ...]:
        """Query, key and value heads."""
        return fused_TNC.split([self.num_heads - 2 * self.num_kv, self.num_kv, self.num_kv], 1)

    def finish(self, hidden_TD: Tensor, attended_THC: Tensor) -> Tensor:
        """Output projection, residual, norm, MLP, residual."""
        hidden_TD = hidden_TD + self.out(attended_THC.flatten(1))
        return hidden_TD + self.down(swiglu(self.gate_up(norm(self.mlp_norm, hidden_TD))))


def norm(module: Any, x: Tensor) -> Tensor:
    """Apply a transformers RMSNorm module's weight and epsilon."""
    return rms_norm(x, module.weight, module.variance_epsilon)


def has_graphs(engine: Engine) -> bool:
    """Whether ``graph_decoding.py`` serves a model: Triton's kernels run there, in 16 bit, and angles stay put."""
    rope_type = engine.causal_lm.model.rotary_emb.rope_type
    in_16_bit = engine.dtype in (torch.float16, torch.bfloat16)
    return has_triton(engine.causal_lm.device) and in_16_bit and rope_type not in GROWING_ROTARY


def read_prompts(
    engine: Engine,
    layers: Sequence[BoundLayer],
    prompts: Sequence[Sequence[int]],
    store: Callable[[int, Tensor, Tensor, Tensor, Tensor], None],
) -> Tensor:
    """Read all prompts; return the last hidden state of each, normed, (B, D).

    Args:
        engine: the model's fast forward.
        layers: its layers, bound.
        prompts: token ids of each row, none empty.
        store: called for each layer with its index, the row and the position of each token (T), and the tokens' key
            and value heads (T, G, C).
    """
    device, lengths = engine.causal_lm.device, [len(prompt) for prompt in prompts]
    ids_T = torch.tensor([token for prompt in prompts for token in prompt], device=device)
    positions_T = torch.cat([torch.arange(length) for length in lengths]).to(device)
    rows_T = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)
    layout = build_layout(lengths, device)
    hidden_TD, cos_TC, sin_TC = engine.embed(ids_T, positions_T)
    for index, layer in enumerate(layers):
        fused_TNC = layer.heads(hidden_TD, cos_TC, sin_TC)
        _, keys_TGC, values_TGC = layer.split(fused_TNC)
        store(index, rows_T, positions_T, keys_TGC, values_TGC)
        hidden_TD = layer.finish(hidden_TD, attention(fused_TNC, layout, layer.num_kv, layer.window))
    last_B = torch.tensor(lengths, device=device).cumsum(0) - 1
    return norm(engine.causal_lm.model.norm, hidden_TD[last_B])


class Decoder:
    """A batch of rows being written; ``prefill`` once, then ``step`` until done.

    Args:
        engine: the model's fast forward.
        prompts: token ids of each row, none empty.
        max_new_tokens: how many tokens a row may grow by.
    """

    def __init__(self, engine: Engine, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        self.engine = engine
        self.layers = [BoundLayer(engine, index) for index in range(len(engine.layers))]
        self.device = engine.causal_lm.device
        self.lengths = [len(prompt) for prompt in prompts]
        self.prompts = prompts
        self.used = max(self.lengths)  # slots written so far
        slots = round_up(self.used + max_new_tokens, SLOT_STEP)
        first = self.layers[0]
        shape = (len(prompts), first.num_kv, slots, first.channels)
        self.keys = [torch.zeros(shape, dtype=engine.dtype, device=self.device) for _ in self.layers]
        self.values = [torch.zeros(shape, dtype=engine.dtype, device=self.device) for _ in self.layers]
        self.positions_B = torch.tensor(self.lengths, device=self.device)
        self.starts_B = self.used - self.positions_B  # the slots left of a shorter prompt are empty
        self.slot_S = torch.arange(slots, device=self.device)

    def prefill(self) -> Tensor:
        """Read all prompts; return the logits of each row's first new token, (B, V)."""

        def store(index: int, rows_T: Tensor, positions_T: Tensor, keys_TGC: Tensor, values_TGC: Tensor) -> None:
            slots_T = self.starts_B[rows_T] + positions_T
            self.keys[index][rows_T, :, slots_T] = keys_TGC
            self.values[index][rows_T, :, slots_T] = values_TGC

        return self.engine.logits(read_prompts(self.engine, self.layers, self.prompts, store))

    def step(self, ids_B: Tensor) -> Tensor:
        """Append one token to every row; return the logits of the next, (B, V)."""
        hidden_BD, cos_BC, sin_BC = self.engine.embed(ids_B, self.positions_B)
        visible = min(round_up(self.used + 1, SLOT_STEP), len(self.slot_S))
        masks: dict[int | None, Tensor] = {}
        for layer, keys, values in zip(self.layers, self.keys, self.values, strict=True):
            if layer.window not in masks:
                masks[layer.window] = self._mask(visible, layer.window)
            queries, new_keys, new_values = layer.split(layer.heads(hidden_BD, cos_BC, sin_BC))
            keys[:, :, self.used] = new_keys
            values[:, :, self.used] = new_values
            attended = _attend(queries, keys[:, :, :visible], values[:, :, :visible], masks[layer.window])
            hidden_BD = layer.finish(hidden_BD, attended)
        self.used += 1
        self.positions_B = self.positions_B + 1
        return self.engine.logits(norm(self.engine.causal_lm.model.norm, hidden_BD))

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only, in this order; ``rows`` are indices into the current ones."""
        for index in range(len(self.keys)):  # a layer at a time, so that the old cache is not held beside the new
            self.keys[index], self.values[index] = self.keys[index][rows], self.values[index][rows]
        self.positions_B, self.starts_B = self.positions_B[rows], self.starts_B[rows]

    def _mask(self, visible: int, window: int | None) -> Tensor:
        """0 for slots a row may see at this step and -inf elsewhere, (B, 1, visible)."""
        slots = self.slot_S[:visible]
        first_B1 = self.starts_B[:, None]
        if window is not None:
            first_B1 = first_B1.clamp_min(self.used - window + 1)
        hidden = (slots < first_B1) | (slots > self.used)
        return torch.zeros(hidden.shape, dtype=self.engine.dtype, device=self.device).masked_fill_(
            hidden, float("-inf")
        )[:, None]


def _attend(queries_BHC: Tensor, keys_BGSC: Tensor, values_BGSC: Tensor, mask_B1S: Tensor) -> Tensor:
    """One query a row against its cache, (B, H, C)."""
    num_rows, num_heads, channels = queries_BHC.shape
    num_kv = keys_BGSC.shape[1]
    queries = queries_BHC.reshape(num_rows * num_kv, -1, channels)
    mask = mask_B1S.repeat_interleave(num_kv, 0)
    scores = torch.baddbmm(mask, queries, keys_BGSC.flatten(0, 1).transpose(1, 2), alpha=channels**-0.5)
    return torch.bmm(scores.softmax(-1), values_BGSC.flatten(0, 1)).view(num_rows, num_heads, channels)
