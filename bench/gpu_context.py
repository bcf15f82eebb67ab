"""The longest row that can be trained on a card of a given size: NF4, one row of N tokens, the allocator capped.

torch's allocator is held to the cap from before the weights are read, as on a card of that size, so the load must fit
too. The row is random ids, every token trained, two optimizer steps through medcot's own trainer with checkpoints in
pinned host memory (``gradient_checkpointing=offload``); the second has the optimizer's moments too. ``--search``
goes through lengths from short to long on one loaded model, and stops at the first that does not fit. A cap on the
allocator leaves out the CUDA context (about 0.5 GiB) and the libraries' own workspaces, which is why a 16 GB card is
written as 14.5 GiB here.

    python bench/gpu_context.py MODEL_FOLDER 56000 14.5 --json out.jsonl
    python bench/gpu_context.py MODEL_FOLDER 24576 14.5 --search 40960,49152,56000,61440,65536 --json out.jsonl
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from gpu_common import GIB, free_memory, is_out_of_memory, synchronise, write_line
from gpu_sft import RECIPE, load_tuned
from medcot import engine, planning
from medcot.model import choose_device
from medcot.recipe import Recipe, load_recipe
from medcot.records import Row
from medcot.shapes import Shape, compute_shape
from medcot.train import sft

STEPS = 2
FIRST_ID, LAST_ID = 5, 49000  # the peers' script draws from the same range
SEED = 3407


@dataclass
class Steps:
    """When each step ended; give it to ``train`` as ``on_step``."""

    device: torch.device
    ends_s: list[float] = field(default_factory=list)
    loss: float | None = None

    def __call__(self, step: int, metrics: sft.Metrics | None) -> None:
        """Note a step's end."""
        if metrics is None:
            synchronise(self.device)
            self.ends_s.append(time.perf_counter())
        else:
            self.loss = metrics.loss


def build_recipe(folder: str, longest: int, precision: str) -> Recipe:
    """Return the tutorial's recipe for two steps of one long row."""
    return load_recipe(
        RECIPE,
        [
            f"model.source={folder}",
            f"model.precision={precision}",
            f"model.max_seq_length={longest}",
            "train.batch_size=1",
            "train.micro_batch_size=1",
            f"train.max_steps={STEPS}",
            "train.warmup=1",
            "train.save_steps=null",
            "train.gradient_checkpointing=offload",
        ],
    )


def make_rows(num_tokens: int) -> list[Row]:
    """Rows of random ids, one a step, every token trained."""
    generator = torch.Generator().manual_seed(SEED)
    rows = []
    for step in range(STEPS):
        ids = torch.randint(FIRST_ID, LAST_ID, (num_tokens,), generator=generator).tolist()
        everything = (0, num_tokens)
        rows.append(Row(f"random-{step}", ids, ids, everything, everything, everything, everything))
    return rows


def cap_memory(device: torch.device, cap_gib: float) -> None:
    """Hold torch's allocator to a number of GiB, on a GPU."""
    if device.type == "cuda":
        total_gib = torch.cuda.get_device_properties(device).total_memory / GIB
        torch.cuda.set_per_process_memory_fraction(cap_gib / total_gib, device)


def try_length(num_tokens: int, tuned: Any, tokenizer: Any, shape: Shape, recipe: Recipe) -> dict[str, Any]:
    """Train two steps on rows of one length; returns whether it fits, and what it took."""
    device, rows = tuned.device, make_rows(num_tokens)
    engine.release(tuned)
    free_memory(device)
    assert engine.accelerate(tuned).fast
    plan, predicted_gib = planning.build_plan(recipe, rows, shape, recipe.model.precision.value, device, fast=True)
    steps, fits, note = Steps(device), True, ""
    started_s = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory() as folder:
            sft.train(tuned, tokenizer, rows, plan, Path(folder), on_step=steps)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        fits, note = False, str(error).splitlines()[0]
        tuned.zero_grad(set_to_none=True)
    return {
        "value": num_tokens,
        "unit": "tokens",
        "fits": fits,
        "peak_gib": round(sft.peak_memory_gb(device), 3),
        "reserved_gib": round(torch.cuda.max_memory_reserved(device) / GIB, 3) if device.type == "cuda" else None,
        "predicted_gib": round(predicted_gib, 3),
        "step_s": round((steps.ends_s[-1] - started_s) / STEPS, 2) if fits else None,
        "last_step_s": round(steps.ends_s[-1] - steps.ends_s[-2], 2) if fits else None,
        "loss": steps.loss,
        **({"error": note} if note else {}),
    }


def describe(line: dict[str, Any]) -> str:
    """Say what a line says, for people."""
    head = f"CONTEXT {line['value']:,} tokens, cap {line['cap_gib']} GiB:"
    reserved = "" if line["reserved_gib"] is None else f", reserved {line['reserved_gib']:.2f}"
    memory = f"peak {line['peak_gib']:.2f} GiB{reserved}, predicted {line['predicted_gib']:.2f}"
    if not line["fits"]:
        return f"{head} does not fit, {memory}; {line['error']}"
    return f"{head} fits, {memory}; {line['step_s']:.1f} s/step, the last {line['last_step_s']:.1f}"


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of the model")
    parser.add_argument("tokens", type=int, help="N")
    parser.add_argument("gib", type=float, help="cap of the allocator")
    parser.add_argument("--search", default="", help="further lengths, with commas")
    parser.add_argument("--precision", default="nf4", help="how the base is held")
    parser.add_argument("--json", type=Path, help="file that one line a length is added to")
    options = parser.parse_args()
    options.lengths = sorted({options.tokens, *(int(n) for n in options.search.split(",") if n)})
    return options


def main() -> None:
    """Try the lengths, shortest first."""
    options = parse_options()
    cap_memory(choose_device(), options.gib)
    recipe = build_recipe(options.model, options.lengths[-1], options.precision)
    loaded, tuned, _ = load_tuned(recipe)
    shape = compute_shape(loaded.model.config)
    longest = 0
    for num_tokens in options.lengths:
        line = {"figure": "context", "system": "medcot", "cap_gib": options.gib, "precision": options.precision}
        line |= try_length(num_tokens, tuned, loaded.tokenizer, shape, recipe)
        print(describe(line), flush=True)
        write_line(line, options.json)
        if not line["fits"]:
            break
        longest = num_tokens
    print(f"longest that fits in {options.gib} GiB: {longest:,} tokens" if longest else "none fits")
    if not longest:
        sys.exit(1)


if __name__ == "__main__":
    main()
