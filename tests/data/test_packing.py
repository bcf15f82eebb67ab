"""Rows end to end."""

from __future__ import annotations

import torch

from medcot.data.packing import build_dataset, collate, flatten_rows
from medcot.records import Row


def make_row(ids: list[int], labels: list[int]) -> Row:
    return Row("r", ids, labels, question=(0, 1), think=(1, 2), answer=(2, 2), eos=(2, 2))


ROWS = [make_row([5, 6, 7], [-100, 6, 7]), make_row([9], [9]), make_row([8, 4], [8, 4])]


def test_rows_follow_one_another_without_padding() -> None:
    batch = flatten_rows(ROWS)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 9, 8, 4]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1]]
    assert batch["lengths"] == [3, 1, 2]
    assert {batch[name].dtype for name in ("input_ids", "labels", "position_ids")} == {torch.int64}


def test_a_rows_first_token_is_never_trained() -> None:
    """Else it would be predicted from the row before, and counted among the step's trained tokens."""
    assert flatten_rows(ROWS)["labels"].tolist() == [[-100, 6, 7, -100, -100, 4]]


def test_collating_leaves_the_features_alone() -> None:
    features = [{"input_ids": [1, 2], "labels": [1, 2]}, {"input_ids": [3], "labels": [3]}]
    once = collate(features)
    assert features == [{"input_ids": [1, 2], "labels": [1, 2]}, {"input_ids": [3], "labels": [3]}]
    again = collate(features)
    assert all(torch.equal(once[name], again[name]) for name in ("input_ids", "labels", "position_ids"))


def test_a_batch_can_be_cut_back_into_its_rows() -> None:
    batch = flatten_rows(ROWS)
    parts = batch["input_ids"][0].split(batch["lengths"])
    assert [part.tolist() for part in parts] == [row.input_ids for row in ROWS]


def test_one_row_is_itself() -> None:
    batch = flatten_rows(ROWS[:1])
    assert batch["input_ids"].tolist() == [[5, 6, 7]] and batch["lengths"] == [3]


def test_the_dataset_holds_what_the_collator_wants() -> None:
    dataset = build_dataset(ROWS)
    assert len(dataset) == 3 and set(dataset.column_names) == {"input_ids", "labels"}
    collated, flat = collate([dataset[i] for i in range(3)]), flatten_rows(ROWS)
    assert collated["lengths"] == flat["lengths"] and torch.equal(collated["labels"], flat["labels"])
