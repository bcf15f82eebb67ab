"""Decoding with a static key/value cache: the same layers as training, one token a row at a time.

transformers' default cache grows by concatenation, which copies every key and value of every layer at each token; at
100 rows that is most of the time on a CPU. Here the cache is one block, allocated once. Prompts are aligned at their
right end, so that each new token of every row lands in the same slot and is written as one slice; a mask hides the
empty slots at the left of shorter prompts, and positions count from each row's own first token, so a row's answer does
not depend on its neighbours' lengths. Rows that have finished are dropped from the cache in batches.

Adapters are applied unmerged, as they are switched when decoding starts.

Axes: B rows; T tokens of all prompts; S cache slots; H query heads; G key/value heads; J = H/G; C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from medcot.engine.attention import attention, build_layout, round_up
from medcot.engine.layers import FastLayer, norm

if TYPE_CHECKING:
    from medcot.engine import Engine

# Attention sees the cache up to the next multiple of this many slots, so that the CPU library compiles its product for
# one shape in 32 steps and not at every step.
SLOT_STEP = 32


class Decoder:
    """A batch of rows being written; ``prefill`` once, then ``step`` until done.

    Args:
        engine: the model's fast forward.
        prompts: token ids of each row, none empty.
        max_new_tokens: how many tokens a row may grow by.
    """

    def __init__(self, engine: Engine, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        self.engine = engine
        self.layers = [layer.bind(engine.dtype) for layer in engine.layers]
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
        device = self.device
        ids_T = torch.tensor([token for prompt in self.prompts for token in prompt], device=device)
        positions_T = torch.cat([torch.arange(length) for length in self.lengths]).to(device)
        rows_T = torch.repeat_interleave(torch.arange(len(self.lengths)), torch.tensor(self.lengths)).to(device)
        slots_T = self.starts_B[rows_T] + positions_T
        layout = build_layout(self.lengths, device)
        hidden_TD, cos_TC, sin_TC = self.engine.embed(ids_T, positions_T)
        for layer, keys, values in zip(self.layers, self.keys, self.values, strict=True):
            fused_TNC = layer.heads(hidden_TD, cos_TC, sin_TC)
            keys[rows_T, :, slots_T] = fused_TNC[:, -2 * layer.num_kv : -layer.num_kv]
            values[rows_T, :, slots_T] = fused_TNC[:, -layer.num_kv :]
            hidden_TD = layer.finish(hidden_TD, attention(fused_TNC, layout, layer.num_kv, layer.window))
        last_B = torch.tensor(self.lengths, device=device).cumsum(0) - 1
        return self.engine.logits(norm(self.engine.decoder.norm, hidden_TD[last_B]))

    def step(self, ids_B: Tensor) -> Tensor:
        """Append one token to every row; return the logits of the next, (B, V)."""
        hidden_BD, cos_BC, sin_BC = self.engine.embed(ids_B, self.positions_B)
        visible = min(round_up(self.used + 1, SLOT_STEP), len(self.slot_S))
        masks: dict[int | None, Tensor] = {}
        for layer, keys, values in zip(self.layers, self.keys, self.values, strict=True):
            if layer.window not in masks:
                masks[layer.window] = self._mask(visible, layer.window)
            fused_BNC = layer.heads(hidden_BD, cos_BC, sin_BC)
            queries, new_keys, new_values = fused_BNC.split(
                [fused_BNC.shape[1] - 2 * layer.num_kv, layer.num_kv, layer.num_kv], 1
            )
            keys[:, :, self.used] = new_keys
            values[:, :, self.used] = new_values
            attended = _attend(layer, queries, keys[:, :, :visible], values[:, :, :visible], masks[layer.window])
            hidden_BD = layer.finish(hidden_BD, attended)
        self.used += 1
        self.positions_B = self.positions_B + 1
        return self.engine.logits(norm(self.engine.decoder.norm, hidden_BD))

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


def _attend(layer: FastLayer, queries_BHC: Tensor, keys_BGSC: Tensor, values_BGSC: Tensor, mask_B1S: Tensor) -> Tensor:
    """One query a row against its cache, (B, H, C)."""
    num_rows, num_heads, channels = queries_BHC.shape
    queries = queries_BHC.reshape(num_rows * layer.num_kv, -1, channels)
    mask = mask_B1S.repeat_interleave(layer.num_kv, 0)
    scores = torch.baddbmm(mask, queries, keys_BGSC.flatten(0, 1).transpose(1, 2), alpha=channels**-0.5)
    return torch.bmm(scores.softmax(-1), values_BGSC.flatten(0, 1)).view(num_rows, num_heads, channels)
