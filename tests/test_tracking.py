"""Trackers write what they are given, into the run folder, and cannot hurt a run."""

from __future__ import annotations

import glob
import json
import os
import signal
import sqlite3
import time
from pathlib import Path

import pytest

from medcot import tracking
from medcot.errors import MedcotError, MissingExtraError, RecipeError
from medcot.secrets import Secret, SecretName
from medcot.tracking import NoTracker, open_tracker

TUTORIAL_PROJECT = "Fine-tune-DeepSeek-R1-Distill-Llama-8B on Medical COT Dataset"
CONFIG = {"name": "tiny", "train": {"learning_rate": 2e-4, "epochs": None}, "lora": {"targets": ["q_proj", "v_proj"]}}
KEY = "0123456789abcdef" * 2 + "01234567"


@pytest.fixture(autouse=True)
def no_secrets(monkeypatch: pytest.MonkeyPatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT", "TRACKIO_DIR", "TRACKIO_SPACE_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


@pytest.fixture
def said() -> list[str]:
    return []


def _log_a_run(tracker, folder: Path) -> None:
    report = folder / "report.html"
    report.write_text("<p>the report</p>")
    with tracker:
        tracker.log({"loss": 2.5, "learning_rate": 2e-4, "memory_gb": None}, step=1)
        tracker.log({"loss": 1.25, "learning_rate": 1e-4}, step=2)
        tracker.log_table("before and after", ["question", "after"], [["What | is\nthis?", "renal"], ["other", 3]])
        tracker.log_file(report)


def test_none(tmp_path):
    tracker = open_tracker("none", project="p", folder=tmp_path)
    _log_a_run(tracker, tmp_path)
    assert isinstance(tracker, NoTracker) and os.listdir(tmp_path) == ["report.html"]


def _trackio_database(folder: Path) -> sqlite3.Connection:
    return sqlite3.connect(glob.glob(str(folder / "trackio" / "*.db"))[0])


def test_auto_without_a_key_is_trackio_in_the_run_folder(tmp_path, said, capfd):
    environment = dict(os.environ)
    tracker = open_tracker("auto", project=TUTORIAL_PROJECT, folder=tmp_path, config=CONFIG, announce=said.append)
    _log_a_run(tracker, tmp_path)
    database = _trackio_database(tmp_path)
    rows = [(step, json.loads(metrics)) for step, metrics in database.execute("select step, metrics from metrics")]
    assert rows[0] == (1, {"loss": 2.5, "learning_rate": 2e-4})
    assert rows[1] == (2, {"loss": 1.25, "learning_rate": 1e-4})
    assert rows[2][1]["before and after"]["_value"][1] == {"question": "other", "after": 3}
    (config,) = database.execute("select config from configs").fetchone()
    assert json.loads(config)["train"]["learning_rate"] == 2e-4
    assert database.execute("select name from artifacts").fetchall() == [("report",)]
    assert str(tmp_path / "trackio") in tracker.where
    assert said == [] and dict(os.environ) == environment
    assert capfd.readouterr() == ("", "")  # no chatter


def test_trackio_goes_on_when_resumed(tmp_path):
    for step in (1, 2):
        with open_tracker("trackio", project="p", folder=tmp_path) as tracker:
            tracker.log({"loss": float(step)}, step=step)
    runs = _trackio_database(tmp_path).execute("select distinct run_id from metrics").fetchall()
    assert len(runs) == 1


def test_tensorboard(tmp_path, capfd):
    pytest.importorskip("tensorboard", reason="the tensorboard extra is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = open_tracker("tensorboard", project=TUTORIAL_PROJECT, folder=tmp_path, config=CONFIG)
    _log_a_run(tracker, tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 2.5), (2, 1.25)]
    texts = {tag.removesuffix("/text_summary"): events.Tensors(tag)[0] for tag in events.Tags()["tensors"]}
    text = {tag: tensor.tensor_proto.string_val[0].decode() for tag, tensor in texts.items() if "hparams" not in tag}
    assert '"learning_rate": 0.0002' in text["config"] and TUTORIAL_PROJECT in text["config"]
    assert "| What \\| is<br>this? | renal |" in text["before and after"]
    assert "report.html" in text["report"]
    assert capfd.readouterr() == ("", "")


def test_wandb_without_a_key_records_offline(tmp_path, said, capfd):
    pytest.importorskip("wandb", reason="the wandb extra is not installed")
    tracker = open_tracker("wandb", project=TUTORIAL_PROJECT, folder=tmp_path, config=CONFIG, announce=said.append)
    _log_a_run(tracker, tmp_path)
    (record,) = glob.glob(str(tmp_path / "wandb" / "offline-run-*" / "run-*.wandb"))
    written = Path(record).read_bytes()
    for expected in (TUTORIAL_PROJECT, "learning_rate", "loss", "2.5", "1.25", "q_proj", tmp_path.name):
        assert expected.encode() in written, expected
    (table,) = glob.glob(str(tmp_path / "wandb" / "offline-run-*" / "files" / "media" / "table" / "*" / "*.json")) or (
        glob.glob(str(tmp_path / "wandb" / "offline-run-*" / "files" / "media" / "table" / "*.json"))
    )
    assert json.loads(Path(table).read_text())["data"][0] == ["What | is\nthis?", "renal"]
    (page,) = glob.glob(str(tmp_path / "wandb" / "offline-run-*" / "files" / "media" / "html" / "*.html"))
    assert Path(page).read_text() == "<p>the report</p>"
    assert len(said) == 1 and "offline" in said[0] and "wandb sync" in tracker.where
    assert capfd.readouterr() == ("", "")


def test_wandb_key_is_written_nowhere_and_no_network_means_offline(tmp_path, said, monkeypatch):
    pytest.importorskip("wandb", reason="the wandb extra is not installed")
    monkeypatch.setattr(tracking, "find_secret", lambda name: Secret(KEY, "Kaggle secret wandb"))
    monkeypatch.setattr("medcot.secrets._found", {KEY})
    config = {"leak": f"token {KEY}"}
    tracker = open_tracker("auto", project="p", folder=tmp_path, config=config, mode="offline", announce=said.append)
    tracker.log_table("t", ["text"], [[f"a header with {KEY}"]])
    tracker.finish()
    assert "wandb, offline" in tracker.where and said == []
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert KEY.encode() not in path.read_bytes(), path


@pytest.mark.slow  # wandb retries for 20 s before it gives up
def test_wandb_falls_back_to_offline_when_the_server_does_not_answer(tmp_path, said, monkeypatch):
    pytest.importorskip("wandb", reason="the wandb extra is not installed")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    with open_tracker("wandb", project="p", folder=tmp_path, announce=said.append) as tracker:
        tracker.log({"loss": 1.0}, step=1)
    assert len(said) == 1 and "recording offline" in said[0] and "offline" in tracker.where


def test_anonymous_must_never_uses_the_key(tmp_path, said, monkeypatch):
    pytest.importorskip("wandb", reason="the wandb extra is not installed")
    monkeypatch.setattr(tracking, "find_secret", lambda name: pytest.fail("the key was looked up"))
    with open_tracker("wandb", project="p", folder=tmp_path, anonymous="must", announce=said.append) as tracker:
        tracker.log({"loss": 1.0}, step=1)
    assert "retired" in said[0] and "offline" in tracker.where


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_a_refused_project_name_is_one_clear_error(tmp_path, tracker):
    if tracker == "wandb":
        pytest.importorskip("wandb", reason="the wandb extra is not installed")
    project = {"wandb": "50% of #1", "trackio": "registry-mine"}[tracker]
    with pytest.raises(RecipeError) as caught:
        open_tracker(tracker, project=project, folder=tmp_path)
    assert project in caught.value.value and "tracking.project" in caught.value.remedy


@pytest.mark.parametrize("tracker", ["wandb", "tensorboard"])
def test_missing_library_names_the_extra(tmp_path, monkeypatch, tracker):
    monkeypatch.setattr(tracking, "is_installed", lambda name: False)
    with pytest.raises(MissingExtraError) as caught:
        open_tracker(tracker, project="p", folder=tmp_path)
    assert f'pip install "medcot[{tracker}]"' in caught.value.remedy and isinstance(caught.value, MedcotError)


def test_a_folder_called_wandb_is_not_the_library(tmp_path, monkeypatch):
    (tmp_path / "not_a_library").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not tracking.is_installed("not_a_library")
    assert tracking.is_installed("json")


def test_auto_with_a_key_but_without_wandb_says_so(tmp_path, said, monkeypatch):
    monkeypatch.setattr(tracking, "is_installed", lambda name: name != "wandb")
    key = Secret(KEY, "environment variable WANDB_API_KEY")
    assert tracking._choose("auto", key, said.append) == "trackio"
    assert "medcot[wandb]" in said[0] and KEY not in said[0]


def test_auto_respects_wandb_switched_off(monkeypatch, said):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert tracking._choose("auto", Secret(KEY, "somewhere"), said.append) == "trackio"


def test_a_tracker_that_dies_is_announced_once_and_the_run_goes_on(tmp_path, said):
    tracker = open_tracker("trackio", project="p", folder=tmp_path, announce=said.append)
    os.kill(tracker._process.pid, signal.SIGKILL)
    tracker._process.wait()
    for step in range(3):
        tracker.log({"loss": 1.0}, step=step)
    tracker.finish()
    assert len(said) == 1 and "the run goes on" in said[0]


def test_a_tracker_that_fails_gives_its_reason(tmp_path, said):
    tracker = open_tracker("trackio", project="p", folder=tmp_path, announce=said.append)
    tracker.log_file(tmp_path / "there is no such file")
    tracker.finish()
    assert len(said) == 1 and "there is no such file" in said[0] and "the run goes on" in said[0]


def test_a_tracker_that_hangs_neither_blocks_nor_survives(tmp_path, said, monkeypatch):
    monkeypatch.setattr(tracking, "FINISH_S", 0.5)
    tracker = open_tracker("trackio", project="p", folder=tmp_path, announce=said.append)
    os.kill(tracker._process.pid, signal.SIGSTOP)
    start = time.monotonic()
    for _ in range(100):
        tracker.log_table("t", ["text"], [["x" * 10_000]])  # far more than a pipe holds
    assert time.monotonic() - start < 5
    tracker.finish()
    assert tracker._process.poll() is not None
    assert len(said) == 1 and "did not finish" in said[0]


def test_the_key_is_only_looked_up_where_wandb_is_meant(tmp_path, monkeypatch):
    asked: list[SecretName] = []
    monkeypatch.setattr(tracking, "find_secret", asked.append)
    open_tracker("none", project="p", folder=tmp_path)
    assert asked == []
