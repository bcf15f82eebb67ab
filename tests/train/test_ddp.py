"""Two processes train what one does: the same rows a step, the same adapter, the same losses; on a CPU with gloo."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from accelerate.data_loader import SeedableRandomSampler

from medcot.train.shares import StepShares, collate_share, deal
from several_processes import adapter_of, assert_same_run, launch
from tiny_runs import NUM_ROWS, make_rows, read_facts, read_validation, run_job, write_rows


@pytest.mark.parametrize("path", ["engine", "plain"])
def test_two_processes_train_the_adapter_of_one(recipe_file: Path, tmp_path: Path, path: str) -> None:
    """Five steps of four rows: the fifth ends an epoch of 18 rows, and has two. Five other rows are watched."""
    held_out = write_rows(tmp_path / "held_out.jsonl", make_rows(NUM_ROWS + 5)[NUM_ROWS:])
    settings = ["train.max_steps=6", f"train.accelerate={str(path == 'engine').lower()}", "ask.max_new_tokens=2"]
    settings += [f"data.validation={held_out}", "train.validate_steps=4"]
    one, two = tmp_path / "one", tmp_path / "two"
    run_job(recipe_file, one, *settings)
    done = launch(recipe_file, two, *settings, "train.micro_batch_size=1")
    assert done.returncode == 0
    assert_same_run(one, two)
    assert [step for step, _ in read_validation(two)] == [0, 4, 6]
    assert done.stdout.count("save adapter") == 1  # one process draws
    assert read_facts(two)["train"]["path"] == path


@pytest.mark.slow  # two launches of two processes
def test_a_run_of_two_processes_resumes(recipe_file: Path, tmp_path: Path) -> None:
    settings = ["train.max_steps=6", "train.save_steps=2", "ask.max_new_tokens=2"]
    run_job(recipe_file, tmp_path / "one", *settings)
    assert launch(recipe_file, tmp_path / "two", *settings).returncode == 0
    whole = adapter_of(tmp_path / "two")
    shutil.rmtree(tmp_path / "two" / "adapter")
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "checkpoint-6")
    kept = tmp_path / "two" / "checkpoints" / "checkpoint-4"
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {path.name for path in kept.iterdir()}
    assert launch(recipe_file, tmp_path / "two").returncode == 0
    for name, tensor in adapter_of(tmp_path / "two").items():
        assert torch.equal(tensor, whole[name]), name
    assert_same_run(tmp_path / "one", tmp_path / "two")


def test_a_batch_that_cannot_be_shared_is_refused(recipe_file: Path, tmp_path: Path) -> None:
    done = launch(recipe_file, tmp_path / "two", "train.batch_size=3")
    assert done.returncode != 0
    assert "train.batch_size=3 for 2 processes" in done.stderr and "Set train.batch_size=4" in done.stderr
    assert "medcot/pipeline.py" not in done.stderr  # a message and no traceback of ours


def test_rows_are_dealt_evenly_and_so_are_tokens() -> None:
    lengths = [100, 10, 90, 20, 80, 30, 70, 40]
    hands = deal(range(8), lengths, 2)
    assert sorted(hands[0] + hands[1]) == list(range(8))
    assert [len(hand) for hand in hands] == [4, 4]
    totals = [sum(lengths[row] for row in hand) for hand in hands]
    assert abs(totals[0] - totals[1]) <= 20
    assert deal(range(3), lengths, 2) == [[0], [2, 1]]  # the longest alone
    assert [len(hand) for hand in deal([5], lengths, 3)] == [1, 0, 0]


@pytest.mark.parametrize(("batch_size", "micro", "size"), [(4, 1, 2), (4, 2, 2), (6, 1, 3), (8, 4, 2), (4, 4, 1)])
def test_every_step_has_the_rows_of_one_process(batch_size: int, micro: int, size: int) -> None:
    lengths = list(range(1, 19))
    parts = []
    for rank in range(size):
        sampler = SeedableRandomSampler(lengths, data_seed=5)
        shares = StepShares(sampler, lengths, batch_size=batch_size, micro_batch_size=micro, rank=rank, size=size)
        shares.set_epoch(1)
        parts.append(list(shares))
        assert len(parts[-1]) == len(shares)
    order_sampler = SeedableRandomSampler(lengths, data_seed=5)
    order_sampler.set_epoch(1)
    order = list(order_sampler)
    a_step = batch_size // (micro * size)
    for number, start in enumerate(range(0, len(order), batch_size)):
        taken = [row for part in parts for batch in part[number * a_step : (number + 1) * a_step] for row in batch]
        assert sorted(taken) == sorted(order[start : start + batch_size])
    assert {len(part) for part in parts} == {len(parts[0])}


def test_an_empty_batch_has_no_loss() -> None:
    batch = collate_share([])
    assert batch["filler"] and batch["labels"].tolist() == [[-100, -100]] and batch["lengths"] == [2]
