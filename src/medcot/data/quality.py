"""Rows that read badly: no reasoning, no answer, loops, refusals, broken characters, mark-up, another language.

Each fault is one plain rule whose reason can be shown beside the row, not a score of a trained model: a filter that
cannot say why it dislikes a row cannot be argued with, and medical text is far from what such filters were trained on.
What the rules cannot see (wrong medicine, reasoning that argues for another answer in the same words) they do not
claim. Only three faults are red, and only above 5 % of the rows, because such a set teaches the model to answer without
thinking, to copy its thoughts from the prompt, or to think without answering; all others are rates with examples, for a
person to judge.

What one text shows by itself is in ``flaws.py``. Two rules on rows need a word.

*Reasoning that misses the answer*: of the content words of the last 600 characters of reasoning and those of the
response, under a tenth of the smaller set is shared. On the 198 real rows of medical-o1-reasoning-SFT the lowest share
is above that in every one; with each response moved to the next row 96 % fall below (tests/data/test_quality.py
holds both).

*Language*: each row against what most rows hold, or what the caller names; see ``languages.py``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

from medcot.data.findings import MOST_ROWS, Chunk, Evidence, Finding, Reader, Severity
from medcot.data.flaws import find_flaws, shorten, show_around
from medcot.data.languages import find_languages
from medcot.data.words import VERSION, list_words, normalise
from medcot.records import AnswerKind, Example, Problem, Quarantined

RED_SHARE = 0.05  # rows without reasoning, or without answer, above which a set is unfit
FEWEST_WORDS = 20  # of reasoning; the shortest of the 198 real rows has 232
FEWEST_CJK = 40  # characters, for text written without spaces
TAIL = 600  # characters of reasoning in which its conclusion is looked for
LEAST_SHARED = 0.1  # of the smaller set of content words; see above
MOST_READ = 8_000  # characters at either end of a text that word-by-word rules read
_MOST_SHOWN = 5  # examples of a fault in the report

# id: what so many rows do, and what to do about it
_FAULTS = {
    "no_reasoning": (
        "have no reasoning of their own (empty, missing, or a copy of the question or of the answer)",
        "Leave these rows out, or name the column that holds the reasoning: data.columns.reasoning=…",
    ),
    "no_answer": (
        "have no answer (an empty or missing response)",
        "Leave these rows out, or name the column that holds the response: data.columns.response=…",
    ),
    "reasoning_in_question": (
        "have their reasoning in the question too, word for word, where it will never be when the model is asked",
        "Take it out of the question, or name the column that holds the question alone: data.columns.question=…",
    ),
    "unusable_rows": (
        "cannot become examples as they stand, and are set aside: not for lack of reasoning or answer, but for values "
        "of a wrong kind, think tags, or a form that their layout does not have",
        "Read why beside each and mend the source; medcot run lists all of them in data/quarantine.jsonl",
    ),
    "tiny_reasoning": (
        f"reason in fewer than {FEWEST_WORDS} words",
        "Read them: a sentence is seldom a chain of thought, and it teaches the model to stop thinking early",
    ),
    "reasoning_misses_answer": (
        f"end their reasoning in words of which the response uses almost none (the last {TAIL} characters)",
        "Read them: either the reasoning was cut, or reasoning and response come from different rows",
    ),
    "gold_missing": (
        "have a response in which the known answer does not stand, word for word or as its number or letter",
        "Read them: another name for the same answer is fine, another answer is not",
    ),
    "language_mixed": (
        "hold another language than the set",
        "Leave them out unless the mixture is meant; the model will switch language as they do",
    ),
    "loops": ("repeat themselves over and over", "Leave them out: they teach the model never to stop"),
    "placeholder": (
        "hold placeholder or refusal text",
        "Leave them out, or the model learns to refuse and to write templates",
    ),
    "broken_text": (
        "hold broken characters (wrong decoding, U+FFFD, control characters)",
        "Read the source again with the right encoding; characters already lost as U+FFFD need the original",
    ),
    "markup": ("hold HTML tags or entities", "Strip them at the source, or the model will write them"),
    "mangled_dates": (
        "hold what looks like a ratio or a gene name that a spreadsheet made a date (2-May, Mar-03)",
        "Compare with the original; export again with these columns as text",
    ),
}

_RED = ("no_reasoning", "no_answer", "reasoning_in_question")  # above RED_SHARE
_RULES = 2  # raised when a rule of this file or of flaws.py changes: tallies kept by older rules serve no more

_HAN_AND_KIN = re.compile(r"[\u3005-\u30ff\u3400-\u9fff\uac00-\ud7a3\uf900-\ufaff]")
# Words that any two medical texts share, besides the short ones.
_EVERYWHERE = frozenset(
    re.findall(
        r"\w+",
        """
        about above after again against alright also although another answer based because been before being below
        between both cannot case conclusion condition consider considering correct could diagnosis does doing down
        during each either even every final from further given have having here however into itself just know less
        like likely look looking make makes making many might more most much must need okay only option options other
        over patient patients question quite rather really right same seems sense shall should since some still such
        than that their them then there therefore these they thing things think this those though through thus
        together under until upon very want well were what when where whether which while will with within without
        would your
        """,
    )
)


@dataclass(slots=True)
class QualityTally:
    """What one chunk holds: a count for each fault, and its first rows."""

    num_rows: int
    counts: Counter[str] = field(default_factory=Counter)
    shown: dict[str, list[Evidence]] = field(default_factory=dict)  # fault → its first MOST_ROWS rows
    languages: Counter[str] = field(default_factory=Counter)  # "en", "en+zh": those of one row
    in_language: dict[str, list[Evidence]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Quality:
    """The check for the faults of ``_FAULTS``.

    Attributes:
        language: what the rows should be in, as ``find_languages`` writes it (``"en"``, ``"zh"``); ``None`` takes the
            language that most rows have.
    """

    language: str | None = None

    @property
    def name(self) -> str:
        """Key of the cache."""
        return "quality"

    @property
    def settings(self) -> str:
        """The versions of the rules and of how words are read; ``language`` is for ``reduce`` only."""
        return f"rules {_RULES}, words {VERSION}"

    def map(self, chunk: Chunk) -> QualityTally:
        """Judge each row of a chunk by itself."""
        tally = QualityTally(chunk.num_rows)
        for example in chunk.examples:
            for fault, parts in judge(example):
                tally.counts[fault] += 1
                _keep(tally.shown.setdefault(fault, []), Evidence(example.id, parts))
            languages = find_languages(text for _, text in named_texts(example)[:3])
            if languages:
                spoken = "+".join(languages)
                tally.languages[spoken] += 1
                seen = tally.in_language.setdefault(spoken, [])
                if len(seen) < MOST_ROWS:  # most rows are in the language of all, and past these
                    texts = {name: shorten(text) for name, text in named_texts(example)[:3]}
                    _keep(seen, Evidence(example.id, texts))
        for item in chunk.quarantined:
            fault = find_missing(item) or "unusable_rows"
            tally.counts[fault] += 1
            evidence = Evidence(f"row {item.row_number}", {"set aside": shorten(item.reason)})
            _keep(tally.shown.setdefault(fault, []), evidence)
        return tally

    def reduce(self, tallies: Iterable[QualityTally], reader: Reader) -> list[Finding]:
        """Return one finding for each fault that any row has."""
        total = QualityTally(0)
        for tally in tallies:
            total.num_rows += tally.num_rows
            total.counts += tally.counts
            total.languages += tally.languages
            for kept, more in ((total.shown, tally.shown), (total.in_language, tally.in_language)):
                for key, seen in more.items():
                    known = kept.setdefault(key, [])
                    known.extend(seen[: MOST_ROWS - len(known)])
        expected = self.language or _most_spoken(total.languages)
        for spoken, count in total.languages.most_common():
            if set(spoken.split("+")) - {expected}:
                total.counts["language_mixed"] += count
                total.shown.setdefault("language_mixed", []).extend(total.in_language[spoken])
        return [_describe(total, fault, expected) for fault in _FAULTS if total.counts[fault]]


def judge(example: Example) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the faults of one example, each with what to show; languages are for ``find_languages``."""
    reasoning, response = example.reasoning or "", example.response or ""
    if not response.strip():
        yield "no_answer", {"question": shorten(example.question), "response": shorten(response)}
    copied = _find_copied(example, reasoning, response)
    if copied or not reasoning.strip():
        parts = {"reasoning": shorten(reasoning), **({copied: shorten(getattr(example, copied))} if copied else {})}
        yield "no_reasoning", parts
    elif _is_tiny(reasoning):
        yield "tiny_reasoning", {"reasoning": shorten(reasoning)}
    elif response.strip() and _misses(reasoning, response):
        yield "reasoning_misses_answer", {"end of reasoning": shorten(reasoning, -1), "response": shorten(response)}
    if not copied and _stands_in(example.question, reasoning):
        yield "reasoning_in_question", {"reasoning": shorten(reasoning), "question": shorten(example.question)}
    if response.strip() and not _holds_gold(example, response):
        yield "gold_missing", {"known answer": shorten(_gold_text(example)), "response": shorten(response)}
    seen: set[str] = set()
    for name, text in named_texts(example):
        for fault, start in find_flaws(text):
            if fault == "loops" and name == "options":  # they are meant to resemble one another
                continue
            if fault not in seen:
                seen.add(fault)
                yield fault, {name: show_around(text, start)}


def named_texts(example: Example) -> list[tuple[str, str]]:
    """Return the texts of an example under their names: question, reasoning, response, options, gold."""
    texts = [
        ("question", example.question),
        ("reasoning", example.reasoning or ""),
        ("response", example.response or ""),
    ]
    if example.options:
        texts.append(("options", "\n".join(example.options.values())))
    if example.gold:
        texts.append(("gold", example.gold))
    return texts


def find_missing(item: Quarantined) -> str | None:
    """Return ``"no_reasoning"`` or ``"no_answer"`` where a row was set aside for that, else ``None``."""
    if item.problem not in (Problem.MISSING, Problem.NULL, Problem.EMPTY):
        return None
    return {"reasoning": "no_reasoning", "response": "no_answer"}.get(item.field or "")


def compute_shared(reasoning: str, response: str) -> float:
    """Return which part of the smaller set of content words is in both: the reasoning's end, and the response."""
    response_words = _content_words(_ends(response))
    end_words = _content_words(reasoning[-TAIL:])
    if not end_words or not response_words:  # "A", "Yes": no content words, so any word will do
        end_words, response_words = set(list_words(reasoning[-TAIL:])), set(list_words(_ends(response)))
    fewest = min(len(end_words), len(response_words))
    return len(end_words & response_words) / fewest if fewest else 1.0


def _misses(reasoning: str, response: str) -> bool:
    """Return whether too little is shared; most often the very end of the reasoning tells that it is not."""
    wanted = _content_words(_ends(response))
    very_end = list_words(reasoning[-TAIL // 3 :])[1:]  # the first may be half a word
    if wanted and len(wanted.intersection(very_end)) / len(wanted) >= LEAST_SHARED:
        return False  # of all of the end, and of the smaller set, as much or more is shared
    return compute_shared(reasoning, response) < LEAST_SHARED


def _keep(seen: list[Evidence], evidence: Evidence) -> None:
    """Keep the first rows of a fault: some with what was seen, the rest by id."""
    if len(seen) < _MOST_SHOWN:
        seen.append(evidence)
    elif len(seen) < MOST_ROWS:
        seen.append(Evidence(evidence.row, {}))


def _describe(total: QualityTally, fault: str, expected: str) -> Finding:
    """Return the finding of one fault, with its rate."""
    does, fix = _FAULTS[fault]
    count = total.counts[fault]
    share = count / max(1, total.num_rows)
    figures: dict[str, object] = {"rate": share, "num_rows": total.num_rows}
    if fault == "language_mixed":
        does = f"{does} ('{expected}')"
        figures["languages"] = dict(total.languages.most_common())
    red = fault in _RED and share > RED_SHARE
    seen = total.shown[fault][:MOST_ROWS]
    return Finding(
        id=fault,
        severity=Severity.RED if red else Severity.YELLOW,
        count=count,
        rows=tuple(evidence.row for evidence in seen),
        says=f"{count:,} of {total.num_rows:,} rows ({share:.1%}) {does}.",
        fix=f"{fix}.",
        evidence=tuple(evidence for evidence in seen if evidence.parts)[:_MOST_SHOWN],
        figures=figures,
    )


def _most_spoken(languages: Counter[str]) -> str:
    """Return the one language that most rows hold; the first in the alphabet of equals."""
    rows: Counter[str] = Counter()
    for spoken, count in languages.items():
        for language in spoken.split("+"):
            rows[language] += count
    return min(rows, key=lambda language: (-rows[language], language), default="")


def _find_copied(example: Example, reasoning: str, response: str) -> str | None:
    """Return the field that the reasoning is a copy of, words alone compared."""
    for name, other in (("question", example.question), ("response", response)):
        near = 0.8 * len(other) - 10 <= len(reasoning) <= 1.25 * len(other) + 10
        if near and other.strip() and reasoning.strip() and normalise(reasoning) == normalise(other):
            return name
    return None


def _stands_in(question: str, reasoning: str) -> bool:
    """Return whether a question holds the whole reasoning, words alone compared; one of a few words proves nothing."""
    if len(question) < 0.8 * len(reasoning) - 10 or not reasoning.strip():  # nearly every row ends here, unread
        return False
    words = normalise(reasoning)
    return words.count(" ") + 1 >= FEWEST_WORDS and f" {words} " in f" {normalise(question)} "


def _is_tiny(reasoning: str) -> bool:
    if len(reasoning) >= 40 * FEWEST_WORDS:
        return False
    return (
        len(reasoning.split(maxsplit=FEWEST_WORDS)) < FEWEST_WORDS and len(_HAN_AND_KIN.findall(reasoning)) < FEWEST_CJK
    )


def _gold_text(example: Example) -> str:
    gold = example.gold or ""
    return f"{gold}: {example.options[gold]}" if example.options and gold in example.options else gold


def _holds_gold(example: Example, response: str) -> bool:
    """Return whether the known answer stands in the response; true where none is known."""
    gold = (example.gold or "").strip()
    if not gold:
        return True
    text = (example.options or {}).get(gold, "")
    folded = f" {normalise(response)} "
    if example.answer_kind is AnswerKind.LETTER or (text and len(gold) == 1):
        letter = re.escape(gold)  # a bare "A" is an article
        named = (
            rf"[(*\[]{letter}[)*\]]|\b{letter}[.):]|\b(?i:answer|option|choice)\W{{1,4}}(?:(?i:is)\W{{1,4}})?{letter}\b"
        )
        return response.strip(" .*()") == gold or bool(re.search(named, response)) or _holds_words(folded, text)
    if example.answer_kind is AnswerKind.NUMBER:
        number = re.search(r"-?\d[\d,]*\.?\d*", gold)
        if number:
            wanted = float(number[0].replace(",", ""))
            found = (float(each.replace(",", "")) for each in re.findall(r"-?\d[\d,]*\.?\d*", response))
            return any(abs(each - wanted) <= 0.005 * abs(wanted) for each in found)
    return _holds_words(folded, gold)


def _holds_words(folded: str, text: str) -> bool:
    """Return whether a text stands in a folded one, in one piece or at least with all of its content words."""
    wanted = normalise(text)
    if not wanted:
        return False
    if f" {wanted} " in folded or (not wanted.isascii() and wanted in folded):
        return True
    words = _content_words(text)
    return len(words) >= 2 and words <= _content_words(folded)


def _content_words(text: str) -> set[str]:
    """Return numbers and words over three letters that not every text has; pairs of characters for Chinese and kin."""
    words = list_words(text)
    content = {word for word in words if (len(word) > 3 and word not in _EVERYWHERE) or word.isdigit()}
    if not text.isascii():
        alone = {word for word in words if len(word) == 1 and not word.isascii() and word.isalpha()}
        if alone:
            content.update(first + second for first, second in pairwise(words) if first in alone and second in alone)
    return content


def _ends(text: str) -> str:
    return text if len(text) <= 2 * MOST_READ else f"{text[:MOST_READ]} {text[-MOST_READ:]}"
