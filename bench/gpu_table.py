"""The engine's table: what the peers reach, what medcot must reach, what it reaches, and what the GPU would allow.

Reads the lines that the benches append and the peers' scripts print, from any number of files, other lines left aside:

- ``{"figure": …}``: ours, from gpu_sft.py, gpu_context.py, gpu_answers.py and gpu_job.py, ceilings among them;
- ``RESULT {json}``: one training run of Unsloth or TRL; ``SEED {json}``: the tutorial's script on Unsloth, by parts;
- ``CTX N ok …``, ``CTX N OOM``: whether Unsloth trains a row of N tokens; ``HFGEN``, ``HFCB``: transformers' two ways
  to generate, tokens a second.

Of runs with the same settings the last counts, because a repeated run is a correction; among settings that a figure
leaves open the best counts, for the peers as for us. A peer's figure that these files lack is taken from what was
measured on the same kind of GPU before and is marked "before"; one of ours that they lack is "not measured". The ratio
is against the best peer, and above 1 when medcot is better, whichever way the figure runs.

    python bench/gpu_table.py ours.jsonl peers.log --save
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from results import format_table, save_result

WHOLE, TRAINED = "whole text", "reasoning and answer"  # which tokens carry loss; gpu_sft.py writes them as ``labels``
NOT_MEASURED = "not measured"
QUESTION_TOKENS = 1200  # of the tutorial's question; the peers' script asks for fewer, to save time
_CTX = re.compile(r"^CTX (\d+) (ok|OOM|ERR)\b(.*)")
_RATE = re.compile(r"^(HFGEN|HFCB) .*?tok/s (\d+(?:\.\d+)?)")


@dataclass(frozen=True)
class Entry:
    """One peer's figure; ``group`` is the row of the table that it may stand in."""

    group: str
    name: str
    value: float
    settings: str = ""


@dataclass(frozen=True)
class Goal:
    """One row of the table."""

    key: str  # the ``figure`` of our lines
    title: str
    must: float
    peers: tuple[Entry, ...]  # as measured before
    ceiling: str  # the ``figure`` of a measured ceiling, or a value known before
    unit: str = "tokens/s"
    lower_is_better: bool = False
    beside: str = ""  # a second condition, in words


@dataclass
class Found:
    """Everything the files hold."""

    ours: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    peers: dict[str, list[Entry]] = field(default_factory=dict)
    ceilings: dict[str, float] = field(default_factory=dict)
    provenance: list[dict[str, Any]] = field(default_factory=list)


MIN_RATE_2X4 = 4900.0
GOALS = (
    Goal("tutorial-nf4", "tokens/s, tutorial's settings (NF4, 8 rows a step)", 17_000,
         (Entry("tutorial-nf4", "Unsloth", 4138, "2×4"), Entry("tutorial-nf4", "TRL", 2670, "2×4")), "ceiling-bf16"),
    Goal("best-nf4", "tokens/s, NF4, best setting of each", 18_000,
         (Entry("best-nf4", "Unsloth", 10_804, "8×1, no checkpointing"),), "ceiling-bf16"),
    Goal("best-bf16", "tokens/s, 16-bit base, best setting of each", 18_500,
         (Entry("best-bf16", "Unsloth", 11_651, "8×1, no checkpointing"),), "ceiling-bf16"),
    Goal("fp8", "tokens/s, FP8 base", 29_000, (), "ceiling-fp8"),
    Goal("nf4-recompute", "tokens/s, NF4, full recompute", 12_500,
         (Entry("nf4-recompute", "Unsloth", 9703, "4×1, packed to 2048"),), "ceiling-bf16-recompute"),
    Goal("tutorial-2x4", "peak memory, tutorial's 2×4", 5.6, (Entry("tutorial-2x4", "Unsloth", 6.4, "2×4"),), "4.4",
         unit="GiB", lower_is_better=True, beside=f"at ≥ {MIN_RATE_2X4:,.0f} tokens/s"),
    Goal("context", "longest row on a 16 GB card, NF4", 56_000, (Entry("context", "Unsloth", 24_576, "cap 16"),), "",
         unit="tokens"),
    Goal("job", "whole tutorial job, start to merged weights saved", 80, (Entry("job", "Unsloth", 255),), "53",
         unit="s", lower_is_better=True),
    Goal("answers-bf16", "answering, 64 prompts × 256 tokens, bf16", 6_000,
         (Entry("answers-bf16", "transformers", 945, "generate"),), "12000"),
    Goal("answer-nf4", "answering, 1 prompt, NF4 + LoRA", 200, (Entry("answer-nf4", "Unsloth", 29),), "700"),
)  # fmt: skip


def read_lines(lines: Iterable[str]) -> Found:
    """Sort a run's lines.

    Raises:
        ValueError: a line that looks like a figure and is not JSON.
    """
    found = Found()
    runs: dict[tuple[Any, ...], dict[str, Any]] = {}
    for line in (line.strip() for line in lines):
        if line.startswith("{") and '"figure"' in line:
            _take_ours(json.loads(line), found)
        elif line.startswith("RESULT "):
            run = json.loads(line.removeprefix("RESULT "))
            runs[run["kind"], *sorted(run["cfg"].items())] = run
        elif line.startswith("SEED "):
            _take_tutorial(json.loads(line.removeprefix("SEED ")), found)
        elif match := _CTX.match(line):
            if match[2] == "ok":
                found.peers.setdefault("context", []).append(Entry("context", "Unsloth", float(match[1])))
        elif match := _RATE.match(line):
            way = "generate" if match[1] == "HFGEN" else "generate_batch"
            found.peers.setdefault("answers-bf16", []).append(
                Entry("answers-bf16", "transformers", float(match[2]), way)
            )
    for run in runs.values():
        for entry in _peer_entries(run):
            found.peers.setdefault(entry.group, []).append(entry)
    return found


def _take_ours(line: dict[str, Any], found: Found) -> None:
    found.provenance.append({key: line.get(key) for key in ("machine", "versions", "date")})
    if line["system"] == "ceiling":
        if line["value"] is not None:
            found.ceilings[line["figure"]] = float(line["value"])
        return
    settings = ("case", "rows", "split", "labels", "precision", "cap_gib")
    kept = found.ours.setdefault(line["figure"], [])
    # A length that was tried is a setting of its own; elsewhere a value is what was measured.
    length = line["value"] if line["figure"] == "context" else None
    same = [
        old
        for old in kept
        if all(old.get(key) == line.get(key) for key in settings) and (length is None or old["value"] == length)
    ]
    for old in same:
        kept.remove(old)
    kept.append(line)


def _take_tutorial(parts: dict[str, Any], found: Found) -> None:
    """The tutorial's whole script: its time with the full question, and the faster of its two answers."""
    rates = {side: parts[f"gen_{side}_tok_s"] for side in ("before", "after")}
    asked = {side: round(parts[f"gen_{side}_s"] * rates[side]) for side in rates}
    more_s = sum(max(0, QUESTION_TOKENS - asked[side]) / rates[side] for side in rates)
    notes = [f"{asked['before']} tokens a question, reckoned for {QUESTION_TOKENS:,}"] if more_s else []
    if isinstance(parts.get("save_merged"), str):  # the script puts the error there
        notes.append("without merged weights, whose saving failed")
    found.peers.setdefault("job", []).append(
        Entry("job", "Unsloth", round(parts["whole"] + more_s, 1), "; ".join(notes))
    )
    found.peers.setdefault("answer-nf4", []).append(Entry("answer-nf4", "Unsloth", max(rates.values())))


def _peer_entries(run: dict[str, Any]) -> list[Entry]:
    """The rows of the table that a peer's training run may stand in, by its settings."""
    cfg = run["cfg"]
    name = {"unsloth": "Unsloth", "trl": "TRL"}[run["kind"]]
    rows, splits = int(cfg.get("bs", 2)), int(cfg.get("ga", 4))
    packed, kept, four_bit = cfg.get("pack") == "1", cfg.get("gc") == "0", cfg.get("q", "1") == "1"
    parts = [f"{rows}×{splits}", *(["packed"] if packed else []), *(["no checkpointing"] if kept else [])]
    settings = ", ".join([*parts, *(["Liger"] if cfg.get("liger") == "1" else [])])
    rate = float(run["tok_s"])
    if not four_bit:
        return [Entry("best-bf16", name, rate, settings)]
    entries = [Entry("best-nf4", name, rate, settings)]
    if not kept:
        entries.append(Entry("nf4-recompute", name, rate, settings))
    if (rows, splits, packed, kept) == (2, 4, False, False):
        entries.append(Entry("tutorial-nf4", name, rate, settings))
        entries.append(Entry("tutorial-2x4", name, float(run["peak_GB"]), settings))
    return entries


def best_peers(goal: Goal, found: Found) -> list[tuple[Entry, bool]]:
    """The best entry of each peer, best first, and whether it was measured in these files.

    A figure from before gives way to these files' unless its settings, which it names, were not run again: then the
    better of the two stands.
    """
    measured = found.peers.get(goal.key, [])
    again = {(entry.name, settings) for entry in measured for settings in (entry.settings, "")}
    known = [(entry, True) for entry in measured]
    known += [(entry, False) for entry in goal.peers if (entry.name, entry.settings) not in again]
    sign = -1 if goal.lower_is_better else 1
    ranked = sorted(known, key=lambda pair: -sign * pair[0].value)
    names = dict.fromkeys(entry.name for entry, _ in ranked)
    return [next(pair for pair in ranked if pair[0].name == name) for name in names]


def quantity(line: dict[str, Any], goal: Goal) -> float | None:
    """The value of one of our lines that a goal looks at."""
    if goal.key == "tutorial-2x4":
        return None if line["value"] is None else line["peak_gib"]
    if line.get("fits") is False:
        return None
    return line["value"]


def best_ours(goal: Goal, found: Found, labels: str) -> dict[str, Any] | None:
    """Our best line for a goal with these labels, or the last that has no value, or none."""
    # The rate of an NF4 run is a candidate for the best one, whichever case it was run for.
    keys = {"best-nf4": ("best-nf4", "tutorial-nf4")}.get(goal.key, (goal.key,))
    lines = [line for key in keys for line in found.ours.get(key, []) if line.get("labels", WHOLE) == labels]
    valued = [line for line in lines if quantity(line, goal) is not None]
    if not valued:
        return lines[-1] if lines else None
    sign = -1 if goal.lower_is_better else 1
    return max(valued, key=lambda line: sign * float(quantity(line, goal) or 0.0))


def number(value: float, unit: str) -> str:
    """A value with the digits its unit deserves."""
    if unit == "tokens/s":
        return f"{value:,.0f}"
    return f"{value:,.0f} {unit}" if unit == "tokens" else f"{value:.1f} {unit}"


def ours_cell(goal: Goal, line: dict[str, Any] | None) -> str:
    """What medcot reached, in words."""
    if line is None:
        return NOT_MEASURED
    value = quantity(line, goal)
    if value is None:
        return line.get("error", "did not fit").split(":")[0]
    if goal.key == "tutorial-2x4":
        return f"{number(value, goal.unit)} at {line['value']:,.0f} tokens/s"
    rows = f" ({line['rows']} rows)" if goal.key in ("best-nf4", "best-bf16", "fp8", "nf4-recompute") else ""
    return f"{number(value, goal.unit)}{rows}"


def is_met(goal: Goal, line: dict[str, Any] | None) -> str:
    """Whether the goal is reached: yes, no, or a dash where nothing was measured."""
    if line is None:
        return "–"
    value = quantity(line, goal)
    if value is None:
        return "no"
    reached = value <= goal.must if goal.lower_is_better else value >= goal.must
    return "yes" if reached and (goal.key != "tutorial-2x4" or line["value"] >= MIN_RATE_2X4) else "no"


def ratio(goal: Goal, line: dict[str, Any] | None, peers: Sequence[tuple[Entry, bool]]) -> str:
    """How many times better than the best peer; a dash where either is missing."""
    value = None if line is None else quantity(line, goal)
    if value is None or not peers:
        return "–"
    best = peers[0][0].value
    return f"{best / value if goal.lower_is_better else value / best:.2f}×"


def peer_cell(goal: Goal, peers: Sequence[tuple[Entry, bool]]) -> str:
    """The peers' figures, with settings and where they are from."""
    cells = []
    for entry, measured in peers:
        notes = "; ".join(note for note in (entry.settings, "" if measured else "before") if note)
        cells.append(f"{entry.name} {number(entry.value, goal.unit)}" + (f" ({notes})" if notes else ""))
    return " · ".join(cells) or "–"


def ceiling_cell(goal: Goal, found: Found) -> str:
    """The ceiling, measured or known before."""
    if goal.ceiling.startswith("ceiling-"):
        value = found.ceilings.get(goal.ceiling)
        return NOT_MEASURED if value is None else f"{value:,.0f}"
    return f"{number(float(goal.ceiling), goal.unit)} (reckoned)" if goal.ceiling else "–"


def build_table(found: Found) -> str:
    """Return the table as Markdown."""
    rows = []
    for goal in GOALS:
        peers, line = best_peers(goal, found), best_ours(goal, found, WHOLE)
        must = f"{'≤' if goal.lower_is_better else '≥'} {number(goal.must, goal.unit)}"
        trained = best_ours(goal, found, TRAINED)
        cells = [ours_cell(goal, line), "–" if trained is None else ours_cell(goal, trained)]
        rows.append([
            goal.title, peer_cell(goal, peers), " ".join([must, goal.beside]).strip(), *cells,
            ceiling_cell(goal, found), ratio(goal, line, peers), is_met(goal, line),
        ])  # fmt: skip
    columns = ["figure", "peers", "must reach", "medcot", "answer labels only", "ceiling", "ratio", "met"]
    return format_table(columns, rows)


def describe(found: Found) -> str:
    """Return the table with what it was measured on."""
    machines = dict.fromkeys(str(entry["machine"]) for entry in found.provenance)
    versions = dict.fromkeys(
        ", ".join(f"{name} {version}" for name, version in (entry["versions"] or {}).items())
        for entry in found.provenance
    )
    notes = [*machines, *versions, "Figures marked “before” were measured earlier, on the same kind of GPU."]
    return "\n\n".join([*(note for note in notes if note), build_table(found)])


def main() -> None:
    """Print the table, and keep it where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="files of lines, ours and the peers'")
    parser.add_argument("--save", action="store_true", help="add the table to bench/RESULTS.md")
    options = parser.parse_args()
    found = read_lines(line for path in options.files for line in path.read_text(encoding="utf-8").splitlines())
    text = describe(found)
    print(text)
    if options.save:
        machines = list(dict.fromkeys(str(entry["machine"]) for entry in found.provenance))
        if len({machine.split(";")[0] for machine in machines}) != 1:
            parser.error(f"--save wants the lines of one kind of GPU; these are of {machines}")
        met = [is_met(goal, best_ours(goal, found, WHOLE)) for goal in GOALS]
        save_result("gpu_table", machines[0], f"{met.count('yes')} of {len(GOALS)} figures met", text)


if __name__ == "__main__":
    main()
