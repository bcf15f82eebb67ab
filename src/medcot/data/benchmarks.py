"""The evaluation sets by name: where each lies on the Hub, how it is read, and how many items it should have.

The same set is told in many ways: MedQA with four options and with five, PubMedQA's 1,000 labelled questions or the 500
of its test split, MMLU's six medical subjects out of 57. A result means nothing without these, so they stand here, and
what was loaded is compared with them: other options than the name promises are refused, another number of items is
said. ``None`` stands where we do not know.

Any set can be read from a local file in the Hub's schema (``medqa=test.jsonl``), since many machines that evaluate have
no network; and any file or data set whose layout is recognised is an evaluation set under its own name.
"""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass, replace
from pathlib import Path

from medcot.data.columns import FIRST_ROWS, Plan, Purpose, choose_layout, refuse_all
from medcot.data.plans import Counts
from medcot.data.sources import SourceStream, parse_slice, stream_rows
from medcot.errors import DataError
from medcot.records import Example, Quarantined


@dataclass(frozen=True, slots=True)
class Known:
    """An evaluation set that has a name.

    Attributes:
        hub_id: the data set on the Hub.
        layout: a key of ``layouts.LAYOUTS``.
        split: the split that is evaluated.
        config: the configuration.
        subjects: topics that belong to it, of a set that has more; ``None`` takes all.
        num_items: how many there are on the Hub.
        num_options: how many options each has, where that is one number.
        note: what a reader of a result should know.
    """

    hub_id: str
    layout: str
    split: str = "test"
    config: str | None = None
    subjects: tuple[str, ...] | None = None
    num_items: int | None = None
    num_options: int | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Benchmark:
    """An evaluation set as loaded.

    Attributes:
        name: a key of ``BENCHMARKS``, else the source.
        items: its questions, of the subjects that belong to it.
        sha256: a file's bytes, or a Hub data set's rows in canonical JSON.
        revision: the Hub commit, where known.
        num_options: how many options each item has; ``None`` where they differ or have none.
        quarantined: rows that are no questions.
        sentences: what each column became, and how it compares with what its name promises.
    """

    name: str
    items: list[Example]
    sha256: str
    revision: str | None
    num_options: int | None
    quarantined: list[Quarantined]
    sentences: list[str]


_MMLU_MEDICAL = (
    "anatomy",
    "clinical_knowledge",
    "college_biology",
    "college_medicine",
    "medical_genetics",
    "professional_medicine",
)

BENCHMARKS: dict[str, Known] = {
    "medqa": Known("GBaker/MedQA-USMLE-4-options", "medqa", num_items=1273, num_options=4),
    "medqa-5": Known(
        "lavita/medical-qa-datasets", "medqa", config="med-qa-en-5options-source", num_items=1273, num_options=5
    ),
    "medmcqa": Known(
        "openlifescienceai/medmcqa",
        "medmcqa",
        split="validation",
        num_items=4183,
        num_options=4,
        note="the test split hides its labels, so the validation split is evaluated",
    ),
    "pubmedqa": Known(
        "qiaojin/PubMedQA",
        "pubmedqa",
        split="train",
        config="pqa_labeled",
        num_items=1000,
        num_options=3,
        note="all 1,000 labelled questions with their abstracts; published results are often of 500 of them",
    ),
    "mmlu-medical": Known("cais/mmlu", "mmlu", config="all", subjects=_MMLU_MEDICAL, num_items=1089, num_options=4),
    "mmlu-pro-health": Known("TIGER-Lab/MMLU-Pro", "mmlu-pro", subjects=("health",), num_items=818),
    "medxpertqa": Known("TsinghuaC3I/MedXpertQA", "medxpertqa", config="Text", num_items=2450, num_options=10),
    "medbullets": Known("mkieffer/Medbullets", "medbullets", split="op5_test", num_items=308, num_options=5),
    "gpqa-medical": Known(
        "Idavidrein/gpqa",
        "gpqa",
        split="train",
        config="gpqa_main",
        subjects=("Genetics", "Molecular Biology"),
        num_options=4,
        note="GPQA has no medical part; these are the two subdomains nearest to medicine, as HuatuoGPT-o1 takes them",
    ),
    "head-qa": Known("alesi12/head_qa_v2", "head-qa", split="train", config="en", num_items=12751),
    "bioasq": Known("kroshan/BioASQ", "bioasq", split="validation", note="factoid questions, graded by text"),
    "medcalc-bench": Known("ncbi/MedCalc-Bench-v1.2", "medcalc-bench", num_items=1100),
    "medical-o1-verifiable-problem": Known(
        "FreedomIntelligence/medical-o1-verifiable-problem", "verifiable", split="train"
    ),
}


def load_benchmark(
    source: str,
    *,
    config: str | None = None,
    split: str | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> Benchmark:
    """Load an evaluation set.

    Args:
        source: a key of ``BENCHMARKS``; such a key, ``=`` and a path or Hub id with its schema; or a path or Hub id
            whose layout is recognised; each with or without ``[:N]``, which takes the first N rows.
        config: the Hub configuration, other than the table's.
        split: the Hub split, other than the table's.
        revision: the Hub branch, tag or commit.
        token: a Hub token.

    Raises:
        DataError: the source cannot be read, is of another layout, or has other options than its name promises.
        NetworkError: the Hub does not answer.
    """
    name, known, where = _resolve(source)
    at_home = known is not None and parse_slice(where)[0] == known.hub_id
    if known is not None and at_home:
        config, split = config or known.config, split or known.split
    local = os.path.exists(Path(parse_slice(where)[0]).expanduser())
    stream = stream_rows(
        where, config=config, split=split or ("train" if local else "test"), revision=revision, token=token
    )
    plan, items, quarantined, counts = _build(stream, name, known)
    items, sentences = _keep_subjects(items, known)
    if not items:
        raise refuse_all(where, counts.num_rows, quarantined[0].reason if quarantined else "of another subject")
    sizes = {len(item.options) if item.options else None for item in items}
    num_options = sizes.pop() if len(sizes) == 1 else None
    sentences = [f"{note}." for note in stream.notes] + plan.say(counts) + sentences
    if known is not None:
        sentences += _compare(name, known, items, num_options, where)
    return Benchmark(name, items, stream.sha256, stream.revision, num_options, quarantined, sentences)


def _resolve(source: str) -> tuple[str, Known | None, str]:
    """Return the name, what is known of it, and where to read it."""
    name, limit = parse_slice(source)
    if name in BENCHMARKS:
        return name, BENCHMARKS[name], BENCHMARKS[name].hub_id + (f"[:{limit}]" if limit else "")
    key, equals, where = source.strip().partition("=")
    if equals and key.strip() in BENCHMARKS:
        return key.strip(), BENCHMARKS[key.strip()], where.strip()
    if equals and where and not os.path.exists(name):
        raise DataError(
            f"'{key}' names no evaluation set",
            f"Known are {', '.join(BENCHMARKS)}",
            f"Write one of them before the '=', or '{where}' alone",
        )
    by_id = {known.hub_id: key for key, known in reversed(BENCHMARKS.items())}
    if name in by_id and not os.path.exists(name):
        return by_id[name], BENCHMARKS[by_id[name]], source
    return name, None, source


def _build(
    stream: SourceStream, name: str, known: Known | None
) -> tuple[Plan, list[Example], list[Quarantined], Counts]:
    rows = (row for row, _ in stream)
    first = list(itertools.islice(rows, FIRST_ROWS))
    plan = choose_layout(
        list(dict.fromkeys(key for row in first for key in row)),
        first,
        source=stream.source,
        purpose=Purpose.EVALUATE,
        layout=known.layout if known else None,
    )
    if known is not None:
        plan = replace(plan, source=name)  # so that items are called medqa:17, wherever they were read
    built = plan.build(first + list(rows), 1, stream.places)
    return plan, built.examples, built.quarantined, built.counts


def _keep_subjects(items: list[Example], known: Known | None) -> tuple[list[Example], list[str]]:
    if known is None or known.subjects is None:
        return items, []
    kept = [item for item in items if item.topic in known.subjects]
    left = len(items) - len(kept)
    return kept, [f"{left:,} of other subjects left out; kept are {', '.join(known.subjects)}."] if left else []


def _compare(name: str, known: Known, items: list[Example], num_options: int | None, where: str) -> list[str]:
    """Say where the items are other than the name promises.

    Raises:
        DataError: they have another number of options.
    """
    if known.num_options is not None and num_options != known.num_options:
        found = "options of different numbers" if num_options is None else f"{num_options} options"
        other = next(
            (key for key, it in BENCHMARKS.items() if (it.layout, it.num_options) == (known.layout, num_options)), None
        )
        raise DataError(
            f"'{where}' has {found}",
            f"{name} has {known.num_options}, and results with more and with fewer are not comparable",
            f"Write {other}={where}" if other else f"Write '{where}' alone, so that it goes by its own name",
        )
    sentences = [f"{name}: {known.note}."] if known.note else []
    if known.num_items is not None and len(items) != known.num_items:
        sentences.append(f"{len(items):,} items; {name} has {known.num_items:,} on the Hub.")
    return sentences
