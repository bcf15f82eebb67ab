"""Rows proved fit for training before the first optimizer step: encoded, measured against the length limit, counted.

Trainers usually cut a row at the maximum length in silence. Cut from the right, a row loses its answer and its
end-of-sequence token, so the model learns neither to answer nor to stop; cut from the left, it loses the question.
Here a row over the limit is dropped (listed and counted), refused, or shortened in the middle of its thinking by
``prompt.py``, which keeps question, ``</think>``, answer and end.

Encoding runs in worker processes (``children.py``) when there are many rows; the callables must then come from
importable modules (``functools.partial`` of a module function).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from medcot.data.children import map_in_children
from medcot.data.columns import find_row_number
from medcot.errors import DataError, OutputError, did_you_mean
from medcot.records import Example, Quarantined, Row

POLICIES = ("drop", "error", "truncate_think")

# Text from which workers pay. One takes 1.2 s of CPU time to start (imports, tokenizer); encoding takes 2.5 s for 3.2
# million characters (1,000 rows of medical-o1-reasoning-SFT, DeepSeek's tokenizer; one core of a 2-core AMD EPYC VM).
FEWEST_CHARACTERS_FOR_WORKERS = 5_000_000

TOO_LARGE = "over the limit however it is tokenised"
_NUM_LISTED = 5  # rows named in an error message
_KEPT = ("row_number", "reason", "row")  # of a row set aside, in its file


@dataclass(frozen=True, slots=True)
class Encoded:
    """Rows ready for training, those set aside, and the counts that prove nothing went missing."""

    rows: list[Row]
    quarantined: list[Quarantined]
    num_rows: int  # len(rows)
    num_over_length: int  # examples longer than the limit, whatever became of them
    num_dropped: int  # of those, set aside
    num_truncated: int  # of those, shortened in their thinking and kept
    num_tokens: int  # of all rows kept
    num_trained_tokens: int  # of those, carrying loss


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one example: a row, or the reason why there is none."""

    row: Row | None
    num_tokens: int  # before any shortening; 0 where encoding itself was refused
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class _Job:
    """What one worker needs to know."""

    encode: Callable[[Example], Row]
    truncate: Callable[[Example, int], Row] | None  # None: rows over the limit are not shortened
    max_tokens: int
    most_bytes: int | None  # of text that may be within any limit


def encode_rows(
    examples: Sequence[Example],
    encode: Callable[[Example], Row],
    *,
    max_tokens: int,
    over_length: str,
    truncate: Callable[[Example, int], Row],
    num_proc: int = 1,
    may_be_empty: bool = False,
    most_bytes: int | None = None,
) -> Encoded:
    """Encode all examples in order and apply the policy for rows over the limit.

    Args:
        examples: what to encode.
        encode: makes a row of an example; a ``DataError`` from it sets that example aside with the error's words.
        max_tokens: the longest row kept, in tokens.
        over_length: ``"drop"``, ``"error"`` or ``"truncate_think"``.
        truncate: makes a row of at most so many tokens; raises ``DataError`` where question and answer exceed them.
        num_proc: worker processes, started for ``FEWEST_CHARACTERS_FOR_WORKERS`` or more; both callables must then be
            picklable.
        may_be_empty: whether it is fine that no row is left.
        most_bytes: text of more bytes of UTF-8 is over the limit whatever its tokens are; it is set aside unread, and
            never shortened.

    Raises:
        DataError: a row is over the limit and the policy is ``"error"``; or no row is left and one must be.
    """
    if over_length not in POLICIES:
        raise DataError(
            f"over_length is '{over_length}'", "It says what to do with long rows", did_you_mean(over_length, POLICIES)
        )
    job = _Job(encode, truncate if over_length == "truncate_think" else None, max_tokens, most_bytes)
    if num_proc == 1 or sum(map(_count_characters, examples)) < FEWEST_CHARACTERS_FOR_WORKERS:
        verdicts = [_judge(example, job) for example in examples]
    else:
        verdicts = _judge_in_workers(examples, job, num_proc)
    if over_length == "error":
        _refuse_long(examples, verdicts, max_tokens)
    encoded = _collect(examples, verdicts, max_tokens)
    if not encoded.rows and not may_be_empty:
        raise _refuse_empty(encoded, verdicts, max_tokens)
    return encoded


def save_quarantine(path: Path, items: Iterable[Quarantined]) -> None:
    """Write rows set aside as JSON Lines ``{row_number, reason, row}``; the file appears whole or not at all.

    Without items the file is written empty, which says that the check was made and found nothing.

    Raises:
        OutputError: the folder cannot be written or the disk is full.
    """
    lines = [
        json.dumps({key: getattr(item, key) for key in _KEPT}, ensure_ascii=False, default=_plain) + "\n"
        for item in sorted(items, key=lambda item: item.row_number)
    ]
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            # A lone surrogate, which UTF-8 cannot hold, becomes \udXXX: inside a JSON string that is its escape.
            draft.write_bytes("".join(lines).encode("utf-8", "backslashreplace"))
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(
            f"'{path}' cannot be written ({error.strerror})",
            "Rows set aside are listed there, so that none is lost in silence",
            "Free disk space, or choose another folder with --out",
        ) from error


def _judge(example: Example, job: _Job) -> Verdict:
    if job.most_bytes is not None and _count_characters(example) * 4 > job.most_bytes:
        num_bytes = sum(len(text.encode("utf-8", "surrogatepass")) for text in _texts(example))
        if num_bytes > job.most_bytes:
            return Verdict(None, job.max_tokens + 1, f"{num_bytes:,} bytes of text; {TOO_LARGE}")
    try:
        row = job.encode(example)
    except DataError as error:
        return Verdict(None, 0, str(error))
    if row.num_tokens <= job.max_tokens:
        return Verdict(row, row.num_tokens)
    over = f"{row.num_tokens:,} tokens; limit {job.max_tokens:,}"
    if job.truncate is None:
        return Verdict(None, row.num_tokens, over)
    try:
        short = job.truncate(example, job.max_tokens)
    except DataError as error:
        return Verdict(None, row.num_tokens, f"{over}; {error}")
    assert short.num_tokens <= job.max_tokens, f"truncate made {short.num_tokens} tokens of at most {job.max_tokens}"
    return Verdict(short, row.num_tokens)


def _refuse_long(examples: Sequence[Example], verdicts: Sequence[Verdict], max_tokens: int) -> None:
    long = [(example, v) for example, v in zip(examples, verdicts, strict=True) if v.num_tokens > max_tokens]
    if not long:
        return
    listed = ", ".join(f"{example.id} ({v.num_tokens:,})" for example, v in long[:_NUM_LISTED])
    more = f" and {len(long) - _NUM_LISTED:,} more" if len(long) > _NUM_LISTED else ""
    longest = max(v.num_tokens for _, v in long)
    raise DataError(
        f"{len(long):,} of {len(examples):,} rows are over {max_tokens:,} tokens: {listed}{more}",
        "data.over_length=error allows none",
        f"Set model.max_seq_length={longest} to keep them whole, or data.over_length to drop or truncate_think",
    )


def _collect(examples: Sequence[Example], verdicts: Sequence[Verdict], max_tokens: int) -> Encoded:
    rows: list[Row] = []
    quarantined: list[Quarantined] = []
    num_over = num_dropped = 0
    for position, (example, verdict) in enumerate(zip(examples, verdicts, strict=True), start=1):
        over = verdict.num_tokens > max_tokens
        num_over += over
        if verdict.row is not None:
            rows.append(verdict.row)
            continue
        assert verdict.reason is not None, "an example without a row has a reason"
        num_dropped += over
        number = find_row_number(example.id) or position
        quarantined.append(Quarantined(number, verdict.reason, _as_row(example)))
    return Encoded(
        rows,
        quarantined,
        num_rows=len(rows),
        num_over_length=num_over,
        num_dropped=num_dropped,
        num_truncated=num_over - num_dropped,
        num_tokens=sum(row.num_tokens for row in rows),
        num_trained_tokens=sum(row.num_trained_tokens for row in rows),
    )


def _refuse_empty(encoded: Encoded, verdicts: Sequence[Verdict], max_tokens: int) -> DataError:
    shortest = min((verdict.num_tokens for verdict in verdicts if verdict.num_tokens), default=0)
    first = encoded.quarantined[0].reason if encoded.quarantined else "none was given"
    return DataError(
        f"No row is left of {len(verdicts):,}; the first: {first}",
        f"Training needs rows of at most {max_tokens:,} tokens",
        f"Set model.max_seq_length to at least {shortest}" if shortest > max_tokens else "Check the data",
    )


def _as_row(example: Example) -> dict[str, object]:
    """Return an example's filled fields as a plain row, for the quarantine file."""
    return {key: value for key, value in dataclasses.asdict(example).items() if value is not None}


def _plain(value: object) -> str:
    return value.hex() if isinstance(value, bytes) else str(value)


# Workers -------------------------------------------------------------------------------------------------------------


def _count_characters(example: Example) -> int:
    return sum(map(len, _texts(example)))


def _texts(example: Example) -> tuple[str, str, str]:
    return example.question, example.reasoning or "", example.response or ""


def _judge_in_workers(examples: Sequence[Example], job: _Job, num_proc: int) -> list[Verdict]:
    """Give each worker a contiguous share, so that the joined answers are in order."""
    size = -(-len(examples) // num_proc)
    shares = [list(examples[start : start + size]) for start in range(0, len(examples), size)]
    judged = map_in_children(functools.partial(_judge_share, job=job), shares, num_proc)
    return [verdict for part in judged for verdict in part]


def _judge_share(share: list[Example], job: _Job) -> list[Verdict]:
    return [_judge(example, job) for example in share]
