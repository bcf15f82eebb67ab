r"""What the data doctor saw, made fit to be shown: masked, visible, and cut into pieces to colour.

Evidence is text of the data: written by anybody, with whatever is in it. A report gets shared, so identifiers are
masked here, in what was found for any other reason too; and since a terminal obeys escape sequences and both terminals
and browsers obey marks of direction, every character that is not plainly visible is written out (``\u001b``). Escaping
HTML is the template's business. What comes out is plain text in pieces, the same for the page and the terminal.

Identifiers are looked for in the text as a whole, not in its pieces: a telephone number that a mark or a change of loss
cuts in two is still one.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import accumulate, pairwise
from typing import Any

from medcot.data.identifiers import find_identifiers, mask_identifiers
from medcot.prompt import THINK_CLOSE, THINK_OPEN

SHORT = 200  # characters on one line up to which a text needs no box of its own
MOST_OF_SPAN = {"prompt": 120, "think": 480, "answer": 480}  # characters; so that a row's end is seen beside its start

# What stands about texts rather than for one; survival.py, contamination.py and quality.py write these labels.
_CAPTIONS = ("what is wrong", "in common", "set aside")
_SPAN = re.compile(r"(\d+) (prompt|question|think|answer|eos), (loss|no loss)")
_SHARED = re.compile(r"⟦(.*?)⟧", re.DOTALL)  # as contamination.mark_shared writes it
_TAGS = re.compile(f"({re.escape(THINK_OPEN)}|{re.escape(THINK_CLOSE)})")
_JOINERS = "\u200c\u200d"  # without them Persian is misspelt and families fall apart; they hide nothing


class Look(StrEnum):
    """What a piece of text is, for colouring it."""

    PLAIN = "plain"
    MARKED = "marked"  # the passage that two texts share, a forged tag, a word that differs
    PROMPT = "prompt"
    QUESTION = "question"
    THINK = "think"
    TAG = "tag"
    ANSWER = "answer"
    EOS = "eos"


NAMES = {
    Look.PROMPT: "prompt",
    Look.QUESTION: "question",
    Look.THINK: "reasoning",
    Look.TAG: "thinking tag",
    Look.ANSWER: "answer",
    Look.EOS: "EOS",
}


@dataclass(frozen=True, slots=True)
class Piece:
    """Some text of one look; ``has_loss`` is ``None`` where loss is not the question."""

    text: str
    look: Look = Look.PLAIN
    has_loss: bool | None = None


@dataclass(frozen=True, slots=True)
class Passage:
    """A text with what it is."""

    label: str
    pieces: tuple[Piece, ...]

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(piece.text for piece in self.pieces)


@dataclass(frozen=True, slots=True)
class Shown:
    """One row's evidence.

    Attributes:
        row: its id.
        captions: said about the texts.
        passages: texts to show next to one another.
        spans: the row as its tokens lie, each span with its loss; empty where tokens were not looked at.
    """

    row: str
    captions: tuple[Passage, ...]
    passages: tuple[Passage, ...]
    spans: tuple[Piece, ...]

    @property
    def is_short(self) -> bool:
        """Whether all passages are single lines that fit into a list."""
        return all(len(passage.text) <= SHORT and "\n" not in passage.text for passage in self.passages)


def read_evidence(finding: Mapping[str, Any]) -> list[Shown]:
    """Return the evidence of a finding of data/report.json, masked and visible."""
    return [_read_row(finding, evidence) for evidence in finding.get("evidence") or ()]


def make_visible(text: str) -> str:
    r"""Return text in which control, format and unassigned characters are written out, but for ``\n`` and ``\t``."""
    text = text.replace("\r\n", "\n")
    if text.isascii() and text.isprintable():
        return text
    return "".join(map(_write_out, text))


def make_value_visible(value: Any) -> Any:
    """Make visible whatever text a template prints, at the last moment; our own markup is no plain ``str``."""
    return make_visible(value) if type(value) is str else value


def clean(text: str) -> str:
    """Return a text of the doctor's own, which can quote a row, masked and visible."""
    return make_visible(mask_identifiers(text)[0])


def read_says(finding: Mapping[str, Any]) -> str:
    """Return a finding's sentence, masked and visible."""
    says = str(finding.get("says") or "")
    # This sentence quotes no row, and explains itself with dates.
    return make_visible(says) if finding.get("id") == "mangled_dates" else clean(says)


def mask_pieces(texts: Sequence[str]) -> list[str]:
    """Return pieces that follow one another with ``[kind]`` for each identifier, also for one that lies in several."""
    text, ends = "".join(texts), list(accumulate(map(len, texts)))
    while hits := find_identifiers(text):
        for hit in reversed(hits):
            mask = f"[{hit.kind}]"
            grown = len(mask) - (hit.stop - hit.start)
            text = text[: hit.start] + mask + text[hit.stop :]
            # A border inside the identifier moves behind its mask.
            ends = [end if end <= hit.start else max(end, hit.stop) + grown for end in ends]
    return [text[start:stop] for start, stop in pairwise([0, *ends])]


def _read_row(finding: Mapping[str, Any], evidence: Mapping[str, Any]) -> Shown:
    parts = {str(label): str(text) for label, text in (evidence.get("parts") or {}).items()}
    spans = {label: match for label in parts if (match := _SPAN.fullmatch(label))}
    captions = tuple(Passage(label, (Piece(clean(text)),)) for label, text in parts.items() if label in _CAPTIONS)
    cut = _cutter(finding)
    passages = [
        Passage(make_visible(label), _finish(cut(text)))
        for label, text in parts.items()
        if label not in spans and label not in _CAPTIONS
    ]
    if finding.get("id") == "duplicates_near":
        passages = list(_mark_differences(passages))
    masked = mask_pieces([parts[label] for label in spans])
    pieces = [piece for match, text in zip(spans.values(), masked, strict=True) for piece in _cut_span(match, text)]
    return Shown(make_visible(str(evidence.get("row", ""))), captions, tuple(passages), tuple(pieces))


def _cutter(finding: Mapping[str, Any]) -> Callable[[str], list[Piece]]:
    """Return what cuts this finding's texts at what is to be marked."""
    markers = (finding.get("figures") or {}).get("markers") or {}
    if str(finding.get("id", "")).startswith("contamination"):
        pattern = _SHARED
    elif markers:
        longest_first = sorted(map(str, markers), key=len, reverse=True)
        pattern = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
    else:
        return lambda text: [Piece(text)]
    return lambda text: [Piece(t, Look.MARKED if odd else Look.PLAIN) for odd, t in _number(pattern.split(text))]


def _number(texts: Sequence[str]) -> Iterator[tuple[bool, str]]:
    """Yield what ``re.split`` with one group gives, each with whether the pattern matched it."""
    return ((bool(place % 2), text) for place, text in enumerate(texts))


def _finish(pieces: Sequence[Piece]) -> tuple[Piece, ...]:
    """Mask and make visible pieces that follow one another; empty ones go."""
    masked = mask_pieces([piece.text for piece in pieces])
    return tuple(
        Piece(make_visible(text), piece.look, piece.has_loss)
        for piece, text in zip(pieces, masked, strict=True)
        if text
    )


def _cut_span(match: re.Match[str], text: str) -> Iterator[Piece]:
    """Yield a span of a row, its thinking tags apart."""
    look, has_loss = Look(match[2]), match[3] == "loss"
    for is_tag, part in _number(_TAGS.split(text)):
        if part:
            yield Piece(_clip(make_visible(part), match[2]), Look.TAG if is_tag else look, has_loss)


def _clip(text: str, look: str) -> str:
    """Return a span's beginning and end."""
    half = MOST_OF_SPAN.get(look, len(text)) // 2
    return text if len(text) <= 2 * half + 1 else f"{text[:half]} […] {text[-half:]}"


def _mark_differences(passages: Sequence[Passage]) -> Iterator[Passage]:
    """Yield texts in which the words are marked that the first of them does not have in that place."""
    first = passages[0].text.split() if passages else []
    for number, passage in enumerate(passages):
        if number == 0 or len(passage.pieces) != 1:
            yield passage
            continue
        found = list(re.finditer(r"\S+", passage.text))
        matcher = difflib.SequenceMatcher(None, first, [word[0] for word in found], autojunk=False)
        pieces, last = [], 0
        for what, _, _, start, stop in matcher.get_opcodes():
            if what in ("insert", "replace") and stop > start:
                begin, end = found[start].start(), found[stop - 1].end()
                pieces += [Piece(passage.text[last:begin]), Piece(passage.text[begin:end], Look.MARKED)]
                last = end
        yield Passage(passage.label, tuple(p for p in [*pieces, Piece(passage.text[last:])] if p.text))


def _write_out(char: str) -> str:
    kind = unicodedata.category(char)
    if (kind[0] != "C" and kind not in ("Zl", "Zp")) or char in "\n\t" or char in _JOINERS:
        return char
    return f"\\u{ord(char):04x}" if ord(char) < 0x10000 else f"\\U{ord(char):08x}"
