"""LoRA's thin products and SwiGLU on one GPU: the one-pass kernels of engine/thin.py over a grid of tiles.

The shapes are those of a step of the tutorial's job on a Llama of 8B: 6,352 tokens, rank 16, bfloat16. Every call is
recorded a few times over into a CUDA graph, on operands of its own each time where they are smaller than the cache, so
that neither launches nor the cache's memory of the last call are in the figures. TB/s counts what a call cannot avoid:
each wide operand once. The last column is what a call saves against the library's products that it makes needless, or
against the tiles as they are chosen.

    python bench/gpu_thin.py                      # all, under 40 s
    python bench/gpu_thin.py --only thin --tokens 25600
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from medcot.engine import pointwise, thin
from medcot.engine.lora import Adapter, Pairs, Term, cast_adapters
from medcot.engine.thin import Tiles
from results import format_table

CUDA = torch.device("cuda")
KIND = torch.bfloat16
HIDDEN, WIDE = 4096, 14336
GROUPS = {"q, k, v": (4096, 1024, 1024), "o, down": (4096,), "gate, up": (WIDE, WIDE)}
CACHE_BYTES = 120 * 2**20  # twice an H200's
CALLS, REPLAYS = 8, 5
THIN = [
    Tiles(columns=128, stages=4, resident=2),
    Tiles(columns=256, stages=3, resident=2),
    Tiles(columns=256, stages=3, resident=2, warps=8),
    Tiles(columns=256, stages=4, resident=1),
    Tiles(columns=512, stages=3, resident=1),
    Tiles(columns=512, stages=3, resident=1, warps=8),
    Tiles(columns=512, stages=2, resident=1, warps=8),
]
ROUNDED = [
    Tiles(rows=32, columns=128, resident=3),
    Tiles(rows=32, columns=256, resident=2),
    Tiles(rows=32, columns=256, stages=4, resident=2),
    Tiles(rows=16, columns=256, resident=2),
    Tiles(columns=256, resident=2, warps=8),
    Tiles(columns=512, resident=1, warps=8),
]
SWIGLU = [
    Tiles(columns=64, stages=2, resident=3),
    Tiles(columns=64, stages=3, resident=3),
    Tiles(columns=64, stages=4, resident=3),
    Tiles(columns=128, stages=2, resident=2),
    Tiles(columns=128, stages=3, resident=2),
    Tiles(columns=128, stages=3, resident=1, warps=8),
    Tiles(rows=128, columns=64, stages=3, resident=1, warps=8),
]
SWIGLU_GRAD = [
    Tiles(columns=32, stages=3, resident=4),
    Tiles(columns=64, stages=2, resident=2),
    Tiles(columns=64, stages=3, resident=2),
    Tiles(columns=64, stages=2, resident=1, warps=8),
    Tiles(columns=128, stages=2, resident=1, warps=8),
    Tiles(columns=128, stages=3, resident=1, warps=8),
]


@dataclass(frozen=True)
class Figure:
    """A call's time and the bytes it cannot avoid."""

    microseconds: float
    num_bytes: int

    @property
    def cells(self) -> list[str]:
        """Microseconds and TB/s."""
        return [f"{self.microseconds:.1f}", f"{self.num_bytes / self.microseconds / 1e6:.2f}"]


def measure(call: Callable[[int], Any]) -> float:
    """Microseconds a call takes on the GPU, the best of a few replays; it is told how often it was called before."""
    for _ in range(2):
        call(0)  # compiles, and lets cuBLAS choose
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(CALLS):
            call(index)
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / CALLS)
    return min(times)


def copies(*shape: int) -> list[Tensor]:
    """As many random tensors as it takes to be larger than the cache."""
    one = torch.randn(*shape, device=CUDA, dtype=KIND)
    return [one, *(one.clone() for _ in range(CACHE_BYTES // (one.numel() * one.element_size())))]


def make_pairs(widths: Sequence[int], width_in: int, rank: int) -> Pairs:
    """Adapters of a group, cast."""
    group = [
        Adapter(torch.randn(rank, width_in, device=CUDA) / 64, torch.randn(width, rank, device=CUDA) / 64, 1.0)
        for width in widths
    ]
    (pairs,) = cast_adapters([group], KIND, CUDA)
    assert pairs is not None
    return pairs


def name(tiles: Tiles, num_rows: int, num_blocks: int) -> str:
    """The tiles in a few characters."""
    ranges = tiles.cut(num_rows, num_blocks)[1]
    return f"{tiles.rows}x{tiles.columns} warps {tiles.warps} stages {tiles.stages} ranges {ranges}"


def attempt(call: Callable[[int], Any]) -> float | None:
    """As ``measure``; ``None`` where the tiles do not fit the device."""
    from triton.runtime.errors import OutOfResources

    try:
        return measure(call)
    except OutOfResources:
        return None


def thin_rows(group: str, num_rows: int, rank: int) -> list[list[str]]:
    """The thin gradients of one group, du and dB: the library's two products a part, and ours."""
    widths = GROUPS[group]
    pairs = make_pairs(widths, 64, rank)
    dys, u = copies(num_rows, sum(widths)), torch.randn(num_rows, rank * len(widths), device=CUDA, dtype=KIND)
    num_bytes = dys[0].numel() * dys[0].element_size()
    B = pairs.stacked_Nr
    assert B is not None

    def plain(index: int) -> None:
        pointwise.thin_gradients(dys[index % len(dys)], u, B, widths)

    before = measure(plain)
    rows = [[group, "cuBLAS", *Figure(before, num_bytes).cells, ""]]

    def ours(tiles: Tiles | None, index: int) -> None:
        thin.thin_gradients(dys[index % len(dys)], u, B, widths, tiles)

    for tiles in (None, *THIN):
        micro = attempt(partial(ours, tiles))
        blocks = sum(-(-width // tiles.columns) for width in widths) if tiles else 0
        label = name(tiles, num_rows, blocks) if tiles else "as chosen"
        rows.append(compared(group, label, micro, num_bytes, before))
    return rows


def rounded_rows(group: str, num_rows: int, rank: int) -> list[list[str]]:
    """As ``thin_rows``, the outputs' gradient rounded to 8 bit on the way; before: rounded by a kernel of its own."""
    from medcot.engine import launch

    widths = GROUPS[group]
    dys, u = copies(num_rows, sum(widths)), torch.randn(num_rows, rank * len(widths), device=CUDA, dtype=KIND)
    B, num_bytes = make_pairs(widths, 64, rank).stacked_Nr, dys[0].numel() * dys[0].element_size() * 3 // 2
    assert B is not None
    columns, scale = torch.rand(sum(widths), device=CUDA) + 0.1, torch.rand(num_rows, 1, device=CUDA) + 1

    def apart(index: int) -> None:
        launch.quantise_rows(dys[index % len(dys)], columns)
        thin.thin_gradients(dys[index % len(dys)], u, B, widths)

    def ours(tiles: Tiles | None, index: int) -> None:
        thin.thin_gradients_rounded(dys[index % len(dys)], u, B, widths, columns, scale, tiles)

    before = measure(apart)
    rows = [[f"{group}, rounded", "apart", *Figure(before, num_bytes).cells, ""]]
    for tiles in (None, *ROUNDED):
        blocks = sum(-(-width // tiles.columns) for width in widths) if tiles else 0
        label = name(tiles, num_rows, blocks) if tiles else "as chosen"
        rows.append(compared(f"{group}, rounded", label, attempt(partial(ours, tiles)), num_bytes, before))
    return rows


def compared(group: str, label: str, micro: float | None, num_bytes: int, before: float) -> list[str]:
    """A row of a table: a time, its rate and what it saves."""
    if micro is None:
        return [group, label, "does not fit", "", ""]
    return [group, label, *Figure(micro, num_bytes).cells, f"{before - micro:+.1f}"]


@dataclass(frozen=True)
class Mlp:
    """The operands of an MLP's small kernels, and the times of the library products that ours can make needless."""

    gate_up: Tensor
    dh: Tensor
    u: Tensor
    pairs: Pairs
    down: Pairs
    du_down: Tensor

    @classmethod
    def build(cls, num_rows: int, rank: int) -> Mlp:
        """Random ones."""
        gate_up, dh, u, du_down = (
            torch.randn(num_rows, width, device=CUDA, dtype=KIND) for width in (2 * WIDE, WIDE, 2 * rank, rank)
        )
        pairs, down = make_pairs((WIDE, WIDE), 64, rank), make_pairs((HIDDEN,), WIDE, rank)
        return cls(gate_up, dh, u, pairs, down, du_down)

    @property
    def term(self) -> Term | None:
        """What gate and up lack."""
        return self.pairs.term(self.u)

    @property
    def down_term(self) -> Term:
        """What dh lacks."""
        return Term(self.du_down, self.down.A_RD)

    @property
    def num_bytes(self) -> int:
        """Of a (T, F) tensor."""
        return self.dh.numel() * self.dh.element_size()


def swiglu_rows(mlp: Mlp) -> list[list[str]]:
    """SwiGLU's forward."""

    def ours(tiles: Tiles | None, _: int) -> None:
        thin.swiglu(mlp.gate_up, mlp.term, tiles=tiles)

    return grid_rows("SwiGLU", ours, SWIGLU, 3 * mlp.num_bytes, len(mlp.dh))


def swiglu_grad_rows(mlp: Mlp) -> list[list[str]]:
    """SwiGLU's gradient, alone and with the down projection's dA, which the library needs a product for."""

    def ours(down: Term | None, tiles: Tiles | None, _: int) -> None:
        thin.swiglu_grad(mlp.dh, down, mlp.gate_up, mlp.term, tiles)

    num_bytes, num_rows = 5 * mlp.num_bytes, len(mlp.dh)
    dA = measure(lambda _: mlp.du_down.T @ mlp.dh)
    return [
        *grid_rows("gradient", partial(ours, None), SWIGLU_GRAD, num_bytes, num_rows),
        ["dA", "cuBLAS", *Figure(dA, mlp.num_bytes).cells, ""],
        *grid_rows("gradient + dA", partial(ours, mlp.down_term), SWIGLU_GRAD, num_bytes, num_rows),
    ]


def grid_rows(
    what: str, ours: Callable[[Tiles | None, int], None], grid: Sequence[Tiles], num_bytes: int, num_rows: int
) -> list[list[str]]:
    """The tiles as chosen, and each of a grid."""
    chosen = measure(partial(ours, None))
    rows = [[what, "as chosen", *Figure(chosen, num_bytes).cells, ""]]
    for tiles in grid:
        label = name(tiles, num_rows, -(-WIDE // tiles.columns))
        rows.append(compared(what, label, attempt(partial(ours, tiles)), num_bytes, chosen))
    return rows


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=6352)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--only", choices=("thin", "rounded", "swiglu", "gradient"), default=None)
    args = parser.parse_args()
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, {args.tokens} tokens, rank {args.rank}, {KIND}")
    header = ["what", "tiles", "µs", "TB/s", "saves, µs"]
    if args.only in (None, "thin"):
        rows = [row for group in GROUPS for row in thin_rows(group, args.tokens, args.rank)]
        print(format_table(header, rows), flush=True)
    if args.only in (None, "rounded"):
        print(format_table(header, rounded_rows("gate, up", args.tokens, args.rank)), flush=True)
    if args.only in ("thin", "rounded"):
        return
    mlp = Mlp.build(args.tokens, args.rank)
    for kind, rows_of in (("swiglu", swiglu_rows), ("gradient", swiglu_grad_rows)):
        if args.only in (None, kind):
            print(format_table(header, rows_of(mlp)), flush=True)


if __name__ == "__main__":
    main()
