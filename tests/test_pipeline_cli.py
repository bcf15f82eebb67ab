"""The whole job through the command line: killed and resumed, its losses against a stored list, and how mistakes end.

``tests/golden/tiny_sft.json`` holds the losses of twenty steps. After a change that is meant to move them, write it
anew with

    MEDCOT_REGENERATE_GOLDEN=1 pytest tests/test_pipeline_cli.py -k golden

and say in the commit why they moved.
"""

from __future__ import annotations

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

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file
from typer.testing import CliRunner

from medcot import cli, folder, generate, pipeline, prompt
from medcot.errors import MedcotError, OutputError
from medcot.train import sft
from tiny_runs import read_facts, read_losses

GOLDEN = Path(__file__).parent / "golden" / "tiny_sft.json"
# Other processors and releases of torch add in another order; twenty steps at this rate carry 1e-7 to about 1e-5.
GOLDEN_TOLERANCE = 1e-3
PATIENCE_S = 120  # how long a child may take before the test gives up; it needs about ten seconds


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """Each command turns logging down for its process; other tests share this one."""
    root, own = logging.getLogger(), logging.getLogger("medcot")
    before = root.level, own.level, own.propagate, list(own.handlers)
    yield
    root.setLevel(before[0])
    own.setLevel(before[1])
    own.propagate, own.handlers = before[2], before[3]


# The real command line ------------------------------------------------------------------------------------------------

LONG_RUN = ("train.max_steps=20", "train.save_steps=2", "train.micro_batch_size=2")  # five steps an epoch
KILL_AFTER = "checkpoint-6"  # in the second epoch


def _start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "medcot", "run", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "300"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8"
    )


def _kill_after(child: subprocess.Popen[str], checkpoint: Path) -> None:
    """Wait for a checkpoint to appear, and kill the child as the kernel would."""
    deadline = time.monotonic() + PATIENCE_S
    try:
        while not checkpoint.exists():
            assert child.poll() is None and time.monotonic() < deadline, child.communicate()[0]
            time.sleep(0.002)
        child.send_signal(signal.SIGKILL)
    finally:
        child.kill()
        child.communicate()


def _finish(child: subprocess.Popen[str]) -> str:
    try:
        output, _ = child.communicate(timeout=PATIENCE_S)
    finally:
        child.kill()
    assert child.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def whole(recipe_file, tmp_path_factory) -> tuple[Path, str]:
    """The run left alone, on one thread as in the children: its folder and what it printed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        result = CliRunner(env={"COLUMNS": "300"}).invoke(
            cli.app, ["run", str(recipe_file), "--out", str(out), *LONG_RUN]
        )
    finally:
        torch.set_num_threads(threads)
    assert result.exit_code == 0, result.output
    return out, result.output


@pytest.fixture(scope="module")
def killed(recipe_file, tmp_path_factory) -> dict[str, Any]:
    """The same run killed after a checkpoint and resumed, each in a process of its own."""
    out = tmp_path_factory.mktemp("killed") / "run"
    _kill_after(_start(str(recipe_file), "--out", str(out), *LONG_RUN), out / "checkpoints" / KILL_AFTER)
    left = {
        "adapter": (out / "adapter").exists(),
        "status": read_facts(out)["status"],
        "before": (out / "samples" / "before.jsonl").stat().st_mtime_ns,
        "steps": [line["step"] for line in folder.read_lines(out / "metrics.jsonl")],
    }
    half_written = out / "checkpoints" / sft.STAGING / "checkpoint-19"
    half_written.mkdir(parents=True, exist_ok=True)
    (half_written / "trainer_state.json").write_text('{"global_step": 19')
    return {"out": out, "left": left, "output": _finish(_start("--resume", "--out", str(out)))}


def test_a_kill_leaves_a_run_that_can_be_seen_to_be_unfinished(killed):
    left = killed["left"]
    assert (left["adapter"], left["status"]) == (False, "running")
    assert 6 <= left["steps"][-1] < 20


def test_resumed_after_a_kill_is_the_uninterrupted_run_bit_for_bit(whole, killed):
    files = [(out / "adapter" / "adapter_model.safetensors").read_bytes() for out in (whole[0], killed["out"])]
    assert files[0] == files[1]


def test_a_resumed_run_logs_each_step_once_with_the_same_numbers(whole, killed):
    wanted, got = (folder.read_lines(out / "metrics.jsonl") for out in (whole[0], killed["out"]))
    assert [line["step"] for line in got] == list(range(1, 21))
    for key in ("step", "loss", "learning_rate", "grad_norm", "epoch"):
        assert [line[key] for line in got] == [line[key] for line in wanted], key


def test_a_resumed_run_goes_on_from_the_last_whole_checkpoint_and_asks_nothing_twice(whole, killed):
    output, samples = killed["output"], killed["out"] / "samples"
    assert "already answered" in output and "going on from checkpoint-" in output
    assert "going on from checkpoint-19" not in output, "half a checkpoint was taken for a whole one"
    assert (samples / "before.jsonl").stat().st_mtime_ns == killed["left"]["before"]
    for name in ("before.jsonl", "after.jsonl"):
        assert (samples / name).read_text() == (whole[0] / "samples" / name).read_text()


def test_a_resumed_run_ends_like_any_other(whole, killed):
    wanted, got = read_facts(whole[0]), read_facts(killed["out"])
    assert got["status"] == "complete" and got.keys() == wanted.keys()
    for key in ("steps", "loss_first", "loss_last"):
        assert got["train"][key] == wanted["train"][key], key
    assert got["data"] == wanted["data"] and got["artifacts"] == wanted["artifacts"]


def test_the_command_line_shows_every_step_on_a_line_of_its_own(killed):
    steps = [line.split()[1] for line in killed["output"].splitlines() if line.startswith("step ")]
    first = 20 - len(steps) + 1
    assert steps == [f"{number}/20" for number in range(first, 21)]
    assert any(line.startswith("loss ") for line in killed["output"].splitlines())
    assert "arning" not in killed["output"] and "it/s" not in killed["output"], "a library's chatter came through"


def test_golden_losses_of_twenty_steps(killed):
    losses = read_losses(killed["out"])
    if os.environ.get("MEDCOT_REGENERATE_GOLDEN"):
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(json.dumps({"losses": [round(loss, 6) for loss in losses]}, indent=1) + "\n")
    stored = json.loads(GOLDEN.read_text())["losses"]
    assert losses == pytest.approx(stored, rel=GOLDEN_TOLERANCE)
    assert stored[0] - stored[-1] > 1, "a list that hardly moves would hardly notice a change"


# Asking afterwards ----------------------------------------------------------------------------------------------------


def _ask_streaming(out: Path, **options: Any) -> tuple[str, list[tuple[str, bool]]]:
    pieces: list[tuple[str, bool]] = []
    text = pipeline.ask(
        "How many cups?", out, max_new_tokens=40, on_text=lambda piece, in_think: pieces.append((piece, in_think)),
        **options,
    )  # fmt: skip
    return text, pieces


def test_asking_streams_what_it_returns(whole):
    text, pieces = _ask_streaming(whole[0])
    assert text and "".join(piece for piece, _ in pieces) == text
    assert _ask_streaming(whole[0])[0] == text, "the same seed gives the same answer"
    assert _ask_streaming(whole[0], seed=1)[0] != text


def test_what_is_streamed_is_what_split_completion_gives(whole, model_folder, monkeypatch):
    seen: list[Any] = []
    original = generate.generate

    def recorded(model: Any, tokenizer: Any, prompts: Any, **options: Any) -> Any:
        found = original(model, tokenizer, prompts, **options)
        [(tokens, finish)] = found
        seen.append(prompt.split_completion(tokens, tokenizer, num_prompt_tokens=len(prompts[0]), finish=finish))
        return found

    monkeypatch.setattr(generate, "generate", recorded)
    _, pieces = _ask_streaming(whole[0])
    [completion] = seen
    assert completion.num_prompt_tokens > 0
    assert "".join(piece for piece, in_think in pieces if in_think) == completion.think
    assert "".join(piece for piece, in_think in pieces if not in_think) == completion.answer


def test_base_asks_the_model_without_its_adapter(whole, tmp_path):
    tuned, base = _ask_streaming(whole[0])[0], _ask_streaming(whole[0], base=True)[0]
    assert base != tuned
    bare = tmp_path / "bare"
    shutil.copytree(whole[0], bare, ignore=shutil.ignore_patterns("adapter", "checkpoints"))
    assert _ask_streaming(bare, base=True)[0] == base
    with pytest.raises(MedcotError):
        _ask_streaming(bare)


# Bad input through the command line -----------------------------------------------------------------------------------


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


TOO_LONG = json.dumps({"Question": "why " * 400, "Complex_CoT": "as " * 400, "Response": "so"})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", ("empty",)),
        ("not json\n", ("rows.jsonl",)),
        ('{"Question": "a", "Cmplex_CoT": "b", "Response": "c"}\n', ("Cmplex_CoT", "Complex_CoT")),
        ('{"Question": "", "Complex_CoT": "b", "Response": "c"}\n', ("1",)),
        (
            json.dumps({"Question": "why " * 400, "Complex_CoT": "as " * 400, "Response": "so"}),
            ("No row is left of 1",),
        ),
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
    facts = read_facts(tmp_path / "out")
    assert facts["status"] == "failed" and facts["error"].startswith("DataError: ")


def test_over_length_error_policy_stops_the_run(recipe_file, tmp_path):
    arguments = ("data.over_length=error", "model.max_seq_length=130", "--out", str(tmp_path / "out"))
    _assert_one_message(_invoke(str(recipe_file), *arguments), "are over 130 tokens", "truncate_think")


def test_a_model_folder_that_is_not_there(recipe_file, tmp_path):
    missing = str(tmp_path / "no-model")
    _assert_one_message(_invoke(str(recipe_file), f"model={missing}", "--out", str(tmp_path / "out")), missing)
    assert read_facts(tmp_path / "out")["error"].startswith("ModelError: ")


def test_pickled_weights_alone_are_refused(recipe_file, model_folder, tmp_path):
    pickled = tmp_path / "pickled"
    shutil.copytree(model_folder, pickled)
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    result = _invoke(str(recipe_file), f"model={pickled}", "--out", str(tmp_path / "out"))
    _assert_one_message(result, "pytorch_model.bin", "allow_pickle")
    assert read_facts(tmp_path / "out")["error"].startswith("UnsafeWeightsError: ")


def test_a_micro_batch_that_does_not_divide_the_batch(recipe_file, tmp_path):
    result = _invoke(str(recipe_file), "train.micro_batch_size=3", "--out", str(tmp_path / "out"))
    _assert_one_message(result, "train.micro_batch_size=3 does not divide train.batch_size=4", "[1, 2, 4]")


def test_a_folder_that_is_not_empty(recipe_file, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    _assert_one_message(_invoke(str(recipe_file), "--out", str(tmp_path)), "already holds files", "--resume")
    assert os.listdir(tmp_path) == ["notes.txt"]


def test_a_folder_in_use(recipe_file, tmp_path):
    shutil.copy(recipe_file, tmp_path / "recipe.yaml")
    (tmp_path / "run.json").write_text("{}")
    with FileLock(tmp_path / folder.LOCK):
        _assert_one_message(_invoke("--resume", "--out", str(tmp_path)), "in use by another job")
    assert (tmp_path / "run.json").read_text() == "{}"


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
    assert "loss  " in result.stdout and read_facts(tmp_path / "out")["train"]["steps"] == 3
    assert math.isfinite(read_facts(tmp_path / "out")["train"]["loss_last"])
