"""Who writes thinking tags and turns: the prompt's frame alone, never a text of the data, and not a template by itself.

Two checks, both before any row is encoded. ``check_template`` sends a canary through the model's chat template and says
what becomes of its reasoning: R1's template deletes it, others open ``<think>`` a second time. Our own rows never pass
an answer through the template, so that is for the record; for a trainer that renders whole conversations it is fatal.

``ForgedTags`` looks for user text that would open or close a thinking block or forge a turn. A row with a stray tag is
set aside when it is read, and ``prompt.encode_row`` refuses the rest on token ids; but a data set that holds such rows
was scraped from model outputs with their markup, or made to attack, and its owner must know. A marker in other clothes
(full-width letters, zero-width characters inside) is red only if this tokenizer's own normaliser undresses it;
otherwise it stays harmless text, and is reported yellow.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from medcot import prompt
from medcot.data.findings import MOST_ROWS, Chunk, Evidence, Finding, Reader, Severity
from medcot.errors import ModelError
from medcot.prompt import THINK_CLOSE, THINK_OPEN, Style
from medcot.records import Example, Problem, Quarantined

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

_CANARY_QUESTION = "Does the canary sing?"
_CANARY_REASONING = "It sings as long as it breathes."
_CANARY_ANSWER = "Yes, it does."

_INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e"
    "\u2060-\u206f\ufe00-\ufe0f\ufeff]"
)
_RULES = 2  # raised when what is counted changes: tallies kept by older rules serve no more
_AROUND = 40  # characters shown on each side of a marker


# The template -------------------------------------------------------------------------------------------------------


def check_template(tokenizer: PreTrainedTokenizerBase, style: Style, *, renders_answers: bool = False) -> list[Finding]:
    """Say what the model's chat template does to a chain of thought.

    Args:
        tokenizer: with its ``chat_template``; without one there is nothing to say, but in style ``chat``.
        style: how questions are put; ``chat`` needs a template whose generation prompt can be used.
        renders_answers: whether training rows are the template's rendering of whole conversations. Medcot's are not;
            other trainers' are, and what is for the record otherwise is then red.
    """
    findings: list[Finding] = []
    if Style(style) is Style.CHAT:
        try:
            prompt.render_prompt(_CANARY_QUESTION, style, tokenizer)
        except ModelError as error:
            findings.append(_say("template_unusable", f"{error.value}. {error.rule}", error.remedy, is_red=True))
    if not tokenizer.chat_template:
        return findings
    try:
        asked, told = _render(tokenizer)
    except Exception as error:  # whatever a template raises: jinja's errors, TypeError, its own raise_exception
        says = f"The chat template cannot render an assistant's turn: {error}"
        return [*findings, _say("template_unusable", says, _FIX, is_red=True)] if renders_answers else findings
    return findings + _judge_template(asked, told, renders_answers)


_FIX = "Encode rows with medcot (it never renders answers through the template), or mend the template."


def _render(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Return a question's generation prompt, and the conversation with its answer."""
    asking = [{"role": "user", "content": _CANARY_QUESTION}]
    answer = f"{THINK_OPEN}\n{_CANARY_REASONING}\n{THINK_CLOSE}\n\n{_CANARY_ANSWER}"
    telling = [*asking, {"role": "assistant", "content": answer}]
    render = functools.partial(tokenizer.apply_chat_template, tokenize=False, enable_thinking=True)
    return cast(str, render(asking, add_generation_prompt=True)), cast(str, render(telling))


def _judge_template(asked: str, told: str, renders_answers: bool) -> list[Finding]:
    times = told.count(_CANARY_REASONING)
    opens, closes = told.count(THINK_OPEN), told.count(THINK_CLOSE)
    figures = {"reasoning": times, "opens": opens, "closes": closes, "prompt": asked, "conversation": told}
    bypassed = "" if renders_answers else " Medcot's rows do not pass through it."
    fix = _FIX if renders_answers else ""
    findings: list[Finding] = []
    if not times:
        says = f"The chat template deletes the chain of thought from assistant turns.{bypassed}"
        findings.append(_say("template_drops_reasoning", says, fix, is_red=renders_answers, figures=figures))
    elif times > 1 or (opens, closes) != (1, 1):
        says = (
            f"The chat template makes {opens} <think>, {closes} </think> and the reasoning {times} times of one of "
            f"each.{bypassed}"
        )
        findings.append(_say("template_duplicates_think", says, fix, is_red=renders_answers, figures=figures))
    if asked.rstrip().endswith(THINK_OPEN):
        agrees = told.startswith(asked)
        says = "The chat template ends the generation prompt with an opened <think>" + (
            "." if agrees else f", which its own assistant turns do not have.{bypassed}"
        )
        is_red = renders_answers and not agrees
        findings.append(_say("template_prefills_think", says, fix if is_red else "", is_red=is_red, figures=figures))
    return findings


def _say(name: str, says: str, fix: str, *, is_red: bool, figures: dict[str, Any] | None = None) -> Finding:
    severity = Severity.RED if is_red else Severity.INFO
    return Finding(name, severity, 1, (), says, fix, figures=figures or {})


# Texts --------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Seen:
    """Markers met in some rows: how many rows, the first ids, and what to show of the first."""

    count: int = 0
    rows: list[str] = field(default_factory=list)
    evidence: list[Evidence] = field(default_factory=list)
    markers: dict[str, int] = field(default_factory=dict)  # marker → rows

    def add(self, row_id: str, hits: dict[str, tuple[str, str]]) -> None:
        """Count a row; ``hits`` is field → marker and the text around it."""
        self.count += 1
        for marker in {marker for marker, _ in hits.values()}:
            self.markers[marker] = self.markers.get(marker, 0) + 1
        if len(self.rows) < MOST_ROWS:
            self.rows.append(row_id)
            self.evidence.append(Evidence(row_id, {name: around for name, (_, around) in hits.items()}))

    def merge(self, other: _Seen) -> None:
        """Add what was seen in later rows."""
        self.count += other.count
        self.rows = [*self.rows, *other.rows][:MOST_ROWS]
        self.evidence = [*self.evidence, *other.evidence][:MOST_ROWS]
        for marker, count in other.markers.items():
            self.markers[marker] = self.markers.get(marker, 0) + count


@dataclass(slots=True)
class ForgedTally:
    """Rows of a chunk with markers, and rows with what only looks like one."""

    num_rows: int
    forged: _Seen = field(default_factory=_Seen)
    alike: _Seen = field(default_factory=_Seen)


@dataclass(frozen=True)
class ForgedTags:
    """The check: does a text of the data hold what only the prompt's frame may write?

    Attributes:
        markers: thinking tags, control tokens, and a style's headings.
        headings: those of them that matter in a question only.
        normaliser: the tokenizer's own, or ``None``; picklable.
    """

    markers: tuple[str, ...]
    headings: tuple[str, ...] = ()
    normaliser: Any = None

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, style: Style) -> ForgedTags:
        """Return the check for a model.

        Raises:
            ModelError: the tokenizer cannot serve the style.
        """
        markers, headings = prompt.find_markers(style, tokenizer)
        return cls(markers, headings, cast("PreTrainedTokenizerFast", tokenizer).backend_tokenizer.normalizer)

    @property
    def name(self) -> str:
        """See ``Check``."""
        return "forged_tags"

    @property
    def settings(self) -> str:
        """See ``Check``."""
        state = b"" if self.normaliser is None else self.normaliser.__getstate__()
        return repr((_RULES, self.markers, self.headings, state))

    def map(self, chunk: Chunk) -> ForgedTally:
        """See ``Check``."""
        tally = ForgedTally(chunk.num_rows)
        for example in chunk.examples:
            forged, alike = self._look(example)
            if forged:
                tally.forged.add(example.id, forged)
            elif alike:
                tally.alike.add(example.id, alike)
        for item in chunk.quarantined:
            if item.problem is Problem.TAGS:
                tally.forged.add(f"row {item.row_number}", {item.field or "row": _find_tag(item)})
        return tally

    def reduce(self, tallies: Iterable[ForgedTally], reader: Reader) -> list[Finding]:
        """See ``Check``."""
        forged, alike, num_rows = _Seen(), _Seen(), 0
        for tally in tallies:
            num_rows += tally.num_rows
            forged.merge(tally.forged)
            alike.merge(tally.alike)
        return [
            *_report("forged_tags", Severity.RED, forged, num_rows,
                     "hold text that would open or close thinking, or forge a turn",
                     "Remove the markup from these texts, or leave the rows out."),
            *_report("lookalike_tags", Severity.YELLOW, alike, num_rows,
                     "hold what looks like a marker of the model's and is none to its tokenizer",
                     "Read them: it may be markup of another model, or an attack on one."),
        ]  # fmt: skip

    def _look(self, example: Example) -> tuple[dict[str, tuple[str, str]], dict[str, tuple[str, str]]]:
        """Return the fields of an example with a marker, and those with a look-alike."""
        forged: dict[str, tuple[str, str]] = {}
        alike: dict[str, tuple[str, str]] = {}
        texts = {"question": example.question, "reasoning": example.reasoning, "response": example.response}
        for name, text in texts.items():
            if not text or not self._may_hold(text):
                continue
            markers = self.markers + (self.headings if name == "question" else ())
            for seen in (text, self._read(text)):
                if (marker := next((marker for marker in markers if marker in seen), None)) is not None:
                    forged[name] = (marker, _around(seen, marker))
            folded = _fold(text)
            if name not in forged and (marker := next((m for m in map(_fold, markers) if m in folded), None)):
                alike[name] = (marker, _around(folded, marker))
        return forged, alike

    def _read(self, text: str) -> str:
        """Return the text as the tokenizer's normaliser hands it on."""
        if self.normaliser is None:
            return text
        whole = text.encode("utf-8", "replace").decode()  # half a surrogate pair is another check's business
        return cast(str, self.normaliser.normalize_str(whole))

    def _may_hold(self, text: str) -> bool:
        """Whether a text has the first character of any marker, plain or dressed; nearly none has."""
        return any(character in text for character in self._beginnings)

    @functools.cached_property
    def _beginnings(self) -> str:
        return _find_variants(frozenset(_fold(marker)[0] for marker in self.markers + self.headings if _fold(marker)))


def _report(name: str, severity: Severity, seen: _Seen, num_rows: int, says: str, fix: str) -> list[Finding]:
    if not seen.count:
        return []
    commonest = sorted(seen.markers.items(), key=lambda item: (-item[1], item[0]))
    listed = ", ".join(f"{marker!r} in {count:,}" for marker, count in commonest[:5])
    sentence = f"{seen.count:,} of {num_rows:,} rows {says}: {listed}."
    figures = {"markers": dict(commonest)}
    return [Finding(name, severity, seen.count, tuple(seen.rows), sentence, fix, tuple(seen.evidence), figures)]


def _find_tag(item: Quarantined) -> tuple[str, str]:
    """Return the tag for which a row was set aside, and the reason."""
    text = str(item.row)
    return next(tag for tag in (THINK_CLOSE, THINK_OPEN) if tag in text), item.reason


def _fold(text: str) -> str:
    """Return a text without what makes one marker look like another: width, compatibility forms, invisible signs."""
    if text.isascii():
        return text.lower()
    return unicodedata.normalize("NFKC", _INVISIBLE.sub("", text)).lower()


@functools.lru_cache(maxsize=8)
def _find_variants(characters: frozenset[str]) -> str:
    """Return every character of the Basic Multilingual Plane that folds to a text that begins with one of these."""
    plane = (chr(code) for code in range(0x10000) if not 0xD800 <= code < 0xE000)
    return "".join(character for character in plane if _fold(character)[:1] in characters)


def _around(text: str, marker: str) -> str:
    at = text.index(marker)
    start, stop = max(0, at - _AROUND), at + len(marker) + _AROUND
    return ("…" if start else "") + text[start:stop] + ("…" if stop < len(text) else "")
