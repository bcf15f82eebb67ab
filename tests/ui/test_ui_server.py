"""What stands around the pages: who is let in, which files they reach, and the line before the model; no browser."""

from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from medcot import cli_ui, folder
from medcot.answering import Choice
from medcot.errors import DataError, MedcotError, ModelError, OutputError, RecipeError
from medcot.ui import voice as voices
from medcot.ui.app import Gate, build_app, check_host, is_loopback, listen
from medcot.ui.app import Setting as Pages
from medcot.ui.shelf import Shelf
from medcot.ui.voice import State, Voice, Wish

WISH = Wish("How many cups?", False, 16, 16, 0.0, 1.0, 1)


# The runs -------------------------------------------------------------------------------------------------------------


def _make_run(path: Path) -> Path:
    path.mkdir(parents=True)
    folder.write_json(path / "run.json", {"status": "complete"})
    return path


def test_runs_are_listed_once_the_newest_first(tmp_path):
    import os

    root = tmp_path / "runs"
    for age, name in enumerate(("new", "old")):
        run = _make_run(root / name)
        os.utime(run / "run.json", (1e9 - age, 1e9 - age))
    (root / "no-run").mkdir()
    (root / "latest").symlink_to("new", target_is_directory=True)
    (root / "elsewhere").symlink_to(_make_run(tmp_path / "elsewhere"), target_is_directory=True)
    assert list(Shelf(root).runs()) == ["new", "old"]
    assert list(Shelf(root, root / "latest").runs()) == ["new", "old"]
    assert set(Shelf(root, tmp_path / "elsewhere").runs()) == {"new", "old", "elsewhere"}
    assert Shelf(tmp_path / "none").runs() == {}


@pytest.mark.parametrize("name", ["../elsewhere", "/etc", "new/../../elsewhere", "", "..", "neww"])
def test_nothing_but_a_listed_run_is_found(tmp_path, name):
    _make_run(tmp_path / "runs" / "new")
    _make_run(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="No run is called"):
        Shelf(tmp_path / "runs").find(name)


@pytest.mark.parametrize(
    "file", ["report.html", "run.json", "metrics.jsonl", "samples/after.jsonl", "data/report.json"]
)
def test_a_file_that_is_a_link_out_of_the_run_is_refused(tmp_path, file):
    run = _make_run(tmp_path / "runs" / "new")
    secret = tmp_path / "secret"
    secret.write_text("{}")
    path = run / file
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(secret)
    with pytest.raises(DataError, match="a link to a file outside"):
        Shelf(tmp_path / "runs").find("new")


# The sources ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("named", ["/etc/passwd", "rows.jsonl", "owner/name", "../x"])
def test_files_are_named_on_loopback_only(named):
    from medcot.ui.examining import check_named

    assert check_named(named, "default", on_loopback=True).named == named
    with pytest.raises(DataError, match="from another address"):
        check_named(named, "default", on_loopback=False)
    assert check_named("builtin:clinic[:9]", "default", on_loopback=False).named


def test_a_recipe_is_a_shipped_one():
    from medcot.ui.examining import check_named

    with pytest.raises(DataError, match="No recipe is called"):
        check_named("builtin:clinic", "/tmp/mine.yaml", on_loopback=True)


# The door -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("host", "own"), [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False),
                                           ("192.168.1.2", False), ("box.lan", False)])  # fmt: skip
def test_others_than_this_machine_need_a_password(host, own):
    assert is_loopback(host) is own
    check_host(host, "long and secret")
    if own:
        check_host(host, None)
    else:
        with pytest.raises(RecipeError, match="--password-env"):
            check_host(host, None)


@pytest.fixture(scope="module")
def client(tmp_path_factory) -> Any:
    from fastapi.testclient import TestClient

    root = tmp_path_factory.mktemp("door") / "runs"
    _make_run(root / "one")
    (root / "one" / "report.html").write_text("the report")
    app = build_app(Pages(None, Shelf(root), "one"))
    assert isinstance(app, Gate)
    return TestClient(app, base_url="http://127.0.0.1:7860", raise_server_exceptions=False), root


@pytest.mark.parametrize("path", [
    "/gradio_api/file=/etc/passwd", "/gradio_api/file=REPORT", "/file=/etc/passwd", "/gradio_api/file/etc/passwd",
    "/gradio_api/upload", "/gradio_api/upload_progress?upload_id=x", "/gradio_api/proxy=http://evil.invalid/",
    "/gradio_api/vibe-edit/", "/gradio_api/process_recording", "/gradio_api/component_server", "/monitoring",
    "/gradio_api/info", "/gradio_api/call/on_ask", "/gradio_api/run/predict", "/openapi.json", "/docs",
    "/static/../../../../etc/passwd", "/static/%2e%2e/%2e%2e/%2e%2e/etc/passwd", "/assets/..%2f..%2f..%2fetc/passwd",
])  # fmt: skip
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_no_file_and_no_other_service_is_reached(client, path, method):
    found, root = client
    reply = found.request(method, path.replace("REPORT", str(root / "one" / "report.html")))
    assert reply.status_code in (403, 404, 405)
    assert "root:" not in reply.text and "the report" not in reply.text


def test_every_reply_forbids_to_ask_others(client):
    for path in ("/", "/config", "/theme.css", "/nowhere"):
        policy = client[0].get(path).headers["content-security-policy"]
        assert "default-src 'self'" in policy and "connect-src 'self'" in policy and "http" not in policy


def test_the_page_itself_names_no_other_host_to_load_from(client):
    import re

    page = client[0].get("/").text
    loads = re.findall(r"""(?:<script[^>]*src|<link[^>]*href|@import|url\()=?\s*["']?(https?:[^"')\s>]+)""", page)
    assert [each for each in loads if "127.0.0.1" not in each] == []
    assert client[0].get("/config").json()["analytics_enabled"] is False


def test_another_name_for_this_machine_is_not_answered(client):
    for host in ("evil.invalid", "evil.invalid:7860", "127.0.0.1.evil.invalid", ""):
        assert client[0].get("/", headers={"host": host}).status_code == 421
    for host in ("localhost:1", "127.0.0.1", "[::1]:7860"):
        assert client[0].get("/", headers={"host": host}).status_code == 200


def test_a_body_has_a_bound(client):
    assert client[0].post("/gradio_api/queue/join", content=b"x" * (2 << 20)).status_code == 413

    def pieces() -> Any:
        for _ in range(40):
            yield b"x" * (1 << 16)

    assert client[0].post("/gradio_api/queue/join", content=pieces()).status_code >= 400  # no length was told


def test_a_password_is_asked_for(tmp_path):
    from fastapi.testclient import TestClient

    app = build_app(Pages(None, Shelf(tmp_path), host="0.0.0.0", password="long and secret"))
    found = TestClient(app, base_url="http://box.lan:7860")
    assert found.get("/config").status_code == 401
    assert "components" not in found.get("/").text.split("gradio_config")[-1][:400]
    for user, password in (("medcot", "wrong"), ("admin", "long and secret"), ("", "")):
        assert found.post("/login", data={"username": user, "password": password}).status_code in (400, 422)
    assert found.post("/login", data={"username": "medcot", "password": "long and secret"}).status_code == 200
    assert found.get("/config").status_code == 200


def test_a_port_in_use_is_said():
    with listen("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(OutputError, match="--port"):
            listen("127.0.0.1", taken.getsockname()[1])


# The command ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arguments", "said"), [
    (["--host", "0.0.0.0"], "--password-env"),
    (["--host", "0.0.0.0", "--password-env", "MEDCOT_NO_SUCH_SECRET"], "MEDCOT_NO_SUCH_SECRET"),
    (["--run", "nowhere"], "no trained adapter"),
    (["--run", "x", "--model", "embedded"], "--model"),
    (["--adapter", "x"], "--model"),
    (["--model", "embedded", "--style", "chatt"], "chat"),
])  # fmt: skip
def test_mistakes_are_one_message(arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    app = typer.Typer()
    app.command()(cli_ui.ui)
    result = CliRunner(env={"COLUMNS": "300"}).invoke(app, arguments)
    assert result.exit_code == 2 and said in result.stderr and "Traceback" not in result.output


def test_without_a_run_there_are_pages_all_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli_ui.find_choice(None, None, None, None) is None
    setting = cli_ui.build_setting(None, None, tmp_path / "runs", "127.0.0.1", None)
    assert setting.voice is None and setting.run is None
    build_app(setting)


def test_a_run_brings_its_style_and_its_budget(recipe_file, tmp_path):
    from tiny_runs import run_job

    run_job(recipe_file, tmp_path / "runs" / "one", "ask.max_new_tokens=33", "train.max_steps=1")
    choice = cli_ui.find_choice(tmp_path / "runs" / "one", None, None, None)
    assert choice is not None and choice.style == "short"
    setting = cli_ui.build_setting(choice, tmp_path / "runs" / "one", tmp_path / "none", "127.0.0.1", None)
    assert (setting.budget, setting.run) == (33, "one")


# The line before the model --------------------------------------------------------------------------------------------


class _Slow:
    """A speaker that speaks until it is stopped, or ``ended``."""

    def __init__(self) -> None:
        self.ended = threading.Event()

    def check_room(self, *_: Any) -> None: ...

    def say(self, question: str, limits: Any, *, on_text: Any, stopped: Any, **_: Any) -> Any:
        from medcot.evaluate.speaking import Spoken
        from medcot.records import Completion, Finish

        if question == "broken":
            raise KeyError("a fault of ours")
        while not stopped() and not self.ended.wait(0.01):
            on_text("a", True)
        return Spoken(Completion("a", "a", "", False, Finish.LENGTH, 1, 1, 0), False, stopped(), 1.0)


@pytest.fixture
def line() -> Any:
    voice, speaker = Voice(Choice("embedded")), _Slow()
    voice._speaker = speaker  # type: ignore[assignment]
    yield voice, speaker
    speaker.ended.set()
    voice.close()


def _wait(voice: Voice, answering: Any, *states: State) -> Any:
    deadline = time.monotonic() + 10
    while (look := voice.look(answering)).state not in states:
        assert time.monotonic() < deadline, look
        time.sleep(0.01)
    return look


def test_questions_wait_for_one_another(line):
    voice, speaker = line
    first, second, third = (voice.ask(WISH, owner) for owner in ("a", "b", "c"))
    _wait(voice, first, State.WRITING)
    assert [voice.look(each).ahead for each in (first, second, third)] == [0, 1, 2]
    voice.stop("b")  # while it waits
    voice.stop("a")
    assert _wait(voice, first, State.STOPPED).think
    assert _wait(voice, second, State.STOPPED).spoken is None
    _wait(voice, third, State.WRITING)
    speaker.ended.set()
    assert _wait(voice, third, State.DONE).spoken is not None


def test_an_answer_that_nobody_looks_at_is_stopped(line, monkeypatch):
    voice, _ = line
    monkeypatch.setattr(voices, "PATIENCE_S", 0.2)
    left, next_one = voice.ask(WISH, "gone"), voice.ask(WISH, "here")
    _wait(voice, next_one, State.WRITING)
    assert left.state is State.STOPPED


def test_a_line_has_an_end(line):
    voice, _ = line
    for _ in range(voices.MOST_WAITING):
        voice.ask(WISH, "a")
    with pytest.raises(ModelError, match="waiting"):
        voice.ask(WISH, "b")


def test_a_fault_of_ours_ends_the_answer_and_not_the_line(line, caplog):
    voice, speaker = line
    broken = voice.ask(Wish("broken", False, 1, 1, 0, 1, 1), "a")
    error = _wait(voice, broken, State.FAILED).error
    assert error is not None and "KeyError" not in " ".join(error) and "KeyError" in caplog.text
    speaker.ended.set()
    _wait(voice, voice.ask(WISH, "a"), State.DONE)


def test_a_model_that_cannot_be_loaded_is_told():
    voice = Voice(Choice("/no/such/model"))
    error = _wait(voice, voice.ask(WISH, "a"), State.FAILED).error
    assert error is not None and "/no/such/model" in error[0]
    voice.close()


@pytest.mark.parametrize("values", [(-1, 10, 0.5, 1), (5000, 10, 0.5, 1), (5, 0, 0.5, 1), (5, 9, 3, 1), (5, 9, 1, -2),
                                    (None, 9, 1, 1), (float("nan"), 9, 1, 1)])  # fmt: skip
def test_settings_are_checked_where_they_arrive(values):
    from medcot.ui.asking import read_wish

    with pytest.raises(MedcotError):
        read_wish("How many?", False, values)


def test_a_torn_run_is_shown_as_far_as_it_goes(tmp_path):
    from medcot.ui.watching import build_lines, draw_run

    run = _make_run(tmp_path / "runs" / "torn")
    (run / "run.json").write_text("{")
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 2.0}) + "\nnonsense\n")
    shelf = Shelf(tmp_path / "runs")
    assert build_lines(shelf)[0].status == "not known"
    assert "cannot be read" in draw_run(shelf, "torn")
    shutil.rmtree(run)
    assert "No run is called" in draw_run(shelf, "torn")
