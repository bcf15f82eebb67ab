"""How long rows are: prompt, reasoning and answer in tokens, what the length limit does, what padding would waste.

Counts come from encoded rows *before* any is dropped or shortened. A row costs a few bytes here, so millions can be
counted; where tokenising all of a source would take too long, ``draw_sample`` takes the rows whose question's hash is
small: the same ones whatever the order, and the sentence says how many of how many were counted.

Padding's waste is not simulated but computed: over all ways to shuffle n rows into batches of b, the longest of a batch
is the i-th shortest row with probability C(i-1, b-1) / C(n, b). So the expected size of the padded batches is exact and
needs no seed. Packing as in ``packing.py`` wastes nothing.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from medcot.data.findings import MOST_ROWS, Finding, Severity
from medcot.data.splits import find_place
from medcot.records import Example, Row

_SAMPLE_SEED = 4  # its own, so that a sample says nothing about the sides of a split
_PERCENTILES = (1, 5, 25, 50, 75, 90, 95, 99)
_PARTS = ("prompt", "reasoning", "answer", "row")


@dataclass(slots=True)
class Lengths:
    """Tokens of rows, counted one by one.

    Attributes:
        max_tokens: the longest row that is kept whole.
        shortest_think: tokens that a shortened row needs between prompt and answer (``prompt.count_shortest_think``).
        longest: ids and tokens of the longest rows over the limit, longest first.
    """

    max_tokens: int
    shortest_think: int
    longest: list[tuple[int, str]] = field(default_factory=list)
    _counts: dict[str, array[int]] = field(default_factory=lambda: {part: array("Q") for part in _PARTS})

    def add(self, row: Row) -> None:
        """Count a row, which must not have been shortened; ``</think>`` counts as reasoning, EOS as answer."""
        counts = (row.think[0], row.think[1] - row.think[0], row.num_tokens - row.answer[0], row.num_tokens)
        for part, count in zip(_PARTS, counts, strict=True):
            self._counts[part].append(count)
        if row.num_tokens > self.max_tokens:
            self.longest = sorted([*self.longest, (row.num_tokens, row.id)], reverse=True)[:MOST_ROWS]

    def merge(self, other: Lengths) -> None:
        """Add the counts of other rows, made under the same limit."""
        for part, counts in other._counts.items():
            self._counts[part].extend(counts)
        self.longest = sorted([*self.longest, *other.longest], reverse=True)[:MOST_ROWS]

    def tokens(self, part: str) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Counts of ``prompt``, ``reasoning``, ``answer`` or ``row`` (all of it), in the order of the rows."""
        return np.array(self._counts[part], dtype=np.int64)


def draw_sample(examples: Iterable[Example], size: int, num_rows: int) -> Iterator[Example]:
    """Give about ``size`` of ``num_rows`` examples, chosen by their questions' hash; all, if there are no more."""
    limit = 2**64 * size // max(size, num_rows)
    return (example for example in examples if find_place(example.question, _SAMPLE_SEED) < limit)


def describe_lengths(
    lengths: Lengths, *, over_length: str, batch_size: int, num_rows: int | None = None
) -> list[Finding]:
    """Say what was counted: an info finding with figures, and a yellow one where rows are over the limit.

    Args:
        lengths: of at least one row.
        over_length: the policy in force: ``"drop"``, ``"error"`` or ``"truncate_think"``.
        batch_size: rows of an optimizer step.
        num_rows: rows of the source, where the counted ones are a sample of them.
    """
    whole = lengths.tokens("row")
    policies = _weigh_policies(lengths)
    kept = np.minimum(whole, lengths.max_tokens)[whole <= lengths.max_tokens]
    if over_length == "truncate_think":
        shortened = np.full(policies["truncate_think"]["shortened"], lengths.max_tokens)
        kept = np.concatenate([kept, shortened])
    figures = {
        "rows": len(whole),
        "of_rows": len(whole) if num_rows is None else num_rows,
        "max_tokens": lengths.max_tokens,
        "parts": {part: _describe(lengths.tokens(part)) for part in _PARTS},
        "over_limit": policies,
        "padding": _weigh_padding(kept, batch_size, lengths.max_tokens),
    }
    info = Finding("lengths", Severity.INFO, len(whole), (), _say_lengths(figures), "", figures=figures)
    over = int(policies["rows"])
    if not over:
        return [info]
    says, fix = _say_policy(policies, over_length, len(whole), lengths)
    ids = tuple(row_id for _, row_id in lengths.longest)
    return [info, Finding("over_length", Severity.YELLOW, over, ids, says, fix, figures=policies)]


def _describe(counts: np.ndarray[Any, np.dtype[np.int64]]) -> dict[str, Any]:
    """Return the figures of one part; ``histogram`` counts rows from each edge to below the next."""
    edges = [0]
    while edges[-1] <= counts.max():  # powers of two and their halfway points: 32, 48, 64, 96, …
        edges.append(32 if edges == [0] else edges[-1] * 3 // 2 if edges[-1].bit_count() == 1 else edges[-1] * 4 // 3)
    return {
        "tokens": int(counts.sum()),
        "mean": round(float(counts.mean()), 1),
        "sd": round(float(counts.std()), 1),
        "min": int(counts.min()),
        "max": int(counts.max()),
        "percentiles": {str(p): int(np.percentile(counts, p, method="inverted_cdf")) for p in _PERCENTILES},
        "histogram": {"edges": edges, "rows": np.histogram(counts, edges)[0].tolist()},
    }


def _weigh_policies(lengths: Lengths) -> dict[str, Any]:
    """Return rows over the limit, and what each policy would do to them."""
    whole, limit = lengths.tokens("row"), lengths.max_tokens
    is_over = whole > limit
    fixed = lengths.tokens("prompt") + lengths.tokens("answer")
    can_shorten = is_over & (fixed + lengths.shortest_think <= limit)
    return {
        "rows": int(is_over.sum()),
        "longest": int(whole.max()),
        "drop": {"rows_lost": int(is_over.sum()), "tokens_lost": int(whole[is_over].sum())},
        "truncate_think": {
            "shortened": int(can_shorten.sum()),
            "reasoning_lost": int((whole[can_shorten] - limit).sum()),
            "rows_lost": int((is_over & ~can_shorten).sum()),
        },
        "error": {"stops": bool(is_over.any())},
    }


def _weigh_padding(kept: np.ndarray[Any, np.dtype[np.int64]], batch_size: int, max_tokens: int) -> dict[str, Any]:
    """Return the tokens that padded batches of the rows kept would have, and the share of them that is padding."""
    real = int(kept.sum())
    to_longest = _expect_padded(kept, batch_size)
    to_limit = len(kept) * max_tokens

    def weigh(padded: float) -> dict[str, Any]:
        return {"wasted": round(padded - real), "share": round(1 - real / padded, 4) if padded else 0.0}

    return {"batch_size": batch_size, "real": real, "to_longest": weigh(to_longest), "to_limit": weigh(to_limit)}


def _expect_padded(counts: np.ndarray[Any, np.dtype[np.int64]], batch_size: int) -> float:
    """Return the expected tokens of rows shuffled into batches and padded to each batch's longest."""
    num_batches, rest = divmod(len(counts), batch_size)
    ordered = np.sort(counts).astype(float)
    padded = num_batches * batch_size * _expect_longest(ordered, batch_size) if num_batches else 0.0
    return padded + rest * _expect_longest(ordered, rest) if rest else padded


def _expect_longest(ordered: np.ndarray[Any, np.dtype[np.float64]], size: int) -> float:
    """Return the mean of the longest of ``size`` rows drawn without replacement; ``ordered`` is ascending."""
    num = len(ordered)
    # P(longest is row n) = b / n; P(row i - 1) = P(row i) * (i - b) / (i - 1), counting rows from 1.
    rows = np.arange(num, size, -1, dtype=float)
    chances = size / num * np.concatenate([[1.0], np.cumprod((rows - size) / (rows - 1))])
    return float(chances @ ordered[::-1][: len(chances)])


def _say_lengths(figures: Mapping[str, Any]) -> str:
    parts = ", ".join(
        f"{part} {figures['parts'][part]['mean']:,.0f} (99 % below {figures['parts'][part]['percentiles']['99'] + 1:,})"
        for part in _PARTS[:3]
    )
    row, padding = figures["parts"]["row"], figures["padding"]
    of = f" of {figures['of_rows']:,}" if figures["of_rows"] != figures["rows"] else ""
    return (
        f"{figures['rows']:,}{of} rows counted: {row['mean']:,.0f} tokens on average, {row['min']:,} to "
        f"{row['max']:,}; {parts}. Padding batches of {padding['batch_size']} to their longest row would waste "
        f"{padding['to_longest']['share']:.0%} of all tokens, padding to {figures['max_tokens']:,} "
        f"{padding['to_limit']['share']:.0%}; rows are packed, so none is."
    )


def _say_policy(policies: Mapping[str, Any], over_length: str, num_rows: int, lengths: Lengths) -> tuple[str, str]:
    """Return what becomes of the rows over the limit, and the remedy."""
    over, cut = policies["rows"], policies["truncate_think"]
    deeds = {
        "drop": f"they are dropped, with {policies['drop']['tokens_lost']:,} tokens",
        "error": "the run refuses them",
        "truncate_think": f"{cut['shortened']:,} lose {cut['reasoning_lost']:,} tokens from the middle of their "
        f"reasoning, and {cut['rows_lost']:,}, whose question and answer alone are too long, are dropped",
    }
    says = f"{over:,} of {num_rows:,} rows are over {lengths.max_tokens:,} tokens; {deeds[over_length]}."
    fix = f"Set model.max_seq_length={policies['longest']} to keep all of them whole"
    if over_length != "truncate_think" and cut["shortened"]:
        fix += f", or data.over_length=truncate_think to keep {cut['shortened']:,} with shortened reasoning"
    return says, f"{fix}."
