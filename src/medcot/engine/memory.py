"""How much memory a training step needs, by counting what is kept.

Three terms: the frozen weights; the adapter with its gradient and two moments, 16 bytes a weight in float32; and the
activations that autograd keeps for the tokens of one forward. The last depends on what the layers save, which for the
engine's layers is known line by line (``activation_bytes_per_token``). The formula is meant to be good to 25 %.

Axes: D hidden, F intermediate, H and G query and key/value heads, C channels of a head, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from medcot.engine.attention import KEEP_PROBABILITIES

GB = 2**30
# Bytes a weight: NF4 with double quantisation is 4 bits and 0.127 bits of scales (QLoRA, section 3); int8 keeps a scale
# a row; the embedding and the head stay in 16 bit.
WEIGHT_BYTES = {"nf4": 4.127 / 8, "int8": 1.0, "bf16": 2.0, "fp16": 2.0, "fp32": 4.0}
# Python, torch and the libraries before any tensor: 0.9 GB on a CPU, of which the process's peak memory counts all.
PROCESS_GB_CPU = 0.9
# The plain path keeps float32 copies of norms, every cast input of every adapter, and the logits of all tokens.
PLAIN_PATH_FACTOR = 2.3


class Keep(StrEnum):
    """What a layer keeps from its forward for its backward, from the fastest to the smallest."""

    ALL = "all"  # everything the gradients read
    LEAN = "lean"  # not the norms' outputs nor SwiGLU's product, which elementwise kernels make again
    INPUT = "input"  # its input alone: the layer is computed again, but for its last product
    HOST = "host"  # its input, in pinned memory of the host

    @property
    def recomputes(self) -> bool:
        """Whether the layer is computed again for its gradient."""
        return self in (Keep.INPUT, Keep.HOST)


@dataclass(frozen=True)
class Memory:
    """How a step is to use memory.

    Attributes:
        keep: what the layers keep.
        tile_tokens: tokens that the MLP takes at a time where layers are computed again; ``None`` for all.
        chunk_tokens: tokens whose logits are in memory at a time; ``None`` for what is fast.
    """

    keep: Keep = Keep.ALL
    tile_tokens: int | None = None
    chunk_tokens: int | None = None


FASTEST = Memory()
# Pieces of a long row: gate and up of 4,096 tokens of Llama 8B take 0.23 GiB, the logits of 512 tokens 0.13.
SMALLEST = Memory(Keep.HOST, tile_tokens=4096, chunk_tokens=512)


class ModelShape(Protocol):
    """The sizes that the formula needs; ``medcot.shapes.Shape`` has them."""

    @property
    def num_layers(self) -> int:
        """Decoder layers."""

    @property
    def hidden(self) -> int:
        """D."""

    @property
    def intermediate(self) -> int:
        """F."""

    @property
    def heads(self) -> int:
        """H."""

    @property
    def kv_heads(self) -> int:
        """G."""

    @property
    def head_dim(self) -> int:
        """C."""

    @property
    def vocab(self) -> int:
        """V."""

    @property
    def num_params(self) -> int:
        """All weights, embedding and head included."""


def weight_gb(shape: ModelShape, precision: str) -> float:
    """GiB of the frozen weights; embedding and head are never quantised."""
    tables = min(2 * shape.vocab * shape.hidden, shape.num_params)
    body = shape.num_params - tables
    table_bytes = 4.0 if precision == "fp32" else 2.0
    return (body * WEIGHT_BYTES.get(precision, 2.0) + tables * table_bytes) / GB


def adapter_params(shape: ModelShape, rank: int) -> int:
    """Weights of a LoRA adapter on the seven projections."""
    queries, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    inputs_and_outputs = (
        2 * (shape.hidden + queries) + 2 * (shape.hidden + kv) + 3 * (shape.hidden + shape.intermediate)
    )
    return rank * inputs_and_outputs * shape.num_layers


def activation_bytes_per_token(shape: ModelShape, bytes_per_value: int, *, recompute: bool) -> int:
    """Bytes that autograd keeps for one token.

    A layer keeps its input, both norms' outputs, the sum after attention (4 D), the padded q, k and v (H + 2G)·C, the
    attended heads (H·C), gate and up (2 F) and their product (F). Recomputing keeps the input alone.
    """
    if recompute:
        return shape.num_layers * shape.hidden * bytes_per_value
    attention = (2 * shape.heads + 2 * shape.kv_heads) * shape.head_dim
    return shape.num_layers * (4 * shape.hidden + attention + 3 * shape.intermediate) * bytes_per_value


def predict_peak_gb(
    shape: ModelShape,
    precision: str,
    *,
    tokens: int,
    rank: int,
    memory: Memory = FASTEST,
    fast: bool = True,
    on_cpu: bool = False,
    longest: int = 0,
) -> float:
    """GiB at the peak of a training step.

    Args:
        shape: the model's sizes.
        precision: how the frozen weights are held.
        tokens: real tokens of one forward.
        rank: LoRA rank, on seven projections.
        memory: what the step keeps.
        fast: whether the engine runs the step.
        on_cpu: then the process itself counts too.
        longest: tokens of the longest row where attention keeps its probabilities (the portable path), else 0.
    """
    bytes_per_value = 4 if precision == "fp32" else 2
    activations = tokens * activation_bytes_per_token(shape, bytes_per_value, recompute=memory.keep.recomputes)
    if not memory.keep.recomputes:
        probabilities = shape.heads * tokens * longest
        activations += (
            shape.num_layers * bytes_per_value * (probabilities if probabilities <= KEEP_PROBABILITIES else 0)
        )
    # Backward works on one layer at a time: its recomputed activations, or the gradients of its widest buffers.
    one_layer = activation_bytes_per_token(shape, bytes_per_value, recompute=False) // shape.num_layers
    working = tokens * one_layer + 2 * 1024 * shape.vocab * 4
    if not fast:
        activations = int(activations * PLAIN_PATH_FACTOR) + tokens * shape.vocab * 8
    total = (activations + working + 16 * adapter_params(shape, rank)) / GB + weight_gb(shape, precision)
    return total + (PROCESS_GB_CPU if on_cpu else 0.0)
