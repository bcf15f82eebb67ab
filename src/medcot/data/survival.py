"""The chain of thought's survival: does everything that is to be learned reach the model, in the batches it is given?

Fine-tunes on reasoning fail in silence. R1's chat template deletes the chain of thought from assistant turns; masking
by pad id masks EOS, which is the same token; truncation takes the answer; a rendered template gets a second BOS. The
loss falls all the same. So the gate looks at what the model gets, after template, truncation, packing and collation,
and believes nothing but the tokens. It takes no span and no boundary from the encoder that made a row: it decodes the
row, finds question, tags, reasoning, answer and EOS in the text, goes back from characters to tokens, and asks of each
whether it is what the example says and whether it carries loss. Hence it judges any trainer's batches, and can fail
ours. What a batch may be: rows end to end (``lengths``, ``cu_seqlens`` or ``position_ids`` say where each begins) or a
padded rectangle (with ``attention_mask``, or pad tokens behind the rows).

Each way to fail has an id and a fix (``faults.py``). Failing rows are shown decoded, by span and loss.
"""

from __future__ import annotations

import itertools
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from medcot import prompt
from medcot.data import packing
from medcot.data.batches import Batch, Segment, cut_batch
from medcot.data.faults import Tally, report
from medcot.data.findings import Finding
from medcot.errors import DataError
from medcot.prompt import THINK_CLOSE, THINK_OPEN, Style
from medcot.prompt.decode import IGNORED_LABEL
from medcot.records import Example, Row, Span

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MOST_CHARACTERS = 2_000  # of one span that is shown
_QUOTED = 80  # characters of a text named in a sentence
_ROWS_A_BATCH = 8


@dataclass(slots=True)
class _Reading:
    """A row read back: its text, each token's characters, and where its parts lie (characters; ``None``: nowhere)."""

    segment: Segment
    text: str
    chars: list[Span]
    question: Span | None = None
    opened: Span | None = None
    reasoning: Span | None = None
    closed: Span | None = None
    answer: Span | None = None
    eos: int | None = None  # a token, not a character
    is_shortened: bool = False

    def tokens(self, part: Span) -> range:
        """Tokens that hold at least one character of a part."""
        first = bisect_right(self.chars, part[0], key=lambda chars: chars[1])
        return range(first, bisect_left(self.chars, part[1], key=lambda chars: chars[0]))

    def unlabelled(self, tokens: Iterable[int]) -> list[int]:
        """Tokens without loss, but for a row's first, which nothing predicts."""
        return [i for i in tokens if i and self.segment.labels[i] == IGNORED_LABEL]


def check_rows(
    pairs: Iterable[tuple[Example, Row]],
    tokenizer: PreTrainedTokenizerBase,
    style: Style,
    *,
    train_on_prompt: bool,
    collate: Callable[[Sequence[dict[str, list[int]]]], Batch] = packing.collate,
) -> list[Finding]:
    """Collate rows as training does, and judge the batches.

    Args:
        pairs: each example with the row that was made of it.
        tokenizer: the model's.
        style: how questions will be put.
        train_on_prompt: whether the question is to carry loss.
        collate: makes a batch of ``{"input_ids", "labels"}`` features; training's own by default.
    """
    gate, tally = Gate(tokenizer, style, train_on_prompt=train_on_prompt), Tally()
    waiting = iter(pairs)
    while taken := list(itertools.islice(waiting, _ROWS_A_BATCH)):
        batch = collate([{"input_ids": row.input_ids, "labels": row.labels} for _, row in taken])
        tally.merge(gate.judge(batch, [example for example, _ in taken]))
    return report(tally)


def check_batches(
    batches: Iterable[Batch],
    expected: Iterable[Sequence[Example]],
    tokenizer: PreTrainedTokenizerBase,
    style: Style,
    *,
    train_on_prompt: bool,
) -> list[Finding]:
    """Judge batches that anyone made; ``expected`` gives the examples of each, in the order of its rows."""
    gate, tally = Gate(tokenizer, style, train_on_prompt=train_on_prompt), Tally()
    for batch, examples in zip(batches, expected, strict=True):
        tally.merge(gate.judge(batch, examples))
    return report(tally)


class Gate:
    """Judges batches for one tokenizer, style and choice of what is trained.

    Raises:
        ModelError: the tokenizer cannot serve the style.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, style: Style, *, train_on_prompt: bool) -> None:
        self._tokenizer, self._style, self._train_on_prompt = tokenizer, Style(style), train_on_prompt
        self._is_sentencepiece = "▁" in prompt.normalise("a b", tokenizer)
        self._num_bos = _count_bos(tokenizer, self._style)

    def judge(self, batch: Batch, examples: Sequence[Example]) -> Tally:
        """Judge a batch whose rows were made of these examples, in this order."""
        segments = cut_batch(batch, self._tokenizer.pad_token_id, self._tokenizer.eos_token_id)
        tally = Tally(num_rows=len(examples), num_tokens=sum(len(segment.input_ids) for segment in segments))
        tally.num_trained_tokens = sum(label != IGNORED_LABEL for segment in segments for label in segment.labels)
        if len(segments) != len(examples):
            detail = f"a batch of {len(examples)} rows has {len(segments)} beginnings"
            shown = {"batch": _shorten(prompt.decode(segments[0].input_ids, self._tokenizer))} if segments else {}
            for example in examples:
                tally.add(example.id, {"rows_touch": detail}, lambda: shown)
            return tally
        for segment, example in zip(segments, examples, strict=True):
            reading, faults = self._read(segment, example)
            tally.num_shortened += reading.is_shortened
            tally.add(example.id, faults, lambda reading=reading, row=example.id: self._show(reading, row))  # type: ignore[misc]
        return tally

    def _said(self, text: str | None) -> str:
        return self._space(prompt.normalise((text or "").strip(), self._tokenizer)).strip()

    def _space(self, text: str) -> str:
        """Return a text as SentencePiece means it, to which "▁" is a space; as it is for other tokenizers."""
        return text.replace("▁", " ") if self._is_sentencepiece else text

    def _read(self, segment: Segment, example: Example) -> tuple[_Reading, dict[str, str]]:
        """Find the parts of a row and everything wrong with it: fault → detail."""
        text, chars = prompt.decode_tokens(segment.input_ids, self._tokenizer)
        reading = _Reading(segment, self._space(text), chars)
        faults: dict[str, str] = {}
        if segment.touches:
            faults["rows_touch"] = segment.touches
        if segment.num_padding_trained:
            faults["padding_trained"] = f"{segment.num_padding_trained} tokens of padding carry loss"
        self._find_tags(reading, faults, self._said(example.question))
        self._find_reasoning(reading, faults, self._said(example.reasoning))
        self._find_answer(reading, faults, self._said(example.response))
        self._check_start(reading, faults, example.question)
        if all(label == IGNORED_LABEL for label in segment.labels[1:]):
            faults["nothing_trained"] = f"all {len(segment.labels)} labels are -100"
        else:
            self._check_loss(reading, faults)
        return reading, faults

    def _find_tags(self, reading: _Reading, faults: dict[str, str], question: str) -> None:
        """Find the question, which stands before thinking begins, and the tags."""
        text = reading.text
        opens, closes = text.count(THINK_OPEN), text.count(THINK_CLOSE)
        if (opens, closes) != (1, 1):
            faults["think_tags"] = f"<think> is there {_times(opens)} and </think> {_times(closes)}"
        reading.question = _find(question, text, 0, text.find(THINK_OPEN) if opens else len(text))
        if reading.question is None:
            faults["question_cut"] = f"{_quote(question)} is not in its prompt as a whole"
        begin = reading.question[1] if reading.question else 0
        reading.opened = _find(THINK_OPEN, text, begin, len(text))
        begin = reading.opened[1] if reading.opened else begin
        reading.closed = _find(THINK_CLOSE, text, begin, len(text))
        if reading.closed is None:
            faults["think_close_lost"] = "there is no </think>"

    def _find_reasoning(self, reading: _Reading, faults: dict[str, str], wanted: str) -> None:
        """Find the reasoning: what stands between the tags, and nothing else, is the example's, or a shortened form."""
        text = reading.text
        start = reading.opened[1] if reading.opened else reading.question[1] if reading.question else 0
        stop = reading.closed[0] if reading.closed else len(text)
        between = _strip(text, start, stop)
        found = text[slice(*between)]
        if not wanted:
            faults["reasoning_lost"] = "the example has none"
            return
        if reading.opened and reading.closed:
            reading.is_shortened = not (is_whole := _same(found, wanted)) and _is_shortened(found, wanted)
            if is_whole or reading.is_shortened:
                reading.reasoning = between
                return
        reading.reasoning = _find(wanted, text, start, stop)
        if reading.reasoning is None:
            earlier = _find(wanted, text, 0, start)
            reading.reasoning = earlier
            where = "stands in the prompt" if earlier else "is not in the row as a whole"
            faults["reasoning_lost"] = f"{_quote(wanted)} {where}"
        elif reading.opened and reading.closed:
            faults["reasoning_lost"] = f"between the tags there is more than the reasoning: {_quote(found)}"

    def _find_answer(self, reading: _Reading, faults: dict[str, str], wanted: str) -> None:
        """Find EOS, and the answer between ``</think>`` and it."""
        text, ids = reading.text, reading.segment.input_ids
        parts = (reading.closed, reading.reasoning, reading.opened, reading.question)
        start = max((part[1] for part in parts if part), default=0)
        first = bisect_left(reading.chars, start, key=lambda chars: chars[0])
        eos_id = self._tokenizer.eos_token_id
        reading.eos = next((i for i in range(first, len(ids)) if ids[i] == eos_id), None)
        if reading.eos is None:
            faults["eos_lost"] = f"the row ends with {_quote(text[-40:])}"
        behind = _strip(text, start, len(text) if reading.eos is None else reading.chars[reading.eos][0])
        found = text[slice(*behind)]
        if not wanted:
            faults["answer_lost"] = "the example has none"
        elif _same(found, wanted):
            reading.answer = behind
        elif reading.closed is None and found.endswith(wanted):
            reading.answer = (behind[1] - len(wanted), behind[1])  # behind reasoning or turn that no tag ends
        elif found and reading.closed and (wanted.startswith(found) or wanted.endswith(found)):
            reading.answer = behind
            faults["answer_cut"] = f"{len(found):,} of its {len(wanted):,} characters are left"
        else:
            reading.answer = _find(wanted, text, start, behind[1])
            faults["answer_lost"] = f"in place of {_quote(wanted)} stands {_quote(found)}"

    def _check_start(self, reading: _Reading, faults: dict[str, str], question: str) -> None:
        """The row begins with the serving prompt, and has the BOS that the model gives it."""
        ids = reading.segment.input_ids
        try:
            serving = prompt.encode_prompt(question, self._style, self._tokenizer)
        except DataError as error:
            faults["prompt_not_prefix"] = f"its question cannot be asked: {error}"
        else:
            if ids[: len(serving)] != serving:
                at = next((i for i, (a, b) in enumerate(zip(ids, serving, strict=False)) if a != b), len(ids))
                row, asked = (prompt.decode(part[at : at + 8], self._tokenizer) for part in (ids, serving))
                faults["prompt_not_prefix"] = f"at token {at} the row has {row!r}, and the serving prompt {asked!r}"
        bos_id = self._tokenizer.bos_token_id
        if bos_id is None:
            return
        num_bos = ids[: reading.eos].count(bos_id)  # where BOS is EOS, the one at the end does not count
        if num_bos != self._num_bos:
            bos = prompt.decode([bos_id], self._tokenizer)
            fault = "bos_doubled" if num_bos > self._num_bos else "bos_missing"
            faults[fault] = f"{bos} is there {_times(num_bos)}, and belongs there {_times(self._num_bos)}"

    def _check_loss(self, reading: _Reading, faults: dict[str, str]) -> None:
        """Each part carries loss as asked, and labels are the tokens they stand at; earlier faults stay."""
        segment = reading.segment
        if reading.question is not None:
            tokens = [i for i in reading.tokens(reading.question) if i]
            masked = reading.unlabelled(tokens)
            if self._train_on_prompt and masked:
                faults["question_untrained"] = _count(masked, tokens, "carry no loss")
            elif not self._train_on_prompt and len(masked) < len(tokens):
                faults["question_trained"] = _count(set(tokens) - set(masked), tokens, "carry loss")
        learned = {
            "reasoning_lost": reading.reasoning,
            "think_close_lost": reading.closed,
            "answer_lost": reading.answer,
        }
        for fault, part in learned.items():
            tokens = list(reading.tokens(part)) if part else []
            if masked := reading.unlabelled(tokens):
                faults.setdefault(fault, _count(masked, tokens, "carry no loss"))
        if reading.eos is not None and reading.unlabelled([reading.eos]):
            same = self._tokenizer.pad_token_id == self._tokenizer.eos_token_id
            faults["eos_lost"] = "EOS carries no loss" + (", and is the padding token too" if same else "")
        both = zip(segment.input_ids, segment.labels, strict=True)
        wrong = next((i for i, (token, label) in enumerate(both) if label not in (IGNORED_LABEL, token)), None)
        if wrong is not None:
            token, label = (
                prompt.decode([part[wrong]], self._tokenizer) for part in (segment.input_ids, segment.labels)
            )
            faults["labels_differ"] = f"token {wrong} is {token!r}, its label {label!r}"

    def _show(self, reading: _Reading, row_id: str) -> dict[str, str]:
        """Return the row's text by span and loss, numbered in order."""

        def span(part: Span | None) -> Span:
            tokens = reading.tokens(part) if part else range(0)
            return (tokens.start, tokens.stop)

        question, answer, closed = span(reading.question), span(reading.answer), span(reading.closed)
        think = span(reading.reasoning)
        if closed[1] and think[0] < closed[0]:
            think = (think[0] or closed[0], closed[1])
        eos = (0, 0) if reading.eos is None else (reading.eos, reading.eos + 1)
        row = Row(row_id, reading.segment.input_ids, reading.segment.labels, question, think, answer, eos)
        return {
            f"{number} {part.kind.value}, {'loss' if part.has_loss else 'no loss'}": _shorten(part.text)
            for number, part in enumerate(prompt.decode_spans(row, self._tokenizer), start=1)
        }


def _count_bos(tokenizer: PreTrainedTokenizerBase, style: Style) -> int:
    """Return how often the model's own tokenizer, or its template in style ``chat``, puts BOS into a row."""
    bos_id = tokenizer.bos_token_id
    if style is not Style.CHAT:
        ids: list[int] = tokenizer("a", verbose=False)["input_ids"]
        return sum(1 for _ in itertools.takewhile(lambda token_id: token_id == bos_id, ids))
    text = prompt.render_prompt("a", style, tokenizer)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids.count(bos_id)


def _find(wanted: str, text: str, start: int, stop: int) -> Span | None:
    """Find a text between two places, first to the letter, then with other whitespace between its words."""
    at = text.find(wanted, start, stop)
    if at >= 0:
        return (at, at + len(wanted))
    words = wanted.split()
    if not words or words[0] not in text or words[-1] not in text:
        return None
    match = re.compile(r"\s+".join(map(re.escape, words))).search(text, start, stop)
    return match.span() if match else None


def _strip(text: str, start: int, stop: int) -> Span:
    """Return where a stretch of text lies without the whitespace around it."""
    part = text[start:stop]
    left = start + len(part) - len(part.lstrip())
    return (left, max(left, start + len(part.rstrip())))


def _same(found: str, wanted: str) -> bool:
    """Whether two texts say the same: whitespace between words may differ, as SentencePiece makes it."""
    return found == wanted or found.split() == wanted.split()


def _is_shortened(found: str, wanted: str) -> bool:
    """Whether a reasoning is another's head and tail with the mark of ``truncate_think`` between them."""
    mark = prompt.ELLIPSIS.strip()
    for match in re.finditer(re.escape(mark), found):
        head, tail = found[: match.start()].rstrip(), found[match.end() :].lstrip()
        if head and tail and len(head) + len(tail) < len(wanted) and wanted.startswith(head) and wanted.endswith(tail):
            return True
    return False


def _quote(text: str) -> str:
    return repr(text if len(text) <= _QUOTED else text[: _QUOTED - 1] + "…")


def _shorten(text: str) -> str:
    if len(text) <= _MOST_CHARACTERS:
        return text
    half = _MOST_CHARACTERS // 2
    return f"{text[:half]} [{len(text) - 2 * half:,} characters left out] {text[-half:]}"


def _times(count: int) -> str:
    return {0: "never", 1: "once", 2: "twice"}.get(count, f"{count} times")


def _count(some: Collection[int], tokens: Collection[int], what: str) -> str:
    return f"{len(some):,} of its {len(tokens):,} tokens {what}"
