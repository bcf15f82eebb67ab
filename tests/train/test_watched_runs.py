"""Runs with held-out rows: what they write, draw and account for, and how they go on after a stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from medcot import folder as folders
from medcot import pipeline
from medcot.errors import DataError
from medcot.train import sft
from tiny_runs import make_rows, read_facts, read_losses, read_validation, run_job, write_rows

SETTINGS = ["train.max_steps=6", "train.validate_steps=2", "train.save_steps=2", "data.validation=0.3"]


@pytest.fixture(scope="module")
def watched(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("watched") / "run"
    _, output = run_job(recipe_file, out, *SETTINGS)
    return out, output


def test_a_run_writes_both_losses(watched):
    out, output = watched
    lines = folders.read_lines(out / "metrics.jsonl")
    assert [line["step"] for line in lines if "validation_loss" in line] == [0, 2, 4, 6]
    assert [line["step"] for line in lines] == [0, 1, 2, 2, 3, 4, 4, 5, 6, 6]
    assert all(set(line) == {"step", "validation_loss", "validation_s"} for line in lines if "loss" not in line)
    train, losses = read_facts(out)["train"], read_validation(out)
    assert (train["validation_loss_first"], train["validation_loss_last"]) == (losses[0][1], losses[-1][1])
    assert 0 < train["validation_s"] < 60 and train["loss_first"] == read_losses(out)[0]
    assert "validation" in output and "rows are held out" in output


def test_a_run_accounts_for_every_row(watched):
    data = read_facts(watched[0])["data"]
    assert data["train"]["rows"] + data["validation"]["rows"] == 18 and data["validation"]["rows"] > 0
    assert data["validation"]["fraction"] == 0.3 and data["validation"]["seed"] == 3407


def test_the_report_draws_both_curves(watched):
    page = (watched[0] / "report.html").read_text(encoding="utf-8")
    assert "held-out rows" in page and "Training loss" not in page


def test_a_run_stopped_and_resumed_has_the_lines_of_one(recipe_file, watched, tmp_path, monkeypatch):
    out, plain = tmp_path / "run", sft.train

    def stopped(*args: Any, **options: Any) -> Any:
        def on_step(step: int, metrics: Any) -> None:
            options_on_step(step, metrics)
            if step == 5:
                raise KeyboardInterrupt

        options_on_step = options.pop("on_step")
        return plain(*args, on_step=on_step, **options)

    monkeypatch.setattr(sft, "train", stopped)
    with pytest.raises(KeyboardInterrupt):
        run_job(recipe_file, out, *SETTINGS)
    monkeypatch.undo()
    run_job("default", out, resume=True)
    assert read_validation(out) == read_validation(watched[0]) and read_losses(out) == read_losses(watched[0])
    facts = [read_facts(folder)["train"] for folder in (out, watched[0])]
    assert facts[0]["validation_loss_first"] == facts[1]["validation_loss_first"]


def test_a_run_stopped_before_its_first_checkpoint_begins_anew(recipe_file, tmp_path, monkeypatch):
    out, settings = tmp_path / "run", ["train.max_steps=2", "data.validation=0.3"]
    monkeypatch.setattr(pipeline.ranks, "part", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run_job(recipe_file, out, *settings)
    monkeypatch.undo()
    run_job("default", out, resume=True)
    assert [step for step, _ in read_validation(out)] == [0, 1, 2]


def test_validation_from_a_source_leaves_the_training_alone(recipe_file, tmp_path):
    held_out = write_rows(tmp_path / "held_out.jsonl", make_rows(30)[20:])
    run_job(recipe_file, tmp_path / "plain")
    run_job(recipe_file, tmp_path / "watched", f"data.validation={held_out}")
    assert read_losses(tmp_path / "watched") == read_losses(tmp_path / "plain")
    adapters = [
        (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("plain", "watched")
    ]
    assert adapters[0] == adapters[1]
    facts = read_facts(tmp_path / "watched")["data"]
    assert facts["validation"]["rows"] == 10 and facts["validation"]["source"] == str(held_out)
    assert "validation" not in read_facts(tmp_path / "plain")["data"]


def test_changed_validation_rows_are_refused_on_resume(recipe_file, tmp_path, monkeypatch):
    held_out = write_rows(tmp_path / "held_out.jsonl", make_rows(30)[20:])
    monkeypatch.setattr(pipeline, "_attach", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run_job(recipe_file, tmp_path / "run", f"data.validation={held_out}")
    write_rows(held_out, make_rows(30)[22:])
    with pytest.raises(DataError, match="has changed since the run was started"):
        run_job("default", tmp_path / "run", resume=True)
