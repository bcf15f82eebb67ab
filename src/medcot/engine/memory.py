"""What a training step may keep in memory, and how much it then needs, by counting.

The engine can keep everything its backward pass reads, or ever less (``Keep``), and can work through long rows in
pieces (``Memory``). The need is a sum of four: the frozen weights; the adapter with its gradient, moments and 16-bit
copy; what the layers keep for the tokens of one forward, known line by line because their backward is our own; and the
most that one layer's backward, or the loss, takes beside that. Against peaks measured on an H200 (Llama 8B's shape in
NF4 and FP8; tests/engine/test_memory.py has them) the sum is good to 10 % for forwards of 2,000 to 13,000 tokens, and
13 % low for a single row of 56,000. On a CPU, where the process's own memory is counted and nothing says when it is
given back, it is a guess.

Axes: D hidden, F intermediate, H and G query and key/value heads, C channels of a head, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from medcot.engine.attention import KEEP_PROBABILITIES

GB = 2**30
# Bytes a weight: NF4 with double quantisation is 4 bits and 0.127 bits of scales (QLoRA, section 3); int8 keeps a scale
# a row; FP8 has each weight twice, by rows and by columns; the embedding and the head stay in 16 bit.
WEIGHT_BYTES = {"nf4": 4.127 / 8, "int8": 1.0, "fp8": 2.0, "bf16": 2.0, "fp16": 2.0, "fp32": 4.0}
# Python, torch and the libraries before any tensor: 0.9 GB on a CPU, of which the process's peak memory counts all.
PROCESS_GB_CPU = 0.9
# Bytes an adapter weight: itself and its gradient in float32, the copy that is cast for the products, two moments.
ADAPTER_BYTES = 4 + 4 + 2 + 2
ADAPTER_BYTES_CPU = 4 + 4 + 2 + 8
# Of the loss, where none are asked for: Triton's kernels, plain torch on a GPU, a CPU; ``loss.py`` has the reasons.
CHUNK_TOKENS = {"kernels": 2048, "portable": 512, "cpu": 160}
# The plain path keeps float32 copies of norms, every cast input of every adapter, and the logits of all tokens.
PLAIN_PATH_FACTOR = 2.3


class Keep(StrEnum):
    """What a layer keeps from its forward for its backward, from the fastest to the smallest."""

    ALL = "all"  # everything the gradients read
    LEAN = "lean"  # not the norms' outputs, which an elementwise kernel makes again
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
        unpacked: keep 4-bit weights unpacked beside their packed form.
        one_weight: where layers are computed again, the MLP has one of its weights open at a time; between the two, its
            product, or the gradient of that, is held for all tokens.
    """

    keep: Keep = Keep.ALL
    tile_tokens: int | None = None
    chunk_tokens: int | None = None
    unpacked: bool = False
    one_weight: bool = False


FASTEST = Memory()
SMALLEST = Memory(Keep.HOST, tile_tokens=1024, chunk_tokens=256, one_weight=True)


# Up to so many tokens the MLP's product takes less than the weight that is not open: of Llama 8B, up to D.
ONE_WEIGHT_TOKENS = 4096


def small_pieces(tokens: int) -> Memory:
    """The smallest setting for a forward of so many tokens: pieces that add little to what its length takes anyway.

    Of Llama 8B, 256 tokens' logits take 0.07 GiB, 1,024 tokens in the MLP 0.14, and the smaller of its weights 0.11.
    Smaller tiles are many more launches (256 or 512 tokens: 3,700 tokens/s on an H200 where 1,024 had 8,600), so a row
    of tens of thousands is cut into some thirty pieces, and keeps both weights open for all of them.
    """
    tile = min(max(1024, tokens // 32 // 128 * 128), 2048)
    return Memory(Keep.HOST, tile_tokens=tile, chunk_tokens=256, one_weight=tokens <= ONE_WEIGHT_TOKENS)


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
    body = body_params(shape)
    tables = shape.num_params - body
    table_bytes = 4.0 if precision == "fp32" else 2.0
    if precision == "fp8":
        table_bytes = 3.0  # the head is held in 8 bit too, twice, for the loss
    return (body * WEIGHT_BYTES.get(precision, 2.0) + tables * table_bytes) / GB


def body_params(shape: ModelShape) -> int:
    """All weights but the embedding's and the head's."""
    return shape.num_params - min(2 * shape.vocab * shape.hidden, shape.num_params)


def adapter_params(shape: ModelShape, rank: int) -> int:
    """Weights of a LoRA adapter on the seven projections."""
    queries, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    inputs_and_outputs = (
        2 * (shape.hidden + queries) + 2 * (shape.hidden + kv) + 3 * (shape.hidden + shape.intermediate)
    )
    return rank * inputs_and_outputs * shape.num_layers


def activation_bytes_per_token(shape: ModelShape, bytes_per_value: int, keep: Keep) -> int:
    """Bytes that all layers keep on the device for one token, from forward to backward.

    ``Keep.ALL``: the residual stream at both norms and the norms' outputs (4 D), the rotated q, k and v (H + 2G)·C, the
    attended heads H·C, gate and up 2 F. ``LEAN`` makes the norms' outputs again, ``INPUT`` keeps D, ``HOST`` nothing
    here.
    """
    return shape.num_layers * bytes_per_value * _layer_values(shape, keep)


def _layer_values(shape: ModelShape, keep: Keep) -> int:
    heads = (2 * shape.heads + 2 * shape.kv_heads) * shape.head_dim
    return {
        Keep.ALL: 4 * shape.hidden + heads + 2 * shape.intermediate,
        Keep.LEAN: 2 * shape.hidden + heads + 2 * shape.intermediate,
        Keep.INPUT: shape.hidden,
        Keep.HOST: 0,
    }[keep]


def _working_bytes(
    shape: ModelShape, precision: str, tokens: int, memory: Memory, bytes_per_value: int, *, kernels: bool
) -> int:
    """The most that one layer's backward takes beside what is kept, its unpacked weights included.

    At its widest moment the MLP has the gradients of gate and up (2 F; kernels write them over gate and up themselves)
    and of their product (F) beside three of the residual stream's width. A layer that is computed again has first of
    all what it would have kept, the MLP's part of that, with the gradients, for a tile's tokens only; where one weight
    is open at a time, the product's gradient is there for all tokens.
    """
    wide = min(memory.tile_tokens or tokens, tokens) if memory.keep.recomputes else tokens
    product = tokens if memory.keep.recomputes and memory.one_weight else wide
    gate_up = 0 if kernels else 2 * wide
    values = tokens * 3 * shape.hidden + (gate_up + product) * shape.intermediate
    if memory.keep.recomputes:
        mlp = 2 * shape.intermediate + shape.hidden
        values += tokens * (_layer_values(shape, Keep.ALL) - mlp) + wide * mlp
        values += 2 * tokens * shape.hidden if memory.keep is Keep.HOST else 0  # one input in use, one on its way
    open_weights = 2 if memory.one_weight else 3  # of F by D: gate and up are one
    unpacked = open_weights * shape.intermediate * shape.hidden * bytes_per_value if precision == "nf4" else 0
    return values * bytes_per_value + unpacked


def predict_peak_gb(
    shape: ModelShape,
    precision: str,
    *,
    tokens: int,
    rank: int,
    memory: Memory = FASTEST,
    fast: bool = True,
    on_cpu: bool = False,
    kernels: bool = True,
    longest: int = 0,
) -> float:
    """GiB at the peak of a training step.

    Args:
        shape: the model's sizes.
        precision: how the frozen weights are held.
        tokens: real tokens of one forward.
        rank: LoRA rank, on seven projections.
        memory: what the step keeps, and in what pieces it works.
        fast: whether the engine runs the step.
        on_cpu: then the process itself counts too, and the moments are float32.
        kernels: whether Triton's kernels run; plain torch makes float32 copies on the way.
        longest: tokens of the longest row where attention keeps its probabilities (the portable path), else 0.
    """
    bytes_per_value = 4 if precision == "fp32" else 2
    activations = tokens * activation_bytes_per_token(shape, bytes_per_value, memory.keep)
    if not memory.keep.recomputes:
        probabilities = shape.heads * tokens * longest
        activations += (
            shape.num_layers * bytes_per_value * (probabilities if probabilities <= KEEP_PROBABILITIES else 0)
        )
    kernels = kernels and not on_cpu
    working = _working_bytes(shape, precision, tokens, memory, bytes_per_value, kernels=kernels)
    if not kernels:
        working += tokens * 4 * (2 * shape.hidden + shape.intermediate // 2)
    # The loss, before any layer's backward: a chunk's logits, and the hidden states, their copy and gradient.
    path = "cpu" if on_cpu else "kernels" if kernels else "portable"
    chunk = min(memory.chunk_tokens or CHUNK_TOKENS[path], tokens)
    loss = chunk * shape.vocab * (bytes_per_value if kernels else 12) + 4 * tokens * shape.hidden * bytes_per_value
    if not fast:
        activations = int(activations * PLAIN_PATH_FACTOR) + tokens * shape.vocab * 8
    adapter = adapter_params(shape, rank) * (ADAPTER_BYTES_CPU if on_cpu else ADAPTER_BYTES)
    total = (activations + max(working, loss) + adapter) / GB + weight_gb(shape, precision)
    if memory.unpacked:
        total += body_params(shape) * bytes_per_value / GB
    if on_cpu and memory.keep is Keep.HOST:  # the host is the same memory
        total += tokens * activation_bytes_per_token(shape, bytes_per_value, Keep.INPUT) / GB
    if fast and memory.keep is Keep.HOST and not on_cpu:
        total -= shape.vocab * shape.hidden * bytes_per_value / GB  # the input embedding waits on the host
    return total + (PROCESS_GB_CPU if on_cpu else 0.0)
