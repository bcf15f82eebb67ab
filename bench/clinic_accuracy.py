"""Accuracy on builtin:clinic before and after training, over all families and for each, with Wilson 95 % intervals.

Reads the run.json of a finished run, which holds every figure; without one, it does the default job first. The
problems graded are the test half of ``builtin:clinic``, split from the training half by a hash of their parameters, so
none was trained on. Answers are greedy and graded strictly: what cannot be read is wrong. Five problems a family say
little about that family, as the width of its interval shows; they are there to see that no family was left out.

    python bench/clinic_accuracy.py runs/latest --save
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medcot import pipeline
from medcot.evaluate.stats import wilson
from medcot.records import Run
from results import format_table, save_result


def read_facts(folder: Path | None) -> dict[str, Any]:
    """Return the facts of a finished run, or of the default job, done now."""
    if folder is None:
        return pipeline.run("default")
    facts: dict[str, Any] = json.loads(Run(folder).facts.read_text(encoding="utf-8"))
    if facts["status"] != "complete" or not facts["eval"].get("before"):
        raise SystemExit(f"{folder} holds no finished run with a graded evaluation (status: {facts['status']})")
    return facts


def describe(facts: Mapping[str, Any]) -> tuple[str, str]:
    """Return the printed text as Markdown, and the result in a few words."""
    before, after = facts["eval"]["before"], facts["eval"]["after"]
    rows = [["**all**", f"{after['n']}", _share(before), _share(after)]]
    rows += [
        [family, f"{counts['n']}", _share(before["topics"][family]), _share(counts)]
        for family, counts in sorted(after["topics"].items())
    ]
    table = format_table(["family", "n", "before: correct (95 % interval)", "after: correct (95 % interval)"], rows)
    text = f"{_settings(facts)}\n\n{table}"
    p_value = facts["eval"]["p_value"]
    significance = "p < 0.0001" if p_value < 1e-4 else f"p = {p_value:.4f}"
    result = (
        f"{before['accuracy']:.0%} → {after['accuracy']:.0%} of {after['n']} problems, exact McNemar {significance};"
        f" {sum(facts['timing'].values()):.0f} s in all"
    )
    return text, result


def _share(counts: Mapping[str, int]) -> str:
    low, high = wilson(counts["correct"], counts["n"])
    return f"{counts['correct']} = {counts['correct'] / counts['n']:.0%} ({low:.1%} to {high:.1%})"


def _settings(facts: Mapping[str, Any]) -> str:
    """What was run, from what, for how long, and what became of the answers that were not right."""
    recipe, trained, train = facts["recipe"], facts["data"]["train"], facts["train"]
    stages = ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in facts["timing"].items() if seconds >= 1)
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    after = facts["eval"]["after"]
    return (
        f"Recipe {recipe['name']}: {facts['model']['source']} in {facts['model']['precision']}, {trained['rows']:,}"
        f" rows of {trained['source']} ({trained['tokens']:,} tokens, {trained['trained_tokens']:,} of them trained),"
        f" style {recipe['prompt']['style']}, {train['steps']:,} steps of {recipe['train']['batch_size']} at learning"
        f" rate {recipe['train']['learning_rate']:g}; loss {train['loss_first']:.3f} → {train['loss_last']:.3f};"
        f" {train['tokens_per_s']:,.0f} tok/s while training. Evaluation set {facts['eval']['source']}, greedy, at most"
        f" {recipe['evaluate']['max_new_tokens']} new tokens; after training {after['unfinished']} answers unfinished,"
        f" {after['unparsed']} unparsed.\nSeconds: {sum(facts['timing'].values()):.0f} in all ({stages}).\n{versions}."
    )


def main() -> None:
    """Print the table, and keep it where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path, help="run folder (default: do the default job now)")
    parser.add_argument("--save", action="store_true", help="add the result to bench/RESULTS.md")
    options = parser.parse_args()
    facts = read_facts(options.run)
    details, result = describe(facts)
    print(f"{facts['machine']}\n\n{details}\n\n{result}")
    if options.save:
        save_result("clinic_accuracy", facts["machine"], result, details)


if __name__ == "__main__":
    main()
