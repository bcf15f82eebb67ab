"""The whole job on a tiny model: what a run leaves behind, how it goes on after a kill, and how mistakes end.

``tests/golden/tiny_sft.json`` holds the losses of twenty steps through the real command line. After a change that is
meant to move them, write it anew with

    MEDCOT_REGENERATE_GOLDEN=1 pytest tests/test_pipeline.py -k golden

and say in the commit why they moved.
"""

from __future__ import annotations

import io
import json
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import medcot
from medcot import asking, cli, folder, generate, pipeline, prompt, tracking
from medcot.errors import DataError, MissingExtraError, MedcotError, ModelError, OutputError, RecipeError
from medcot.records import Run
from medcot.train import sft

GOLDEN = Path(__file__).parent / "golden" / "tiny_sft.json"
# Other processors and releases of torch add in another order; twenty steps at this rate carry 1e-7 to about 1e-5.
GOLDEN_TOLERANCE = 1e-3
TWO_DAYS_S = 120  # how long a child may take before the test gives up; it needs about ten seconds

NUM_ROWS = 18  # steps of 4: the last of an epoch has two rows
RUN_JSON = {
    "recipe": dict, "status": str, "model": dict, "data": dict, "train": dict, "eval": dict, "artifacts": dict,
    "timing": dict, "versions": dict, "machine": str,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """Each command turns logging down for its process; other tests share this one."""
    root, own = logging.getLogger(), logging.getLogger("medcot")
    before = root.level, own.level, own.propagate, list(own.handlers)
    yield
    root.setLevel(before[0])
    own.setLevel(before[1])
    own.propagate, own.handlers = before[2], before[3]


@pytest.fixture(scope="module")
def model_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with weights that depend on nothing but NumPy's generator, so that losses can be stored."""
    copied = tmp_path_factory.mktemp("golden") / "model"
    shutil.copytree(tiny_folder, copied)
    weights = load_file(copied / "model.safetensors")
    draws = np.random.default_rng(3407)
    for name in sorted(weights):
        if not name.endswith("norm.weight"):
            weights[name] = torch.from_numpy(draws.normal(0, 0.08, tuple(weights[name].shape)).astype("float32"))
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    return copied


def _make_rows(count: int = NUM_ROWS) -> list[dict[str, Any]]:
    return [
        {
            "Question": f"A patient drinks {i} cups and then {i % 5} more.{' Please add.' * (i % 4)} How many?",
            "Complex_CoT": f"I add {i} and {i % 5}. " * (1 + i % 3) + f"That is {i + i % 5}.",
            "Response": f"Final answer: {i + i % 5} cups",
        }
        for i in range(count)
    ]


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", _make_rows())


@pytest.fixture(scope="module")
def recipe_file(model_folder: Path, rows_file: Path) -> Path:
    """A recipe that is done in a second or two: no graded problems, one short question."""
    values = {
        "model": {"source": str(model_folder), "precision": "fp32", "max_seq_length": 512},
        "prompt": "short",
        "data": str(rows_file),
        "lora": {"r": 8, "alpha": 16},
        "train": {"batch_size": 4, "max_steps": 4, "warmup": 2, "learning_rate": 0.01, "logging_steps": 1},
        "ask": {"max_new_tokens": 4},
        "evaluate": {"source": None},
        "tracking": "none",
    }
    path = rows_file.with_name("tiny.yaml")
    path.write_text(yaml.safe_dump(values))
    return path


def _run(recipe: Path, out: Path | None, *overrides: str, **more: Any) -> tuple[dict[str, Any], str]:
    stream = io.StringIO()
    console = Console(file=stream, width=300)
    try:
        return pipeline.run(recipe, overrides=overrides, out=out, console=console, **more), stream.getvalue()
    finally:
        print(stream.getvalue())


def _facts(out: Path) -> dict[str, Any]:
    return json.loads((out / "run.json").read_text())


def _losses(out: Path) -> list[float]:
    return [line["loss"] for line in folder.read_lines(out / "metrics.jsonl")]


# The real command line -------------------------------------------------------------------------------------------------

LONG_RUN = ("train.max_steps=20", "train.save_steps=2", "train.micro_batch_size=2")  # five steps an epoch
KILL_AFTER = "checkpoint-6"  # in the second epoch


def _start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "medcot", "run", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "300"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8"
    )


def _finish(child: subprocess.Popen[str]) -> str:
    try:
        output, _ = child.communicate(timeout=TWO_DAYS_S)
    finally:
        child.kill()
    assert child.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def killed(recipe_file, tmp_path_factory) -> dict[str, Any]:
    """One run left alone, and one killed after a checkpoint and resumed, in three processes of the command line."""
    base = tmp_path_factory.mktemp("killed")
    whole, cut = base / "whole", base / "cut"
    child = _start(str(recipe_file), "--out", str(cut), *LONG_RUN)
    beside = _start(str(recipe_file), "--out", str(whole), *LONG_RUN)
    try:
        deadline = time.monotonic() + TWO_DAYS_S
        while not (cut / "checkpoints" / KILL_AFTER).exists():
            assert child.poll() is None and time.monotonic() < deadline, child.communicate()[0]
            time.sleep(0.002)
        child.send_signal(signal.SIGKILL)
        child.communicate()
    finally:
        child.kill()
        whole_output = _finish(beside)
    left = {
        "adapter": (cut / "adapter").exists(),
        "lock": (cut / folder.LOCK).exists(),
        "status": _facts(cut)["status"],
        "before": (cut / "samples" / "before.jsonl").stat().st_mtime_ns,
        "steps": [line["step"] for line in folder.read_lines(cut / "metrics.jsonl")],
    }
    half_written = cut / "checkpoints" / sft.STAGING / "checkpoint-19"
    half_written.mkdir(parents=True, exist_ok=True)
    (half_written / "trainer_state.json").write_text('{"global_step": 19')
    resumed_output = _finish(_start("--resume", "--out", str(cut)))
    return {"whole": whole, "cut": cut, "left": left, "whole_output": whole_output, "resumed_output": resumed_output}


def test_a_kill_leaves_a_run_that_can_be_seen_to_be_unfinished(killed):
    left = killed["left"]
    assert (left["adapter"], left["lock"], left["status"]) == (False, True, "running")
    assert 6 <= left["steps"][-1] < 20


def test_resumed_after_a_kill_is_the_uninterrupted_run_bit_for_bit(killed):
    files = [(killed[name] / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert files[0] == files[1]


def test_a_resumed_run_logs_each_step_once_with_the_same_numbers(killed):
    whole, cut = (folder.read_lines(killed[name] / "metrics.jsonl") for name in ("whole", "cut"))
    assert [line["step"] for line in cut] == list(range(1, 21))
    for key in ("step", "loss", "learning_rate", "grad_norm", "epoch"):
        assert [line[key] for line in cut] == [line[key] for line in whole], key


def test_a_resumed_run_goes_on_from_the_last_whole_checkpoint_and_asks_nothing_twice(killed):
    output, cut = killed["resumed_output"], killed["cut"]
    assert "already answered" in output and "going on from checkpoint-" in output
    assert "going on from checkpoint-19" not in output, "half a checkpoint was taken for a whole one"
    assert (cut / "samples" / "before.jsonl").stat().st_mtime_ns == killed["left"]["before"]
    assert (cut / "samples" / "before.jsonl").read_text() == (killed["whole"] / "samples" / "before.jsonl").read_text()
    assert (cut / "samples" / "after.jsonl").read_text() == (killed["whole"] / "samples" / "after.jsonl").read_text()


def test_a_resumed_run_ends_like_any_other(killed):
    whole, cut = _facts(killed["whole"]), _facts(killed["cut"])
    assert cut["status"] == "complete" and cut.keys() == whole.keys()
    for key in ("steps", "loss_first", "loss_last"):
        assert cut["train"][key] == whole["train"][key], key
    assert cut["data"] == whole["data"] and cut["artifacts"] == whole["artifacts"]
    assert not (killed["cut"] / folder.LOCK).exists()


def test_the_command_line_shows_every_step_on_a_line_of_its_own(killed):
    lines = killed["whole_output"].splitlines()
    assert sum(line.startswith("step ") for line in lines) == 20
    assert any(line.startswith("loss ") for line in lines)
    assert "Warning" not in killed["whole_output"] and "it/s" not in killed["whole_output"]


def test_golden_losses_of_twenty_steps(killed):
    losses = _losses(killed["whole"])
    if os.environ.get("MEDCOT_REGENERATE_GOLDEN"):
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(json.dumps({"losses": [round(loss, 6) for loss in losses]}, indent=1) + "\n")
    stored = json.loads(GOLDEN.read_text())["losses"]
    assert losses == pytest.approx(stored, rel=GOLDEN_TOLERANCE)
    assert stored[0] - stored[-1] > 1, "a list that hardly moves would hardly notice a change"


# What a run leaves behind -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(recipe_file, rows_file, tmp_path_factory) -> tuple[dict[str, Any], Path, str]:
    """A run with graded problems, merged weights, and rows that are set aside."""
    out = tmp_path_factory.mktemp("finished") / "run"
    rows = _make_rows()
    rows[2]["Response"] = "  "
    rows[7]["Complex_CoT"] = "on and on " * 60
    data = _write_rows(out.parent / "rows.jsonl", rows)
    facts, output = _run(
        recipe_file, out, f"data={data}", "evaluate.source=builtin:clinic[:20]", "evaluate.max_new_tokens=8",
        "ask.questions=['Why <b>so</b>?']", "save.merged=true", "train.save_steps=2",
    )  # fmt: skip
    return facts, out, output


def test_run_json_has_every_promised_key(finished):
    facts = _facts(finished[1])
    for key, kind in RUN_JSON.items():
        assert type(facts[key]) is kind, key
    assert facts["status"] == "complete" and facts["error"] is None
    assert finished[0] == {**facts, "folder": str(finished[1])}


def test_run_json_tells_of_model_and_data(finished, model_folder):
    facts = _facts(finished[1])
    assert facts["model"]["source"] == str(model_folder) and facts["model"]["precision"] == "fp32"
    assert facts["model"]["params"] == sum(w.numel() for w in load_file(model_folder / "model.safetensors").values())
    train = facts["data"]["train"]
    assert (train["rows"], train["quarantined"], len(train["sha256"])) == (NUM_ROWS - 2, 2, 64)
    assert 0 < train["trained_tokens"] < train["tokens"] and train["source"].endswith("rows.jsonl")
    assert facts["data"]["eval"] == {"source": "builtin:clinic[:20]", "rows": 20}


def test_run_json_tells_of_training(finished):
    train = _facts(finished[1])["train"]
    assert train["steps"] == 4 and train["path"] == "engine"
    for key in (
        "loss_first", "loss_last", "seconds", "tokens_per_s", "trained_tokens_per_s", "peak_memory_gb",
        "predicted_memory_gb",
    ):  # fmt: skip
        assert isinstance(train[key], float) and train[key] > 0, key
    losses = _losses(finished[1])
    assert (train["loss_first"], train["loss_last"]) == (losses[0], losses[-1])


def test_run_json_tells_of_the_evaluation(finished):
    evaluation = _facts(finished[1])["eval"]
    assert evaluation["source"] == "builtin:clinic[:20]" and evaluation["n"] == 20
    for when in ("before", "after"):
        part = evaluation[when]
        assert part["n"] == 20 and part["correct"] == 20 * part["accuracy"]
        assert len(part["ci95"]) == 2 and part["ci95"][0] <= part["accuracy"] <= part["ci95"][1]
        assert all(type(part[key]) is int for key in ("unparsed", "unfinished"))
        assert all(type(part[key]) is float for key in ("mean_think_tokens", "mean_answer_tokens"))
        assert len(part["topics"]) == 20 and "repeated_4gram_share" in part["style"]
    assert isinstance(evaluation["delta"], float) and 0 <= evaluation["p_value"] <= 1


def test_run_json_tells_of_artifacts_machine_and_time(finished):
    facts = _facts(finished[1])
    assert facts["artifacts"] == {"adapter": "adapter", "merged": "merged", "report": "report.html"}
    assert {"read data", "load model", "ask before", "train", "ask after", "report"} <= facts["timing"].keys()
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
    proof = _facts(finished[1])["proof"]
    assert (proof["adapter_before"], proof["adapter_after"]) == ("absent", "on")
    assert proof["logits_changed_by"] > 1e-3 > proof["base_moved_by"]


def test_the_saved_recipe_repeats_the_run(finished, tmp_path):
    _run(finished[1] / "recipe.yaml", tmp_path / "again", "evaluate.source=null", "save.merged=false")
    first, again = (load_file(out / "adapter" / "adapter_model.safetensors") for out in (finished[1], tmp_path / "again"))
    assert all(torch.allclose(again[name], first[name], atol=1e-6) for name in first)


def test_a_complete_run_can_be_resumed_and_stays_what_it_was(finished):
    out = finished[1]
    before, adapter = _facts(out), (out / "adapter" / "adapter_model.safetensors").read_bytes()
    _, output = _run("ignored", out, resume=True)  # the saved recipe is used
    after = _facts(out)
    assert "training was complete" in output and after["status"] == "complete"
    assert (out / "adapter" / "adapter_model.safetensors").read_bytes() == adapter
    assert after["eval"] == before["eval"] and after["train"] == before["train"]


# Interrupted between and within stages -----------------------------------------------------------------------------------


def _stop(*arguments: Any, **options: Any) -> None:
    raise KeyboardInterrupt


def test_stopped_between_stages_keeps_the_answers(recipe_file, tmp_path, monkeypatch):
    out = tmp_path / "run"
    monkeypatch.setattr(pipeline, "_attach", _stop)
    with pytest.raises(KeyboardInterrupt):
        _run(recipe_file, out)
    assert _facts(out)["status"] == "stopped" and not (out / folder.LOCK).exists()
    monkeypatch.undo()
    marked = [{**line, "text": "kept\u2028as it was"} for line in folder.read_lines(out / "samples" / "before.jsonl")]
    folder.write_lines(out / "samples" / "before.jsonl", marked)
    facts, output = _run(recipe_file, out, resume=True)
    assert facts["status"] == "complete" and facts["error"] is None and "already answered" in output
    assert folder.read_lines(out / "samples" / "before.jsonl") == marked


def test_stopped_after_the_last_step_has_finite_facts(recipe_file, tmp_path, monkeypatch):
    out = tmp_path / "run"
    monkeypatch.setattr(pipeline, "_save_adapter", _stop)
    with pytest.raises(KeyboardInterrupt):
        _run(recipe_file, out, "train.save_steps=3")
    monkeypatch.undo()
    facts, output = _run(recipe_file, out, resume=True)  # no step is left to do
    assert "going on from checkpoint-4" in output
    losses = _losses(out)
    assert len(losses) == 4 and (facts["train"]["loss_first"], facts["train"]["loss_last"]) == (losses[0], losses[-1])
    assert "NaN" not in (out / "run.json").read_text()


def test_killed_before_the_first_fact_can_be_resumed(recipe_file, tmp_path, monkeypatch):
    out = tmp_path / "run"
    monkeypatch.setattr(pipeline, "_do", _stop)
    with pytest.raises(KeyboardInterrupt):
        _run(recipe_file, out)
    monkeypatch.undo()
    (out / "run.json").unlink()
    assert _run(recipe_file, out, resume=True)[0]["status"] == "complete"


def test_a_resumed_run_refuses_other_data_and_other_settings(recipe_file, tmp_path, monkeypatch):
    out, data = tmp_path / "run", _write_rows(tmp_path / "rows.jsonl", _make_rows())
    monkeypatch.setattr(pipeline, "_attach", _stop)
    with pytest.raises(KeyboardInterrupt):
        _run(recipe_file, out, f"data={data}")
    with pytest.raises(RecipeError, match=r"--resume was given with train\.seed=1, lora"):
        _run(recipe_file, out, "train.seed=1", resume=True, lora={"r": 2})
    _write_rows(data, _make_rows(5))
    with pytest.raises(DataError, match="has changed since the run was started"):
        _run(recipe_file, out, resume=True)


def test_a_tracker_that_cannot_start_is_a_failed_run(recipe_file, tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "is_installed", lambda library: False)
    with pytest.raises(MissingExtraError):
        _run(recipe_file, tmp_path / "run", "tracking=tensorboard")
    assert _facts(tmp_path / "run")["status"] == "failed"


# Training that goes wrong -------------------------------------------------------------------------------------------------


def test_a_diverged_run_is_recorded_as_failed(recipe_file, tmp_path):
    with pytest.raises(sft.DivergedError, match="finite"):
        _run(recipe_file, tmp_path / "run", "train.learning_rate=1e30", "train.warmup=0")
    facts = _facts(tmp_path / "run")
    assert facts["status"] == "failed" and facts["error"].startswith("DivergedError: the loss is")
    assert not (tmp_path / "run" / "adapter").exists()


def test_an_adapter_that_is_not_finite_does_not_pass_the_proof(recipe_file, tmp_path):
    with pytest.raises(ModelError, match="not finite"):
        _run(recipe_file, tmp_path / "run", "train.learning_rate=1e30", "train.warmup=0", "train.max_steps=1")
    assert _facts(tmp_path / "run")["status"] == "failed"


def test_an_adapter_that_changes_nothing_does_not_pass_the_proof(recipe_file, tmp_path):
    # The first step of a warm-up has a learning rate of zero.
    with pytest.raises(ModelError, match="changes no logit"):
        _run(recipe_file, tmp_path / "run", "train.max_steps=1", "train.warmup=1")


# Python, and asking afterwards -------------------------------------------------------------------------------------------


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


def _ask_streaming(out: Path, **options: Any) -> tuple[str, list[tuple[str, bool]]]:
    pieces: list[tuple[str, bool]] = []
    text = pipeline.ask(
        "How many cups?", out, max_new_tokens=40, on_text=lambda piece, in_think: pieces.append((piece, in_think)),
        **options,
    )  # fmt: skip
    return text, pieces


def test_asking_streams_what_it_returns(killed):
    text, pieces = _ask_streaming(killed["whole"])
    assert text and "".join(piece for piece, _ in pieces) == text
    assert _ask_streaming(killed["whole"])[0] == text, "the same seed gives the same answer"
    assert _ask_streaming(killed["whole"], seed=1)[0] != text


def test_what_is_streamed_is_what_split_completion_gives(killed, monkeypatch):
    tokens: list[int] = []

    def recorded(model, tokenizer, prompts, **options):
        results = generate.generate(model, tokenizer, prompts, **options)
        completion = prompt.split_completion(
            results[0][0], tokenizer, num_prompt_tokens=len(prompts[0]), finish=results[0][1]
        )
        tokens.extend(results[0][0])
        recorded.completion = completion
        return results

    original = generate.generate
    monkeypatch.setattr(generate, "generate", recorded)
    recorded.__globals__["generate"] = type("Module", (), {"generate": staticmethod(original)})
    try:
        text, pieces = _ask_streaming(killed["whole"])
    finally:
        recorded.__globals__["generate"] = sys.modules["medcot.generate"]
    assert tokens and "".join(p for p, in_think in pieces if in_think) == recorded.completion.think
    assert text


def test_base_asks_the_model_without_its_adapter(killed, model_folder, monkeypatch):
    tuned, base = _ask_streaming(killed["whole"])[0], _ask_streaming(killed["whole"], base=True)[0]
    assert base != tuned
    shutil.copytree(killed["whole"], killed["whole"].parent / "bare")
    shutil.rmtree(killed["whole"].parent / "bare" / "adapter")
    assert _ask_streaming(killed["whole"].parent / "bare", base=True)[0] == base
    with pytest.raises(MedcotError):
        _ask_streaming(killed["whole"].parent / "bare")


# Bad input through the command line ----------------------------------------------------------------------------------------


def _invoke(*arguments: str):
    return CliRunner().invoke(cli.app, ["run", *arguments])


def _assert_one_message(result: Any, *said: str) -> None:
    assert result.exit_code == 2, (result.output, result.exception)
    assert "Traceback" not in result.output and isinstance(result.exception, SystemExit)
    for words in said:
        assert words in result.stderr, result.stderr
    assert result.stderr.count("✗") == 1 and "→" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["tutorial-8"], ("no recipe is named 'tutorial-8'", "tutorial-8b")),
        (["no/such.yaml"], ("cannot be read",)),
        (["train.learning_rte=1"], ("'train.learning_rte'", "Did you mean 'learning_rate'?")),
        (["train.batch_size=-1"], ("'train.batch_size'",)),
        (["--resume", "--out", "nowhere"], ("holds no recipe.yaml",)),
    ],
)
def test_a_mistake_in_the_call_makes_no_folder(tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    _assert_one_message(_invoke(*arguments), *said)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", ("empty",)),
        ("not json\n", ("rows.jsonl",)),
        ('{"Question": "a", "Cmplex_CoT": "b", "Response": "c"}\n', ("Cmplex_CoT", "Complex_CoT")),
        ('{"Question": "", "Complex_CoT": "b", "Response": "c"}\n', ("1",)),
        (json.dumps({k: "word " * 400 for k in ("Question", "Complex_CoT", "Response")}), ("No row is left of 1",)),
        (None, ("rows.jsonl",)),
    ],
    ids=["empty", "not JSON", "missing column", "no usable row", "all too long", "no file"],
)
def test_bad_data_ends_with_one_message_and_a_failed_run(recipe_file, tmp_path, content, said):
    data = tmp_path / "rows.jsonl"
    if content is not None:
        data.write_text(content)
    result = _invoke(str(recipe_file), f"data={data}", "--out", str(tmp_path / "out"))
    _assert_one_message(result, *said)
    facts = _facts(tmp_path / "out")
    assert facts["status"] == "failed" and facts["error"].startswith("DataError: ")


def test_over_length_error_policy_stops_the_run(recipe_file, tmp_path):
    arguments = ("data.over_length=error", "model.max_seq_length=130", "--out", str(tmp_path / "out"))
    _assert_one_message(_invoke(str(recipe_file), *arguments), "are over 130 tokens", "truncate_think")


def test_a_model_folder_that_is_not_there(recipe_file, tmp_path):
    missing = str(tmp_path / "no-model")
    _assert_one_message(_invoke(str(recipe_file), f"model={missing}", "--out", str(tmp_path / "out")), missing)
    assert _facts(tmp_path / "out")["error"].startswith("ModelError: ")


def test_pickled_weights_alone_are_refused(recipe_file, model_folder, tmp_path):
    pickled = tmp_path / "pickled"
    shutil.copytree(model_folder, pickled)
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    result = _invoke(str(recipe_file), f"model={pickled}", "--out", str(tmp_path / "out"))
    _assert_one_message(result, "pytorch_model.bin", "allow_pickle")
    assert _facts(tmp_path / "out")["error"].startswith("UnsafeWeightsError: ")


def test_a_micro_batch_that_does_not_divide_the_batch(recipe_file, tmp_path):
    result = _invoke(str(recipe_file), "train.micro_batch_size=3", "--out", str(tmp_path / "out"))
    _assert_one_message(result, "train.micro_batch_size=3 does not divide train.batch_size=4", "[1, 2, 4]")


def test_a_folder_that_is_not_empty(recipe_file, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    _assert_one_message(_invoke(str(recipe_file), "--out", str(tmp_path)), "already holds files", "--resume")
    assert os.listdir(tmp_path) == ["notes.txt"]


def test_a_folder_in_use(finished, tmp_path):
    out = tmp_path / "used"
    shutil.copytree(finished[1], out)
    parent = psutil.Process(os.getppid())
    (out / folder.LOCK).write_text(f"{parent.pid} {parent.create_time()}")
    before = (out / "run.json").read_bytes()
    _assert_one_message(_invoke("--resume", "--out", str(out)), f"in use by process {parent.pid}")
    assert (out / "run.json").read_bytes() == before


def test_too_little_disk(recipe_file, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(2**40, 2**40, 2**20)
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda path: usage)
    result = _invoke(str(recipe_file), "--out", str(tmp_path / "out"))
    _assert_one_message(result, "GiB free", "may need", "--out")
    with pytest.raises(OutputError):
        folder.check_disk(tmp_path, 0)


def test_the_command_line_runs_the_whole_job(recipe_file, tmp_path):
    result = _invoke(str(recipe_file), "train.max_steps=3", "--out", str(tmp_path / "out"))
    assert result.exit_code == 0, result.output
    assert "loss  " in result.stdout and _facts(tmp_path / "out")["train"]["steps"] == 3
    assert math.isfinite(_facts(tmp_path / "out")["train"]["loss_last"])
