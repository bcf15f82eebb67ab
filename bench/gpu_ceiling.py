"""The rate that a training step's matrix products alone would allow, sustained; run by gpu_sft.py --ceiling.

A step is all layers' forward, the head forward and backward, and all layers' backward (only the input's gradient: the
base is frozen), at the job's own number of tokens, on random data (zeros would draw less power and clock higher), with
four layers' weights in turn, 1.7 GB, which no cache holds. The rate is what a perfect engine would reach: no attention,
no LoRA, no norm, no loss, no optimizer. Full recomputation adds a second forward of the layers. A burst would show 10
to 20 % more than a GPU at its power limit can sustain, so the first quarter of the time is not counted.

Axes: T tokens of a step; O outputs and I inputs of a linear layer.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from gpu_common import free_memory, synchronise
from medcot.shapes import Shape

NUM_LAYERS = 4  # distinct sets of a layer's weights that the loop goes through


class Products:
    """The matrix products of one step's layers, base weights only.

    Args:
        shape: the model's sizes.
        num_tokens: T.
        fp8: row-wise scaled FP8 operands, as the engine's, in place of bf16; the head is bf16 either way.
        device: where they run.
    """

    def __init__(self, shape: Shape, num_tokens: int, *, fp8: bool, device: torch.device) -> None:
        queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        hidden, wide = shape.hidden, shape.intermediate
        self.sizes_OI = [(queries + 2 * keys, hidden), (hidden, queries), (2 * wide, hidden), (hidden, wide)]
        self.head_OI = (shape.vocab, hidden)
        self.num_tokens, self.num_layers, self.fp8, self.device = num_tokens, shape.num_layers, fp8, device
        widths = {width for pair in self.sizes_OI for width in pair}
        self.inputs = {width: self._left(width) for width in widths}
        self.column_scales = {width: torch.ones(1, width, device=device) for width in widths}
        self.weights = [[self._weights(o, i) for o, i in self.sizes_OI] for _ in range(NUM_LAYERS)]
        self.head = self._random(*self.head_OI)
        self.hidden_TI, self.logits_TO = self._random(num_tokens, hidden), self._random(num_tokens, shape.vocab)

    def _random(self, *size: int) -> Tensor:
        return torch.randn(*size, device=self.device, dtype=torch.bfloat16)

    def _left(self, width: int) -> tuple[Tensor, Tensor]:
        """A left operand (T, width) and its row scales."""
        values = self._random(self.num_tokens, width)
        scales = torch.ones(self.num_tokens, 1, device=self.device)
        return (values.to(torch.float8_e4m3fn) if self.fp8 else values), scales

    def _weights(self, outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
        """A weight (O, I), and for FP8 its transposed copy too: its products want both operands K-major."""
        weight_OI = self._random(outputs, inputs)
        if not self.fp8:
            return weight_OI, weight_OI
        weight8_OI = weight_OI.to(torch.float8_e4m3fn)
        return weight8_OI, weight_OI.t().contiguous().to(torch.float8_e4m3fn)

    def _multiply8(self, width: int, right: Tensor) -> Tensor:
        """The FP8 product with the left operand of a width; ``right`` is K-major, its rows are the result's columns."""
        left, row_scales = self.inputs[width]
        return torch._scaled_mm(
            left,
            right.t(),
            scale_a=row_scales,
            scale_b=self.column_scales[right.shape[0]],
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )

    def forward(self) -> None:
        """All layers' ``x Wᵀ``."""
        for layer in range(self.num_layers):
            for (_, inputs), (weight_OI, _) in zip(self.sizes_OI, self.weights[layer % NUM_LAYERS], strict=True):
                _ = self._multiply8(inputs, weight_OI) if self.fp8 else self.inputs[inputs][0] @ weight_OI.t()

    def backward(self) -> None:
        """All layers' ``dy W``."""
        for layer in range(self.num_layers):
            for (outputs, _), (weight_OI, weight_IO) in zip(
                self.sizes_OI, self.weights[layer % NUM_LAYERS], strict=True
            ):
                _ = self._multiply8(outputs, weight_IO) if self.fp8 else self.inputs[outputs][0] @ weight_OI

    def head_both(self) -> None:
        """The head's ``x Wᵀ`` and ``dy W`` for all tokens."""
        _ = self.hidden_TI @ self.head.t()
        _ = self.logits_TO @ self.head

    @property
    def flops(self) -> float:
        """Of forward, head and backward together."""
        layers = sum(o * i for o, i in self.sizes_OI) * self.num_layers
        return 4.0 * self.num_tokens * (layers + self.head_OI[0] * self.head_OI[1])


def sustain(products: Products, seconds: float) -> dict[str, float]:
    """Repeat a step's products; returns the mean seconds of its parts, the first quarter of the time left out."""
    parts = {"forward": products.forward, "head": products.head_both, "backward": products.backward}
    taken: list[tuple[float, dict[str, float]]] = []
    started_s = time.perf_counter()
    while not taken or time.perf_counter() - started_s < seconds:
        times = {}
        for name, part in parts.items():
            before_s = time.perf_counter()
            part()
            # Three waits in a third of a second let the GPU idle for well under a thousandth of it.
            synchronise(products.device)
            times[name] = time.perf_counter() - before_s
        taken.append((time.perf_counter() - started_s, times))
    counted = [times for end_s, times in taken if end_s > seconds / 4] or [taken[-1][1]]
    return {name: statistics.mean(times[name] for times in counted) for name in parts}


def ceilings(shape: Shape, num_tokens: int, seconds: float, device: torch.device) -> Iterator[dict[str, Any]]:
    """Yield the lines of the ceilings: bf16, bf16 with full recomputation, and FP8 where the GPU has it."""
    has_fp8 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    for precision in ("bf16", "fp8") if has_fp8 else ("bf16",):
        products = Products(shape, num_tokens, fp8=precision == "fp8", device=device)
        parts = sustain(products, seconds)
        whole_s = sum(parts.values())
        layers = 4.0 * num_tokens * sum(o * i for o, i in products.sizes_OI) * products.num_layers
        line = {
            "system": "ceiling",
            "unit": "tokens/s",
            "precision": precision,
            "tokens_a_step": num_tokens,
            "seconds": seconds,
            "tflops": round(products.flops / whole_s / 1e12, 1),
            "layer_tflops": round(layers / (parts["forward"] + parts["backward"]) / 1e12, 1),
            "parts_s": {name: round(s, 4) for name, s in parts.items()},
        }
        yield {"figure": f"ceiling-{precision}", "value": round(num_tokens / whole_s, 1), **line}
        if precision == "bf16":
            value = round(num_tokens / (whole_s + parts["forward"]), 1)
            yield {"figure": "ceiling-bf16-recompute", "value": value, **line}
        del products
        free_memory(device)
