"""From a recipe's sources to rows of tokens, with an account of every row on the way.

It is done in two parts, so that a mistake in the data shows before gigabytes of weights are loaded, and so that what
is found wrong in between (copies, leaked test questions, identifiers) can be taken out or masked with ``revise``:

1. ``read_examples``: each source is read, and the questions of the validation split are held out of it
   (``data/splits.py``), or validation has a source of its own.
2. ``encode_examples``: all of it becomes tokens, and the mixture is drawn (``data/mixtures.py``) from the rows that are
   left by then. Drawing earlier would spare some encoding, but the proportions asked for would be those of rows that
   are then found too long. What is held out is not weighted: all of it is measured.

Ids stay unique over all sources: where two of them would clash (``a/rows.jsonl``, ``b/rows.jsonl``), the later one's
ids name its place in the recipe (``rows@2:17``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from medcot import clinic, prompt
from medcot.accounts import RawData, SourceData, TrainingData
from medcot.data import checks, columns, sources
from medcot.data.licences import BUILT_IN, find_licence
from medcot.data.mixtures import Share, draw_rows, plan_mixture
from medcot.data.splits import Side, Split, check_sides
from medcot.errors import DataError, RecipeError, did_you_mean
from medcot.recipe import Origin, Recipe
from medcot.records import Example, Row
from medcot.secrets import SecretName, find_secret

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CLINIC = "builtin:clinic"
CLINIC_ROWS = 2000  # what "builtin:clinic" means without a slice
CLINIC_SEED = 3407
NO_LIMIT = 2**62
GIANT = 32  # characters a token from which a row may be too large to tokenise


def check_accepted(accepted: Collection[str], known: Collection[str]) -> None:
    """Refuse a ``data.accept`` that names a finding which no check makes.

    Raises:
        RecipeError: such a name; a misspelt one would leave the run stopped for no visible reason.
    """
    for name in accepted:
        if name not in known:
            raise RecipeError(
                f"data.accept names '{name}'",
                "It lists ids of findings that the doctor makes",
                did_you_mean(name, known),
            )


# Reading --------------------------------------------------------------------------------------------------------------


def read_examples(recipe: Recipe) -> RawData:
    """Read the recipe's rows.

    Raises:
        DataError: nothing that can be trained on, or nothing that could be held out.
        RecipeError: validation rows that are training rows.
        NetworkError: a Hub data set, and no network.
    """
    data, validation = recipe.data, recipe.data.validation
    if validation.source is not None:
        _check_other_source(data.origins, validation)
    parts = [_read_source(origin) for origin in data.origins]
    held = None
    if validation.source is not None:
        read = _read_source(validation)
        held = dataclasses.replace(read, examples=[], held_out=read.examples)
    named = _name_apart([*parts, held] if held is not None else parts)
    if held is not None:
        return RawData(tuple(named[:-1]), named[-1])
    if not validation.fraction:
        return RawData(tuple(named))
    split = Split(validation.fraction, data.seed)
    raw = RawData(tuple(_hold_out(part, split) for part in named))
    check_sides(split, raw.examples, raw.validation)
    return raw


def _check_other_source(origins: Sequence[Origin], validation: Origin) -> None:
    def place(origin: Origin) -> tuple[str, str | None, str]:
        return sources.parse_slice(str(origin.source))[0], origin.config, origin.split

    if place(validation) in map(place, origins):
        raise RecipeError(
            f"data.validation.source is '{validation.source}', from which training rows come",
            "The loss of rows that are trained on measures memory",
            "Set data.validation=0.05 to hold out a part of them, or name another source or split",
        )


def _read_source(origin: Origin) -> SourceData:
    source = str(origin.source)
    name, count = sources.parse_slice(source)
    if name == CLINIC:
        examples = clinic.generate(CLINIC_ROWS if count is None else count, split="train", seed=CLINIC_SEED)
        return SourceData(origin, _digest(examples), None, len(examples), examples, licence=BUILT_IN)
    secret = find_secret(SecretName.HUGGING_FACE)
    table = sources.load_rows(
        source,
        config=origin.config,
        split=origin.split,
        revision=origin.revision,
        token=secret.value if secret else None,
    )
    built = columns.build_examples(table, {str(name): column for name, column in origin.columns.items()})
    return SourceData(
        origin, table.sha256, table.revision, len(table.rows), built.examples,
        quarantined=list(built.quarantined), sentences=list(built.sentences),
        licence=find_licence(name, revision=table.revision, token=secret.value if secret else None),
    )  # fmt: skip


def _name_apart(parts: Sequence[SourceData]) -> list[SourceData]:
    """Return the sources with ids that are unique over all of them."""
    taken: set[str] = set()
    named: list[SourceData] = []
    for number, part in enumerate(parts, start=1):
        while any(example.id in taken for example in (*part.examples, *part.held_out)):
            part = dataclasses.replace(
                part, examples=_rename(part.examples, number), held_out=_rename(part.held_out, number)
            )
        if len(parts) > 1:
            taken.update(example.id for example in (*part.examples, *part.held_out))
        named.append(part)
    return named


def _rename(examples: Sequence[Example], number: int) -> list[Example]:
    return [dataclasses.replace(example, id=_with_number(example.id, number)) for example in examples]


def _with_number(example_id: str, number: int) -> str:
    """Put a source's number into an id, before the row's number, which stays readable."""
    name, colon, row = example_id.rpartition(":")
    return f"{name}@{number}:{row}" if colon else f"{example_id}@{number}"


def _hold_out(part: SourceData, split: Split) -> SourceData:
    sides: dict[Side, list[Example]] = {side: [] for side in Side}
    for side, example in split.assign(part.examples):
        sides[side].append(example)
    return dataclasses.replace(part, examples=sides[Side.TRAIN], held_out=sides[Side.VALIDATION])


def _digest(examples: Sequence[Example]) -> str:
    """sha256 of generated problems, as canonical JSON, so that two runs can be seen to have had the same."""
    if not examples:
        raise DataError("0 problems were asked for", "Training needs at least one", "Raise the slice in data.source")
    lines = (json.dumps([e.id, e.question, e.reasoning, e.response], ensure_ascii=False) for e in examples)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


# Encoding and mixing --------------------------------------------------------------------------------------------------


def encode_examples(raw: RawData, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> TrainingData:
    """Turn examples into rows of tokens, by the recipe's style and its policy for long rows, and draw the mixture.

    Raises:
        DataError: no row is left, of all or of one source.
    """
    encode = functools.partial(_encode_all, recipe=recipe, tokenizer=tokenizer)
    several = len(raw.every_part) > 1
    quarantined, encoded = raw.quarantined, []
    for part in raw.parts:
        with _naming(part.name if several else None):
            encoded.append(encode(part.examples))
        quarantined += raw.placed(part, encoded[-1].quarantined)
    held_out = None
    if raw.validation:
        with _naming("validation"):
            held_out = encode(raw.validation)
        quarantined += held_out.quarantined
    all_encoded = [*encoded, held_out] if held_out is not None else encoded
    sentences = raw.sentences
    if num_truncated := sum(part.num_truncated for part in all_encoded):
        sentences.append(f"{num_truncated} rows had the middle of their reasoning taken out to fit.")
    data = recipe.data
    shares = plan_mixture(
        [part.name for part in raw.parts],
        [part.num_rows for part in encoded],
        [source.weight for source in data.sources] or [None],
        repeat=data.repeat,
    )
    rows = encoded[0].rows
    if len(shares) > 1:
        rows = [encoded[source].rows[row] for source, row in draw_rows(shares, data.seed)]
        sentences += [_say_share(part.name, share, len(rows)) for part, share in zip(raw.parts, shares, strict=True)]
    validation = held_out.rows if held_out is not None else []
    if validation:
        sentences.append(_say_held_out(raw, recipe, validation))
    facts = _describe_held_out(raw, recipe)
    num_over = sum(part.num_over_length for part in all_encoded)
    return TrainingData(raw, rows, quarantined, sentences, validation, tuple(shares), facts, num_over)


def encode_whole(examples: Sequence[Example], recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> checks.Encoded:
    """Turn examples into rows of any length: nothing is dropped or shortened, and there may be none to encode."""
    return _encode_all(examples, recipe, tokenizer, max_tokens=NO_LIMIT)


def _encode_all(
    examples: Sequence[Example], recipe: Recipe, tokenizer: PreTrainedTokenizerBase, max_tokens: int | None = None
) -> checks.Encoded:
    options: dict[str, Any] = {
        "style": prompt.Style(recipe.prompt.style),
        "tokenizer": tokenizer,
        "train_on_prompt": recipe.train.train_on_prompt,
    }
    return checks.encode_rows(
        examples,
        functools.partial(_encode, **options),
        max_tokens=max_tokens or recipe.model.max_seq_length,
        over_length=recipe.data.over_length.value,
        truncate=functools.partial(_shorten, **options),
        num_proc=recipe.data.num_proc,
        may_be_empty=max_tokens is not None,
        most_bytes=_most_bytes(examples, recipe, tokenizer),
    )


def _most_bytes(examples: Sequence[Example], recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the bytes of text that a row of the recipe's length can have at most, where it matters and is known."""
    limit = recipe.model.max_seq_length
    longest = max((len(e.question) + len(e.reasoning or "") + len(e.response or "") for e in examples), default=0)
    if longest < GIANT * limit:
        return None  # finding the bound takes a second for a large vocabulary
    a_token = prompt.count_most_bytes(tokenizer)
    return None if a_token is None else a_token * limit


def shorten_all(examples: Iterable[Example], recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    """Turn examples that are too long into rows with the middle of their reasoning taken out; others are left out."""
    rows = []
    for example in examples:
        with contextlib.suppress(DataError):  # question and answer alone are over the limit: lengths.py counts these
            rows.append(
                _shorten(
                    example,
                    recipe.model.max_seq_length,
                    style=prompt.Style(recipe.prompt.style),
                    tokenizer=tokenizer,
                    train_on_prompt=recipe.train.train_on_prompt,
                )
            )
    return rows


@contextlib.contextmanager
def _naming(part: str | None) -> Iterator[None]:
    """Put the name of a source before what is wrong with it."""
    try:
        yield
    except DataError as error:
        if part is None:
            raise
        raise DataError(f"{part}: {error.value}", error.rule, error.remedy) from error


def _say_share(name: str, share: Share, num_rows: int) -> str:
    said = f"{share.num_drawn:,} of {num_rows:,} rows are from {name}, which has {share.num_rows:,}"
    if share.num_left_out:
        said += f"; {share.num_left_out:,} of them are left out"
    if share.num_repeats:
        said += f"; {share.num_repeats:,} are repeats"
    return f"{said}."


def _say_held_out(raw: RawData, recipe: Recipe, rows: Sequence[Row]) -> str:
    if raw.validation_part is not None:
        return f"The loss of {len(rows):,} rows from {raw.validation_part.name} is watched."
    share = f"{recipe.data.validation.fraction:.2%}".replace(".00%", "%")
    return f"{len(rows):,} rows are held out, and their loss is watched: {share} of the questions, by their content."


def _describe_held_out(raw: RawData, recipe: Recipe) -> dict[str, Any]:
    if raw.validation_part is not None:
        return raw.validation_part.lineage()
    return {"source": raw.source, "fraction": recipe.data.validation.fraction, "seed": recipe.data.seed}


def _encode(example: Example, *, style: prompt.Style, tokenizer: PreTrainedTokenizerBase, train_on_prompt: bool) -> Row:
    return prompt.encode_row(example, style, tokenizer, train_on_prompt=train_on_prompt)


def _shorten(
    example: Example, max_tokens: int, *, style: prompt.Style, tokenizer: PreTrainedTokenizerBase, train_on_prompt: bool
) -> Row:
    return prompt.truncate_think(example, style, tokenizer, train_on_prompt=train_on_prompt, max_tokens=max_tokens)
