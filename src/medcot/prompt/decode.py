"""Decoding: a model's tokens back to text, split into thinking and answer, at once or while they stream."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from enum import StrEnum
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple, cast

from medcot.prompt.frames import THINK_CLOSE, THINK_OPEN, control_ids, tokenise
from medcot.records import Completion, Finish, Row, Span

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED_LABEL = -100  # cross entropy's ignore_index
_MOST_PARTS = 16  # tokens tried together as one character; real ones have four at most


class SpanKind(StrEnum):
    """What a stretch of a row is, for showing it."""

    PROMPT = "prompt"
    QUESTION = "question"
    THINK = "think"
    ANSWER = "answer"
    EOS = "eos"


class SpanText(NamedTuple):
    """A decoded stretch of one kind of a row, all of which carries loss or none of which does."""

    text: str
    kind: SpanKind
    has_loss: bool


class StreamPiece(NamedTuple):
    """Text to show as it is generated."""

    text: str
    in_think: bool


def decode(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, skip_special: bool = False) -> str:
    """Return the text of tokens; with ``skip_special``, without control tokens but always with thinking tags."""
    control = control_ids(tokenizer) if skip_special else frozenset()
    kept = [token_id for token_id in ids if token_id not in control]
    return cast(str, tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def decode_tokens(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[Span]]:
    """Return the text of tokens and each token's character range in it; tokens of one character share its range.

    Pieces are decoded once an id, behind an ordinary token (some decoders treat the first token of a text apart), and
    joined; where that is not the text, every prefix is decoded instead, which takes time quadratic in the tokens.
    """
    text, known = decode(ids, tokenizer), _known_pieces(tokenizer, len(tokenizer))
    anchor = tokenise("a", tokenizer)[0]
    pieces: list[str] = []
    spans: list[Span] = []
    first = position = 0
    for index, token_id in enumerate(ids):
        group = list(ids[first : index + 1])
        alone, lead = 0 < first == index, anchor if first else []
        piece = known.get(token_id) if alone else None
        if piece is None:
            piece = decode([*lead, *group], tokenizer)[len(decode(lead, tokenizer)) :]
            if alone:
                known[token_id] = piece
        if piece.endswith("\N{REPLACEMENT CHARACTER}") and index + 1 < len(ids) and len(group) < _MOST_PARTS:
            continue
        spans += [(position, position + len(piece))] * len(group)
        pieces.append(piece)
        position += len(piece)
        first = index + 1
    if "".join(pieces) != text:
        ends = [len(decode(ids[:stop], tokenizer)) for stop in range(len(ids) + 1)]
        spans = list(itertools.pairwise(ends))
    return text, spans


@lru_cache(maxsize=4)
def _known_pieces(tokenizer: PreTrainedTokenizerBase, num_tokens: int) -> dict[int, str]:
    """Texts of single tokens, filled as they are met; the number only tells the cache that tokens were added."""
    return {}


def decode_spans(row: Row, tokenizer: PreTrainedTokenizerBase) -> list[SpanText]:
    """Return a row as consecutive stretches of text, each of one kind and with or without loss throughout."""
    spans = {SpanKind.QUESTION: row.question, SpanKind.THINK: row.think, SpanKind.ANSWER: row.answer}
    spans[SpanKind.EOS] = row.eos
    kinds = [SpanKind.PROMPT] * row.num_tokens
    for kind, (start, stop) in spans.items():
        kinds[start:stop] = [kind] * (stop - start)
    keys = [(kind, label != IGNORED_LABEL) for kind, label in zip(kinds, row.labels, strict=True)]
    edges = [i for i in range(len(keys)) if i == 0 or keys[i] != keys[i - 1]] + [len(keys)]
    return [
        SpanText(decode(row.input_ids[start:stop], tokenizer), *keys[start])
        for start, stop in itertools.pairwise(edges)
    ]


def split_completion(
    token_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, *, num_prompt_tokens: int, finish: Finish
) -> Completion:
    """Split what a model wrote after the prompt at its last ``</think>``.

    Control tokens (EOS, padding) are neither shown nor counted; a repeated ``<think>`` is left out of ``think``.
    ``num_think_tokens`` counts up to and with the token that ends the tag; without a tag all of it is thinking.
    """
    control = control_ids(tokenizer)
    ids = [i for i in token_ids if i not in control]
    text = decode(ids, tokenizer)
    think, tag, answer = text.rpartition(THINK_CLOSE)
    if not tag:
        think, answer = text, ""
    # The tag may be several tokens, and its last one may run on: take the shortest prefix that holds all tags.
    low, high = 0 if tag else len(ids), len(ids)
    while low < high:
        middle = (low + high) // 2
        if decode(ids[:middle], tokenizer).count(THINK_CLOSE) == text.count(THINK_CLOSE):
            high = middle
        else:
            low = middle + 1
    return Completion(
        text=text,
        think=think.replace(THINK_OPEN, "").strip(),
        answer=answer.strip(),
        closed=bool(tag),
        finish=finish,
        num_prompt_tokens=num_prompt_tokens,
        num_think_tokens=low,
        num_answer_tokens=len(ids) - low,
    )


class TokenText:
    """Tokens to text as they come: ``feed`` gives nothing while a character is not whole.

    Args:
        tokenizer: the model's; control tokens give no text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._control = control_ids(tokenizer)
        self._shown: list[int] = []  # the tokens decoded last: some decoders treat the first token of a text apart
        self._pending: list[int] = []  # tokens that end within a character

    def feed(self, token_id: int) -> str:
        """Take the next token; return the text that is whole now."""
        if token_id in self._control:
            return ""
        self._pending.append(token_id)
        text = self._decode_pending()
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self._shown, self._pending = self._pending, []
        return text

    def finish(self) -> str:
        """Return what was held back, half a character shown as such; call it once, after the last token."""
        text, self._pending = self._decode_pending(), []
        return text

    def _decode_pending(self) -> str:
        before = decode(self._shown, self._tokenizer)
        return decode(self._shown + self._pending, self._tokenizer)[len(before) :]


class StreamSplitter:
    """Splits a completion while it is generated, for ``medcot ask``.

    Feed token ids, then call ``finish``. No piece holds half a character or part of a thinking tag; joined by
    ``in_think``, the pieces are ``split_completion``'s ``think`` and ``answer``, outer whitespace stripped. (A stream
    must decide at the first ``</think>``; where a model writes several, later ones stay in the answer as text.)
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._text = TokenText(tokenizer)
        self._held = ""  # text that may be the beginning of a tag
        self._space = ""  # whitespace, shown only when text follows
        self._in_think, self._started = True, False

    @property
    def in_think(self) -> bool:
        """Whether the thinking is open."""
        return self._in_think

    def feed(self, token_id: int) -> list[StreamPiece]:
        """Take the next token; return what can be shown now."""
        text = self._text.feed(token_id)
        return self._split(text) if text else []

    def finish(self) -> list[StreamPiece]:
        """Return what was held back; call it once, after the last token."""
        pieces = self._split(self._text.finish())
        pieces += self._show(self._held)
        self._held = ""
        return pieces

    def _split(self, text: str) -> list[StreamPiece]:
        self._held += text
        pieces: list[StreamPiece] = []
        if self._in_think:
            think, closed, rest = self._held.partition(THINK_CLOSE)
            num_safe = len(think) if closed else len(think) - _partial_tag(think)
            pieces += self._show(think[:num_safe].replace(THINK_OPEN, ""))
            self._held = rest if closed else think[num_safe:]
            if closed:
                self._in_think, self._started, self._space = False, False, ""
        if not self._in_think:
            pieces += self._show(self._held)
            self._held = ""
        return pieces

    def _show(self, text: str) -> list[StreamPiece]:
        text = self._space + text
        if not self._started:
            text = text.lstrip()
        shown = text.rstrip()
        self._space = text[len(shown) :]
        self._started = self._started or bool(shown)
        return [StreamPiece(shown, self._in_think)] if shown else []


def _partial_tag(text: str) -> int:
    """Return how many characters at the end of a text may be the beginning of a thinking tag."""
    sizes = range(min(len(text), len(THINK_CLOSE) - 1), 0, -1)
    return next((n for n in sizes if THINK_OPEN.startswith(text[-n:]) or THINK_CLOSE.startswith(text[-n:])), 0)
