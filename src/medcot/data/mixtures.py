"""Several sources as one set of rows: how many are drawn from each, which ones, and in what order.

Weights are proportions of the rows drawn: 3 and 1 make three rows of the first for each of the second, whatever their
sizes. The usual way is to draw with replacement until some number of steps is reached: rows then come three times or
never, by chance, and nobody is told. Here no row comes twice in an epoch unless it is asked for. The largest mixture of
the asked proportions that repeats nothing is drawn: one source is used up, and of the others a part is left out,
counted and said. With ``repeat`` it is the smallest mixture that leaves nothing out: one source is used once, the small
ones are gone through again. Without weights every row of every source comes once.

Which rows of a source are drawn is a fair choice (selection sampling: Knuth, The Art of Computer Programming 2,
algorithm S in 3.4.2), not its first ones, since files are often sorted. The order is a fair shuffle of the sources that
keeps each one's own order: the next row comes from a source with the chance of its share in what is still to come. Both
read forward only and hold nothing but counters, so they serve streams. Both are seeded, the same in every process.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from random import Random

from medcot.errors import DataError


@dataclass(frozen=True, slots=True)
class Share:
    """What a mixture takes of one source."""

    num_rows: int  # it has
    num_drawn: int  # rows of the mixture that come from it, repeats counted

    @property
    def num_left_out(self) -> int:
        """Rows that are not used at all."""
        return max(0, self.num_rows - self.num_drawn)

    @property
    def num_repeats(self) -> int:
        """Rows of the mixture that have come before."""
        return max(0, self.num_drawn - self.num_rows)


def plan_mixture(names: Sequence[str], num_rows: Sequence[int], weights: Sequence[float | None], *, repeat: bool
                 ) -> list[Share]:  # fmt: skip
    """Settle how many rows come from each source.

    Args:
        names: the sources' names, for errors.
        num_rows: rows of each.
        weights: share of each against the others, above 0; all ``None`` for every row once.
        repeat: whether small sources are repeated, instead of a part of the large ones left out.

    Raises:
        DataError: a source without rows, or with so small a share that none would be drawn.
    """
    for name, count in zip(names, num_rows, strict=True):
        if count == 0:
            raise DataError(f"'{name}' has no row left", "A mixture takes rows from each source", "Leave it out")
    shares = [Fraction(repr(float(weight))) for weight in weights if weight is not None]  # decimals mean what they say
    if not shares:
        return [Share(count, count) for count in num_rows]
    assert len(shares) == len(weights), "all sources have weights or none has"
    per_weight = [count / share for count, share in zip(num_rows, shares, strict=True)]
    scale = max(per_weight) if repeat else min(per_weight)
    drawn = [round(scale * share) for share in shares]
    for name, count, weight in zip(names, drawn, weights, strict=True):
        if count == 0:
            raise DataError(
                f"'{name}' would give none of {sum(drawn):,} rows by its weight of {weight:g}",
                "A mixture takes rows from each source, in the proportion of their weights",
                "Raise its weight, leave it out, or set data.repeat=true",
            )
    return [Share(count, num) for count, num in zip(num_rows, drawn, strict=True)]


def draw_rows(shares: Sequence[Share], seed: int) -> Iterator[tuple[int, int]]:
    """Yield the rows of a mixture as ``(source, row)``, both from 0; a source's rows ascend, anew in each repeat."""
    order = Random(f"{seed}:order")  # a text seed goes through SHA-512, so it does not depend on the process
    streams = [_draw_from(share, Random(f"{seed}:{source}")) for source, share in enumerate(shares)]
    left = [share.num_drawn for share in shares]
    for remaining in range(sum(left), 0, -1):
        place = order.randrange(remaining)
        source = 0
        while place >= left[source]:
            place -= left[source]
            source += 1
        left[source] -= 1
        yield source, next(streams[source])


def _draw_from(share: Share, rng: Random) -> Iterator[int]:
    """Yield whole passes, then a fair choice of what is left to draw."""
    passes, wanted = divmod(share.num_drawn, share.num_rows)
    for _ in range(passes):
        yield from range(share.num_rows)
    for row in range(share.num_rows):
        if rng.randrange(share.num_rows - row) < wanted:
            wanted -= 1
            yield row
