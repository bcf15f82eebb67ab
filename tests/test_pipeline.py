"""The whole job on a tiny model: what a run leaves behind, how it goes on after a stop, and how it ends in failure.

The same job through the real command line, kills and golden losses included, is in ``test_pipeline_cli.py``.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import medcot
from medcot import folder, pipeline, tracking
from medcot.errors import DataError, MissingExtraError, ModelError, RecipeError
from medcot.export import adapter
from medcot.records import Run
from medcot.train import sft
from tiny_runs import NUM_ROWS, make_rows, read_facts, read_losses, run_job, write_rows

RUN_JSON = {
    "recipe": dict, "status": str, "model": dict, "data": dict, "train": dict, "eval": dict, "artifacts": dict,
    "timing": dict, "versions": dict, "machine": str,
}  # fmt: skip


# What a run leaves behind ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(recipe_file, rows_file, tmp_path_factory) -> tuple[dict[str, Any], Path, str]:
    """A run with graded problems, merged weights, and rows that are set aside."""
    out = tmp_path_factory.mktemp("finished") / "run"
    rows = make_rows()
    rows[2]["Response"] = "  "
    rows[7]["Complex_CoT"] = "on and on " * 60
    data = write_rows(out.parent / "rows.jsonl", rows)
    facts, output = run_job(
        recipe_file, out, f"data={data}", "data.accept=no_answer",  # one of eighteen is more than a twentieth
        "evaluate.source=builtin:clinic:20", "evaluate.max_new_tokens=8", "evaluate.reuse=false",
        "ask.questions=['Why <b>so</b>?']", "save.merged=true", "train.save_steps=2",
    )  # fmt: skip
    return facts, out, output


def test_run_json_has_every_promised_key(finished):
    facts = read_facts(finished[1])
    for key, kind in RUN_JSON.items():
        assert type(facts[key]) is kind, key
    assert facts["status"] == "complete" and facts["error"] is None
    assert finished[0] == {**facts, "folder": str(finished[1])}


def test_run_json_tells_of_model_and_data(finished, model_folder):
    facts = read_facts(finished[1])
    assert facts["model"]["source"] == str(model_folder) and facts["model"]["precision"] == "fp32"
    assert facts["model"]["params"] == sum(w.numel() for w in load_file(model_folder / "model.safetensors").values())
    train = facts["data"]["train"]
    assert (train["rows"], train["quarantined"], len(train["sha256"])) == (NUM_ROWS - 2, 2, 64)
    assert 0 < train["trained_tokens"] < train["tokens"] and train["source"].endswith("rows.jsonl")
    assert facts["data"]["eval"] == {"source": "builtin:clinic:20", "rows": 20}


def test_run_json_tells_of_training(finished):
    train = read_facts(finished[1])["train"]
    assert train["steps"] == 4 and train["path"] == "engine"
    for key in (
        "loss_first", "loss_last", "seconds", "tokens_per_s", "trained_tokens_per_s", "peak_memory_gb",
        "predicted_memory_gb",
    ):  # fmt: skip
        assert isinstance(train[key], float) and train[key] > 0, key
    losses = read_losses(finished[1])
    assert (train["loss_first"], train["loss_last"]) == (losses[0], losses[-1])


def test_run_json_tells_of_the_evaluation(finished):
    evaluation = read_facts(finished[1])["eval"]
    assert evaluation["source"] == "builtin:clinic:20" and evaluation["n"] == 20
    for when in ("before", "after"):
        part = evaluation[when]
        assert part["n"] == 20 and part["correct"] == 20 * part["accuracy"]
        assert len(part["ci95"]) == 2 and part["ci95"][0] <= part["accuracy"] <= part["ci95"][1]
        assert all(type(part[key]) is int for key in ("unparsed", "unfinished"))
        assert all(type(part[key]) is float for key in ("mean_think_tokens", "mean_answer_tokens"))
        assert len(part["topics"]) == 20 and "repeated_4gram_share" in part["style"]
    assert isinstance(evaluation["delta"], float) and 0 <= evaluation["p_value"] <= 1


def test_run_json_tells_of_artifacts_machine_and_time(finished):
    facts = read_facts(finished[1])
    assert facts["artifacts"] == {"adapter": "adapter", "merged": "merged", "report": "report.html"}
    stages = ["import libraries", "read data", "check data", "load model", "make tokens", "ask before"]
    stages += ["attach adapter", "train"]
    assert list(facts["timing"]) == [*stages, "save adapter", "ask after", "save merged", "report"]
    assert all(seconds >= 0 for seconds in facts["timing"].values())
    assert facts["versions"]["torch"] == torch.__version__ and "cores" in facts["machine"]


def test_the_folder_holds_what_a_run_promises(finished):
    out = finished[1]
    run = Run(out)
    for path in (run.recipe, run.metrics, run.report, run.card, run.adapter / "adapter_model.safetensors"):
        assert path.stat().st_size > 0, path
    assert (run.adapter / "tokenizer.json").exists() and (run.merged / "model.safetensors").exists()
    assert len(folder.read_lines(run.samples / "before.jsonl")) == len(folder.read_lines(run.samples / "after.jsonl"))
    page = run.report.read_text()
    assert "<b>so</b>" not in page and "&lt;b&gt;so&lt;/b&gt;" in page
    assert "http" not in "".join(part.split('"')[0] for part in page.split('src="')[1:]), "the report must open offline"


def test_rows_set_aside_are_listed_with_their_number_in_the_file(finished):
    listed = folder.read_lines(finished[1] / "data" / "quarantine.jsonl")
    assert [item["row_number"] for item in listed] == [3, 8]
    assert "Response" in listed[0]["reason"] and "limit 512" in listed[1]["reason"]
    assert listed[0]["row"]["Response"] == "  "
    assert "2 rows set aside" in finished[2] and "row 3" in finished[2]


def test_the_adapter_is_proved_off_before_and_on_after(finished):
    proof = read_facts(finished[1])["proof"]
    assert (proof["adapter_before"], proof["adapter_after"]) == ("absent", "on")
    assert proof["logits_changed_by"] > 1e-3 > proof["base_moved_by"]


def test_the_saved_recipe_repeats_the_run(finished, tmp_path):
    run_job(finished[1] / "recipe.yaml", tmp_path / "again", "evaluate.source=null", "save.merged=false")
    first, again = (
        load_file(out / "adapter" / "adapter_model.safetensors") for out in (finished[1], tmp_path / "again")
    )
    assert all(torch.allclose(again[name], first[name], atol=1e-6) for name in first)


def test_a_complete_run_can_be_resumed_and_stays_what_it_was(finished):
    out = finished[1]
    before, adapter = read_facts(out), (out / "adapter" / "adapter_model.safetensors").read_bytes()
    _, output = run_job("default", out, resume=True)  # the saved recipe is used
    after = read_facts(out)
    assert "training was complete" in output and after["status"] == "complete"
    assert (out / "adapter" / "adapter_model.safetensors").read_bytes() == adapter
    assert after["eval"] == before["eval"] and after["train"] == before["train"]


# Interrupted between and within stages --------------------------------------------------------------------------------


def _stop(*arguments: Any, **options: Any) -> None:
    raise KeyboardInterrupt


def test_stopped_between_stages_keeps_the_answers(recipe_file, tmp_path, monkeypatch):
    out = tmp_path / "run"
    monkeypatch.setattr(pipeline, "_attach", _stop)
    with pytest.raises(KeyboardInterrupt):
        run_job(recipe_file, out)
    assert read_facts(out)["status"] == "stopped"
    monkeypatch.undo()
    marked = [{**line, "text": "kept\u2028as it was"} for line in folder.read_lines(out / "samples" / "before.jsonl")]
    folder.write_lines(out / "samples" / "before.jsonl", marked)
    facts, output = run_job("default", out, resume=True)
    assert facts["status"] == "complete" and facts["error"] is None and "already answered" in output
    assert folder.read_lines(out / "samples" / "before.jsonl") == marked


def test_stopped_after_the_last_step_has_finite_facts(recipe_file, tmp_path, monkeypatch):
    out = tmp_path / "run"
    monkeypatch.setattr(adapter, "save_adapter", _stop)
    with pytest.raises(KeyboardInterrupt):
        run_job(recipe_file, out, "train.save_steps=3")
    monkeypatch.undo()
    facts, output = run_job("default", out, resume=True)  # no step is left to do
    assert "going on from checkpoint-4" in output
    losses = read_losses(out)
    assert len(losses) == 4 and (facts["train"]["loss_first"], facts["train"]["loss_last"]) == (losses[0], losses[-1])
    assert "NaN" not in (out / "run.json").read_text()


def test_killed_before_the_first_fact_can_be_resumed(recipe_file, tmp_path, monkeypatch):
    out = tmp_path / "run"
    monkeypatch.setattr(pipeline, "_do", _stop)
    with pytest.raises(KeyboardInterrupt):
        run_job(recipe_file, out)
    monkeypatch.undo()
    (out / "run.json").unlink()
    assert run_job("default", out, resume=True)[0]["status"] == "complete"


def test_a_resumed_run_refuses_other_data_and_other_settings(recipe_file, tmp_path, monkeypatch):
    out, data = tmp_path / "run", write_rows(tmp_path / "rows.jsonl", make_rows())
    monkeypatch.setattr(pipeline, "_attach", _stop)
    with pytest.raises(KeyboardInterrupt):
        run_job(recipe_file, out, f"data={data}")
    with pytest.raises(RecipeError, match=r"--resume was given with tutorial-8b"):
        run_job("tutorial-8b", out, resume=True)
    with pytest.raises(RecipeError, match=r"--resume was given with train\.seed=1, lora"):
        run_job("default", out, "train.seed=1", resume=True, lora={"r": 2})
    write_rows(data, make_rows(5))
    with pytest.raises(DataError, match="has changed since the run was started"):
        run_job("default", out, resume=True)


def test_a_tracker_that_cannot_start_is_a_failed_run(recipe_file, tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "is_installed", lambda library: False)
    with pytest.raises(MissingExtraError):
        run_job(recipe_file, tmp_path / "run", "tracking=tensorboard")
    assert read_facts(tmp_path / "run")["status"] == "failed"


# Training that goes wrong ---------------------------------------------------------------------------------------------


def test_a_diverged_run_is_recorded_as_failed(recipe_file, tmp_path):
    with pytest.raises(sft.DivergedError, match="finite"):
        run_job(recipe_file, tmp_path / "run", "train.learning_rate=1e30", "train.warmup=0")
    facts = read_facts(tmp_path / "run")
    assert facts["status"] == "failed" and facts["error"].startswith("DivergedError: the loss is")
    assert not (tmp_path / "run" / "adapter").exists()


def test_an_adapter_that_is_not_finite_does_not_pass_the_proof(recipe_file, tmp_path):
    with pytest.raises(ModelError, match="not finite"):
        run_job(recipe_file, tmp_path / "run", "train.learning_rate=1e30", "train.warmup=0", "train.max_steps=1")
    assert read_facts(tmp_path / "run")["status"] == "failed"


def test_an_adapter_that_changes_nothing_does_not_pass_the_proof(recipe_file, tmp_path):
    with pytest.raises(ModelError, match="changes no logit"):
        run_job(recipe_file, tmp_path / "run", "train.max_steps=1", "train.learning_rate=1e-30")


# From Python ----------------------------------------------------------------------------------------------------------


def test_the_python_call_returns_the_facts_and_the_folder(model_folder, rows_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    facts = medcot.run(
        "tutorial-8b",
        model={"source": str(model_folder), "precision": "fp32", "max_seq_length": 1024 // 2},
        data=rows_file,
        prompt="short",
        train={"max_steps": 2, "warmup": 0, "accelerate": False},
        ask={"max_new_tokens": 2},
        evaluate={"source": None},
        tracking="none",
        console=Console(file=io.StringIO()),
    )
    assert facts["status"] == "complete" and facts["train"]["steps"] == 2 and facts["train"]["path"] == "plain"
    assert facts["recipe"]["train"]["train_on_prompt"] is True and facts["eval"] == {"source": None}
    assert facts["data"]["train"]["trained_tokens"] == facts["data"]["train"]["tokens"] - NUM_ROWS
    assert Path(facts["folder"]).name.startswith("tutorial-8b-")
    assert Path("runs/latest").resolve() == Path(facts["folder"]).resolve()
    with pytest.raises(DataError, match="does not exist"):
        medcot.run("tutorial-8b", data="no-such-file.jsonl", tracking="none", console=Console(file=io.StringIO()))
    assert Path("runs/latest").resolve() == Path(facts["folder"]).resolve(), "what never began is not the latest run"
