"""MinHash: how alike two texts are, from 128 bytes each, and which pairs are worth looking at.

Likeness here is Jaccard's: of all word 5-grams (shingles) that two texts have, the share that both have; 0.8 counts as
near. Lee et al. use the same n and the same threshold. One word changed touches five shingles, so 0.8 means one word in
45 or so replaced at even distances, or a fifth of the text cut off.

MinHash gives each text 128 numbers, of which two texts share a fraction that estimates their likeness. The numbers are
cut into 16 bands of 8; texts with a band in common are candidates. A pair of likeness s becomes one with probability
1 - (1 - s**8)**16:

    s      0.5   0.6   0.7   0.8   0.85  0.9
    found  6 %   24 %  61 %  95 %  99 %  99.99 %

The bands are only how pairs are found; whether a pair counts is decided by its shingles. Kept of each text are a 32-bit
hash of each band (64 bytes) and the lowest 4 bits of each number (64 bytes). From the latter any candidate's likeness
is known to ± 0.04 (one standard deviation at 0.8: ``sqrt(p (1 - p) / 128) / (15/16)``, ``p = s + (1 - s)/16``), which
spares reading again most pairs of templates that are alike at 0.6 only.

The numbers come from rensa, which computes them in Rust for a whole chunk from hashes that we hand it: 3 µs a text of
150 words (one core of a 2-core AMD EPYC VM). Its own index is not used: it lives in memory, with Python objects for
each row.

Sources: Broder, "On the resemblance and containment of documents", 1997; Lee et al., "Deduplicating Training Data Makes
Language Models Better", ACL 2022; Li and König, "b-Bit Minwise Hashing", WWW 2010 (the 4 bits);
https://github.com/beowolx/rensa.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import rensa
from numpy.typing import NDArray

from medcot.data.words import Hashes, Offsets, mix

NUM_BANDS = 16
ROWS_PER_BAND = 8
SHINGLE_WORDS = 5
NEAR = 0.8  # Jaccard likeness from which two texts are near-duplicates

VERSION = f"rensa{rensa.RMinHash.ALGORITHM_VERSION} {NUM_BANDS}x{ROWS_PER_BAND} {SHINGLE_WORDS}"

_SEED = 20_041_979  # any; it must only never change
_PAIRS_AT_ONCE = 1 << 16  # estimated together: 8 MB of nibbles
_NUM_HASHES = NUM_BANDS * ROWS_PER_BAND


@dataclass(frozen=True, slots=True)
class Sketches:
    """What is kept of some texts.

    Attributes:
        bands: (texts, NUM_BANDS), 32-bit hashes.
        nibbles: (texts, 64), two 4-bit values a byte.
    """

    bands: NDArray[np.uint32]
    nibbles: NDArray[np.uint8]


def compute_sketches(shingles: Hashes, bounds: Offsets) -> Sketches:
    """Sketch texts, given the hashes of their shingles and where each text's begin (and end)."""
    if len(bounds) == 1:
        return Sketches(np.zeros((0, NUM_BANDS), np.uint32), np.zeros((0, _NUM_HASHES // 2), np.uint8))
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(shingles, bounds.astype(np.uint64), _NUM_HASHES, _SEED)
    numbers = np.array(matrix.to_rows(), dtype=np.uint32)
    banded = numbers.reshape(-1, NUM_BANDS, ROWS_PER_BAND).astype(np.uint64)
    folded = np.zeros(banded.shape[:2], np.uint64)
    for place in range(ROWS_PER_BAND):
        folded = mix(folded + banded[:, :, place])
    low = (numbers & 15).astype(np.uint8)
    nibbles = np.bitwise_or(low[:, 0::2], low[:, 1::2] * np.uint8(16))
    return Sketches((folded >> np.uint64(32)).astype(np.uint32), nibbles)


def estimate_likeness(
    left_nibbles: NDArray[np.uint8], right_nibbles: NDArray[np.uint8], left: Offsets, right: Offsets
) -> NDArray[np.float32]:
    """Estimate the likeness of pairs, given as places in two sets of nibbles, (texts, 64) each."""
    estimates = np.empty(len(left), np.float32)
    for start in range(0, len(left), _PAIRS_AT_ONCE):
        part = slice(start, start + _PAIRS_AT_ONCE)
        differ = left_nibbles[left[part]] ^ right_nibbles[right[part]]
        equal = np.count_nonzero((differ & 15) == 0, axis=1) + np.count_nonzero((differ & 240) == 0, axis=1)
        estimates[part] = (equal / _NUM_HASHES - 1 / 16) / (15 / 16)
    return estimates


def compute_likeness(left: Hashes, right: Hashes) -> float:
    """Return Jaccard's likeness of two sets of shingles, each sorted and without repeats; 0 where both are empty."""
    shared = len(np.intersect1d(left, right, assume_unique=True))
    either = len(left) + len(right) - shared
    return shared / either if either else 0.0


def pair_equals(values: NDArray[np.uint32]) -> tuple[tuple[Offsets, Offsets], tuple[Offsets, Offsets]]:
    """Pair the places that hold equal values: each with the first such place, and each with the one before.

    A bucket of m gives 2 (m - 1) pairs and not m (m - 1) / 2. A pair missed because the first of a bucket happens to be
    unlike the others has its chance with its neighbour, and in fifteen other bands.
    """
    order = np.argsort(values, kind="stable")
    in_order = values[order]
    again = np.zeros(len(values), bool)
    again[1:] = in_order[1:] == in_order[:-1]
    starts = np.flatnonzero(~again)
    first = np.repeat(order[starts], np.diff(np.append(starts, len(values))))
    before = np.roll(order, 1)
    return (first[again], order[again]), (before[again], order[again])
