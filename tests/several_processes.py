"""Runs of the whole job in several processes, and how they are held against a run in one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from medcot.folder import read_lines
from tiny_runs import read_facts, read_losses, read_validation


def launch(recipe: Path, out: Path, *overrides: str, processes: int = 2) -> subprocess.CompletedProcess[str]:
    """``torchrun -m medcot run``, on a port of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command += ["--master-addr", "127.0.0.1", "--master-port", str(port), "-m", "medcot", "run"]
    command += ["--resume"] if not overrides and out.exists() else [str(recipe), *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--out", str(out)], capture_output=True, text=True, check=False, timeout=120, env=environment
    )
    print(done.stdout, done.stderr)
    return done


def adapter_of(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter" / "adapter_model.safetensors")


def assert_same_run(one: Path, two: Path, *, adapter: float = 1e-3, losses: float = 1e-4) -> None:
    """Adapters and losses as far apart as rounding takes them; Adam, which divides by small roots, makes more of it.

    The defaults are for float32, where B was seen 3e-5 of its size apart after six steps.
    """
    wanted, got = adapter_of(one), adapter_of(two)
    assert wanted.keys() == got.keys()
    for name, tensor in wanted.items():
        if ".lora_B." in name:  # B starts at zero
            assert (got[name] - tensor).norm() < adapter * tensor.norm(), name
    assert read_losses(two) == pytest.approx(read_losses(one), rel=losses)
    watched = [read_validation(out) for out in (one, two)]
    assert [step for step, _ in watched[1]] == [step for step, _ in watched[0]]
    assert [loss for _, loss in watched[1]] == pytest.approx([loss for _, loss in watched[0]], rel=losses)
    logged = [[line for line in read_lines(out / "metrics.jsonl") if "loss" in line] for out in (one, two)]
    for key in ("tokens", "trained_tokens"):
        assert [line[key] for line in logged[0]] == [line[key] for line in logged[1]]
    first, second = read_facts(one)["train"], read_facts(two)["train"]
    assert (first["processes"], second["processes"]) == (1, 2)
    assert first["steps"] == second["steps"]
