"""One GPU and several: the same steps, the same losses, more tokens a second.

Runs the tutorial's training once for each number of processes, with ``torchrun``, and prints rates and the losses of
every step side by side. The rows of a step are the same for all, so the losses may differ by rounding only.

    python bench/gpu_ddp.py MODEL_FOLDER ROWS.jsonl --processes 1,2
    python bench/gpu_ddp.py MODEL_FOLDER ROWS.jsonl --processes 1,2 train.batch_size=32 model.precision=bf16
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from gpu_job import Job, run_job
from results import format_table, save_result


def launcher(num_processes: int) -> list[str]:
    """What starts a module in several processes of this machine."""
    return ["torchrun", "--standalone", "--nproc-per-node", str(num_processes)]


def describe(jobs: dict[int, Job]) -> tuple[str, str]:
    """Return the tables as Markdown, and the result in a few words."""
    base = next(iter(jobs.values())).facts["train"]["tokens_per_s"]
    rates = [
        [str(count), f"{job.facts['train']['tokens_per_s']:,.0f}", f"{job.facts['train']['tokens_per_s'] / base:.2f}",
         f"{job.facts['train']['peak_memory_gb']:.1f}"]
        for count, job in jobs.items()
    ]  # fmt: skip
    losses = [
        [str(lines[0]["step"]), *(f"{line['loss']:.4f}" for line in lines)]
        for lines in zip(*(job.metrics for job in jobs.values()), strict=True)
    ]
    first = next(iter(jobs.values())).metrics
    apart = max(
        abs(one["loss"] - other["loss"]) / one["loss"]
        for job in jobs.values()
        for one, other in zip(first, job.metrics, strict=True)
    )
    text = (
        f"{format_table(['processes', 'tokens/s', 'ratio', 'GiB each'], rates)}\n\n"
        f"Largest difference of a step's loss: {100 * apart:.2f} %\n\n"
        f"{format_table(['step', *(f'loss, {count}' for count in jobs)], losses)}"
    )
    return text, ", ".join(f"{row[0]}: {row[1]} tok/s" for row in rates) + f"; losses within {100 * apart:.2f} %"


def main() -> None:
    """Train with each number of processes and print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="model folder, or 'embedded'")
    parser.add_argument("rows", help="training rows, JSON Lines")
    parser.add_argument("override", nargs="*", help="further key=value of the recipe")
    parser.add_argument("--processes", default="1,2", help="numbers of processes, by commas")
    parser.add_argument("--save", action="store_true", help="add the result to bench/RESULTS.md")
    options = parser.parse_intermixed_args()
    overrides = [f"model.source={options.model}", f"data.source={options.rows}", "data.config=null"]
    overrides += ["evaluate.source=null", "ask.max_new_tokens=1", "tracking.tracker=none"]
    overrides += ["train.logging_steps=1", "train.save_steps=null", *options.override]
    jobs = {}
    with tempfile.TemporaryDirectory() as scratch:
        for count in map(int, options.processes.split(",")):
            jobs[count] = run_job(overrides, Path(scratch) / str(count), launcher=launcher(count))
    text, result = describe(jobs)
    print(f"\n{text}")
    if options.save:
        save_result("gpu_ddp", next(iter(jobs.values())).facts["machine"], result, text)


if __name__ == "__main__":
    main()
