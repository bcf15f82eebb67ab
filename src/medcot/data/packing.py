"""Rows end to end: a batch without padding.

The rows of a batch are laid one after another in a single sequence, with positions that start again at each row. No
token is spent on padding, and attention is told where rows begin (``engine/attention.py``), so none sees another. The
usual padded rectangle wastes whatever the longest row leaves over, in every operation of the model.

Labels are unshifted, as everywhere in transformers, and the first token of a row is always -100: nothing predicts it,
so it must not be counted when the loss is normalised by the trained tokens of a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from medcot.records import Row

if TYPE_CHECKING:
    from datasets import Dataset


def flatten_rows(rows: Sequence[Row]) -> dict[str, Any]:
    """Lay rows end to end; see ``collate``."""
    return collate([{"input_ids": row.input_ids, "labels": row.labels} for row in rows])


def collate(features: Sequence[dict[str, list[int]]]) -> dict[str, Any]:
    """Turn rows into one batch: a data collator for transformers' and TRL's trainers.

    Args:
        features: each with ``input_ids`` and ``labels`` of equal length.

    Returns:
        ``input_ids``, ``labels`` and ``position_ids``, each int64 of shape (1, T); ``lengths``, tokens of each row.
    """
    import torch

    lengths = [len(feature["input_ids"]) for feature in features]
    ids = [token for feature in features for token in feature["input_ids"]]
    labels = [label for feature in features for label in (-100, *feature["labels"][1:])]
    positions = [position for length in lengths for position in range(length)]
    return {
        "input_ids": torch.tensor([ids]),
        "labels": torch.tensor([labels]),
        "position_ids": torch.tensor([positions]),
        "lengths": lengths,
    }


def build_dataset(rows: Sequence[Row]) -> Dataset:
    """Return the rows as the Arrow-backed dataset that TRL's trainer wants."""
    from datasets import Dataset

    return Dataset.from_dict({"input_ids": [row.input_ids for row in rows], "labels": [row.labels for row in rows]})
