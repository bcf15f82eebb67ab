"""From a data set's texts to rows of tokens, whole text trained, as the tutorial's trainer does it.

``medcot.prompt`` builds a row from question, reasoning and answer, refuses control tokens in them, and knows every
span. Here the notebook has built the text, control tokens and all, and the spans are its own affair. So the text is
tokenised as TRL does: the tokenizer's BOS before it unless the text brings one, EOS behind it unless it ends so, loss
on every token. One thing is done otherwise: TRL cuts a text that is too long, and the answer and EOS with it, so that
the model is taught never to stop. Here such a row is left out, and counted.

Labels are masked by position and never by id, so the tutorial's ``pad_token == eos_token`` does no harm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from medcot.errors import DataError
from medcot.prompt import TUTORIAL_TEMPLATE, Style
from medcot.records import Row, Span

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NOWHERE: Span = (0, 0)  # a text's parts are not known
IGNORED = -100


@dataclass(frozen=True)
class Texts:
    """A data set as rows.

    Attributes:
        rows: what is trained on.
        spans: for each row the characters of each token, where the rows were made from texts.
        texts: for each row its text, where it was made from one.
        sentences: what was done that the user did not say.
    """

    rows: list[Row]
    spans: list[list[Span]]
    texts: list[str]
    sentences: list[str]


def read_rows(
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    field: str,
    max_tokens: int,
    formatting_func: Callable[[Any], Any] | None = None,
) -> Texts:
    """Turn a data set into rows.

    Args:
        dataset: rows as mappings: a ``datasets.Dataset``, or a list.
        tokenizer: the model's.
        field: the column that holds the text; rows with ``input_ids`` are taken as they are.
        max_tokens: longer rows are left out.
        formatting_func: makes a row's text, in place of the column.

    Raises:
        DataError: no rows, no such column, or something else than text in it.
    """
    records = _records(dataset)
    if formatting_func is None and "input_ids" in records[0]:
        found = Texts([_ready_row(number, record) for number, record in enumerate(records, 1)], [], [], [])
    else:
        texts = [_text_of(n, record, field, formatting_func) for n, record in enumerate(records, 1)]
        found = _tokenise(texts, tokenizer)
    return _without_long(found, max_tokens)


def _records(dataset: Any) -> Sequence[Mapping[str, Any]]:
    if not isinstance(dataset, Sized):
        raise DataError(
            f"train_dataset is a {type(dataset).__name__}, whose length is not known",
            "Steps, memory and order are planned from all rows",
            "Take what you need, for example Dataset.from_list(list(stream.take(500)))",
        )
    if len(dataset) == 0:
        raise DataError("train_dataset has no rows", "Training needs at least one", "Look at the split and filters")
    rows: Any = dataset  # a Dataset, or a list
    records = [rows[number] for number in range(len(rows))]
    if not isinstance(records[0], Mapping):
        raise DataError(
            f"train_dataset holds {type(records[0]).__name__}s", "A row names its columns", "Use datasets.Dataset"
        )
    return records


def _text_of(number: int, record: Mapping[str, Any], field: str, formatting_func: Callable[[Any], Any] | None) -> str:
    if formatting_func is not None:
        text = formatting_func(record)
        remedy = "Let formatting_func return one row's text, or map it over the data set with batched=True before"
    elif field not in record:
        remedy = f"Set dataset_text_field, or make the column {field!r} with dataset.map"
        if "messages" in record or "conversations" in record:
            remedy += "; a chat becomes text with tokenizer.apply_chat_template (R1's template deletes the reasoning)"
        raise DataError(
            f"the data set has no column '{field}'; it has {', '.join(record)}", "Text is read there", remedy
        )
    else:
        text = record[field]
        remedy = "Mend the row, or leave it out with dataset.filter"
    if not isinstance(text, str) or not text:
        met = "an empty text" if text == "" else f"a {type(text).__name__} for a text"
        raise DataError(f"row {number} of the data set has {met}", "A row is trained on as one text", remedy)
    return text


def _tokenise(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Texts:
    bos, eos, eos_id = tokenizer.bos_token, tokenizer.eos_token, tokenizer.eos_token_id
    brings_bos = bos is not None and texts[0].startswith(str(bos))
    encoded = tokenizer(
        list(texts),
        add_special_tokens=not brings_bos,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,  # lengths are looked at below
    )
    ids_of: list[list[int]] = encoded["input_ids"]
    spans_of: list[list[Span]] = encoded["offset_mapping"]
    num_without = 0
    rows, spans = [], []
    for number, (ids, where) in enumerate(zip(ids_of, spans_of, strict=True), 1):
        if ids[-1] != eos_id:
            num_without += 1
            ids, where = [*ids, int(eos_id or 0)], [*where, (len(texts[number - 1]), len(texts[number - 1]))]
        rows.append(_row(number, ids, ids))
        spans.append(where)
    sentences = []
    if num_without:
        ending = f"{num_without:,} of {len(rows):,} texts did not end with EOS ({eos})"
        sentences.append(f"{ending}; it was added, or the model would not learn to stop")
    return Texts(rows, spans, list(texts), sentences)


def _row(number: int, ids: Sequence[int], labels: Sequence[int]) -> Row:
    return Row(f"row {number}", list(ids), list(labels), NOWHERE, NOWHERE, NOWHERE, NOWHERE)


def _ready_row(number: int, record: Mapping[str, Any]) -> Row:
    ids = record["input_ids"]
    labels = record.get("labels") or ids
    if len(labels) != len(ids):
        raise DataError(f"row {number} has {len(ids)} ids and {len(labels)} labels", "Each id has a label", "Mend it")
    return _row(number, ids, labels)


def _without_long(found: Texts, max_tokens: int) -> Texts:
    kept = [place for place, row in enumerate(found.rows) if row.num_tokens <= max_tokens]
    if not kept:
        shortest = min(row.num_tokens for row in found.rows)
        raise DataError(
            f"every row is longer than max_seq_length={max_tokens}; the shortest has {shortest} tokens",
            "Rows that are too long are left out, since a cut row has no end",
            f"Raise max_seq_length, to {max(row.num_tokens for row in found.rows)} for all of them",
        )
    if len(kept) == len(found.rows):
        return found
    left_out = len(found.rows) - len(kept)
    longest = max(row.num_tokens for row in found.rows)
    sentence = (
        f"{left_out:,} of {len(found.rows):,} rows are longer than max_seq_length={max_tokens:,} and are left out;"
        f" the longest has {longest:,} tokens"
    )
    return Texts(
        [found.rows[place] for place in kept],
        [found.spans[place] for place in kept] if found.spans else [],
        [found.texts[place] for place in kept] if found.texts else [],
        [*found.sentences, sentence],
    )


def find_style(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Style:
    """The prompt style of the rows, for whoever serves the model: the tutorial's, or the model's chat template."""
    head = TUTORIAL_TEMPLATE.partition("{question}")[0].strip()
    if any(head in text for text in texts[:1]) or not tokenizer.chat_template:
        return Style.TUTORIAL
    return Style.CHAT


def mask_outside_responses(found: Texts, instruction: str, response: str) -> Texts:
    """Take the loss off everything but what follows ``response``, up to the next ``instruction`` or the end.

    Raises:
        DataError: no text holds the response's marker, or the rows came without texts.
    """
    if not found.texts:
        raise DataError(
            "the rows came as input_ids",
            "Instructions and responses are told apart in the text",
            "Give the rows a text column, or labels of their own",
        )
    rows = [
        replace(row, labels=_labels_inside(row, spans, list(_responses(text, instruction, response))))
        for row, spans, text in zip(found.rows, found.spans, found.texts, strict=True)
    ]
    kept = [place for place, row in enumerate(rows) if row.num_trained_tokens]
    if not kept:
        raise DataError(
            f"no text holds {response!r}",
            "Loss is on what follows it",
            "Write response_part exactly as it stands in the text",
        )
    missing = len(rows) - len(kept)
    sentences = [f"{missing:,} of {len(rows):,} rows hold no {response!r} and are left out"] if missing else []
    return Texts(
        [rows[place] for place in kept],
        [found.spans[place] for place in kept],
        [found.texts[place] for place in kept],
        [*found.sentences, *sentences],
    )


def _responses(text: str, instruction: str, response: str) -> Iterable[Span]:
    stop = 0
    while (start := text.find(response, stop)) >= 0:
        start += len(response)
        stop = text.find(instruction, start)
        stop = len(text) if stop < 0 else stop
        yield start, stop


def _labels_inside(row: Row, spans: Sequence[Span], wanted: Sequence[Span]) -> list[int]:
    """A token that begins inside a response is trained on, and so is the EOS that was added behind one."""
    inside = [any(start <= first < stop or first == stop == last for start, stop in wanted) for first, last in spans]
    inside = [kept and not (first == last == 0) for kept, (first, last) in zip(inside, spans, strict=True)]
    return [label if kept else IGNORED for label, kept in zip(row.labels, inside, strict=True)]
