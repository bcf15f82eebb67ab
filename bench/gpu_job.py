"""The whole tutorial job by its stages: seconds from the start of the process to the merged weights on disk.

Runs ``medcot run tutorial-8b`` as a user would, in a process of its own, with the tutorial's settings on a model and
rows of your own: the question before, 60 steps, the question again, adapter, merged 16-bit weights. Two things are not
the recipe's: graded problems are left out, since the tutorial has none, and the question's end-of-text token is ignored
(``ask.ignore_eos``), so that each answer has its full 1,200 tokens whatever the weights. The clock starts before the
process does and stops at the last file of the merged folder; drawing the report comes after it.

With ``--peer-json``, the parts that the tutorial's script on Unsloth printed (line ``SEED {json}``) stand beside ours.
Its answers are shorter, to save time; they are reckoned for as many tokens at the rate it had.

    python bench/gpu_job.py MODEL_FOLDER ROWS.jsonl --json out.jsonl --peer-json tutorial_unsloth.log
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medcot.records import Run
from results import format_table, save_result

RECIPE = "tutorial-8b"
# Each of our stages, and what the peer's script calls the same work.
STAGES = {
    "import libraries": "import",
    "read data": "",
    "check data": "",
    "load model": "load",
    "make tokens": "prep",  # with the adapter and the trainer
    "ask before": "gen_before_s",
    "attach adapter": "",
    "train": "train60",
    "save adapter": "save_adapter",
    "ask after": "gen_after_s",
    "save merged": "save_merged",
}


@dataclass(frozen=True)
class Job:
    """A finished run: its facts, and the seconds from the start of its process to its merged weights."""

    facts: dict[str, Any]
    samples: list[dict[str, Any]]
    metrics: list[dict[str, Any]]
    merged_s: float | None


def run_job(overrides: Sequence[str], folder: Path, *, recipe: str = RECIPE, launcher: Sequence[str] = ()) -> Job:
    """Run the command line in a process of its own and read what it left.

    Args:
        overrides: ``key=value`` of the recipe.
        folder: run folder, new.
        recipe: its name or file.
        launcher: what starts the module in the place of ``python``, such as torchrun and its options.

    Raises:
        subprocess.CalledProcessError: the run failed; it has said why.
    """
    command = [*(launcher or [sys.executable]), "-m", "medcot", "run", recipe, *overrides, "--out", str(folder)]
    started_s = time.time()
    subprocess.run(command, check=True)
    run = Run(folder)
    merged = [path.stat().st_mtime for path in run.merged.glob("*")] if run.merged.is_dir() else []
    return Job(
        facts=json.loads(run.facts.read_text(encoding="utf-8")),
        samples=_read_lines(run.samples / "after.jsonl"),
        metrics=_read_lines(run.metrics),
        merged_s=max(merged) - started_s if merged else None,
    )


def _read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def read_peer(path: Path) -> dict[str, Any]:
    """Return the parts of the last ``SEED`` line in a file.

    Raises:
        ValueError: there is none.
    """
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("SEED ")]
    if not lines:
        raise ValueError(f"'{path}' has no line 'SEED {{json}}'; tutorial_unsloth.py prints one")
    parts: dict[str, Any] = json.loads(lines[-1].removeprefix("SEED "))
    return parts


def reckon_peer(parts: Mapping[str, Any], num_tokens: int) -> dict[str, float]:
    """Return the peer's seconds by part, its answers as long as ours, and the whole."""
    seconds = {name: float(value) for name, value in parts.items() if isinstance(value, int | float)}
    for side in ("before", "after"):
        longer_s = num_tokens / seconds[f"gen_{side}_tok_s"]
        seconds["whole"] += longer_s - seconds[f"gen_{side}_s"]
        seconds[f"gen_{side}_s"] = longer_s
    return seconds


def describe(job: Job, num_tokens: int, peer: Mapping[str, float] | None) -> str:
    """Return the table of stages and a paragraph of figures, as Markdown."""
    timing, train = job.facts["timing"], job.facts["train"]
    assert job.merged_s is not None, "the recipe was told to merge"
    staged_s = sum(timing.get(stage, 0.0) for stage in STAGES)
    ours = [(stage, timing.get(stage, 0.0), theirs) for stage, theirs in STAGES.items()]
    ours.append(("interpreter, between stages", job.merged_s - staged_s, ""))
    ours.append(("**start to merged weights**", job.merged_s, "whole"))
    columns = ["stage", "medcot s", *(["Unsloth s"] if peer else [])]
    rows = [
        [stage, f"{seconds:.1f}", *([f"{peer[theirs]:.1f}" if theirs in peer else ""] if peer else [])]
        for stage, seconds, theirs in ours
    ]
    return (
        f"{format_table(columns, rows)}\n\n"
        f"{train['steps']} steps at {train['tokens_per_s']:,.0f} real tokens/s on the {train['path']} path, peak"
        f" {train['peak_memory_gb']:.1f} GiB; loss {train['loss_first']:.3f} → {train['loss_last']:.3f};"
        f" {num_tokens:,} tokens an answer."
    )


def main() -> None:
    """Run the job, print its parts, and keep them where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="model folder")
    parser.add_argument("rows", help="training rows, JSON Lines")
    parser.add_argument("override", nargs="*", help="further key=value of the recipe")
    parser.add_argument("--out", type=Path, help="run folder; a temporary one if left out")
    parser.add_argument("--json", type=Path, help="file to which the line is appended")
    parser.add_argument("--peer-json", type=Path, help="output of tutorial_unsloth.py")
    parser.add_argument("--save", action="store_true", help="add the result to bench/RESULTS.md")
    options = parser.parse_args()
    peer_parts = read_peer(options.peer_json) if options.peer_json else None
    overrides = [f"model.source={options.model}", f"data.source={options.rows}", "data.config=null"]
    overrides += ["evaluate.source=null", "ask.ignore_eos=true", "save.merged=true", "tracking.tracker=none"]
    with tempfile.TemporaryDirectory() as scratch:
        job = run_job([*overrides, *options.override], options.out or Path(scratch) / "run")
    asked = job.samples[0]
    num_tokens = job.facts["recipe"]["ask"]["max_new_tokens"]
    assert asked["finish"] == "length", f"the answer stopped early ({asked['finish']}), and the job was shorter"
    peer = reckon_peer(peer_parts, num_tokens) if peer_parts else None
    text = describe(job, num_tokens, peer)
    print(f"\n{text}\n")
    from gpu_common import provenance, write_line  # they start CUDA, which the job must find free

    line = {"figure": "job", "system": "medcot", "value": round(job.merged_s or 0.0, 1), "unit": "s"}
    line |= {"stages": job.facts["timing"], "peer": peer, "train": job.facts["train"]}
    print(json.dumps(line | provenance(), ensure_ascii=False))
    write_line(line, options.json)
    if options.save:
        versus = f", Unsloth {peer['whole']:.0f} s" if peer else ""
        result = f"whole tutorial job to merged weights: {line['value']:.0f} s{versus}"
        save_result("gpu_job", job.facts["machine"], result, text)


if __name__ == "__main__":
    main()
