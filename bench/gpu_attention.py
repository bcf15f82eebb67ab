"""Attention alone on a Hopper GPU: PyTorch's ``varlen_attn`` against our kernels, over a grid of tile sizes.

``python bench/gpu_attention.py`` takes Llama 8B's heads (32 queries, 8 keys, 128 channels) in bfloat16, on rows drawn
like the real ones (mean 790 tokens, deviation 136, 522 to 1184), 8 and 20 of them, and on one long row. It prints
milliseconds and TFLOP/s (of the causal triangle: 4·C a score forward, 10·C backward) of every kernel and tile size,
registers and spills, the best of each kernel, and how far output and gradients are from float32's. ``--channels``,
``--heads`` and ``--kv-heads`` choose another model's. Kernels are compiled side by side before the clock runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

import medcot.engine.reference as reference
from medcot.engine import flash, flash_kernels
from medcot.engine.attention import FlashAttended, Layout, build_layout
from medcot.engine.flash import Problem, Tiling, Tilings, TritonAttended

CUDA = torch.device("cuda")
ROUNDS, ROUND_MS, MOST_REPEATS = 3, 20.0, 50
# Rows, keys, warps, stages, split, registers.
GRID: dict[str, list[Tiling]] = {
    "attend": [
        Tiling(128, 64, 8, 2, True),
        Tiling(128, 64, 8, 2, True, 128),
        Tiling(128, 64, 8, 2, False, 128),
        Tiling(128, 64, 8, 3, True),
        Tiling(128, 32, 8, 3, True, 128),
        Tiling(128, 128, 8, 2, True),
        Tiling(128, 128, 8, 2, False),
        Tiling(64, 64, 4, 2, True),
        Tiling(64, 128, 4, 2, True),
        Tiling(128, 32, 4, 3, True),
    ],
    "query_grad": [
        Tiling(128, 64, 8, 2, True),
        Tiling(128, 64, 8, 2, False),
        Tiling(128, 64, 8, 3, True),
        Tiling(128, 32, 8, 2, True, 128),
        Tiling(64, 64, 4, 2, True),
        Tiling(64, 64, 4, 2, False),
        Tiling(128, 128, 8, 2, False),
    ],
    "key_grad": [
        Tiling(64, 128, 8, 2, True),
        Tiling(64, 128, 8, 2, False),
        Tiling(64, 128, 8, 3, True),
        Tiling(32, 128, 8, 3, True),
        Tiling(64, 64, 4, 2, True),
        Tiling(64, 64, 4, 2, False),
        Tiling(32, 64, 4, 2, True),
        Tiling(32, 64, 4, 3, True),
    ],
}
Jobs = dict[str, list[Tiling]]
Broken = set[tuple[str, Tiling]]
OUT_OF_RESOURCES = "more shared memory than there is"


class Case(NamedTuple):
    """Rows to attend to, and a gradient for the output."""

    problem: Problem
    layout: Layout
    d_out_THC: Tensor

    @property
    def forward_flops(self) -> float:
        """Of the scores that a causal mask leaves, and their product with the values."""
        seen = sum(length * (length + 1) // 2 for length in self.problem.lengths)
        return 4.0 * self.problem.num_heads * self.problem.channels * seen


def draw_lengths(num_rows: int) -> list[int]:
    generator = torch.Generator().manual_seed(num_rows)
    return (790 + 136 * torch.randn(num_rows, generator=generator)).clamp(522, 1184).int().tolist()


def build_case(lengths: list[int], heads: int, kv_heads: int, channels: int) -> Case:
    heads_TNC = torch.randn(sum(lengths), heads + 2 * kv_heads, channels, device=CUDA, dtype=torch.bfloat16)
    d_out_THC = torch.randn(sum(lengths), heads, channels, device=CUDA, dtype=torch.bfloat16)
    return Case(Problem(heads_TNC, tuple(lengths), kv_heads, None), build_layout(lengths, CUDA), d_out_THC)


def time_ms(call: Callable[[], object]) -> float:
    """Milliseconds of one call, the best round of calls queued without a wait."""
    call()
    once_ms = time_round_ms(call, 1)
    repeats = max(2, min(MOST_REPEATS, int(ROUND_MS / once_ms)))
    return min(time_round_ms(call, repeats) for _ in range(ROUNDS))


def time_round_ms(call: Callable[[], object], repeats: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / repeats


def calls(case: Case) -> dict[str, Callable[[Tiling], object]]:
    """Our three kernels, on what they would be given."""
    problem, d_out, tilings = case.problem, case.d_out_THC, flash.TILINGS[case.problem.key]
    out, lse = flash.compute_attention(problem, tilings.attend)
    _, delta = flash.compute_query_grad(problem, out, d_out, lse, tilings.query_grad)
    return {
        "attend": lambda tiling: flash.compute_attention(problem, tiling),
        "query_grad": lambda tiling: flash.compute_query_grad(problem, out, d_out, lse, tiling),
        "key_grad": lambda tiling: flash.compute_key_grad(problem, d_out, lse, delta, tiling),
    }


def compile_all(case: Case, grid: Jobs) -> Broken:
    """Run every kernel once, on threads (compilers work outside Python's lock); returns those that cannot run."""
    run = calls(case)

    def attempt(job: tuple[str, Tiling]) -> bool:
        torch.ones(1, device=CUDA)  # a thread has no context before its first kernel, and Triton asks for none
        with torch.cuda.device(CUDA):
            try:
                run[job[0]](job[1])
            except OutOfResources:
                return False
        return True

    jobs = [(name, tiling) for name, tilings in grid.items() for tiling in tilings]
    with ThreadPoolExecutor(12) as pool:
        ran = list(pool.map(attempt, jobs))
    torch.cuda.synchronize()
    return {job for job, good in zip(jobs, ran, strict=True) if not good}


def find_registers(name: str, tiling: Tiling) -> str:
    """Registers and spilled bytes of the compiled kernel; the launches were its only ones."""
    kernel: Any = getattr(flash_kernels, f"{name}_kernel")
    found = []
    for compiled in kernel.device_caches[torch.cuda.current_device()][0].values():
        values = {kernel.arg_names[place[0]]: value for place, value in compiled.src.constants.items()}
        metadata = compiled.metadata
        cut = Tiling(
            values["BM"], values["BN"], metadata.num_warps, metadata.num_stages, values["SPLIT"], metadata.maxnreg
        )
        if cut == tiling:
            found.append(f"{compiled.n_regs} regs, {compiled.n_spills} spilled, {metadata.shared} shared")
    return "; ".join(found)


def time_torch(case: Case) -> tuple[float, float]:
    """Milliseconds of PyTorch's kernels, forward and backward."""
    window = case.problem.window
    arguments = (case.problem.heads_TNC, case.layout, case.problem.num_kv, window)
    forward_ms = time_ms(lambda: FlashAttended.attend(*arguments))
    _, state = FlashAttended.attend(*arguments)

    def backward() -> object:
        return torch.autograd.grad(state._out_THC, state._parts, case.d_out_THC, retain_graph=True)

    return forward_ms, time_ms(backward)


def measure(case: Case, grid: Jobs, broken: Broken) -> Tilings:
    """Print every kernel's figures; returns the fastest of each."""
    flops = {"attend": case.forward_flops, "query_grad": 1.5 * case.forward_flops, "key_grad": 2 * case.forward_flops}
    run, best = calls(case), {}
    for name, tilings in grid.items():
        taken = {cut: time_ms(partial(run[name], cut)) for cut in tilings if (name, cut) not in broken}
        for tiling, ms in sorted(taken.items(), key=lambda item: item[1]):
            cut = f"{tiling.rows}x{tiling.keys} warps {tiling.warps} stages {tiling.stages} split {tiling.split}"
            cut += f" registers {tiling.registers}" if tiling.registers else ""
            rate = flops[name] / ms / 1e9
            print(f"  {name:10} {cut:60} {ms:8.3f} ms {rate:6.0f} TFLOP/s of its own  {find_registers(name, tiling)}")
        best[name] = min(taken, key=lambda tiling: taken[tiling])
    return Tilings(**best)


def compare(case: Case) -> None:
    """Print both paths' errors against float32, for the heads of the last group."""
    problem, num_kv = case.problem, case.problem.num_kv
    group = problem.num_heads // num_kv
    q, k, v = problem.heads_TNC.split([problem.num_heads, num_kv, num_kv], 1)
    q, k, v = (part.float().requires_grad_() for part in (q[:, -group:], k[:, -1:], v[:, -1:]))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    out = reference.attention(q, k, v, problem.lengths)
    exact = [out.detach(), *torch.autograd.grad(out, (q, k, v), case.d_out_THC[:, -group:].float())]
    torch.set_float32_matmul_precision(before)
    for path in (FlashAttended, TritonAttended):
        attended, state = path.attend(problem.heads_TNC, case.layout, num_kv, None)
        results = (attended, *state.gradients(case.d_out_THC))
        errors = []
        for name, result, true in zip(("out", "dq", "dk", "dv"), results, exact, strict=True):
            off = (result[:, -true.shape[1] :].float() - true).abs()
            errors.append(f"{name} {float(off.max()):.1e} (rms {float(off.norm() / true.norm()):.1e})")
        print(f"  {path.__name__:15} off float32 by at most: {', '.join(errors)}")


def report(title: str, case: Case, grid: Jobs, broken: Broken) -> None:
    print(f"{title}: {len(case.problem.lengths)} rows, {len(case.problem.heads_TNC):,} tokens")
    forward_ms, backward_ms = time_torch(case)
    best = measure(case, grid, broken)
    print(f"  best: {best}")
    standing = flash.TILINGS[case.problem.key]
    for name, tilings in (("best", best), ("as shipped", standing)):
        flash.TILINGS[case.problem.key] = tilings
        arguments = (case.problem.heads_TNC, case.layout, case.problem.num_kv, None)
        ours_ms = time_ms(partial(TritonAttended.attend, *arguments))
        _, state = TritonAttended.attend(*arguments)
        ours_back_ms = time_ms(partial(state.gradients, case.d_out_THC))
        for step, ms, torchs_ms, flops in (
            ("forward", ours_ms, forward_ms, case.forward_flops),
            ("backward", ours_back_ms, backward_ms, 2.5 * case.forward_flops),
        ):
            print(
                f"  {name:10} {step:8}: varlen_attn {torchs_ms:.3f} ms ({flops / torchs_ms / 1e9:.0f} TFLOP/s), "
                f"ours {ms:.3f} ms ({flops / ms / 1e9:.0f} TFLOP/s), {torchs_ms / ms:.2f} times as fast"
            )
    flash.TILINGS[case.problem.key] = standing
    compare(case)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--channels", type=int, default=128, choices=[64, 96, 128])
    parser.add_argument("--long", type=int, default=16384, help="tokens of the long row; 0 for none")
    options = parser.parse_args()
    sizes = (options.heads, options.kv_heads, options.channels)
    cases = {f"{rows} rows": build_case(draw_lengths(rows), *sizes) for rows in (8, 20)}
    shipped = flash.TILINGS[cases["8 rows"].problem.key]._asdict()
    grid = {name: list(dict.fromkeys([shipped[name], *tried])) for name, tried in GRID.items()}
    if options.long:
        cases["one long row"] = build_case([options.long], *sizes)
    broken = compile_all(cases["8 rows"], grid)
    for name, tiling in sorted(broken, key=str):
        print(f"left out: {name} {tiling}: {OUT_OF_RESOURCES}")
    for title, case in cases.items():
        report(title, case, grid, broken)


if __name__ == "__main__":
    main()
