"""What the card says of a run besides its scores: proofs of its exports, what its data was checked for, what it took.

Everything is read from the run's records. What was not measured is said to be so: of energy nothing is, so the card
gives at most an upper bound that anybody can follow, the GPU's rated power over the time of training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from medcot.report import words
from medcot.report.evidence import clean
from medcot.report.findings import FindingView
from medcot.report.folder import Folder

# Board power in watts, from NVIDIA's data sheets; the first name that the machine's line holds counts.
BOARD_POWER_W = {
    "H200": 700, "H100 PCIe": 350, "H100": 700, "A100-PCIE": 250, "A100": 400, "L40S": 350, "L40": 300, "L4": 72,
    "A10G": 150, "A10": 150, "Tesla T4": 70, "Tesla P100": 250, "Tesla V100": 300, "RTX 4090": 450, "RTX 3090": 350,
    "RTX A6000": 300,
}  # fmt: skip
_TOLD_APART = ("contamination", "over_length")  # findings that have lines of their own
_LIMITS = {"kl_mean": "mean KL ≤", "kl_max": "max KL ≤", "top1": "top-1 ≥", "answers_changed": "changed ≤"}


def list_proofs(exports: Mapping[str, Any], kinds: Sequence[str] | None = None) -> list[dict[str, str]]:
    """Return a line for each export: what it is compared with and how near it is; ``kinds`` picks some."""
    return [_read_proof(kind, export) for kind, export in sorted(exports.items()) if kinds is None or kind in kinds]


def _read_proof(kind: str, export: Mapping[str, Any]) -> dict[str, str]:
    proof = export.get("proof") or {}
    reader = proof.get("reader")
    limits = proof.get("threshold") or {}
    asked = f" of {words.count(proof['answers'])}" if proof.get("answers") is not None else ""
    shares = {key: _share_or_number(key, value) for key, value in limits.items()}
    verdict = "not proven" if proof.get("passed") is None else "passed" if proof["passed"] else "FAILED"
    return {
        "kind": kind,
        "base": str(export.get("base") or words.UNKNOWN),
        "reader": " ".join(map(str, reader.values())) if isinstance(reader, Mapping) else str(reader or words.UNKNOWN),
        "prompts": words.count(proof.get("prompts")),
        "positions": words.count(proof.get("positions")),
        "kl": f"{words.number(proof.get('kl_mean'))} ({words.number(proof.get('kl_max'))})",
        "top1": words.percent(proof.get("top1"), 2),
        "changed": f"{words.count(proof.get('answers_changed'))}{asked}",
        "limits": ", ".join(f"{_LIMITS.get(key, words.label(key))} {text}" for key, text in shares.items()),
        "verdict": verdict,
    }


def _share_or_number(key: str, value: Any) -> str:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return str(value)
    return words.percent(value, 2) if key == "top1" else words.number(float(value))


def list_checks(folder: Folder) -> list[tuple[str, str]]:
    """Return what was looked for in the data and what was found: leaked questions, long rows, rows set aside."""
    findings = {str(f.get("id")): clean(str(f.get("says") or "")) for f in folder.doctor.get("findings") or ()}
    train = (folder.facts.get("data") or {}).get("train") or {}
    leaks = [findings[name] for name in sorted(findings) if name.startswith("contamination")]
    looked = "not looked for: no benchmark was named" if findings else "not looked for"
    long = findings.get("over_length") or ("none over the limit" if "lengths" in findings else "not counted")
    rows = [("Benchmark questions in the data", " ".join(leaks) or looked), ("Rows cut or dropped for length", long)]
    if train.get("quarantined") is not None:
        reasons = "; ".join(f"{clean(reason)} ({number:,})" for reason, number in folder.quarantine_reasons[:5])
        rows.append(("Rows set aside", words.count(train["quarantined"]) + (f": {reasons}" if reasons else "")))
    return rows


def leave_told(findings: Sequence[FindingView]) -> list[FindingView]:
    """Return the findings that ``list_checks`` does not tell."""
    return [finding for finding in findings if not finding.id.startswith(_TOLD_APART)]


def say_energy(facts: Mapping[str, Any]) -> str:
    """Return what is known of the energy that training took."""
    train = facts.get("train") or {}
    machine = str(facts.get("machine") or "")
    found = next(((name, watts) for name, watts in BOARD_POWER_W.items() if name in machine), None)
    seconds = train.get("seconds")
    if found is None or not isinstance(seconds, int | float):
        return "not measured"
    num_gpus = int(train.get("processes") or 1)
    watt_hours = found[1] * num_gpus * seconds / 3600
    gpus = f"{num_gpus} × " if num_gpus > 1 else ""
    return (
        f"not measured. An upper estimate for the GPU alone is {words.number(watt_hours)} Wh: {gpus}its rated"
        f" {found[1]} W (NVIDIA's data sheet of the {found[0]}) over the {words.seconds(seconds)} of training"
    )
