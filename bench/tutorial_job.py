"""The tutorial's own notebook, cell by cell: seconds of each part, beside the same cells on Unsloth.

Runs the code cells of ``notebooks/from_unsloth.ipynb`` as they stand, those that install or need a network left out, in
this process, with a model folder and rows of your choice. Parts are named by the cells' tags; what a cell left on the
GPU is waited for before its time is taken. Unsloth's parts were measured with the tutorial's script in its current API
on one H200, whose answers had 400 tokens and are reckoned for the notebook's number at the rate they had; they stand
beside ours only with ``--peer``, since they say nothing about any other machine or model.

    python bench/tutorial_job.py MODEL ROWS.jsonl --json out.jsonl --peer      # H200, the 8B's shape
    python bench/tutorial_job.py embedded ROWS.jsonl --tokens 200 --save       # a CPU
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from notebook_cells import read_cells, run_cells
from results import format_table, save_result

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "from_unsloth.ipynb"
PARTS = {
    "import": "import",
    "load": "load",
    "ask_before": "question before",
    "prepare": "rows, adapter, trainer",
    "train": "training",
    "ask_after": "question after",
    "save_adapter": "save adapter",
    "save_merged": "save merged 16-bit",
}
# Unsloth 2026.10.9 on one H200, the 8B's shape (FACTS of the project; bench/RESULTS.md, gpu_job): seconds by part, and
# answers in tokens a second.
PEER = {"import": 27.4, "load": 4.4, "prepare": 6.7, "train": 90.4, "save_adapter": 0.3, "save_merged": 38.6}
PEER_RATES = {"ask_before": 25.6, "ask_after": 28.6}


def main() -> None:
    """Run the cells, print the parts, and keep them where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="model folder, or 'embedded'")
    parser.add_argument("rows", type=Path, help="rows in the tutorial's layout, JSON Lines")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--tokens", type=int, default=1200, help="of each answer at most")
    parser.add_argument("--peer", action="store_true", help="put Unsloth's seconds on an H200 beside")
    parser.add_argument("--json", type=Path, help="file to which the line is appended")
    parser.add_argument("--save", action="store_true", help="add the result to bench/RESULTS.md")
    options = parser.parse_args()
    json_path = options.json.resolve() if options.json else None
    with tempfile.TemporaryDirectory() as scratch:
        parameters = {
            "model_name": os.path.abspath(options.model) if Path(options.model).is_dir() else options.model,
            "dataset_source": {"path": "json", "data_files": str(options.rows.resolve()), "split": "train"},
            "new_model_local": "tuned",
            "max_steps": options.steps,
            "max_new_tokens": options.tokens,
            "hf_token": None,
        }
        os.chdir(scratch)
        seconds, names = run_parts(parameters)
        line = summarise(seconds, names)
        os.chdir("/")
    peer = reckon_peer(line["answer_tokens"]) if options.peer else None
    text = describe(line, peer)
    print(f"\n{text}\n")
    from gpu_common import provenance, write_line

    line |= {"figure": "tutorial_job", "system": "medcot", "unit": "s", "peer": peer}
    print(json.dumps(line | provenance(), ensure_ascii=False))
    write_line(line, json_path)
    if options.save:
        versus = f", Unsloth {peer['whole']:.0f} s" if peer else ""
        result = f"the tutorial's cells, {line['steps']} steps: {line['value']:.0f} s{versus}"
        save_result("tutorial_job", str(provenance()["machine"]), result, text)


def run_parts(parameters: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, Any]]:
    """Run the notebook's cells; return seconds by part, and the names that they left."""
    seconds: dict[str, float] = defaultdict(float)
    left: dict[str, Any] = {}
    part, started_s = "", time.monotonic()
    for cell, names in run_cells(read_cells(NOTEBOOK), parameters):
        seconds[part] += _passed(started_s)
        part, left = next((tag for tag in PARTS if tag in cell.tags), ""), names
        started_s = time.monotonic()
    seconds[part] += _passed(started_s)
    return dict(seconds), left


def _passed(started_s: float) -> float:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.monotonic() - started_s


def summarise(seconds: Mapping[str, float], names: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures of a run: what the notebook's own objects say, beside the clock."""
    stats, trainer = names["trainer_stats"], names["trainer"]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    tokens = int(names["outputs"].shape[1] - names["inputs"].input_ids.shape[1])
    from gpu_common import seconds_since_start

    return {
        "value": round(seconds_since_start(), 1),
        "parts": {name: round(seconds.get(name, 0.0), 2) for name in PARTS},
        "between": round(seconds.get("", 0.0), 2),
        "answer_tokens": tokens,
        "answer_tokens_per_s": round(tokens / seconds["ask_after"], 1),
        "steps": stats.global_step,
        "losses": [round(loss, 4) for loss in losses],
        "metrics": stats.metrics,
    }


def reckon_peer(num_tokens: int) -> dict[str, float]:
    """Return Unsloth's seconds by part for answers of so many tokens, and their sum."""
    seconds = PEER | {part: num_tokens / rate for part, rate in PEER_RATES.items()}
    return seconds | {"whole": sum(seconds.values())}


def describe(line: Mapping[str, Any], peer: Mapping[str, float] | None) -> str:
    """Return the table of parts and a paragraph of figures, as Markdown."""
    parts, metrics = line["parts"], line["metrics"]
    counted = sum(parts.values())
    rows = [[words, f"{parts[part]:.1f}", *([f"{peer[part]:.1f}"] if peer else [])] for part, words in PARTS.items()]
    rows.append(["interpreter, between the parts", f"{line['value'] - counted:.1f}", *([""] if peer else [])])
    rows.append(["**in all**", f"{line['value']:.1f}", *([f"{peer['whole']:.1f}"] if peer else [])])
    columns = ["part", "medcot s", *(["Unsloth s"] if peer else [])]
    return (
        f"{format_table(columns, rows)}\n\n"
        f"{line['steps']} steps at {metrics['train_tokens_per_second']:,.0f} real tokens/s, peak"
        f" {metrics['peak_memory_gb']:.1f} GiB; loss {line['losses'][0]:.3f} → {line['losses'][-1]:.3f};"
        f" answers of {line['answer_tokens']:,} tokens at {line['answer_tokens_per_s']:,.1f} tokens/s."
    )


if __name__ == "__main__":
    main()
