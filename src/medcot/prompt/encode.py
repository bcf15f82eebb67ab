"""Encoding: questions to serving prompts, examples to rows, and the refusal of text that would not stay text."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from medcot.errors import DataError
from medcot.prompt.decode import IGNORED_LABEL, decode
from medcot.prompt.frames import THINK_CLOSE, THINK_OPEN, Frame, Style, frame_of, tokenise
from medcot.records import Example, Row, Span

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

ELLIPSIS = " … "  # stands where `truncate_think` took reasoning out
_FEWEST_KEPT = 2  # tokens of reasoning that `truncate_think` leaves at least: one at each end


@dataclass(frozen=True, slots=True)
class _Parts:
    """The tokens of a row before they are joined; ``cuts[i]`` says whether reasoning may be cut before token i."""

    prompt: list[int]
    question: Span
    reasoning: list[int]
    cuts: list[bool]
    answer: list[int]


def render_prompt(question: str, style: Style, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the serving prompt as text; a BOS that the tokenizer adds by itself is not part of it.

    Raises:
        DataError: the question is empty, or would be more than plain text to the model.
        ModelError: the tokenizer has no usable chat template (style ``chat``), or no EOS.
    """
    frame = frame_of(style, tokenizer)
    return frame.head + _plain(question, "question", tokenizer, frame.headings) + frame.tail


def encode_prompt(question: str, style: Style, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the serving prompt's ids: an exact prefix of ``encode_row(...).input_ids`` for the same question.

    Raises:
        DataError: the question is empty, or would be more than plain text to the model.
        ModelError: the tokenizer has no usable chat template (style ``chat``), or no EOS.
    """
    return _encode_question(question, "question", frame_of(style, tokenizer), tokenizer)[0]


def encode_row(example: Example, style: Style, tokenizer: PreTrainedTokenizerBase, *, train_on_prompt: bool) -> Row:
    """Return prompt, reasoning, ``</think>``, response and EOS as one row with its spans.

    Args:
        example: must have reasoning and response.
        style: the prompt's style.
        tokenizer: a fast tokenizer.
        train_on_prompt: True trains on the whole text, as the tutorial does; False from the reasoning on.

    Raises:
        DataError: a field is empty, or would be more than plain text to the model; callers quarantine the example.
        ModelError: as in ``render_prompt``.
    """
    frame = frame_of(style, tokenizer)
    parts = _encode_parts(example, frame, tokenizer)
    return _join(example.id, parts, parts.reasoning, frame, train_on_prompt)


def truncate_think(
    example: Example, style: Style, tokenizer: PreTrainedTokenizerBase, *, train_on_prompt: bool, max_tokens: int
) -> Row:
    """Return the example's row in at most ``max_tokens``, taking tokens out of the middle of the reasoning only.

    Prompt, the first and the last half of what reasoning fits, ``</think>``, answer and EOS stay; " … " marks the gap.
    A character made of several tokens is never cut in two.

    Raises:
        DataError: even without reasoning the row would not fit; or as in ``encode_row``.
        ModelError: as in ``render_prompt``.
    """
    frame = frame_of(style, tokenizer)
    parts = _encode_parts(example, frame, tokenizer)
    num_fixed = len(parts.prompt) + len(frame.close_ids) + len(parts.answer) + 1
    num_reasoning = len(parts.reasoning)
    if num_fixed + num_reasoning <= max_tokens:
        return _join(example.id, parts, parts.reasoning, frame, train_on_prompt)
    gap = tokenise(ELLIPSIS, tokenizer)[0]
    num_kept = max_tokens - num_fixed - len(gap)
    if num_kept < _FEWEST_KEPT:
        raise DataError(
            f"Row {example.id!r} needs {num_fixed} tokens for its question and answer alone, and may have {max_tokens}",
            "Cutting reasoning must leave the question, the answer, EOS and at least two tokens of reasoning",
            "Raise model.max_seq_length, or drop such rows with data.over_length: drop",
        )
    head, tail = (num_kept + 1) // 2, num_reasoning - num_kept // 2
    while head and not parts.cuts[head]:
        head -= 1
    while tail < num_reasoning and not parts.cuts[tail]:
        tail += 1
    return _join(example.id, parts, parts.reasoning[:head] + gap + parts.reasoning[tail:], frame, train_on_prompt)


def count_shortest_think(style: Style, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the tokens that ``truncate_think`` needs between prompt and answer: two of reasoning, gap, ``</think>``.

    Raises:
        ModelError: as in ``render_prompt``.
    """
    return _FEWEST_KEPT + len(tokenise(ELLIPSIS, tokenizer)[0]) + len(frame_of(style, tokenizer).close_ids)


def _encode_parts(example: Example, frame: Frame, tokenizer: PreTrainedTokenizerBase) -> _Parts:
    """Check and tokenise the three texts of an example."""
    row = f"of row {example.id!r}"
    prompt, question = _encode_question(example.question, f"question {row}", frame, tokenizer)
    reasoning, offsets = _encode_text(
        example.reasoning, frame.before_think, frame.after_think, f"reasoning {row}", frame, tokenizer
    )
    answer, _ = _encode_text(example.response, frame.before_answer, "", f"response {row}", frame, tokenizer)
    # Tokens of one character share its offsets: a cut is clean where a token starts at or after its neighbour's end.
    cuts = [True, *(right[0] >= left[1] for left, right in itertools.pairwise(offsets)), True]
    return _Parts(prompt, question, reasoning, cuts, answer)


def _join(row_id: str, parts: _Parts, reasoning: list[int], frame: Frame, train_on_prompt: bool) -> Row:
    """Put the parts of a row together and count its spans."""
    think_start = len(parts.prompt)
    think_stop = think_start + len(reasoning) + len(frame.close_ids)
    answer_stop = think_stop + len(parts.answer)
    input_ids = [*parts.prompt, *reasoning, *frame.close_ids, *parts.answer, frame.eos_id]
    masked = 0 if train_on_prompt else think_start
    return Row(
        id=row_id,
        input_ids=input_ids,
        labels=[IGNORED_LABEL] * masked + input_ids[masked:],
        question=parts.question,
        think=(think_start, think_stop),
        answer=(think_stop, answer_stop),
        eos=(answer_stop, answer_stop + 1),
    )


def _encode_question(
    question: str, name: str, frame: Frame, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], Span]:
    """Return the prompt's ids and the question's span; a token that straddles the question's border belongs to it."""
    question = _plain(question, name, tokenizer, frame.headings)
    text = frame.head + question + frame.tail
    ids, offsets = tokenise(text, tokenizer)
    first, last = len(frame.head), len(frame.head) + len(question)
    inside = [i for i, (start, stop) in enumerate(offsets) if start < last and stop > first]
    # A character that got no token at the question's edge must be missed too, so the text reaches at least that far.
    begin = min([first, *(offsets[i][0] for i in inside)])
    end = max([last, *(offsets[i][1] for i in inside)])
    _refuse_changed(text[begin:end], [ids[i] for i in inside], name, frame, tokenizer)
    lead = len(frame.lead_ids)
    return [*frame.lead_ids, *ids], (lead + inside[0], lead + inside[-1] + 1)


def _encode_text(
    text: str | None, before: str, after: str, name: str, frame: Frame, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[Span]]:
    """Return the ids and character ranges of reasoning or response between its newlines."""
    whole = before + _plain(text, name, tokenizer) + after
    ids, offsets = tokenise(whole, tokenizer)
    _refuse_changed(whole, ids, name, frame, tokenizer)
    return ids, offsets


def _plain(text: str | None, name: str, tokenizer: PreTrainedTokenizerBase, headings: tuple[str, ...] = ()) -> str:
    """Return the text without outer whitespace; raise where it is empty, not Unicode, or holds a tag or heading."""
    stripped = (text or "").strip()
    if not stripped:
        raise DataError(f"The {name} is empty", "A prompt or row needs text there", "Fill it in, or leave the row out")
    try:
        stripped.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"The {name} holds half a surrogate pair at character {error.start}",
            "Text must be valid Unicode",
            "Repair how the source was decoded",
        ) from error
    seen = normalise(stripped, tokenizer)
    for string in (THINK_OPEN, THINK_CLOSE, *headings):
        if string in seen:
            raise _forged(name, string)
    return stripped


def _forged(name: str, string: str) -> DataError:
    return DataError(
        f"The {name} contains {string!r}",
        "Only the prompt's own frame may open or close thinking, or begin or end a turn",
        "Remove it from the text, or write it another way",
    )


def _refuse_changed(text: str, ids: list[int], name: str, frame: Frame, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise where user text did not stay what it was: where tokens lost some of it, or became control tokens."""
    decoded = decode(ids, tokenizer)
    # SentencePiece writes a space as "▁" and puts one before each piece: no difference in what is said.
    want, got = (t.replace(" ", "").replace("▁", "") for t in (normalise(text, tokenizer), decoded))
    if decoded == text or want == got:
        forged = next((i for i in ids if i in frame.refused_ids), None)
        if forged is not None:
            raise _forged(name, decode([forged], tokenizer))
        return
    lost = sorted({c for c in want if c not in got}) or ["a sequence of characters"]
    raise DataError(
        f"The {name} holds characters this model's tokenizer loses: {', '.join(map(repr, lost[:5]))}",
        "What the model reads must be what was written",
        "Remove these characters",
    )


def normalise(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text as the tokenizer's normaliser hands it on."""
    normalizer = cast("PreTrainedTokenizerFast", tokenizer).backend_tokenizer.normalizer
    return text if normalizer is None else cast(str, normalizer.normalize_str(text))
