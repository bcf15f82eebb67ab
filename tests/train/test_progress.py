"""The console shows a live bar on a terminal, plain lines elsewhere, and never breaks a run."""

from __future__ import annotations

import io
import re
import subprocess
import sys

import pytest
from rich.console import Console

from medcot.train.progress import Bar, RunConsole, format_clock, format_seconds


def _console(*, terminal: bool, width: int = 100, encoding: str = "utf-8") -> Console:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
    return Console(file=stream, force_terminal=terminal, width=width, color_system=None, legacy_windows=False)


def _text(console: Console) -> str:
    stream = console.file
    stream.seek(0)
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.read())


@pytest.mark.parametrize(
    ("seconds", "said", "clock"),
    [
        (0.44, "0.4 s", "0:00"),
        (59.96, "1 min 00 s", "1:00"),
        (125, "2 min 05 s", "2:05"),
        (3725, "1 h 02 min", "1:02:05"),
    ],
)
def test_durations(seconds, said, clock):
    assert format_seconds(seconds) == said
    assert format_clock(seconds) == clock


@pytest.mark.parametrize("terminal", [True, False])
def test_a_stage_leaves_one_line(terminal):
    console = _console(terminal=terminal)
    with RunConsole(console).stage("loading the model") as stage:
        stage.detail = "134.5 M parameters"
    lines = [line for line in re.split(r"[\r\n]+", _text(console)) if "✓" in line]
    assert len(lines) == 1
    assert re.fullmatch(r"✓ loading the model +0\.\d s  134\.5 M parameters *", lines[0])


def test_a_failed_stage_is_marked_and_the_error_goes_on():
    console = _console(terminal=False)
    with pytest.raises(KeyboardInterrupt), RunConsole(console).stage("training"):
        raise KeyboardInterrupt
    assert _text(console).startswith("✗ training")


def test_plain_training_is_one_line_a_logging_step():
    console = _console(terminal=False, width=40)  # a width that must not wrap a file's lines
    run_console = RunConsole(console)
    with run_console.stage("training"), run_console.training(total_steps=20) as bar:
        for step in range(1, 21):
            bar.update(step)
            if step % 10 == 0:
                bar.update(
                    step,
                    loss=4.0 / step,
                    learning_rate=2e-4,
                    tokens_per_s=1234.5,
                    trained_tokens_per_s=600,
                    memory_gb=3.14,
                )
    lines = _text(console).splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("step 10/20  loss 0.4000  lr 2.00e-04  1,234 tok/s (600 trained)  3.1 GB  0:00<0:00")
    assert lines[1].startswith("step 20/20  loss 0.2000")
    assert lines[2].startswith("✓ training") and lines[2].endswith("loss 0.400 → 0.200")


def test_the_loss_of_held_out_rows_stands_beside_that_of_training():
    console = _console(terminal=False)
    run_console = RunConsole(console)
    with run_console.stage("training"), run_console.training(total_steps=20) as bar:
        bar.validated(0, 5.0)
        bar.update(10, loss=4.0)
        bar.validated(10, 4.5)
        bar.update(20, loss=3.0)
        bar.validated(20, 4.25)
    lines = _text(console).splitlines()
    assert lines[0] == "step  0/20  validation 5.0000"
    assert lines[1].startswith("step 10/20  loss 4.0000  ") and "validation" not in lines[1]
    assert lines[2] == "step 10/20  validation 4.5000"
    assert lines[-1].endswith("loss 4.000 → 3.000, validation 5.000 → 4.250")


def test_a_live_bar_keeps_the_last_validation():
    console = _console(terminal=True)
    run_console = RunConsole(console)
    with run_console.training(total_steps=4) as bar:
        bar.validated(0, 2.5)
        bar.update(2, loss=1.5, learning_rate=1e-4)
        run_console._shown.refresh()
        bar.validated(2, 2.25)
        run_console._shown.refresh()
    text = _text(console)
    assert "loss 1.5000 · validation 2.5000 · lr 1.00e-04" in text
    assert "loss 1.5000 · validation 2.2500 · lr 1.00e-04" in text


def test_live_training_draws_a_bar_and_takes_it_away():
    console = _console(terminal=True)
    run_console = RunConsole(console)
    with run_console.training(total_steps=4) as bar:
        bar.update(2, loss=1.5, learning_rate=1e-4, tokens_per_s=1000, memory_gb=2.0)
        run_console._shown.refresh()
    text = _text(console)
    assert "steps" in text and "2/4" in text and "loss 1.5000 · lr 1.00e-04 · 1,000 tok/s · 2.0 GB" in text
    console.file.seek(0)
    assert "\x1b[2K" in console.file.read()  # the lines are erased at the end: the bar is transient


@pytest.mark.parametrize("width", [10, 20, 44, 100, 300])
def test_a_bar_fits_any_width(width):
    console = _console(terminal=True, width=width)
    bar = Bar("questions", 100)
    bar.parts = ["loss 1.2345", "lr 1.00e-04", "1,234 tok/s (600 trained)", "3.1 GB"]
    bar.advance_to(50)
    console.print(bar)
    assert all(len(line) <= width for line in _text(console).splitlines())


def test_narrow_windows_keep_the_loss():
    console = _console(terminal=True, width=30)
    bar = Bar("steps", 100)
    bar.parts = ["loss 1.2345", "lr 1.00e-04", "1,234 tok/s (600 trained)", "3.1 GB"]
    console.print(bar)
    text = _text(console)
    assert "loss 1.2345 · lr 1.00e-04" in text and "tok/s" not in text


def test_remaining_time_counts_from_where_a_resume_began(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("medcot.train.progress.time.monotonic", lambda: now[0])
    bar = Bar("steps", 100)
    assert bar.remaining_s is None
    now[0] = 2.0
    bar.advance_to(51)  # one step in two seconds, 49 to go
    assert bar.remaining_s == pytest.approx(98.0)


def test_generating_without_a_terminal_says_the_end():
    console = _console(terminal=False)
    with RunConsole(console).generating("questions", 10) as on_progress:
        for done in range(11):
            on_progress(done, 10)
    assert _text(console) == "questions  10/10  0:00<0:00\n"


def test_generating_without_a_terminal_reports_now_and_then(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("medcot.train.progress.time.monotonic", lambda: now[0])
    console = _console(terminal=False)
    with RunConsole(console).generating("questions", 100) as on_progress:
        for done in range(101):
            now[0] = float(done)
            on_progress(done, 100)
    assert len(_text(console).splitlines()) == 4  # at 30, 60, 90 and 100 seconds


def test_a_bar_inside_a_stage_takes_the_spinners_place():
    console = _console(terminal=True)
    run_console = RunConsole(console)
    with run_console.stage("asking"):
        spinner = run_console._shown
        with run_console.generating("questions", 2) as on_progress:
            on_progress(1, 2)
            assert not spinner.is_started and run_console._shown.is_started
        assert spinner.is_started and run_console._shown is spinner
    assert run_console._shown is None


@pytest.mark.parametrize("terminal", [True, False])
def test_markup_in_text_is_not_read(terminal):
    console = _console(terminal=terminal)
    run_console = RunConsole(console)
    run_console.note("data[:500] has [bold]3[/bold] rows")
    run_console.warn("[/] is not closed")
    text = _text(console)
    assert "data[:500] has [bold]3[/bold] rows" in text and "! [/] is not closed" in text


@pytest.mark.parametrize("terminal", [True, False])
def test_a_stream_without_unicode_gets_ascii(terminal):
    console = _console(terminal=terminal, encoding="ascii")
    run_console = RunConsole(console)
    with run_console.stage("training"), run_console.training(total_steps=1) as bar:
        bar.update(1, loss=1.0, memory_gb=1.0)
    text = _text(console)  # an unencodable character would have raised
    assert "ok training" in text and "loss 1.000 -> 1.000" in text


def test_torch_is_not_imported():
    code = "import sys, medcot.train.progress; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
