"""The small timings that the engine's comments quote for a CPU, each beside what it replaced.

Every figure is the best of several repetitions, because the question is what an operation costs, not what the machine
was doing besides. Shapes are those of SmolLM2-135M with 12 rows of 80 tokens.

    python bench/cpu_ops.py --save
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from medcot.engine.attention import attention, build_layout
from medcot.engine.loss import TokenLoss
from medcot.machine import describe_machine
from results import format_table, save_result

REPEATS = 10
ROWS, LENGTH, HEADS, KV, CHANNELS, HIDDEN, VOCAB = 12, 80, 9, 3, 64, 576, 49152


def measure(run: Callable[[], object]) -> float:
    """Best of several repetitions, in milliseconds."""
    run()
    best = float("inf")
    for _ in range(REPEATS):
        started = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - started)
    return best * 1e3


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float32).bfloat16()


def time_attention() -> list[list[str]]:
    q, k, v = (randn(ROWS, heads, LENGTH, CHANNELS).requires_grad_() for heads in (HEADS, KV, KV))
    d_out = randn(ROWS, HEADS, LENGTH, CHANNELS)
    fused = randn(ROWS * LENGTH, HEADS + 2 * KV, CHANNELS).requires_grad_()
    d_flat = randn(ROWS * LENGTH, HEADS, CHANNELS)
    layout = build_layout([LENGTH] * ROWS, torch.device("cpu"))
    flash = measure(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).backward(d_out))
    ours = measure(lambda: attention(fused, layout, KV).backward(d_flat))
    return [["attention, forward and backward", f"{flash:.1f}", f"{ours:.1f}"]]


def time_loss() -> list[list[str]]:
    hidden, head = randn(640, HIDDEN).requires_grad_(), randn(VOCAB, HIDDEN) * 0.05
    targets = torch.randint(0, VOCAB, (640,))

    def step(chunk_tokens: int) -> float:
        return measure(lambda: TokenLoss.apply(hidden, head, targets, chunk_tokens).backward())

    thin, wide = step(64), step(160)
    rows = randn(100, VOCAB)
    plain, vectorised = measure(lambda: rows.argmax(-1)), measure(lambda: rows.float().argmax(-1))
    return [
        ["loss of 640 tokens, chunks of 64 / 160", f"{thin:.0f}", f"{wide:.0f}"],
        ["argmax of 100 × 49k, bf16 / cast first", f"{plain:.1f}", f"{vectorised:.1f}"],
    ]


def main() -> None:
    """Print the table, and keep it where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="add the result to bench/RESULTS.md")
    options = parser.parse_args()
    rows = time_attention() + time_loss()
    table = format_table(["operation, bf16", "usual way, ms", "medcot, ms"], rows)
    details = f"torch {torch.__version__}, {torch.get_num_threads()} threads, best of {REPEATS}.\n\n{table}"
    print(f"{describe_machine()}\n\n{details}")
    if options.save:
        result = "; ".join(f"{name}: {usual} → {ours} ms" for name, usual, ours in rows)
        save_result("cpu_ops", describe_machine(), result, details)


if __name__ == "__main__":
    main()
