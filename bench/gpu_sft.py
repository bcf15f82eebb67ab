"""Training throughput and memory on a GPU by named setting, and the rate that its matrix products alone would allow.

Each case is one row of the issue's table: a precision, rows a step, rows a forward, and what becomes of activations.
The recipe is the tutorial's in everything else, and training goes through medcot's own trainer, so what is timed is
what a run does. Real rows are encoded and repeated as the steps need. Cases of one precision share one loaded model,
its adapter simply trains on: throughput does not depend on what the weights are.

What is counted: real tokens (no system here pads) between the end of the warm-up and the end of the last step, over
the wall time between two synchronisations, one at each mark; in between the trainer runs as it always does, and looks
at the loss as often as the warm-up is long, because only then does it report how many tokens it has seen. The peak is
``torch.cuda.max_memory_allocated`` over all steps; that of the steps after the warm-up alone is kept beside it.

``--ceiling`` measures what the matrix products alone would allow, sustained, in the same run (gpu_ceiling.py).

    python bench/gpu_sft.py MODEL_FOLDER ROWS.jsonl --case tutorial-nf4,best-nf4 --json out.jsonl
    python bench/gpu_sft.py MODEL_FOLDER ROWS.jsonl --case all --both --ceiling --json out.jsonl
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from gpu_ceiling import ceilings
from gpu_common import GIB, free_memory, is_out_of_memory, seconds_since_start, synchronise, write_line
from gpu_table import TRAINED, WHOLE
from medcot import engine, model, planning
from medcot.engine.frozen import Fp8, Fp8Head, choose_fp8
from medcot.recipe import Recipe, load_recipe
from medcot.records import Row
from medcot.shapes import Shape, compute_shape
from medcot.train import sft

RECIPE = "tutorial-8b"


@dataclass(frozen=True)
class Case:
    """A setting; several numbers of rows are several runs."""

    figure: str  # the row of the table that it speaks for
    precision: str
    rows: tuple[int, ...]  # a step
    split: int | None = None  # rows a forward; None: the whole step in one
    checkpointing: str = "off"
    fp8: Fp8 | None = None  # what an FP8 base computes in 8 bit; None: the default


CASES = {
    "tutorial-nf4": Case("tutorial-nf4", "nf4", (8,)),
    "best-nf4": Case("best-nf4", "nf4", (20,)),
    "nf4-recompute": Case("nf4-recompute", "nf4", (8, 16), checkpointing="on"),
    "tutorial-2x4": Case("tutorial-2x4", "nf4", (8,), split=2, checkpointing="offload"),
    "best-bf16": Case("best-bf16", "bf16", (8, 20)),
    "fp8-8": Case("fp8", "fp8", (8,)),
    "best-fp8": Case("fp8", "fp8", (32, 40)),
    # What the choices of gpu_curves.py cost; no row of the table.
    "fp8-head-forward16": Case("fp8-head-forward16", "fp8", (8, 32), fp8=Fp8(head_forward=False)),
    "fp8-head16": Case("fp8-head16", "fp8", (8,), fp8=Fp8(head_forward=False, head_backward=False)),
    "fp8-slow-backward": Case("fp8-slow-backward", "fp8", (40,), fp8=Fp8(fast_backward=False)),
    "fp8-fast-sums": Case("fp8-fast-sums", "fp8", (40,), fp8=Fp8(longest_fast_sum=1 << 20)),
    "fp8-slow-accum": Case("fp8-slow-accum", "fp8", (8,), fp8=Fp8(fast_accum=False)),
}


@dataclass
class Held:
    """A loaded model with its adapter, the rows by label policy, and how long it took to get here."""

    precision: str
    tuned: Any
    tokenizer: Any
    shape: Shape
    device: torch.device
    rows: dict[str, list[Row]]
    load_s: float
    choice: Fp8 = field(default_factory=Fp8)  # what an FP8 base computes in 8 bit


@dataclass
class Clock:
    """Takes the two marks of a run; give it to ``train`` as ``on_step``."""

    device: torch.device
    warmup: int
    last: int
    first_step_s: float = 0.0  # since the process started
    started_s: float = 0.0
    stopped_s: float = 0.0
    warmup_peak_gib: float = 0.0
    seen: dict[int, sft.Metrics] = field(default_factory=dict)

    def __call__(self, step: int, metrics: sft.Metrics | None) -> None:
        """Note a step's end; those of no interest cost nothing."""
        if metrics is not None:
            self.seen[step] = metrics
            return
        if step == 1:
            synchronise(self.device)
            self.first_step_s = seconds_since_start()
        if step == self.warmup:
            synchronise(self.device)
            self.warmup_peak_gib = sft.peak_memory_gb(self.device)
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
            self.started_s = time.perf_counter()
        elif step == self.last:
            synchronise(self.device)
            self.stopped_s = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Between the marks."""
        return self.stopped_s - self.started_s

    @property
    def tokens(self) -> int:
        """Real tokens between the marks."""
        return self.seen[self.last].tokens - self.seen[self.warmup].tokens


def build_recipe(folder: str, rows: str, case: Case, num_rows: int, steps: int, warmup: int, labels: str) -> Recipe:
    """Return the tutorial's recipe with a case's settings."""
    return load_recipe(
        RECIPE,
        [
            f"model.source={folder}",
            f"model.precision={case.precision}",
            f"data.source={rows}",
            f"train.batch_size={num_rows}",
            f"train.micro_batch_size={case.split or num_rows}",
            f"train.gradient_checkpointing={case.checkpointing}",
            f"train.max_steps={steps}",
            f"train.logging_steps={warmup}",
            f"train.train_on_prompt={str(labels == WHOLE).lower()}",
            "train.save_steps=null",
        ],
    )


def load_tuned(recipe: Recipe) -> tuple[Any, Any, float]:
    """Load the model, attach the adapter and accelerate; returns the loaded and the tuned model, and the seconds."""
    started_s = time.perf_counter()
    stage = recipe.model
    loaded = model.load(stage.source, precision=stage.precision.value, max_seq_length=stage.max_seq_length)
    tuned = model.attach_lora(loaded, r=recipe.lora.r, alpha=recipe.lora.alpha, seed=recipe.lora.seed)
    explanation = engine.accelerate(tuned)
    synchronise(loaded.device)
    load_s = time.perf_counter() - started_s
    assert explanation.fast, explanation.reason
    print(f"{recipe.model.precision.value} loaded in {load_s:.1f} s\n{explanation}", flush=True)
    return loaded, tuned, load_s


def hold(recipe: Recipe, labels: Sequence[str]) -> Held:
    """Load what a recipe names, and encode its rows for each label policy."""
    raw = planning.read_examples(recipe)
    loaded, tuned, load_s = load_tuned(recipe)
    rows = {}
    for policy in labels:
        asked = load_recipe(recipe, [f"train.train_on_prompt={str(policy == WHOLE).lower()}"])
        rows[policy] = planning.encode_examples(raw, asked, loaded.tokenizer).rows
    return Held(
        precision=recipe.model.precision.value,
        tuned=tuned,
        tokenizer=loaded.tokenizer,
        shape=compute_shape(loaded.model.config),
        device=loaded.device,
        rows=rows,
        load_s=load_s,
    )


def train_held(
    held: Held, recipe: Recipe, labels: str, on_step: Callable[[int, sft.Metrics | None], None]
) -> tuple[sft.Plan, float]:
    """Train a held model by a recipe; returns the plan and the peak that was predicted, GiB."""
    stage = recipe.train
    assert stage.max_steps is not None, "build_recipe sets it"
    rows = list(itertools.islice(itertools.cycle(held.rows[labels]), stage.max_steps * stage.batch_size))
    engine.release(held.tuned)  # buffers that an earlier case has made would count as this one's memory
    free_memory(held.device)
    assert engine.accelerate(held.tuned).fast
    if held.precision == "fp8":
        check_choice(held.tuned, held.choice)
    plan, predicted_gib = planning.build_plan(recipe, rows, held.shape, held.precision, held.device, fast=True)
    with tempfile.TemporaryDirectory() as folder:
        sft.train(held.tuned, held.tokenizer, rows, plan, Path(folder), on_step=on_step)
    return plan, predicted_gib


def check_choice(tuned: Any, choice: Fp8) -> None:
    """See that the loss goes through the head as an FP8 choice wants it, so that no figure is given a wrong name."""
    fast = engine.engine_of(tuned)
    assert fast is not None
    usual = choice.head_forward and choice.head_backward
    assert usual or isinstance(fast.head, torch.Tensor | Fp8Head), f"the engine's head does not follow {choice}"


def measure(held: Held, recipe: Recipe, labels: str, warmup: int) -> dict[str, Any]:
    """Run one case; returns the measured part of its line."""
    steps = recipe.train.max_steps
    assert steps is not None, "build_recipe sets it"
    clock = Clock(held.device, warmup, steps)
    held_gib = torch.cuda.memory_allocated(held.device) / GIB if held.device.type == "cuda" else 0.0
    plan, predicted_gib = train_held(held, recipe, labels, clock)
    steady_gib = sft.peak_memory_gb(held.device)
    counted = steps - warmup
    trained = clock.seen[steps].trained_tokens - clock.seen[warmup].trained_tokens
    return {
        "value": round(clock.tokens / clock.seconds, 1),
        "unit": "tokens/s",
        "trained_tokens_s": round(trained / clock.seconds, 1),
        "step_s": round(clock.seconds / counted, 4),
        "tokens_a_step": clock.tokens // counted,
        "peak_gib": round(max(clock.warmup_peak_gib, steady_gib), 3),
        "steady_peak_gib": round(steady_gib, 3),
        "predicted_gib": round(predicted_gib, 3),
        "held_gib": round(held_gib, 3),
        "micro_batch": plan.micro_batch_size,
        "loss_first": clock.seen[1].loss,
        "loss_last": clock.seen[steps].loss,
        "first_step_s": round(clock.first_step_s, 2),
    }


def run_case(
    name: str, num_rows: int, held: Held, labels: str, options: argparse.Namespace, *, first: bool
) -> dict[str, Any]:
    """Measure one case; returns its line. One that does not fit has no value, and says so."""
    case = CASES[name]
    held.choice = case.fp8 or Fp8()
    choose_fp8(held.tuned, held.choice)
    recipe = build_recipe(options.model, options.rows, case, num_rows, options.steps, options.warmup, labels)
    line: dict[str, Any] = {
        "figure": case.figure,
        "system": "medcot",
        "case": name,
        "precision": case.precision,
        "rows": num_rows,
        "split": case.split or num_rows,
        "checkpointing": case.checkpointing,
        "labels": labels,
        "steps": options.steps - options.warmup,
        "load_s": round(held.load_s, 2),
        "value": None,
        "unit": "tokens/s",
    }
    try:
        line |= measure(held, recipe, labels, options.warmup)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        held.tuned.zero_grad(set_to_none=True)
        line["error"] = f"out of memory: {str(error).splitlines()[0]}"
    if not first:
        line.pop("first_step_s", None)  # of a later case it says nothing
    return line


def print_line(line: dict[str, Any]) -> None:
    """Say what a line says, for people."""
    head = f"{line['case']:<14} {line['rows']:>2} rows, {line['labels']:<20}"
    if line["value"] is None:
        print(f"{head}  {line['error']}", flush=True)
        return
    started = f", first step {line['first_step_s']:.1f} s after process start" if "first_step_s" in line else ""
    print(
        f"{head} {line['value']:>9,.0f} tok/s  {line['step_s']:.3f} s/step  {line['tokens_a_step']:,} tok/step  peak"
        f" {line['peak_gib']:.2f} GiB (steady {line['steady_peak_gib']:.2f}, predicted {line['predicted_gib']:.2f})"
        f"  loss {line['loss_first']:.3f} → {line['loss_last']:.3f}{started}",
        flush=True,
    )


def run_cases(names: Sequence[str], labels: Sequence[str], options: argparse.Namespace) -> list[str]:
    """Measure cases, each precision loaded once; returns the names of those that failed, their errors printed.

    One that fails does not take the others with it: the machine's time is short and the failure is reported.
    """
    failed, first = [], True
    for precision in dict.fromkeys(CASES[name].precision for name in names):
        chosen = [name for name in names if CASES[name].precision == precision]
        try:
            case = CASES[chosen[0]]
            held = hold(build_recipe(options.model, options.rows, case, 8, 1, 1, WHOLE), labels)
        except Exception:
            traceback.print_exc()
            failed += chosen
            continue
        for name, policy in itertools.product(chosen, labels):
            for num_rows in CASES[name].rows:
                try:
                    line = run_case(name, num_rows, held, policy, options, first=first)
                except Exception:
                    traceback.print_exc()
                    failed.append(name)
                else:
                    print_line(line)
                    write_line(line, options.json)
                first = False
        device = held.device
        del held
        free_memory(device)
    return failed


def run_ceilings(options: argparse.Namespace) -> None:
    """Measure, print and write the ceilings at the real rows' mean length."""
    from transformers import AutoConfig

    recipe = build_recipe(options.model, options.rows, CASES["tutorial-nf4"], 8, 1, 1, WHOLE)
    tokenizer = model.load_tokenizer(options.model)
    rows = planning.encode_examples(planning.read_examples(recipe), recipe, tokenizer).rows
    num_tokens = round(8 * statistics.mean(row.num_tokens for row in rows))
    shape = compute_shape(AutoConfig.from_pretrained(options.model))
    for line in ceilings(shape, num_tokens, options.ceiling_seconds, model.choose_device()):
        print(
            f"{line['figure']:<23} {line['tflops']:>7,.0f} TFLOP/s (layers alone {line['layer_tflops']:,.0f})"
            f" → {line['value']:>8,.0f} tok/s at {num_tokens:,} tokens a step",
            flush=True,
        )
        write_line(line, options.json)


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of the model")
    parser.add_argument("rows", help="file of rows with question, reasoning and response")
    parser.add_argument("--case", default="", help=f"all of the table, or names: {', '.join(CASES)}")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--trained-only", action="store_true", help="loss on reasoning and answer only")
    which.add_argument("--both", action="store_true", help="each case with loss on the whole text, and without")
    parser.add_argument("--steps", type=int, default=24, help="steps in all")
    parser.add_argument("--warmup", type=int, default=8, help="steps that are not counted; also those between logs")
    parser.add_argument("--ceiling", action="store_true", help="measure what the matrix products alone allow")
    parser.add_argument("--ceiling-seconds", type=float, default=20.0)
    parser.add_argument("--json", type=Path, help="file that one line a figure is added to")
    options = parser.parse_args()
    options.names = [name for name in options.case.split(",") if name]
    if options.case == "all":
        options.names = [name for name, case in CASES.items() if case.fp8 is None]
    unknown = [name for name in options.names if name not in CASES]
    if unknown:
        parser.error(f"no case is named {', '.join(unknown)}; there are {', '.join(CASES)}")
    if not options.names and not options.ceiling:
        parser.error("nothing to measure: give --case or --ceiling")
    if options.warmup >= options.steps:
        parser.error("--warmup must be less than --steps")
    return options


def main() -> None:
    """Measure what was asked for."""
    options = parse_options()
    labels = [WHOLE, TRAINED] if options.both else [TRAINED if options.trained_only else WHOLE]
    failed = run_cases(options.names, labels, options)
    if options.ceiling:
        run_ceilings(options)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
