"""The suite: which sets of questions there are, how each is put, and the controls made from them.

Where a set lies, how it is read and how many items it should have is ``data/benchmarks.py``'s. This table adds what
only an evaluation needs: whether the abstract is shown, whether options are words or letters, what may differ from gold
and still be right. The same name elsewhere can mean any of these, and PubMedQA with and without its abstract are 20
points apart; so they are names of their own here, and a result carries the source's checksum and its counts.

``medqa:200`` takes the first 200 by a hash of their content, the same ones from the Hub and from a file, in whatever
order it is; those of ``medqa:400`` begin with them. The head of a file is no sample: many sets are sorted by subject.
The problems that our own code makes come in a seeded order already, family after family, and its head is taken.

A task is ready to be asked: ``build_requests`` makes requests of it, ``controls.py`` other tasks.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

from medcot import clinic
from medcot.data.benchmarks import load_benchmark
from medcot.data.choices import find_stem
from medcot.errors import DataError, did_you_mean
from medcot.evaluate.answers import WORDS
from medcot.evaluate.backends import Draws, Limits, Request
from medcot.evaluate.general import NUM_ITEMS, make_general
from medcot.evaluate.general import SOURCE as GENERAL
from medcot.evaluate.grading import instruction
from medcot.records import Allowance, AnswerKind, Example

CLINIC = "builtin:clinic"
CLINIC_ITEMS = 200  # ten of each family
CLINIC_SEED = 3407


@dataclass(frozen=True, slots=True)
class Entry:
    """How a set is asked.

    Attributes:
        about: what it is, in a few words.
        benchmark: a key of ``BENCHMARKS``; ``None`` where our code makes the items, or only a file has them.
        config: the Hub configuration, other than that table's.
        words: the options are words to answer with, such as yes, no and maybe, and no letters are shown.
        abstract: whether the text above the question is shown.
        share: how far from gold a decimal number may be, as a share of it.
        any_unit: gold's data set states no units, so none is judged.
        remedy: for a set that only a file has, how to come by it.
    """

    about: str
    benchmark: str | None = None
    config: str | None = None
    words: tuple[str, ...] = ()
    abstract: bool = True
    share: Decimal | None = None
    any_unit: bool = False
    remedy: str = ""


TASKS: dict[str, Entry] = {
    "medqa": Entry("USMLE questions, 4 options", "medqa"),
    "medqa-5": Entry("USMLE questions, 5 options", "medqa-5"),
    "medmcqa": Entry("Indian entrance examinations", "medmcqa"),
    "pubmedqa": Entry("a research question with its abstract: yes, no or maybe", "pubmedqa", words=WORDS),
    "pubmedqa-no-abstract": Entry("the same without the abstract", "pubmedqa", words=WORDS, abstract=False),
    "mmlu-medical": Entry("six medical subjects of MMLU", "mmlu-medical"),
    "mmlu-pro-health": Entry("MMLU-Pro's health questions, up to 10 options", "mmlu-pro-health"),
    "medxpertqa": Entry("specialist board questions, text only, 10 options", "medxpertqa"),
    "medbullets": Entry("USMLE step 2 and 3 style, 5 options", "medbullets"),
    "gpqa-medical": Entry("GPQA's genetics and molecular biology", "gpqa-medical"),
    "head-qa": Entry("Spanish health-service examinations, in English", "head-qa"),
    "head-qa-es": Entry("the same in Spanish", "head-qa", config="es"),
    "bioasq": Entry("factoid questions on the literature, a short answer", "bioasq"),
    "bioasq-yesno": Entry(
        "yes/no questions on the literature",
        words=("yes", "no"),
        remedy="Write bioasq-yesno=FILE, with columns question, options and answer, as in MIRAGE's benchmark.json; "
        "BioASQ gives its questions to registered users only",
    ),
    # The tolerance of the set's own scorer: decimals within 5 %, whole numbers (scores) and dates exactly.
    "medcalc-bench": Entry(
        "a value to calculate from a patient's note", "medcalc-bench", share=Decimal("0.05"), any_unit=True
    ),
    "medical-o1-verifiable-problem": Entry("open questions, a short answer", "medical-o1-verifiable-problem"),
    CLINIC: Entry("bedside arithmetic and scores made by our code, held out from training"),
    GENERAL: Entry("sums and reading comprehension made by our code: shows forgetting"),
}

SUITES: dict[str, tuple[str, ...]] = {
    "medicine": (
        *("medqa", "medmcqa", "pubmedqa", "mmlu-medical", "mmlu-pro-health", "medxpertqa", "medbullets"),
        *("medcalc-bench", CLINIC, GENERAL),
    ),
    "quick": ("medqa:200", "pubmedqa:100", f"{CLINIC}:100", f"{GENERAL}:100"),
    "builtin": (CLINIC, GENERAL),
}

_LIMITED = re.compile(r"(?P<rest>.+):(?P<limit>[0-9]+)")
_DATE = re.compile(r"(\d{1,2})/(\d{1,2})/(\d{4})")
_SEPARATORS = (", ", " ", " and ")
_WEEKS = re.compile(r"\(?['\"]?(\d+) weeks?['\"]?, *['\"]?(\d+) days?['\"]?\)?")


@dataclass(frozen=True, slots=True)
class Wanted:
    """A task as asked for.

    Attributes:
        name: a key of ``TASKS``, or a path or Hub id under its own name.
        source: where to read it instead of the table's place.
        limit: how many items; ``None`` for all.
    """

    name: str
    source: str | None = None
    limit: int | None = None

    @property
    def label(self) -> str:
        """The name with its limit."""
        return self.name if self.limit is None else f"{self.name}:{self.limit}"


@dataclass(frozen=True, slots=True)
class Item:
    """One question: what is graded against, what is asked, and what it may be answered with where that is a list."""

    example: Example
    prompt: str
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Task:
    """A set of questions, ready to be asked.

    Attributes:
        name: as asked for: ``medqa:200``.
        items: the questions.
        sha256: of the source: a file's bytes, a Hub set's rows, or our own problems as text.
        num_available: items that the source has.
        num_options: of each item, where that is one number.
        revision: the Hub commit, where known.
        control: what was done to it; ``None`` for the task itself.
        thinks: whether the model may think.
        sentences: what a reader of the result should know.
    """

    name: str
    items: tuple[Item, ...]
    sha256: str
    num_available: int
    num_options: int | None = None
    revision: str | None = None
    control: str | None = None
    thinks: bool = True
    sentences: tuple[str, ...] = ()

    @property
    def base(self) -> str:
        """The name without its size: ``medqa``."""
        return parse_task(self.name).name

    @property
    def facts(self) -> dict[str, Any]:
        """What every result says of the task that it is of."""
        return {
            "task": self.name,
            "control": self.control,
            "num_items": len(self.items),
            "num_available": self.num_available,
            "num_options": self.num_options,
            "sha256": self.sha256,
            "revision": self.revision,
            "sentences": list(self.sentences),
        }


# Names ----------------------------------------------------------------------------------------------------------------


def parse_task(text: str) -> Wanted:
    """Read ``medqa``, ``medqa:200``, ``medqa=FILE``, ``medqa=FILE:200`` or ``FILE:200``.

    Raises:
        DataError: the name is none, or the number is 0, or a slice is asked for.
    """
    whole = text.strip()
    if whole.endswith("]"):
        raise DataError(
            f"'{whole}' ends in a slice",
            "A slice takes the head of a file, which is no sample of it",
            f"Write {whole.partition('[')[0]}:200 for 200 items chosen by their content",
        )
    match = None if whole in TASKS else _LIMITED.fullmatch(whole)
    rest, limit = (match["rest"], int(match["limit"])) if match else (whole, None)
    if limit == 0 or not rest:
        raise DataError(f"'{whole}' has no item", "A task has one at least", "Write medqa, or medqa:200")
    name, equals, source = rest.partition("=")
    if equals and name.strip() in TASKS and source.strip():
        return Wanted(name.strip(), source.strip(), limit)
    if rest in TASKS:
        return Wanted(rest, None, limit)
    if "/" in rest or "." in rest or "\\" in rest:  # a path or a Hub id, which goes under its own name
        return Wanted(rest, rest, limit)
    raise DataError(f"'{rest}' is no task", "A task is named in the table, or is a path", did_you_mean(rest, TASKS))


def parse_suite(text: str) -> list[Wanted]:
    """Read a list of suites and tasks, separated by commas; a task named twice is taken once.

    Raises:
        DataError: as in ``parse_task``; or two sizes of one task.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    flat = [task for name in names for task in SUITES.get(name, (name,))]
    wanted = list(dict.fromkeys(parse_task(task) for task in flat))
    doubled = next((one.name for one in wanted if sum(other.name == one.name for other in wanted) > 1), None)
    if doubled or not wanted:
        raise DataError(
            f"'{text}' names {doubled + ' more than once' if doubled else 'no task'}",
            "Each task is evaluated once, in one size",
            f"Suites are {', '.join(SUITES)}; tasks {', '.join(TASKS)}",
        )
    return wanted


# Loading --------------------------------------------------------------------------------------------------------------


def load_task(wanted: Wanted | str, *, revision: str | None = None, token: str | None = None) -> Task:
    """Load a task and word its questions.

    Args:
        wanted: what ``parse_task`` reads.
        revision: the Hub branch, tag or commit.
        token: a Hub token.

    Raises:
        DataError: the source cannot be read, has no item with a known answer, or is not what its name promises.
        NetworkError: the Hub does not answer.
    """
    asked = parse_task(wanted) if isinstance(wanted, str) else wanted
    entry = TASKS.get(asked.name, Entry("a set of the user's"))
    if asked.name in (CLINIC, GENERAL) and asked.source is None:
        return _load_own(asked)
    source = _find_source(asked, entry)
    loaded = load_benchmark(
        source, config=entry.config if asked.source is None else None, revision=revision, token=token
    )
    known = [example for example in loaded.items if example.gold is not None and example.answer_kind is not None]
    hidden = len(loaded.items) - len(known)
    sentences = list(loaded.sentences)
    if hidden:
        sentences.append(f"{hidden:,} items without a known answer left out.")
    if not known:
        raise DataError(f"'{source}' has no item with a known answer", "Answers are graded", "Name another set")
    chosen = known if asked.limit is None else sorted(known, key=_digest)[: asked.limit]
    sentences += _say_short(asked, len(known))
    items = tuple(_word(example, entry) for example in chosen)
    num_options = len(entry.words) or loaded.num_options
    return Task(asked.label, items, loaded.sha256, len(known), num_options, loaded.revision, sentences=tuple(sentences))


def load_suite(text: str, *, token: str | None = None) -> list[Task]:
    """Load what ``parse_suite`` reads; errors as for ``parse_suite`` and ``load_task``."""
    return [load_task(wanted, token=token) for wanted in parse_suite(text)]


def _find_source(asked: Wanted, entry: Entry) -> str:
    """Return what ``load_benchmark`` reads, under the benchmark's name where it has one."""
    if asked.source is None and entry.benchmark is None:
        raise DataError(f"'{asked.name}' is not on the Hub", "It is read from a file", entry.remedy)
    if asked.source is None or entry.benchmark is None:
        return asked.source or str(entry.benchmark)
    return f"{entry.benchmark}={asked.source}"


def _load_own(asked: Wanted) -> Task:
    """Make a built-in task; its checksum is that of the usual length, so that a longer list finds a shorter one's."""
    usual = _make_own(asked.name, None)
    examples = usual if asked.limit is None else _make_own(asked.name, asked.limit)
    digest = hashlib.sha256("".join(f"{it.question}\n{it.gold}\n" for it in usual).encode()).hexdigest()
    items = tuple(_word(example, TASKS[asked.name]) for example in examples)
    return Task(asked.label, items, digest, max(len(usual), len(items)))


def _make_own(name: str, count: int | None) -> list[Example]:
    if name == CLINIC:
        return clinic.generate(count or CLINIC_ITEMS, split="test", seed=CLINIC_SEED)
    return make_general(count or NUM_ITEMS)


def _digest(example: Example) -> tuple[str, str]:
    return hashlib.sha256(f"{example.question}\n{example.gold}".encode()).hexdigest(), example.id


def _say_short(asked: Wanted, num_available: int) -> list[str]:
    if asked.limit is None or asked.limit <= num_available:
        return []
    return [f"{asked.limit:,} items were asked for, and there are {num_available:,}."]


def _word(example: Example, entry: Entry) -> Item:
    """Bring an item into the form that its task asks in, and put the wish for the last line behind it."""
    if entry.words:
        example = _as_words(example, entry)
    if entry.share is not None and example.gold is not None:
        example = replace(example, allowance=_allow(example.gold, entry))
    kind, gold = example.answer_kind, example.gold or ""
    assert kind is not None, "load_task left the others out"
    choices = tuple(example.options or ()) if kind is AnswerKind.LETTER else entry.words
    return Item(example, f"{example.question.strip()}\n\n{_ask(kind, gold, choices)}", choices)


def _ask(kind: AnswerKind, gold: str, choices: Sequence[str]) -> str:
    if kind is AnswerKind.TEXT and _DATE.fullmatch(gold):
        return "On the last line write Final answer: X, where X is the date as MM/DD/YYYY."
    if kind is AnswerKind.TEXT and _WEEKS.fullmatch(gold):
        return "On the last line write Final answer: X, where X is of the form 3 weeks, 2 days."
    return instruction(kind, choices or None)


def _as_words(example: Example, entry: Entry) -> Example:
    """Turn lettered options yes, no, maybe into the words themselves."""
    options = {letter: text.strip().lower() for letter, text in (example.options or {}).items()}
    gold = options.get(example.gold or "", (example.gold or "").lower())
    if gold not in entry.words or not set(options.values()) <= set(entry.words):
        raise DataError(
            f"'{example.id}' has the answer '{gold}' and the options {', '.join(options.values()) or 'none'}",
            f"They are {', '.join(entry.words)} in this set",
            "Name the file alone, so that it goes by its own name",
        )
    stem = find_stem(example)
    if not entry.abstract:
        stem = stem.rpartition("\n\n")[2]  # the abstract's parts are lines; an empty line parts it from the question
    return replace(example, question=stem, options=None, gold=gold, answer_kind=AnswerKind.YESNO)


def _allow(gold: str, entry: Entry) -> Allowance:
    """What may differ from gold: decimals by a share of it, dates and pairs by how they are written."""
    text = gold.strip().replace(",", "")
    if re.fullmatch(r"-?[0-9]*\.[0-9]+", text) and entry.share:
        value = Decimal(text)
        limits = sorted((value * (1 - entry.share), value * (1 + entry.share)))
        return Allowance((f"{limits[0]:f}", f"{limits[1]:f}"), any_unit=entry.any_unit)
    if date := _DATE.fullmatch(gold.strip()):
        month, day, year = (int(part) for part in date.groups())
        return Allowance(aliases=(f"{month:02}/{day:02}/{year}", f"{month}/{day}/{year}"))
    if pair := _WEEKS.fullmatch(gold.strip()):
        weeks, days = (int(part) for part in pair.groups())
        texts = [
            f"{weeks} {w}{sep}{days} {d}" for w in ("week", "weeks") for d in ("day", "days") for sep in _SEPARATORS
        ]
        return Allowance(aliases=(*texts, *(f"({text})" for text in texts)))
    return Allowance(any_unit=entry.any_unit)


def without_form(task: Task) -> Task:
    """Leave out the wish for the last line, for models that were trained on these very questions."""
    return replace(task, items=tuple(replace(item, prompt=item.example.question.strip()) for item in task.items))


def build_requests(task: Task, sampling: Draws, seeds: Sequence[int], limits: Limits) -> list[Request]:
    """Return one request an item and seed, the items of the first seed before those of the second."""
    limits = limits if task.thinks else replace(limits, think_tokens=0)
    return [
        Request(item.example.id, item.prompt, sampling, seed, limits, item.choices)
        for seed in seeds
        for item in task.items
    ]
