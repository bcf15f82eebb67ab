"""The command line: what it passes on, what it prints, and how it ends."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from medcot import __version__, cli
from medcot.errors import DataError
from medcot.terminal import open_console

TOKEN = "hf_" + "abcDEF123" * 4

FACTS = {
    "recipe": "default",
    "status": "complete",
    "train": {
        "steps": 200,
        "loss_first": 2.431,
        "loss_last": 0.412,
        "seconds": 300.0,
        "tokens_per_s": 1033.4,
        "trained_tokens_per_s": 612.2,
        "peak_memory_gb": 2.13,
    },
    "eval": {
        "before": {"n": 100, "correct": 0, "accuracy": 0.0, "ci95": [0.0, 0.037]},
        "after": {"n": 100, "correct": 54, "accuracy": 0.54, "ci95": [0.443, 0.634]},
        "delta": 0.54,
        "p_value": 1.1e-16,
    },
    "timing": {"load": 2.0, "train": 300.0},
    "artifacts": {"adapter": "runs/x/adapter", "merged": None, "report": "runs/x/report.html"},
}


class FakePipeline(types.ModuleType):
    """Stands in for medcot.pipeline and remembers how it was called."""

    def __init__(self) -> None:
        super().__init__("medcot.pipeline")
        self.calls: list[tuple] = []
        self.raises: BaseException | None = None

    def run(self, recipe, *, overrides, out, resume, console):
        self.calls.append(("run", recipe, overrides, out, resume))
        if self.raises is not None:
            raise self.raises
        return FACTS

    def plan(self, recipe, overrides, *, console):
        self.calls.append(("plan", recipe, overrides))
        console.print("the plan")

    def ask(self, question, run_dir, *, base, max_new_tokens, seed, on_text):
        self.calls.append(("ask", question, run_dir, base, max_new_tokens, seed))
        for piece, in_think in [("It may ", True), ("be renal.", True), ("\nFinal answer: ", False), ("[3] mL", False)]:
            on_text(piece, in_think)


@pytest.fixture(autouse=True)
def logging_as_before():
    """Each command turns logging down for its process; other tests share this one."""
    root, own = logging.getLogger(), logging.getLogger("medcot")
    before = root.level, own.level, own.propagate, list(own.handlers)
    yield
    root.setLevel(before[0])
    own.setLevel(before[1])
    own.propagate, own.handlers = before[2], before[3]


@pytest.fixture
def pipeline(monkeypatch) -> FakePipeline:
    import medcot

    fake = FakePipeline()
    monkeypatch.setitem(sys.modules, "medcot.pipeline", fake)
    monkeypatch.setattr(medcot, "pipeline", fake, raising=False)
    return fake


def _invoke(*arguments: str):
    return CliRunner().invoke(cli.app, list(arguments))


def _medcot(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "medcot", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "200", **environment}
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ("run", "default", [], None, False)),
        (["tutorial-8b"], ("run", "tutorial-8b", [], None, False)),
        (["train.max_steps=3"], ("run", "default", ["train.max_steps=3"], None, False)),
        (["data=my.jsonl", "mine.yaml", "a.b=c=d"], ("run", "mine.yaml", ["data=my.jsonl", "a.b=c=d"], None, False)),
        (["--out", "here", "--resume"], ("run", "default", [], Path("here"), True)),
        (["--dry-run", "train.epochs=1"], ("plan", "default", ["train.epochs=1"])),
    ],
)
def test_run_passes_on_what_was_typed(pipeline, arguments, expected):
    result = _invoke("run", *arguments)
    assert result.exit_code == 0, result.output
    assert pipeline.calls == [expected]


def test_run_prints_a_summary(pipeline):
    lines = _invoke("run").stdout.splitlines()
    assert "accuracy  0.0 % → 54.0 %  95 % intervals 0.0 to 3.7 and 44.3 to 63.4, p < 0.0001, n = 100" in lines
    assert "loss      2.431 → 0.412 in 200 steps" in lines
    assert "speed     1,033 tok/s (612 trained), peak memory 2.1 GB" in lines
    assert "time      5 min 02 s" in lines
    assert "adapter   runs/x/adapter" in lines and "report    runs/x/report.html" in lines
    assert not any(line.startswith("merged") for line in lines)


@pytest.mark.parametrize("facts", [{}, {"eval": None, "train": {}, "artifacts": {}}, {"eval": {"before": {"n": 1}}}])
def test_summary_leaves_out_what_was_not_done(facts):
    console = Console(file=io.StringIO(), width=80)
    cli.print_summary(facts, console)
    assert console.file.getvalue().strip() == ""


@pytest.mark.parametrize("width", [30, 80, 200])
def test_summary_fits_a_terminal(width):
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    cli.print_summary(FACTS, console)
    assert max(len(line) for line in console.file.getvalue().splitlines()) <= width
    assert "54.0 %" in console.file.getvalue()


def test_two_recipes_are_a_usage_error(pipeline):
    result = _invoke("run", "one", "two")
    assert result.exit_code == 2 and "one, two" in result.output and pipeline.calls == []


def test_a_mistake_is_one_message_and_exit_code_2(pipeline, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    pipeline.raises = DataError(f"'x[:5].json' with {TOKEN} has no rows", "A data set has rows", "Add some")
    result = _invoke("run")
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr == "✗ 'x[:5].json' with ••• has no rows\n  A data set has rows.\n  → Add some.\n"


def test_ctrl_c_says_how_to_go_on(pipeline):
    pipeline.raises = KeyboardInterrupt()
    result = _invoke("run", "--out", "my-run")
    assert result.exit_code == 130
    assert "Stopped. 'medcot run --resume --out my-run' goes on with it." in result.stderr


def test_our_own_defects_keep_their_traceback(pipeline):
    pipeline.raises = ZeroDivisionError("ours")
    result = _invoke("run")
    assert result.exit_code == 1 and isinstance(result.exception, ZeroDivisionError)


def test_traceback_of_a_defect_holds_no_secret(monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    cli._redacted_traceback(RuntimeError, RuntimeError(f"401 for {TOKEN}"), None)
    assert capsys.readouterr().err == "RuntimeError: 401 for •••\n"


def _make_run(folder: Path) -> Path:
    folder.mkdir()
    (folder / "run.json").write_text("{}")
    return folder


def test_ask_streams_and_marks_the_thinking(pipeline, tmp_path):
    folder = _make_run(tmp_path / "run")
    result = _invoke("ask", "Why?", "--run", str(folder), "--base", "--max-new-tokens", "7", "--seed", "1")
    assert pipeline.calls == [("ask", "Why?", folder, True, 7, 1)]
    assert result.stdout == "<think>\nIt may be renal.\n</think>\n\nFinal answer: [3] mL\n"


def test_ask_dims_the_thinking_on_a_terminal():
    console = Console(file=io.StringIO(), force_terminal=True, color_system="standard", no_color=False)
    with cli._streaming(console) as on_text:
        on_text("hm", True)
        on_text("yes", False)
    assert console.file.getvalue() == "\x1b[2mhm\x1b[0m\n\nyes\n"


@pytest.mark.parametrize("command", [("ask", "Why?", "--run"), ("report",)])
def test_a_folder_without_a_run_is_a_mistake(pipeline, tmp_path, command):
    result = _invoke(*command, str(tmp_path))
    assert result.exit_code == 2 and "holds no run.json" in result.stderr and pipeline.calls == []


def test_report_prints_where_it_is(monkeypatch, tmp_path):
    fake = types.ModuleType("medcot.report")
    fake.render_report = lambda run: run.report
    monkeypatch.setitem(sys.modules, "medcot.report", fake)
    folder = _make_run(tmp_path / "run")
    assert _invoke("report", str(folder)).stdout.strip() == str(folder / "report.html")


def test_doctor_shows_every_finding(monkeypatch):
    from medcot import doctor

    findings = [
        doctor.Finding("torch", doctor.Status.PROBLEM, "the GPU [bold] lies idle"),
        doctor.Finding("disk", doctor.Status.OK, "enough"),
    ]
    monkeypatch.setattr(doctor, "examine", lambda: findings)
    text = _invoke("doctor").stdout
    assert "✗ torch the GPU [bold] lies idle" in text and "✓ disk  enough" in text
    assert json.loads(_invoke("doctor", "--json").stdout) == [
        {"area": "torch", "status": "problem", "text": "the GPU [bold] lies idle"},
        {"area": "disk", "status": "ok", "text": "enough"},
    ]


def test_recipes_are_listed():
    assert _invoke("recipes").stdout.startswith("default")


def test_help_and_version_load_nothing_heavy():
    code = (
        "import sys, runpy; sys.argv = ['medcot', {flag!r}]\n"
        "try: runpy.run_module('medcot', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {{'torch', 'transformers', 'pydantic', 'huggingface_hub', 'matplotlib'}} & set(sys.modules)\n"
        "sys.exit(f'loaded: {{heavy}}' if heavy else 0)"
    )
    for flag, expected in (("--help", "Usage"), ("--version", f"medcot {__version__}")):
        done = subprocess.run(
            [sys.executable, "-c", code.format(flag=flag)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout


def test_importing_the_command_line_sets_no_variable():
    code = "import os; before = dict(os.environ); import medcot.cli; assert dict(os.environ) == before"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_main_sets_variables_but_keeps_the_users():
    code = (
        "import os, sys\nfrom medcot import cli\nsys.argv = ['medcot', '--version']\n"
        "try: cli.main()\nexcept SystemExit: pass\n"
        "print(os.environ['TOKENIZERS_PARALLELISM'], os.environ['TRANSFORMERS_VERBOSITY'])"
    )
    environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "info"}
    environment.pop("TOKENIZERS_PARALLELISM", None)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.splitlines()[-1] == "false info"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "--no-such-option"], "No such option"),
        (["rnu"], "No such command"),
        (["report", "no/such/folder"], "holds no run.json"),
        (["ask", "why", "--max-new-tokens", "0"], "max-new-tokens"),
    ],
)
def test_wrong_calls_end_with_2_and_no_traceback(arguments, said):
    done = _medcot(*arguments)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


def test_messages_survive_a_stream_without_unicode():
    done = _medcot("report", "nowhere", PYTHONIOENCODING="ascii")
    assert done.returncode == 2 and done.stderr.startswith("x 'nowhere'")


def test_log_messages_are_shown_as_notes(capsys):
    open_console()
    logging.getLogger("medcot.embedded").info("fetching %s", "once")
    logging.getLogger("medcot.embedded").warning("damaged")
    assert capsys.readouterr().out == "  fetching once\n! damaged\n"


def test_what_a_model_writes_does_nothing_to_the_terminal():
    console = Console(file=io.StringIO(), force_terminal=True, color_system="standard", width=80)
    with cli._streaming(console) as on_text:
        on_text("\x1b[2J\x1b]0;title\x07 [bold]<b>", True)
        on_text("\x9b31m \u202e </think> [x](y)", False)
    text = console.file.getvalue()
    assert "\x1b[2J" not in text and not set(text) & {"\x07", "\x9b", "\u202e"} and "]0;" in text
    assert "[bold]<b>" in text and "[x](y)" in text


def test_grade_says_which_lines_could_not_be_graded_and_grades_the_others(tmp_path):
    path = tmp_path / "outputs.jsonl"
    path.write_text('{"output": "Final answer: B", "kind": "letter", "gold": "B"}\n{"output": 1}\n', encoding="utf-8")
    done = _invoke("grade", str(path))
    assert done.exit_code == 2
    assert [("outcome" in line) for line in map(json.loads, done.stdout.splitlines())] == [True, False]
    assert "1 of the lines cannot be graded. Line 2" in done.stderr
