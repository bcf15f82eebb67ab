"""Evaluating: a base beside its adapter, nothing paid for twice, a kill survived, and folders compared."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from made_lines import make_task
from medcot import answering, asking, cli, evaluation
from medcot.answering import Answerer, Choice, choose_run, find_adapter
from medcot.errors import DataError, ModelError, NetworkError, OutputError, RecipeError
from medcot.evaluate import vllm_writer
from medcot.evaluate.backends import Ending, Limits, Request, answer_failed
from medcot.evaluate.results import read_respondents
from medcot.evaluate.servers import build_endpoint
from medcot.evaluation import Settings, compare, evaluate, plan_rounds
from medcot.folder import read_lines
from medcot.prompt import Style
from medcot.records import AnswerKind
from tiny_runs import run_job

SETTINGS = Settings(Limits(8, 8), temperature=0.0, top_p=1.0)
SUITE = "builtin:clinic:6,builtin:general:5"


@pytest.fixture(scope="module")
def run_folder(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("evaluated") / "tuned"
    run_job(recipe_file, out, "evaluate=builtin:clinic:6", "evaluate.max_new_tokens=8", "evaluate.reuse=false")
    return out


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(asking, "default_cache_dir", lambda: tmp_path / "cache")
    return tmp_path / "cache"


def look(suite: str, who: Any, settings: Settings, out: Path, **more: Any) -> tuple[dict[str, Any], str]:
    stream = io.StringIO()
    facts = evaluate(suite, who, settings, out=out, console=Console(file=stream, width=100), **more)
    return facts, stream.getvalue()


def test_a_model_is_asked_beside_its_plain_base(run_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    facts, output = look(SUITE, choose_run(run_folder), SETTINGS, out)
    assert facts == json.loads((out / "results.json").read_text())
    base, tuned = facts["models"]
    assert (base["adapter"], tuned["name"], len(tuned["adapter_sha256"])) == (None, "tuned", 64)
    assert facts["status"] == "complete" and base["num_asked"] == tuned["num_asked"] == 11
    for name in (base["name"], "tuned"):
        assert {task: found["n"] for task, found in facts["scores"][name].items()} == {
            "builtin:clinic": 6,
            "builtin:general": 5,
        }
    assert facts["comparisons"][0]["pooled"]["n"] == 11
    assert len(read_lines(out / "items" / "tuned" / "builtin-clinic.jsonl")) == 6
    assert (out / "report.html").stat().st_size > 5_000 and list((out / "lm-eval").rglob("results_*.json"))
    assert "assumed to flip" in output.partition("tuned")[0], "what can be detected is said before anything is asked"


def test_the_same_evaluation_asks_nothing_from_any_folder(run_folder: Path, tmp_path: Path) -> None:
    first, _ = look(SUITE, choose_run(run_folder), SETTINGS, tmp_path / "one")
    again, _ = look(SUITE, choose_run(run_folder), SETTINGS, tmp_path / "two")
    assert [model["num_asked"] for model in again["models"]] == [0, 0] and again["scores"] == first["scores"]
    longer, _ = look(SUITE.replace("6", "9"), choose_run(run_folder), SETTINGS, tmp_path / "one")
    assert [model["num_asked"] for model in longer["models"]] == [3, 3], "only what was not asked before"
    fresh, _ = look(SUITE, choose_run(run_folder), SETTINGS, tmp_path / "three", keep_answers=False)
    assert fresh["models"][0]["num_asked"] == 11 and fresh["scores"] == first["scores"]


def test_a_run_finds_what_an_evaluation_asked_its_base(run_folder: Path, recipe_file: Path, tmp_path: Path) -> None:
    settings = Settings(Limits(6, 2), temperature=0.0, top_p=1.0, seeds=(3407,))
    look("builtin:clinic:6", replace(choose_run(run_folder), adapter=None), settings, tmp_path / "out")
    (store,) = (tmp_path / "cache" / "answers").glob("*.jsonl")
    before = store.read_text()
    run_job(recipe_file, tmp_path / "run", "evaluate=builtin:clinic:6", "evaluate.max_new_tokens=8")
    assert store.read_text() == before and len(list(store.parent.glob("*.jsonl"))) == 2


class Dying:
    """A back end that dies after some answers; ``limit`` of ``None`` lets it live."""

    def __init__(self, limit: int | None) -> None:
        self.limit, self.asked = limit, 0

    def prompt_of(self, request: Request) -> str:
        return request.question

    def answer(self, requests: Any, on_answer: Any) -> None:
        for request in requests:
            if self.asked == self.limit:
                raise KeyboardInterrupt
            self.asked += 1
            failed = answer_failed(request, "")
            on_answer(replace(failed, error=None, finish="eos", closed=True, answer="Final answer: 1 mL"))


def test_a_killed_evaluation_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backends = [Dying(4), Dying(None)]

    def open_answerers(*_: Any) -> Iterator[Answerer]:
        yield Answerer("model", {"backend": "made"}, backends[0], "model", None)

    monkeypatch.setattr(evaluation, "open_answerers", open_answerers)
    with pytest.raises(KeyboardInterrupt):
        look("builtin:clinic:9", Choice("x"), SETTINGS, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "results.json").read_text())["status"] == "stopped"
    del backends[0]
    facts, _ = look("builtin:clinic:9", Choice("x"), SETTINGS, tmp_path / "out")
    assert backends[0].asked == 5 and facts["scores"]["model"]["builtin:clinic"]["n"] == 9


def test_an_evaluation_in_which_every_answer_failed_is_no_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(Dying):
        def answer(self, requests: Any, on_answer: Any) -> None:
            for request in requests:
                on_answer(answer_failed(request, "503, out of order"))

    answerer = Answerer("model", {"backend": "made"}, Failing(None), "model", None)
    monkeypatch.setattr(evaluation, "open_answerers", lambda *_: iter([answerer]))
    with pytest.raises(NetworkError, match=r"'model' gave none of 9 answers.*503, out of order.*asks again"):
        look("builtin:clinic:9", Choice("x"), SETTINGS, tmp_path / "out")
    assert (tmp_path / "out" / "report.html").is_file()
    mended = replace(answerer, backend=Dying(None))
    monkeypatch.setattr(evaluation, "open_answerers", lambda *_: iter([mended]))
    assert look("builtin:clinic:9", Choice("x"), SETTINGS, tmp_path / "out")[0]["models"][0]["num_asked"] == 9


def test_rounds_are_the_task_its_controls_and_budgets_from_the_largest() -> None:
    task = make_task(num_items=80)
    settings = Settings(Limits(900, 64), controls=evaluation.CONTROLS, budgets=(128, 512), seeds=(1, 2))
    rounds = plan_rounds(task, settings)
    assert [one.task.control for one in rounds] == [
        None, "rotate-1", "blank", "no-thinking", "budget-512", "budget-128",
    ]  # fmt: skip
    assert [one.num_requests for one in rounds] == [160, 50, 50, 50, 160, 160]
    assert rounds[4].limits == Limits(512, 64, Ending.FORCED) and settings.longest.think_tokens == 900
    sums = make_task(num_items=5, kind=AnswerKind.NUMBER)
    likeliest = replace(settings, limits=Limits(9, 9, Ending.LIKELIHOOD))
    found = plan_rounds(sums, likeliest)
    assert found[0].limits.ending is Ending.FORCED, "numbers have no choices to compare"
    assert "forced" in found[0].notes[0]
    empty = [one for one in found if not one.task.items]
    assert [one.task.control for one in empty] == ["rotate", "blank"], "and no options to turn round"
    assert all("No" in one.notes[0] for one in empty)


def test_controls_and_budgets_of_a_real_model_are_in_the_results(run_folder: Path, tmp_path: Path) -> None:
    settings = replace(SETTINGS, controls=("no-thinking",), budgets=(4, 8), control_items=3)
    who = replace(choose_run(run_folder), adapter=None)
    facts, _ = look("builtin:general:5", who, settings, tmp_path / "out")
    (name,) = facts["scores"]
    assert facts["controls"][name]["builtin:general"]["no-thinking"]["n"] == 3
    curve = facts["budgets"][name]["builtin:general"]
    assert [point["think_tokens"] for point in curve["points"]] == [4, 8] and curve["recommended"] in (4, 8)


def test_folders_of_runs_and_evaluations_are_compared(run_folder: Path, tmp_path: Path) -> None:
    settings = Settings(Limits(6, 2), temperature=0.0, top_p=1.0, seeds=(3407,))
    look("builtin:clinic:6", choose_run(run_folder), settings, tmp_path / "eval")
    stream = io.StringIO()
    results = compare([run_folder, tmp_path / "eval"], out=tmp_path / "both", console=Console(file=stream))
    assert len(results["models"]) == 2, "the same answers to the same questions are shown once"
    assert (tmp_path / "both" / "report.html").is_file() and len(read_respondents(run_folder)) == 2
    with pytest.raises(DataError, match=r"neither results\.json nor run\.json"):
        compare([tmp_path])


def test_two_runs_are_each_compared_with_their_base_and_with_each_other(
    run_folder: Path, recipe_file: Path, tmp_path: Path
) -> None:
    graded = ("evaluate=builtin:clinic:6", "evaluate.max_new_tokens=8", "evaluate.reuse=false")
    run_job(recipe_file, tmp_path / "other", *graded, "train.max_steps=2")
    found = compare([run_folder, tmp_path / "other"], console=Console(file=io.StringIO()))
    base = found["models"][0]["name"]
    pairs = [(it["before"], it["after"]) for it in found["comparisons"]]
    assert pairs == [(base, "tuned"), (base, "other"), ("tuned", "other")] and found["notes"] == []


def test_what_was_asked_otherwise_is_said(run_folder: Path, tmp_path: Path) -> None:
    who = choose_run(run_folder)
    for tokens, name in ((8, "short"), (12, "long")):
        look("builtin:clinic:6", who, replace(SETTINGS, limits=Limits(tokens, 8)), tmp_path / name)
    found = compare([tmp_path / "short", tmp_path / "long"], out=tmp_path / "both", console=Console(file=io.StringIO()))
    assert any("tokens 16 against 20" in note for note in found["notes"])
    with pytest.raises(OutputError, match="something else than a comparison"):
        compare([tmp_path / "short", tmp_path / "long"], out=tmp_path / "short", console=Console(file=io.StringIO()))
    with pytest.raises(DataError, match="none of its own"):
        compare([tmp_path / "both", tmp_path / "short"], console=Console(file=io.StringIO()))


def test_an_adapter_that_changes_nothing_is_still_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def open_answerers(*_: Any) -> Iterator[Answerer]:
        yield Answerer("base", {"source": "m"}, Dying(None), "m", None)
        yield Answerer("tuned", {"source": "m", "adapter_sha256": "a"}, Dying(None), "m", "a", "base")

    monkeypatch.setattr(evaluation, "open_answerers", open_answerers)
    facts, output = look("builtin:general:60", Choice("x", adapter="y"), SETTINGS, tmp_path / "out")
    (change,) = facts["comparisons"]
    assert change["tasks"][0]["verdict"] == "no detectable change" and facts["status"] == "complete"
    assert "no detectable change" in output.lower() and (tmp_path / "out" / "report.html").is_file()
    assert len(compare([tmp_path / "out"], console=Console(file=io.StringIO()))["models"]) == 2


def test_what_a_server_cannot_be_asked_is_said_before_anything_is_paid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Server(Dying):
        def prompt_of(self, request: Request) -> str:
            if request.limits.ending is not Ending.WRITTEN:
                raise ModelError("a server", "cannot be asked", "Leave it out")
            return super().prompt_of(request)

    server = Server(None)
    monkeypatch.setattr(evaluation, "open_answerers", lambda *_: iter([Answerer("s", {}, server, "s", None)]))
    with pytest.raises(ModelError):
        look("builtin:clinic:3", Choice("x"), replace(SETTINGS, budgets=(8,)), tmp_path / "out")
    assert server.asked == 0


def test_answers_of_a_server_on_this_machine_are_kept_in_the_folder_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    answerer = Answerer("s", {}, Dying(None), "s", None, keeps=False)
    monkeypatch.setattr(evaluation, "open_answerers", lambda *_: iter([answerer]))
    _, output = look("builtin:clinic:3", Choice("x"), SETTINGS, tmp_path / "out")
    assert not cache.exists() and (tmp_path / "out" / "answers.jsonl").is_file() and "goes on with them" in output


def test_a_server_that_is_not_there_is_missed_at_once(tmp_path: Path) -> None:
    with pytest.raises(NetworkError, match="nobody answers"):
        look("builtin:clinic:5", build_endpoint("m", "http://127.0.0.1:9/v1"), SETTINGS, tmp_path / "out")


def test_a_base_and_an_adapter_of_one_name_are_two(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    assert answering._name_both(Choice(str(tmp_path / "adapter"), adapter="x")) == ("adapter", "adapter, tuned")
    assert answering._name_both(Choice("org/m", adapter="x", name="mine")) == ("org/m", "mine")


def test_what_could_not_be_meant_is_refused(run_folder: Path, tmp_path: Path) -> None:
    for wrong in ({"controls": ("turn",)}, {"budgets": (0,)}, {"temperature": 0.0, "seeds": (1, 2)}):
        with pytest.raises(RecipeError):
            Settings(Limits(8, 8), **wrong)
    (tmp_path / "mine.txt").write_text("text")
    with pytest.raises(OutputError, match="something else"):
        look(SUITE, choose_run(run_folder), SETTINGS, tmp_path)
    with pytest.raises(ModelError, match="no trained adapter"):
        choose_run(tmp_path)
    with pytest.raises(ModelError, match="is no adapter"):
        find_adapter(str(tmp_path))


def test_vllm_answers_with_and_without_the_adapter(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    def llm(**settings: Any) -> Any:
        made.append(settings)
        return SimpleNamespace()

    request = SimpleNamespace(LoRARequest=lambda *parts: parts)
    module = SimpleNamespace(__version__="0", LLM=llm, lora=SimpleNamespace(request=request))
    monkeypatch.setattr(vllm_writer, "load_vllm", lambda: module)
    who = replace(choose_run(run_folder), engine=answering.Engine.VLLM)
    with pytest.raises(ModelError, match="fp32"):
        list(answering.open_answerers(who, [], Limits(8, 8)))
    who = replace(who, precision="auto")
    with pytest.raises(ModelError, match="likelihoods"):
        list(answering.open_answerers(who, [], Limits(8, 8, Ending.LIKELIHOOD)))
    base, tuned = answering.open_answerers(who, [], Limits(8, 8))
    assert len(made) == 1 and made[0]["enable_lora"], "one model in memory serves both"
    assert base.adapter_sha256 is None and tuned.adapter_sha256 is not None and base.model == tuned.model
    adapters = [it.backend.writer._adapter for it in (base, tuned)]
    assert adapters == [None, ("adapter", 1, str(run_folder / "adapter"))]


def test_the_command_passes_on_what_it_was_told(monkeypatch: pytest.MonkeyPatch, run_folder: Path) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(evaluation, "evaluate", lambda *words, **more: calls.append((words, more)))
    options = ["--run", str(run_folder), "--style", "chat", "--think-tokens", "64", "--seeds", "2", "--seed", "7"]
    done = CliRunner().invoke(cli.app, ["eval", "quick", *options, "--controls", "all", "--budgets", "256, 512"])
    assert done.exit_code == 0, done.output
    ((suite, who, settings), more) = calls[0]
    assert (suite, who.style, who.name, more["keep_answers"]) == ("quick", Style.CHAT, "tuned", True)
    assert (settings.seeds, settings.budgets, settings.controls) == ((7, 8), (256, 512), evaluation.CONTROLS)
    served = ["--endpoint", "http://127.0.0.1:9/v1", "--model", "o1", "--price", "1.1,4.4", "--concurrency", "3"]
    assert CliRunner().invoke(cli.app, ["eval", "quick", *served]).exit_code == 0
    assert calls[1][0][1].concurrency == 3 and calls[1][0][1].prices["o1"].completion == 4.4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "nobody is named"),
        (["--run", "x", "--model", "y"], "--run together with --model"),
        (["--endpoint", "http://127.0.0.1:9/v1"], "--endpoint without --model"),
        (["--model", "embedded", "--ending", "forcd"], "forced"),
        (["--model", "embedded", "--budgets", "many"], "--budgets holds 'many'"),
        (["--model", "m", "--endpoint", "http://127.0.0.1:9/v1", "--price", "1"], "two numbers"),
        (["--model", "m", "--endpoint", "http://127.0.0.1:9/v1", "--engine", "vllm"], "together with --engine"),
        (["--model", "embedded", "--rpm", "9"], "no --endpoint together with --rpm"),
        (["--model", "embedded", "--budgets", "256.9"], "whole numbers"),
    ],
)
def test_the_command_says_what_is_wrong(options: list[str], words: str) -> None:
    done = CliRunner().invoke(cli.app, ["eval", "quick", *options])
    assert done.exit_code == 2 and words in done.output
