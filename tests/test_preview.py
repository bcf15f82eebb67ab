"""The dry run shows recipe, plan and one coloured row, and leaves nothing behind."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest
import torch
from rich.console import Console

from medcot import pipeline, planning, preview
from medcot.errors import DataError, ModelError
from medcot.shapes import EMBEDDED_SHAPE

ROWS = [
    {"Question": f"How much is {i} and 1?", "Complex_CoT": f"I add 1 to {i}.", "Response": f"{i + 1}."}
    for i in range(10)
]
GREEN, DIM, RESET = "\x1b[32m", "\x1b[2m", "\x1b[0m"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS, {**ROWS[0], "Response": ""}]))
    return path


def _overrides(tiny_folder: Path, data: Path, *more: str) -> list[str]:
    start = [f"model={tiny_folder}", f"data={data}", "model.max_seq_length=512", "prompt=short", "train.batch_size=4"]
    return [*start, *more]


def _print(overrides: list[str], *, color: bool = False) -> str:
    stream = io.StringIO()
    console = Console(
        file=stream, width=200, force_terminal=color, color_system="standard" if color else None, no_color=not color
    )
    pipeline.plan("default", overrides, console)
    return stream.getvalue()


def test_a_dry_run_prints_recipe_plan_and_row(tiny_folder, data):
    text = _print(_overrides(tiny_folder, data, "train.learning_rate=1e-4"))
    assert f"source: {tiny_folder}" in text and "learning_rate: 0.0001" in text and "keep_checkpoints: 2" in text
    assert "1 rows would be set aside; row 11: " in text
    assert "10 of " in text and "3 of 4 rows" in text
    facts = {line.split()[0] for line in text.splitlines() if line.strip()}
    assert facts >= {"rows", "steps", "tokens", "model", "memory", "training"}
    assert "How much is 0 and 1?\n<think>I add 1 to 0.</think>1.</s>" in text


def test_a_row_is_coloured_by_what_carries_loss(tiny_folder, data):
    text = _print(_overrides(tiny_folder, data), color=True)
    row = text[text.index("one row") :]
    assert f"{DIM}How much is 0 and 1?{RESET}" in row
    assert f"{GREEN}I add 1 to 0.</think>{RESET}" in row and f"{GREEN}</s>{RESET}" in row
    everything = _print(_overrides(tiny_folder, data, "train.train_on_prompt=true"), color=True)
    assert f"{GREEN}How much is 0 and 1?{RESET}" in everything


def test_a_dry_run_writes_nothing(tiny_folder, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(os.listdir(tmp_path)), sorted(os.listdir(tiny_folder))
    _print(_overrides(tiny_folder, data))
    assert (sorted(os.listdir(tmp_path)), sorted(os.listdir(tiny_folder))) == before


def test_a_dry_run_reads_no_weights(tiny_folder, data, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (bare / name).write_bytes((tiny_folder / name).read_bytes())
    (bare / "model.safetensors").write_bytes(b"not one weight")
    assert "M parameters in" in _print(_overrides(bare, data))


def test_a_dry_run_says_how_memory_is_met(tiny_folder, data, monkeypatch):
    monkeypatch.setattr(planning, "free_memory_gb", lambda device: 0.1)
    text = _print(_overrides(tiny_folder, data))
    assert "in 4 forwards" in text and "activations recomputed" in text and "of 0.1 GiB" in text


def test_a_dry_run_stops_at_what_would_stop_the_run(tiny_folder, data, tmp_path):
    with pytest.raises(DataError):
        _print(_overrides(tiny_folder, tmp_path / "none.jsonl"))
    with pytest.raises(DataError, match="No row is left"):
        _print(_overrides(tiny_folder, data, "model.max_seq_length=8"))
    with pytest.raises(ModelError):
        _print(_overrides(tmp_path / "no-model", data))


def test_a_guess_at_time_grows_with_tokens():
    one, ten = (preview.guess_seconds(EMBEDDED_SHAPE, n, "bf16", torch.device("cpu")) for n in (1_000, 10_000))
    assert ten == pytest.approx(10 * one) and 0.01 < one < 100
