"""Two GPUs train what one does, over NCCL. Run with ``-m gpu`` on a machine with two."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from several_processes import assert_same_run, launch
from tiny_runs import read_facts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


@pytest.mark.parametrize(
    ("precision", "adapter", "losses"),
    [("fp32", 1e-2, 1e-3), ("bf16", 0.2, 1e-2), ("nf4", 0.2, 1e-2)],  # 16 bit: rounding of other sums, then Adam
)
@pytest.mark.parametrize("path", ["engine", "plain"])
def test_two_gpus_train_the_adapter_of_one(
    recipe_file: Path, tmp_path: Path, path: str, precision: str, adapter: float, losses: float
) -> None:
    settings = ["train.max_steps=6", f"train.accelerate={str(path == 'engine').lower()}", "ask.max_new_tokens=2"]
    settings += [f"model.precision={precision}", "train.optimizer=adamw_torch", "train.save_steps=2"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert launch(recipe_file, one, *settings, processes=1).returncode == 0
    assert launch(recipe_file, two, *settings).returncode == 0
    assert_same_run(one, two, adapter=adapter, losses=losses)
    assert read_facts(two)["train"]["path"] == path


def test_more_processes_than_gpus_are_refused(recipe_file: Path, tmp_path: Path) -> None:
    done = launch(recipe_file, tmp_path / "out", "train.max_steps=1", processes=torch.cuda.device_count() + 1)
    assert done.returncode != 0 and "Each process computes on a GPU of its own" in done.stderr
