"""What the data doctor says of a source or a run, and what it needs to say it.

Severity is decided by the checks (``data/``). What changes it afterwards is ``apply_policy``: a finding that was dealt
with (rows removed, identifiers masked) is yellow. One that the user accepts stays what it is, and stops nothing.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from medcot import prompt
from medcot.data.benchmarks import load_benchmark
from medcot.data.duplicates import Duplicates
from medcot.data.faults import FAULTS
from medcot.data.findings import Check, Evidence, Finding, Severity
from medcot.data.identifiers import Identifiers, mask_identifiers
from medcot.data.quality import Quality
from medcot.data.tags import ForgedTags, check_template
from medcot.errors import MedcotError
from medcot.recipe import Recipe
from medcot.records import Example
from medcot.secrets import SecretName, find_secret
from medcot.stages import Identifiers as Policy

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ORDER = {severity: rank for rank, severity in enumerate((Severity.RED, Severity.YELLOW, Severity.INFO))}
CLEAN, UNREADABLE = "clean", "source_unreadable"


@dataclass(frozen=True)
class Diagnosis:
    """What the doctor says of a source or a run.

    Attributes:
        findings: the worst first.
        sources: lineage of each source, in plain JSON.
        sentences: what each column became, and what was noticed.
        counts: rows and tokens on the way, in plain JSON.
        accepted: ids of red findings that stop nothing.
    """

    findings: list[Finding]
    sources: list[dict[str, Any]] = field(default_factory=list)
    sentences: list[str] = field(default_factory=list)
    counts: dict[str, Any] = field(default_factory=dict)
    accepted: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        """``red``, ``yellow`` or ``clean``: the worst finding that was not accepted."""
        worst = min((ORDER[f.severity] for f in self.findings if f.id not in self.accepted), default=len(ORDER))
        return {0: "red", 1: "yellow"}.get(worst, CLEAN)

    @property
    def exit_code(self) -> int:
        """Of the command line: 2 where the source could not be read, 1 where something stops a run, else 0."""
        if any(finding.id == UNREADABLE for finding in self.findings):
            return 2
        return 1 if self.stops else 0

    @property
    def headline(self) -> str:
        """The verdict with the number of findings, in a few words."""
        counts = [sum(f.severity is severity for f in self.findings) for severity in (Severity.RED, Severity.YELLOW)]
        if not any(counts):
            return "nothing to object to"
        return ", ".join(f"{count} {word}" for count, word in zip(counts, ("red", "yellow"), strict=True) if count)

    @property
    def stops(self) -> list[Finding]:
        """The findings that stop a run."""
        return [f for f in self.findings if f.severity is Severity.RED and f.id not in self.accepted]

    def summary(self) -> dict[str, Any]:
        """The findings without evidence and figures, and the verdict: what ``--json`` prints and run.json keeps."""
        keys = ("id", "severity", "count", "rows", "says", "fix")
        return {
            "findings": [{key: _plain(getattr(finding, key)) for key in keys} for finding in self.findings],
            "verdict": self.verdict,
        }

    def report(self, version: str) -> dict[str, Any]:
        """All of it in plain JSON, for data/report.json and whoever draws it."""
        findings = [
            {**said, "evidence": [_masked(evidence) for evidence in f.evidence], "figures": f.figures}
            for said, f in zip(self.summary()["findings"], self.findings, strict=True)
        ]
        return {
            "version": 1,
            "medcot": version,
            "date": datetime.date.today().isoformat(),
            "verdict": self.verdict,
            "accepted": list(self.accepted),
            "sources": self.sources,
            "sentences": self.sentences,
            "counts": self.counts,
            "findings": _plain(findings),
        }

    def joined(self, other: Diagnosis) -> Diagnosis:
        """Both as one."""
        return dataclasses.replace(
            self,
            findings=sort_findings([*self.findings, *other.findings]),
            sources=other.sources or self.sources,
            sentences=other.sentences or self.sentences,
            counts={**self.counts, **other.counts},
        )


def unreadable(error: MedcotError) -> Diagnosis:
    """The diagnosis of a source that cannot be read."""
    says = f"{error.value}. {error.rule}."
    return Diagnosis([Finding(UNREADABLE, Severity.RED, 0, (), says, str(error.remedy))])


# Checks of texts ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tools:
    """What the checks need of the outside.

    Attributes:
        tokenizer: the model's; ``None`` where it cannot be had.
        style: how a question becomes text.
        items: the evaluation sets' questions, each with its set's name.
        why_no_tokenizer: said where there is none.
    """

    tokenizer: PreTrainedTokenizerBase | None
    style: prompt.Style
    items: tuple[tuple[str, Example], ...] = ()
    why_no_tokenizer: str = ""

    def template(self) -> list[Finding]:
        """What the model's own template does with a chain of thought."""
        return [] if self.tokenizer is None else check_template(self.tokenizer, self.style)

    @property
    def is_encodable(self) -> bool:
        """Whether rows can become tokens: there is a tokenizer, and a template where the style needs one."""
        return self.tokenizer is not None and not any(f.id == "template_unusable" for f in self.template())

    def doubts(self) -> list[Finding]:
        """What the template shows, and what could not be looked at."""
        found = self.template()
        if self.tokenizer is None:
            says = f"Nothing that needs tokens was checked: there is no tokenizer ({self.why_no_tokenizer})."
            fix = "Name a model that is at hand: --recipe, or model.source=…"
            found.append(Finding("survival_unchecked", Severity.YELLOW, 0, (), says, fix))
        if not self.items:
            says = "Training questions were compared with no evaluation set: none was named."
            fix = "Name those that will be used: --against medqa, or data.against=[medqa]"
            found.append(Finding("contamination_unchecked", Severity.INFO, 0, (), says, fix))
        return found

    def text_checks(self) -> list[Check]:
        """The checks that read texts, but for the comparison with ``items``."""
        found: list[Check] = [Quality(), Identifiers(), Duplicates()]
        if self.is_encodable:
            assert self.tokenizer is not None, "is_encodable says so"
            found.append(ForgedTags.of(self.tokenizer, self.style))
        return found


def load_items(against: Iterable[str]) -> tuple[tuple[str, Example], ...]:
    """Read benchmarks' questions, each with its benchmark's name.

    Raises:
        DataError: a benchmark that is not known or cannot be read.
        NetworkError: it is on the Hub, and there is no network.
    """
    secret = find_secret(SecretName.HUGGING_FACE)
    loaded = (load_benchmark(source, token=secret.value if secret else None) for source in against)
    return tuple((benchmark.name, item) for benchmark in loaded for item in benchmark.items)


def known_ids() -> frozenset[str]:
    """Ids of the findings that can be red, which ``data.accept`` may name."""
    of_texts = {"no_reasoning", "no_answer", "reasoning_in_question", "identifiers", "contamination_confirmed"}
    return frozenset({*FAULTS, *of_texts, "forged_tags", "template_unusable"})


def apply_policy(finding: Finding, recipe: Recipe, counts: Mapping[str, int] | None = None) -> Finding:
    """What a finding means under a recipe's policies.

    Args:
        finding: as a check made it.
        recipe: says what is removed, masked or refused.
        counts: of what was, as ``treatment.treat`` returns them; ``None`` where nothing was done yet.
    """
    data = recipe.data
    if finding.id == "identifiers" and data.identifiers is Policy.REFUSE:
        return dataclasses.replace(finding, severity=Severity.RED)
    if finding.id == "identifiers" and data.identifiers is Policy.MASK:
        done = "A run masks them." if counts is None else f"They were masked in {_rows(counts['masked_rows'])}."
        return dataclasses.replace(finding, severity=Severity.YELLOW, says=f"{finding.says} {done}", fix="")
    if counts is None:
        return finding
    if finding.id == "contamination_confirmed" and data.remove_contaminated:
        done = f"{_rows(counts['removed_contaminated'])} left out of training."
        return dataclasses.replace(finding, severity=Severity.YELLOW, says=f"{finding.says} {done}", fix="")
    exact, near = counts["removed_exact"], counts["removed_near"]
    if finding.id == "duplicates_exact" and exact:
        return dataclasses.replace(finding, says=f"{finding.says} {_rows(exact)} left out of training.", fix="")
    if finding.id in ("duplicates_normalised", "duplicates_near") and near:
        said = f"{finding.says} {_rows(near)} of this kind and the other left out of training."
        return dataclasses.replace(finding, says=said, fix="")
    return finding


def _rows(count: int) -> str:
    return f"{count:,} row{'' if count == 1 else 's'}"


def sort_findings(findings: Iterable[Finding]) -> list[Finding]:
    """Put the worst first, and of equals the most frequent."""
    return sorted(findings, key=lambda finding: (ORDER[finding.severity], -finding.count))


def _masked(evidence: Evidence) -> dict[str, Any]:
    """Evidence without what identifies a person: reports are passed around."""
    return {"row": evidence.row, "parts": {label: mask_identifiers(text)[0] for label, text in evidence.parts.items()}}


def _plain(value: Any) -> Any:
    """Make a value what JSON has."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(inner) for inner in value]
    if isinstance(value, np.generic):
        return value.item()
    return str(value) if isinstance(value, Severity) else value
