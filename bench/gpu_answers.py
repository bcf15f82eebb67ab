"""Answering on one GPU: tokens a second of a batch in bf16, of one prompt and of a hundred in NF4, all with LoRA.

Every row is written to its limit, EOS passed over, so that both sides write the same number of tokens; greedy, except
where a question is sampled as the recipes sample it. The LoRA is random: rank 16 on seven projections, unmerged. Each
case is run once briefly first, which compiles and loads what only the first use needs; that first use is a line of its
own column (``cold s``). ``first token s`` is from the call to the first token told.

``--peer`` runs transformers' own ``generate`` on the same model and prompts: its default cache, no compilation.
``--kernels`` times the packed product alone at the model's shapes, in GB/s of packed weights and scales.

    python bench/gpu_answers.py MODEL_FOLDER --peer --json out.jsonl
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gpu_common import GIB, free_memory, synchronise, write_line
from medcot import engine, model
from medcot.engine.products import ThinProduct, can_be_thin
from medcot.generate import Sampling, generate
from medcot.model import LoadedModel
from results import format_table

GREEDY, WARM = Sampling(0.0, 1.0), Sampling(0.6, 0.95)
RANK, ALPHA = 16, 16
QUESTION = "Question: what causes anaemia? "
WARM_UP_TOKENS = 8
PEER_TOKENS = 64  # it is slow, and its rate does not depend on the number much
ITERATIONS = 200


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    figure: str
    precision: str
    rows: int
    new_tokens: int
    sampling: Sampling
    lora: bool = True


CASES = [
    Case("answers-bf16", "bf16", 64, 256, GREEDY, lora=False),
    Case("answers-bf16-lora", "bf16", 64, 256, GREEDY),
    Case("answer-nf4", "nf4", 1, 400, GREEDY),
    Case("question-nf4", "nf4", 1, 1200, WARM),
    Case("graded-nf4", "nf4", 100, 200, GREEDY),
]


def make_prompts(loaded: LoadedModel, rows: int) -> list[list[int]]:
    """Prompts of 4 to 12 repeats of a short question, so that the rows differ in length."""
    return [loaded.tokenizer(QUESTION * (4 + row % 9)).input_ids for row in range(rows)]


def randomise(tuned: Any) -> None:
    """Give every B values: a new adapter's are zero."""
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)


def run_case(tuned: Any, loaded: LoadedModel, case: Case) -> dict[str, Any]:
    """Measure one case; the adapter is switched off where the case has none."""
    prompts = make_prompts(loaded, case.rows)
    device = tuned.device
    first_s: list[float] = []

    def answer(new_tokens: int) -> float:
        first_s.clear()
        synchronise(device)
        start = time.perf_counter()

        def on_token(row: int, token: int) -> None:
            if not first_s:
                first_s.append(time.perf_counter() - start)

        written = generate(
            tuned,
            loaded.tokenizer,
            prompts,
            max_new_tokens=new_tokens,
            sampling=case.sampling,
            seed=0,
            batch_size=case.rows,
            stop_at_eos=False,
            on_token=on_token,
        )
        elapsed = time.perf_counter() - start
        assert all(len(tokens) == new_tokens for tokens, _ in written)
        return elapsed

    cold_s = answer(WARM_UP_TOKENS)
    torch.cuda.reset_peak_memory_stats(device)
    elapsed_s = answer(case.new_tokens)
    return {
        "figure": case.figure,
        "system": "medcot",
        "value": case.rows * case.new_tokens / elapsed_s,
        "unit": "tok/s",
        "seconds": elapsed_s,
        "first_token_s": first_s[0],
        "cold_s": cold_s,
        "peak_gib": torch.cuda.max_memory_allocated(device) / GIB,
    }


def run_peer(tuned: Any, loaded: LoadedModel, case: Case) -> dict[str, Any]:
    """Measure transformers' generate on the same prompts, left-padded."""
    prompts = make_prompts(loaded, case.rows)
    longest = max(map(len, prompts))
    ids = torch.zeros(case.rows, longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    inputs = {"input_ids": ids.to(tuned.device), "attention_mask": mask.to(tuned.device)}

    def answer(new_tokens: int) -> float:
        synchronise(tuned.device)
        start = time.perf_counter()
        tuned.generate(**inputs, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
        synchronise(tuned.device)
        return time.perf_counter() - start

    with torch.no_grad():
        answer(2)
        tokens = min(case.new_tokens, PEER_TOKENS)
        elapsed_s = answer(tokens)
    return {
        "figure": case.figure,
        "system": "transformers",
        "value": case.rows * tokens / elapsed_s,
        "unit": "tok/s",
        "seconds": elapsed_s,
        "new_tokens": tokens,
    }


def time_s(work: Callable[[], object]) -> float:
    """Seconds of one launch, many in a row recorded in a graph."""
    stream = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        work()
        graph.capture_begin()
        for _ in range(ITERATIONS):
            work()
        graph.capture_end()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    graph.replay()
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / ITERATIONS


def run_kernels(tuned: Any) -> list[dict[str, Any]]:
    """Time each of a layer's packed products, eight layers in turn, which no cache holds."""
    fast = engine.engine_of(tuned)
    assert fast is not None
    lines = []
    for place, name in enumerate(("qkv", "out", "gate_up", "down")):
        projections = [layer.projections[place] for layer in fast.layers[:8]]
        assert all(can_be_thin(projection) for projection in projections)
        products = [ThinProduct(projection, fast.dtype) for projection in projections]
        x = torch.randn(1, products[0].inputs, device=tuned.device)
        ranks = 0 if products[0].A_RD is None else len(products[0].A_RD)
        u = torch.randn(1, 1, ranks, device=tuned.device) if ranks else None
        calls = iter(products * ITERATIONS)

        def work(calls: Any = calls, x: torch.Tensor = x, u: torch.Tensor | None = u) -> object:
            return next(calls).multiply(x, u)

        seconds = time_s(work)
        size = sum(words.nbytes for words in products[0].words) + products[0].scales.nbytes
        lines.append(
            {"figure": f"gemv-{name}", "system": "medcot", "value": size / seconds / 1e9, "unit": "GB/s"}
            | {"seconds": seconds}
        )
    return lines


def measure(folder: Path, precision: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """All cases of one precision, on one loaded model."""
    loaded = model.load(str(folder), precision=precision, device="cuda")
    tuned = model.attach_lora(loaded, r=RANK, alpha=ALPHA)
    randomise(tuned)
    explanation = engine.accelerate(tuned)
    assert explanation.fast, explanation.reason
    lines: list[dict[str, Any]] = []
    for case in CASES:
        if case.precision != precision or (options.case and case.figure not in options.case):
            continue
        for run in (run_case, run_peer) if options.peer else (run_case,):
            if case.lora:
                line = run(tuned, loaded, case)
            else:
                with tuned.disable_adapter():
                    line = run(tuned, loaded, case)
            settings = {"precision": precision, "rows": case.rows, "new_tokens": case.new_tokens, "lora": case.lora}
            lines.append(settings | line)
            print(lines[-1], flush=True)
    if options.kernels and precision == "nf4":
        lines += run_kernels(tuned)
    return lines


def describe(lines: list[dict[str, Any]]) -> str:
    """The table."""

    def cell(line: dict[str, Any], name: str, form: str) -> str:
        return format(line[name], form) if name in line else ""

    columns = ["figure", "system", "value", "unit", "seconds", "first token s", "cold s", "peak GiB"]
    rows = [
        [
            line["figure"],
            line["system"],
            format(line["value"], ",.0f"),
            line["unit"],
            cell(line, "seconds", ".2f" if line["unit"] == "tok/s" else ".2e"),
            cell(line, "first_token_s", ".3f"),
            cell(line, "cold_s", ".2f"),
            cell(line, "peak_gib", ".1f"),
        ]
        for line in lines
    ]
    return format_table(columns, rows)


def main() -> None:
    """Run the cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="model folder, 16-bit")
    parser.add_argument("--precision", default="bf16,nf4", help="which to load, one after the other")
    parser.add_argument("--case", type=lambda text: text.split(","), help="figures to measure; all by default")
    parser.add_argument("--peer", action="store_true", help="transformers' generate beside each")
    parser.add_argument("--kernels", action="store_true", help="the packed product alone")
    parser.add_argument("--json", type=Path, help="file that the lines are added to")
    options = parser.parse_args()
    lines: list[dict[str, Any]] = []
    for precision in options.precision.split(","):
        lines += measure(options.folder, precision, options)
        free_memory(torch.device("cuda"))
    for line in lines:
        write_line(line, options.json)
    print(describe(lines))


if __name__ == "__main__":
    main()
