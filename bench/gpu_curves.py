"""Loss curves of an accelerated and a plain training run over the same steps: whether they are the same training.

Sixty optimizer steps of SmolLM2-135M on the real rows, eight a step, the tutorial's settings, the same seed, and so
the same adapter at the start and the same rows in the same order. Plain is the model as transformers, PEFT and
bitsandbytes run it: ``engine.accelerate`` is never called. Three pairs are judged: bf16 against plain bf16 and NF4
against plain bitsandbytes NF4, within 1 % of the plain loss at every step; FP8 against plain bf16, within 2 %. NF4
against bf16 is shown and not judged: the embedded model's weights have been rounded to four bits once already, and a
second rounding starts higher by itself.

A step's loss is the mean over its trained tokens, so it differs from its neighbours because their rows do. The
difference of two curves does not: both saw the same rows. It is given as it is, step by step, and of the curves
smoothed over five steps.

    python bench/gpu_curves.py ROWS.jsonl --out curves --json out.jsonl
    python bench/gpu_curves.py ROWS.jsonl --model FOLDER --pairs bf16,nf4
    python bench/gpu_curves.py ROWS.jsonl --pairs bf16 --fp8 default,head-forward16,head16,slow-accum,backward16

``--fp8`` judges FP8 with some of its products in 16 bit; what each rounding costs, fp8_error.py tells on a CPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gpu_common import free_memory, provenance, write_line
from gpu_sft import RECIPE, check_choice
from medcot import engine, model, planning
from medcot.embedded import convert_embedded
from medcot.engine.frozen import Fp8, choose_fp8
from medcot.recipe import Recipe, load_recipe
from medcot.shapes import compute_shape
from medcot.train import sft
from results import format_table, save_result

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SMOOTHED_STEPS = 5
# Okabe and Ito's palette, told apart by the colour-blind too.
COLOURS = {"bf16": "#0072b2", "nf4": "#009e73", "fp8": "#d55e00", "fp32": "#333333"}
COLOURS |= {"fp8:head-forward16": "#e69f00", "fp8:head16": "#f0e442", "fp8:slow-accum": "#8b4513"}
COLOURS |= {"fp8:slow-backward": "#666666", "fp8:forward16": "#11a579"}
COLOURS |= {"fp8:weights-only": "#3969ac"}
COLOURS |= {"fp8:backward16": "#7f3c8d", "fp8:all16-backward+head16": "#e73f74"}
COLOURS |= {"bf16 / fp32": "#56b4e9", "plain / fp32": "#cc79a7", "nf4 / bf16": "#999999"}


@dataclass(frozen=True)
class Pair:
    """Two runs to compare; a run is a precision, FP8's with a choice after a colon, and whether it is accelerated."""

    run: tuple[str, bool]
    reference: tuple[str, bool]
    limit: float | None  # largest relative difference of a step's loss; None: shown only


FP8_CHOICES = {
    "default": Fp8(),
    "head-forward16": Fp8(head_forward=False),
    "head16": Fp8(head_forward=False, head_backward=False),
    "slow-accum": Fp8(fast_accum=False),
    "slow-backward": Fp8(fast_backward=False),
    "backward16": Fp8(backward=False),
    "all16-backward+head16": Fp8(backward=False, head_forward=False, head_backward=False),
    "forward16": Fp8(forward=False),
    "weights-only": Fp8(forward=False, backward=False, head_forward=False, head_backward=False),
}


def fp8_name(choice: str) -> str:
    """The pair, and the precision, of a choice."""
    return "fp8" if choice == "default" else f"fp8:{choice}"


PAIRS = {
    "bf16": Pair(("bf16", True), ("bf16", False), 0.01),
    "nf4": Pair(("nf4", True), ("nf4", False), 0.01),
    **{fp8_name(choice): Pair((fp8_name(choice), True), ("bf16", False), 0.02) for choice in FP8_CHOICES},
    # Which of the two stays closer to the same weights in float32, where no small contribution is rounded away.
    "bf16 / fp32": Pair(("bf16", True), ("fp32", False), 0.01),
    "plain / fp32": Pair(("bf16", False), ("fp32", False), 0.01),
    "nf4 / bf16": Pair(("nf4", False), ("bf16", False), None),
}


def label(run: tuple[str, bool]) -> str:
    """A run in words."""
    precision, fast = run
    return f"{precision} {'accelerated' if fast else 'plain'}"


def build_recipe(source: str, rows: str, precision: str, steps: int, batch_size: int) -> Recipe:
    """Return the tutorial's recipe for the small model, logging every step."""
    return load_recipe(
        RECIPE,
        [
            f"model.source={source}",
            f"model.precision={precision}",
            f"data.source={rows}",
            f"train.batch_size={batch_size}",
            f"train.micro_batch_size={batch_size}",
            f"train.max_steps={steps}",
            "train.gradient_checkpointing=off",
            "train.logging_steps=1",
            "train.save_steps=null",
        ],
    )


def run_curve(run: tuple[str, bool], options: argparse.Namespace) -> list[float]:
    """Train from freshly loaded weights; returns the loss of each step."""
    (precision, _, choice), fast = run[0].partition(":"), run[1]
    recipe = build_recipe(options.model, options.rows, precision, options.steps, options.batch_size)
    loaded = model.load(recipe.model.source, precision=precision, max_seq_length=recipe.model.max_seq_length)
    rows = planning.encode_examples(planning.read_examples(recipe), recipe, loaded.tokenizer).rows
    tuned = model.attach_lora(loaded, r=recipe.lora.r, alpha=recipe.lora.alpha, seed=recipe.lora.seed)
    if fast:
        explanation = engine.accelerate(tuned)
        assert explanation.fast, explanation.reason
        if precision == "fp8":
            choose_fp8(tuned, FP8_CHOICES[choice or "default"])
            check_choice(tuned, FP8_CHOICES[choice or "default"])
    shape = compute_shape(loaded.model.config)
    plan, _ = planning.build_plan(recipe, rows, shape, precision, loaded.device, fast=fast)
    losses: list[float] = []

    def on_step(step: int, metrics: sft.Metrics | None) -> None:
        if metrics is not None:
            losses.append(metrics.loss)

    with tempfile.TemporaryDirectory() as folder:
        sft.train(tuned, loaded.tokenizer, rows, plan, Path(folder), on_step=on_step)
    device = loaded.device
    del loaded, tuned
    free_memory(device)
    print(f"{label(run):<24} loss {losses[0]:.4f} → {losses[-1]:.4f} in {len(losses)} steps", flush=True)
    return losses


def smooth(losses: Sequence[float]) -> list[float]:
    """Mean of each step and those before it, five in all; one shorter by four."""
    window = min(SMOOTHED_STEPS, len(losses))
    return [sum(losses[i : i + window]) / window for i in range(len(losses) - window + 1)]


def differences(losses: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Relative difference at each step, signed."""
    assert len(losses) == len(reference), "the runs have different numbers of steps"
    return [(a - b) / b for a, b in zip(losses, reference, strict=True)]


def compare(losses: Sequence[float], reference: Sequence[float], limit: float | None) -> dict[str, Any]:
    """Largest and mean relative difference of two curves, raw and smoothed, and whether the limit holds."""
    raw = [abs(d) for d in differences(losses, reference)]
    smoothed = [abs(d) for d in differences(smooth(losses), smooth(reference))]
    return {
        "max": max(raw),
        "mean": sum(raw) / len(raw),
        "smoothed_max": max(smoothed),
        "smoothed_mean": sum(smoothed) / len(smoothed),
        "limit": limit,
        "within": None if limit is None else max(raw) <= limit,
        "within_smoothed": None if limit is None else max(smoothed) <= limit,
    }


def build_table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the comparisons as Markdown."""
    verdicts = {None: "shown only", True: "within", False: "not within"}
    rows = []
    for name, figures in found.items():
        pair, limit = PAIRS[name], figures["limit"]
        values = [f"{figures[key]:.3%}" for key in ("max", "mean", "smoothed_max", "smoothed_mean")]
        verdict = [verdicts[figures["within"]], verdicts[figures["within_smoothed"]]]
        allowed = "–" if limit is None else f"{limit:.0%}"
        rows.append([f"{label(pair.run)} against {label(pair.reference)}", *values, allowed, *verdict])
    columns = ["curves", "max", "mean", "max of 5", "mean of 5", "allowed", "each step", "smoothed"]
    return format_table(columns, rows)


def draw(curves: Mapping[tuple[str, bool], Sequence[float]], names: Sequence[str]) -> Figure:
    """Draw the curves, smoothed over faint raw ones, and the pairs' differences below them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 7), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    for run, losses in curves.items():
        steps = range(1, len(losses) + 1)
        precision, fast = run
        colour, smoothed = COLOURS[precision], smooth(losses)
        above.plot(steps, losses, linewidth=0.6, alpha=0.35, color=colour)
        # A plain run is a broad pale band, so that the accelerated one's line on top of it hides nothing.
        width, alpha = (1.4, 1.0) if fast else (6.0, 0.3)
        behind = steps[len(losses) - len(smoothed) :]
        above.plot(behind, smoothed, linewidth=width, alpha=alpha, color=colour, label=label(run), zorder=2 + fast)
    above.set_ylabel("loss, mean of trained tokens")
    above.set_title(f"Loss by step (faint), and its mean over {SMOOTHED_STEPS} steps", loc="left", fontsize=10)
    above.legend(frameon=False, fontsize=9)
    draw_differences(below, curves, [name for name in names if PAIRS[name].limit is not None])
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", linewidth=0.4, alpha=0.5)
    return figure


def draw_differences(axes: Axes, curves: Mapping[tuple[str, bool], Sequence[float]], names: Sequence[str]) -> None:
    """Draw each judged pair's relative difference, and the limits."""
    for name in names:
        pair = PAIRS[name]
        values = [100 * d for d in differences(curves[pair.run], curves[pair.reference])]
        text = f"{label(pair.run)} − {label(pair.reference)}"
        axes.plot(range(1, len(values) + 1), values, color=COLOURS[name], linewidth=1.2, label=text)
    for limit in sorted({100 * (PAIRS[name].limit or 0) for name in names}):
        axes.axhline(limit, color="#666666", linewidth=0.8, linestyle=":")
        axes.axhline(-limit, color="#666666", linewidth=0.8, linestyle=":")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("difference of the loss, %")
    axes.set_title("Step by step against the plain run; dotted: what is allowed", loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=9)


def run_all(names: Sequence[str], options: argparse.Namespace) -> dict[tuple[str, bool], list[float]]:
    """Train each run that the pairs name, once; one that fails is printed and missing."""
    wanted = dict.fromkeys(run for name in names for run in (PAIRS[name].reference, PAIRS[name].run))
    curves = {}
    for run in wanted:
        try:
            curves[run] = run_curve(run, options)
        except Exception:  # the other pairs are still worth the machine's time; main ends with an error
            traceback.print_exc()
    return curves


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", help="file of rows with question, reasoning and response")
    parser.add_argument("--model", help="folder of the model (default: the embedded one, unpacked in bf16)")
    parser.add_argument("--pairs", default="bf16,nf4,fp8,bf16 / fp32", help=f"with commas: {', '.join(PAIRS)}")
    parser.add_argument("--fp8", default="", help=f"more pairs, of FP8; with commas: {', '.join(FP8_CHOICES)}")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("curves"), help="written as OUT.png and OUT.json")
    parser.add_argument("--json", type=Path, help="file that one line a pair is added to")
    parser.add_argument("--save", action="store_true", help="add the result to bench/RESULTS.md")
    options = parser.parse_args()
    choices = [choice for choice in options.fp8.split(",") if choice]
    odd = [choice for choice in choices if choice not in FP8_CHOICES]
    if odd:
        parser.error(f"no choice of FP8 is named {', '.join(odd)}")
    asked = [name for name in options.pairs.split(",") if name]
    options.names = list(dict.fromkeys([*asked, *map(fp8_name, choices)]))
    unknown = [name for name in options.names if name not in PAIRS]
    if unknown:
        parser.error(f"no pair is named {', '.join(unknown)}")
    if options.model is None:
        options.model = str(convert_embedded(torch.bfloat16))
    return options


def main() -> None:
    """Run, compare, draw."""
    options = parse_options()
    curves = run_all(options.names, options)
    complete = [name for name, pair in PAIRS.items() if pair.run in curves and pair.reference in curves]
    found = {
        name: compare(curves[PAIRS[name].run], curves[PAIRS[name].reference], PAIRS[name].limit) for name in complete
    }
    for name, figures in found.items():
        value = round(100 * figures["max"], 4)
        line = {"figure": f"curve-{name}", "system": "medcot", "value": value, "unit": "%", "steps": options.steps}
        write_line(line | figures, options.json)
    listed = {label(run): losses for run, losses in curves.items()}
    kept = {"curves": listed, "comparisons": found, "batch_size": options.batch_size} | provenance()
    options.out.with_suffix(".json").write_text(json.dumps(kept, indent=1, ensure_ascii=False), encoding="utf-8")
    if found:
        draw(curves, complete).savefig(options.out.with_suffix(".png"), dpi=150)
        table = build_table(found)
        print(f"\n{provenance()['machine']}\n\n{table}")
        if options.save:
            result = "; ".join(f"{name}: max {figures['max']:.2%}" for name, figures in found.items())
            save_result("gpu_curves", provenance()["machine"], result, f"{options.steps} steps.\n\n{table}")
    missing = [name for name in options.names if name not in found]
    if missing:
        sys.exit(f"not compared: {', '.join(missing)}")


if __name__ == "__main__":
    main()
