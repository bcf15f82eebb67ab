"""Decoding with a static key/value cache: the same layers as training, one token a row at a time.

transformers' default cache grows by concatenation, which copies every key and value of every layer at each token; at
100 rows that is most of the time on a CPU. Here the cache is one block, allocated once.

This file is what all devices share (a layer bound to its adapters, the reading of prompts, what a cache needs) and the
portable decoder, plain torch, for a CPU or an older GPU; ``graph_decoding.py`` is the one for CUDA. A row begins at the
first place of its cache and has its own length; a mask hides what lies behind it, be it empty or left by the row that
had the slot before. So a row's answer depends on no other, and a slot can be given to another prompt at any step.
Who gets which slot when is decided in ``slots.py``.

Adapters are applied unmerged, as they are switched when decoding starts.

Memory is planned before the cache is made (``fit_slots``): fewer slots are slower, an allocation that fails is the end.

Axes: B rows; R of them that are read together; T tokens of all prompts; S places of a row's cache; H query heads;
G key/value heads; N = H + 2G; C channels; V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from medcot.engine.attention import SHAPE_STEP, attention, build_layout, round_up
from medcot.engine.devices import has_triton, send
from medcot.engine.pointwise import rms_norm, rotary_, swiglu
from medcot.engine.products import RESERVE_BYTES, Product, free_bytes
from medcot.engine.slots import READ_TOKENS, split_to_read

if TYPE_CHECKING:
    from medcot.engine import Engine

# Attention sees the cache up to the next multiple of this many places, so that the CPU library compiles its product for
# one shape in 32 steps and not at every step.
SLOT_STEP = 32
# A row's cache is a multiple of this many places, as the attention kernel's blocks are.
CACHE_STEP = 64
# Bytes a row and token of the vocabulary that the portable draw holds at most: float32 chances, sorted, their ids,
# cumulated in float64, and what sorting needs itself.
DRAW_BYTES = 48
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
    """Read all prompts; return the last hidden state of each, normed, (R, D).

    Args:
        engine: the model's fast forward.
        layers: its layers, bound.
        prompts: token ids of each row, none empty.
        store: called for each layer with its index, the row and the position of each token (T), and the tokens' key
            and value heads (T, G, C).
    """
    device, lengths = engine.causal_lm.device, [len(prompt) for prompt in prompts]
    num_tokens = sum(lengths)
    # As in training, filler lengthens the last prompt at its end, where causal attention hides it from the real tokens.
    filler = -num_tokens % SHAPE_STEP if device.type == "cpu" else 0
    filled = [*lengths[:-1], lengths[-1] + filler]
    # Sent without waiting: between the steps of other rows the host must not stop for the device.
    ids_T = send(F.pad(torch.tensor([token for prompt in prompts for token in prompt]), (0, filler)), device)
    positions_T = send(torch.cat([torch.arange(length) for length in filled]), device)
    rows_T = send(torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)), device)
    layout = build_layout(filled, device)
    hidden_TD, cos_TC, sin_TC = engine.embed(ids_T, positions_T)
    for index, layer in enumerate(layers):
        fused_TNC = layer.heads(hidden_TD, cos_TC, sin_TC)
        _, keys_TGC, values_TGC = layer.split(fused_TNC)
        store(index, rows_T, positions_T[:num_tokens], keys_TGC[:num_tokens], values_TGC[:num_tokens])
        hidden_TD = layer.finish(hidden_TD, attention(fused_TNC, layout, layer.num_kv, layer.window))
    last_R = send(torch.tensor(lengths).cumsum(0) - 1, device)
    return norm(engine.causal_lm.model.norm, hidden_TD[last_R])


def next_logits(engine: Engine, prompts: Sequence[Sequence[int]]) -> Iterator[Tensor]:
    """Read prompts a piece at a time, keeping nothing; yield the logits behind each prompt of a piece, (R, V)."""
    layers = [BoundLayer(engine, index) for index in range(len(engine.layers))]
    for piece in split_to_read([len(prompt) for prompt in prompts]):
        yield engine.logits(read_prompts(engine, layers, [prompts[i] for i in piece], lambda *_: None))


def cache_bytes(engine: Engine, num_tokens: int) -> int:
    """Bytes of the keys and values of one row of so many tokens, in all layers."""
    return sum(2 * layer.num_kv * layer.channels for layer in engine.layers) * num_tokens * engine.dtype.itemsize


def reading_bytes(engine: Engine, num_tokens: int) -> int:
    """Bytes that a forward over so many tokens holds at once: about three tensors as wide as the widest output."""
    widest = max(sum(p.weight.out_features) for layer in engine.layers for p in layer.projections)
    return 3 * num_tokens * widest * engine.dtype.itemsize


def fit_slots(engine: Engine, wanted: int, row_tokens: int, lengths: Sequence[int]) -> int:
    """Return how many rows can be written together: ``wanted``, or what a GPU's free memory holds, and at least one.

    A row needs its cache, its part of a step's activations and of the choice of a token. What reading a piece of
    prompts holds, and ``RESERVE_BYTES``, stay free. On a CPU ``wanted`` is taken as it is: memory there is shared with
    all else that runs, and the caller knows better.

    Args:
        engine: the model's fast forward, weights and all already in memory.
        wanted: rows.
        row_tokens: the longest prompt and what it may grow by, together.
        lengths: tokens of each prompt.
    """
    device = engine.causal_lm.device
    if device.type != "cuda":
        return wanted
    vocabulary = engine.causal_lm.lm_head.out_features
    token_bytes = engine.dtype.itemsize if has_graphs(engine) else DRAW_BYTES
    row_bytes = cache_bytes(engine, round_up(row_tokens, CACHE_STEP))
    row_bytes += reading_bytes(engine, 1) + vocabulary * token_bytes
    room = free_bytes(device) - RESERVE_BYTES - reading_bytes(engine, tokens_read(lengths))
    return max(1, min(wanted, room // row_bytes))


def tokens_read(lengths: Sequence[int]) -> int:
    """The most tokens that are read together."""
    return max(min(sum(lengths), READ_TOKENS), max(lengths))


class Decoder:
    """Rows being written, each in a slot of its own; ``read`` prompts into slots, then ``step`` all of them.

    Args:
        engine: the model's fast forward.
        num_slots: rows.
        row_tokens: the longest prompt and what it may grow by, together.
    """

    def __init__(self, engine: Engine, num_slots: int, row_tokens: int) -> None:
        self.engine = engine
        self.layers = [BoundLayer(engine, index) for index in range(len(engine.layers))]
        self.device = engine.causal_lm.device
        slots = round_up(row_tokens, CACHE_STEP)
        first = self.layers[0]
        shape = (num_slots, first.num_kv, slots, first.channels)
        # Zeros: what a mask hides must still be a number.
        self.keys = [torch.zeros(shape, dtype=engine.dtype, device=self.device) for _ in self.layers]
        self.values = [torch.zeros(shape, dtype=engine.dtype, device=self.device) for _ in self.layers]
        self.lengths = [0] * num_slots  # tokens in each row's cache
        self.slot_S = torch.arange(slots, device=self.device)

    def read(self, places: Sequence[int], prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read prompts into these slots, whoever had them; return the logits of each one's first new token, (R, V)."""
        places_R = torch.tensor(places, device=self.device)

        def store(index: int, rows_T: Tensor, positions_T: Tensor, keys_TGC: Tensor, values_TGC: Tensor) -> None:
            self.keys[index][places_R[rows_T], :, positions_T] = keys_TGC
            self.values[index][places_R[rows_T], :, positions_T] = values_TGC

        for place, prompt in zip(places, prompts, strict=True):
            self.lengths[place] = len(prompt)
        return self.engine.logits(read_prompts(self.engine, self.layers, prompts, store))

    def step(self, ids_B: Tensor) -> Tensor:
        """Append one token to each of the first B slots; return the logits of the next, (B, V).

        Rows that have ended are stepped like the others until they leave: at the end of their cache they stay.
        """
        num_rows = len(ids_B)
        lengths = self.lengths[:num_rows]
        lengths_B = torch.tensor(lengths, device=self.device)
        _, num_kv, slots, channels = self.keys[0].shape
        heads = torch.arange(num_rows * num_kv, device=self.device)
        places = heads * slots + lengths_B.repeat_interleave(num_kv)  # in a cache seen as rows of C
        hidden_BD, cos_BC, sin_BC = self.engine.embed(ids_B, lengths_B)
        visible = min(round_up(max(lengths) + 1, SLOT_STEP), slots)
        masks: dict[int | None, Tensor] = {}
        for layer, keys, values in zip(self.layers, self.keys, self.values, strict=True):
            if layer.window not in masks:
                masks[layer.window] = self._mask(lengths_B[:, None], visible, layer.window)
            queries, new_keys, new_values = layer.split(layer.heads(hidden_BD, cos_BC, sin_BC))
            keys.view(-1, channels).index_copy_(0, places, new_keys.flatten(0, 1))
            values.view(-1, channels).index_copy_(0, places, new_values.flatten(0, 1))
            seen = slice(num_rows), slice(None), slice(visible)
            attended = _attend(queries, keys[seen], values[seen], masks[layer.window])
            hidden_BD = layer.finish(hidden_BD, attended)
        self.lengths[:num_rows] = [min(length + 1, slots - 1) for length in lengths]
        return self.engine.logits(norm(self.engine.causal_lm.model.norm, hidden_BD))

    def rest(self, places: Sequence[int]) -> None:
        """Count these slots as empty; a step of an ended row would else go on as far back as it had come."""
        for place in places:
            self.lengths[place] = 0

    def keep(self, places: Sequence[int]) -> None:
        """Go on with these rows only, in this order."""
        places_R = torch.tensor(places, device=self.device)
        for index in range(len(self.keys)):  # a layer at a time, so that the old cache is not held beside the new
            self.keys[index], self.values[index] = self.keys[index][places_R], self.values[index][places_R]
        self.lengths = [self.lengths[place] for place in places]

    def _mask(self, lengths_B1: Tensor, visible: int, window: int | None) -> Tensor:
        """0 for places a row may see at this step and -inf elsewhere, (B, 1, visible)."""
        slots = self.slot_S[:visible]
        hidden = slots > lengths_B1
        if window is not None:
            hidden |= slots <= lengths_B1 - window
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
