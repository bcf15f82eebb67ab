"""What a whole job came to: steps, loss, tokens per second, memory against its prediction, and seconds by stage.

Reads the run.json of a finished run, on whatever machine it was made. A model or data set on a local path is named by
the last part of the path.

    medcot run tutorial-8b save.merged=true && python bench/job_figures.py runs/latest --save
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medcot.records import Run
from results import format_table, save_result


def describe(facts: Mapping[str, Any], note: str) -> tuple[str, str]:
    """Return the printed text as Markdown, and the result in a few words."""
    train, data, model = facts["train"], facts["data"]["train"], facts["model"]
    stages = facts["timing"]
    rows = [[stage, f"{seconds:.1f}"] for stage, seconds in stages.items()]
    rows.append(["**all stages**", f"{sum(stages.values()):.1f}"])
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    text = (
        f"Recipe {facts['recipe']['name']}: {_name(model['source'])} ({model['params'] / 1e6:,.0f} M parameters) in"
        f" {model['precision']}, {data['rows']:,} rows of {_name(data['source'])} ({data['tokens']:,} tokens),"
        f" {train['steps']:,} steps of {facts['recipe']['train']['batch_size']} rows on the {train['path']} path."
        f"{note}\n"
        f"Loss {train['loss_first']:.3f} → {train['loss_last']:.3f}; {train['tokens_per_s']:,.0f} real tok/s while"
        f" training ({train['trained_tokens_per_s']:,.0f} with loss); peak memory {train['peak_memory_gb']:.1f} GiB,"
        f" predicted {train['predicted_memory_gb']:.1f}.\n{versions}.\n\n{format_table(['stage', 'seconds'], rows)}"
    )
    result = (
        f"{facts['recipe']['name']}: {train['tokens_per_s']:,.0f} tok/s, {train['peak_memory_gb']:.1f} GiB,"
        f" {sum(stages.values()):.0f} s in all"
    )
    return text, result


def _name(source: str) -> str:
    """A Hub id or a built-in source as it is, a path by its last part."""
    return source.rstrip("/").rpartition("/")[2] if source.startswith(("/", ".", "~")) else source


def main() -> None:
    """Print the figures, and keep them where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--note", default="", help="a sentence about the run, kept with it")
    parser.add_argument("--save", action="store_true", help="add the result to bench/RESULTS.md")
    options = parser.parse_args()
    facts = json.loads(Run(options.run).facts.read_text(encoding="utf-8"))
    details, result = describe(facts, f" {options.note}" if options.note else "")
    print(f"{facts['machine']}\n\n{details}\n\n{result}")
    if options.save:
        save_result("job_figures", facts["machine"], result, details)


if __name__ == "__main__":
    main()
