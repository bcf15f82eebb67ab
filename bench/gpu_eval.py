"""Answering an evaluation on one GPU: tokens a second through the local back end, and what refilling slots is worth.

Two cases, both greedy, every answer written to its limit with EOS passed over, so that all systems write the same
number of tokens:

- ``eval``: 256 questions of 512 new tokens through ``TokenBackend``, in 256 slots, in bf16 and in bf16 with LoRA (rank
  16, random, unmerged); beside it transformers' own ``generate``, reached through the same back end with the engine
  taken off, on the first 64 of the same questions for 64 tokens: it is slow, and its rate hardly depends on the number.
- ``uneven``: 512 prompts whose limits are drawn evenly from 64 to 2,048, in 128 slots: with a slot's next prompt put in
  as its row ends, and batch after batch, each as slow as its longest row.

Each is run once briefly first, which compiles and loads what only the first use needs. ``--tiny`` takes sizes that a
CPU writes in seconds, to see that it runs; its figures mean nothing.

    python bench/gpu_eval.py MODEL_FOLDER --peer --save
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gpu_answers import ALPHA, GREEDY, QUESTION, RANK, make_prompts, randomise
from gpu_common import GIB, free_memory, synchronise, write_line
from medcot import engine, model
from medcot.evaluate.backends import Answer, Limits, Request
from medcot.evaluate.local import ModelWriter, TokenBackend
from medcot.generate import generate
from medcot.machine import describe_machine
from medcot.model import LoadedModel
from medcot.prompt import Style
from medcot.records import Finish
from results import format_table, save_result

SEED = 3407


@dataclass(frozen=True)
class Sizes:
    """How much is written."""

    rows: int = 256
    new_tokens: int = 512
    peer_rows: int = 64
    peer_tokens: int = 64
    uneven_rows: int = 512
    uneven_slots: int = 128
    shortest: int = 64
    longest: int = 2048
    warm_up_tokens: int = 8


TINY = Sizes(6, 10, 3, 4, 12, 4, 2, 12, 2)


def answer_all(tuned: Any, loaded: LoadedModel, rows: int, new_tokens: int) -> int:
    """Answer that many questions through the back end; return the tokens written."""
    # Whatever a random model writes is thinking, but thinking and answer share one limit here.
    limits = Limits(new_tokens - 1, 1)
    questions = [(QUESTION * (4 + row % 9)).strip() for row in range(rows)]
    requests = [Request(f"q-{row}", question, GREEDY, 0, limits) for row, question in enumerate(questions)]
    writer = ModelWriter(tuned, loaded.tokenizer, stop_at_eos=False)
    answers: list[Answer] = []
    TokenBackend(writer, loaded.tokenizer, Style.SHORT, batch_size=rows).answer(requests, answers.append)
    assert len(answers) == rows and all(answer.finish is Finish.LENGTH for answer in answers)
    return rows * new_tokens


def write_uneven(tuned: Any, loaded: LoadedModel, sizes: Sizes, most: int, *, refill: bool) -> int:
    """Write the uneven answers, of at most ``most`` tokens, in one go or batch after batch; return the tokens."""
    draws = torch.Generator().manual_seed(SEED)
    rooms = torch.randint(sizes.shortest, sizes.longest + 1, (sizes.uneven_rows,), generator=draws).clamp_max(most)
    prompts = make_prompts(loaded, sizes.uneven_rows)
    at_once = sizes.uneven_rows if refill else sizes.uneven_slots
    written = 0
    for start in range(0, sizes.uneven_rows, at_once):
        some = slice(start, start + at_once)
        answers = generate(
            tuned,
            loaded.tokenizer,
            prompts[some],
            max_new_tokens=rooms[some].tolist(),
            sampling=GREEDY,
            seed=0,
            batch_size=sizes.uneven_slots,
            stop_at_eos=False,
        )
        written += sum(len(tokens) for tokens, _ in answers)
    assert written == int(rooms.sum())
    return written


def time_case(figure: str, device: torch.device, work: Callable[[bool], int], **settings: Any) -> dict[str, Any]:
    """Run ``work`` briefly, then wholly; its line."""
    work(True)
    synchronise(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    num_tokens = work(False)
    synchronise(device)
    seconds = time.perf_counter() - start
    line = {"figure": figure, "value": num_tokens / seconds, "unit": "tok/s", "seconds": seconds, "tokens": num_tokens}
    if device.type == "cuda":
        line["peak_gib"] = torch.cuda.max_memory_allocated(device) / GIB
    print(line | settings, flush=True)
    return line | settings


def measure(folder: Path, sizes: Sizes, *, uneven: bool, peer: bool, device: str) -> list[dict[str, Any]]:
    """All cases, on one loaded model."""
    loaded = model.load(str(folder), precision="bf16", max_seq_length=sizes.longest, device=device)
    tuned = model.attach_lora(loaded, r=RANK, alpha=ALPHA)
    randomise(tuned)
    explanation = engine.accelerate(tuned)
    assert explanation.fast, explanation.reason
    where = torch.device(tuned.device)
    lines = []
    for lora in (False, True):
        with contextlib.nullcontext() if lora else tuned.disable_adapter():

            def answer(brief: bool) -> int:
                return answer_all(tuned, loaded, sizes.rows, sizes.warm_up_tokens if brief else sizes.new_tokens)

            figure = "eval-bf16-lora" if lora else "eval-bf16"
            lines.append(time_case(figure, where, answer, system="medcot", rows=sizes.rows, slots=sizes.rows))
    for refill in (True, False) if uneven else ():

        def write(brief: bool, refill: bool = refill) -> int:
            most = sizes.warm_up_tokens if brief else sizes.longest
            return write_uneven(tuned, loaded, sizes, most, refill=refill)

        system = "medcot, slots refilled" if refill else "medcot, batch after batch"
        counts = {"rows": sizes.uneven_rows, "slots": sizes.uneven_slots}
        lines.append(time_case("uneven-bf16-lora", where, write, system=system, **counts))
    if peer:
        engine.release(tuned)

        def answer_plainly(brief: bool) -> int:
            return answer_all(tuned, loaded, sizes.peer_rows, 2 if brief else sizes.peer_tokens)

        counts = {"rows": sizes.peer_rows, "slots": sizes.peer_rows}
        lines.append(time_case("eval-bf16-lora", where, answer_plainly, system="transformers", **counts))
    return lines


def describe(lines: Sequence[dict[str, Any]]) -> str:
    """The table."""
    columns = ["figure", "system", "tok/s", "seconds", "tokens", "rows", "slots", "peak GiB"]
    rows = [
        [
            line["figure"],
            line["system"],
            format(line["value"], ",.0f"),
            format(line["seconds"], ".2f"),
            format(line["tokens"], ","),
            str(line["rows"]),
            str(line["slots"]),
            format(line["peak_gib"], ".1f") if "peak_gib" in line else "",
        ]
        for line in lines
    ]
    return format_table(columns, rows)


def summarise(lines: Sequence[dict[str, Any]]) -> str:
    """The result in a few words."""
    found = {(line["figure"], line["system"]): line["value"] for line in lines}
    parts = [f"eval: {found['eval-bf16', 'medcot']:,.0f} tok/s, with LoRA {found['eval-bf16-lora', 'medcot']:,.0f}"]
    if ("eval-bf16-lora", "transformers") in found:
        parts.append(f"transformers {found['eval-bf16-lora', 'transformers']:,.0f}")
    ways = [found.get(("uneven-bf16-lora", f"medcot, {way}")) for way in ("slots refilled", "batch after batch")]
    if all(ways):
        parts.append(f"uneven: {ways[0]:,.0f} refilled against {ways[1]:,.0f} batch after batch")
    return "; ".join(parts)


def main() -> None:
    """Run the cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="model folder, 16-bit")
    parser.add_argument("--peer", action="store_true", help="transformers' generate beside it")
    parser.add_argument("--even", action="store_true", help="without the uneven case, which takes two minutes")
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU and a tiny model")
    parser.add_argument("--json", type=Path, help="file that the lines are added to")
    parser.add_argument("--save", action="store_true", help="add the table to RESULTS.md")
    options = parser.parse_args()
    if options.tiny and options.save:
        parser.error("--save keeps figures, and those of --tiny mean nothing")
    device = "cpu" if options.tiny else "cuda"
    sizes = TINY if options.tiny else Sizes()
    lines = measure(options.folder, sizes, uneven=not options.even, peer=options.peer, device=device)
    free_memory(torch.device(device))
    for line in lines:
        write_line(line, options.json)
    text = describe(lines)
    print(f"{text}\n\n{summarise(lines)}")
    if options.save:
        save_result("gpu_eval", describe_machine(), summarise(lines), text)


if __name__ == "__main__":
    main()
