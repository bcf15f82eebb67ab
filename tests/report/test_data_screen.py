import io
import subprocess
import sys

import pytest
from data_reports import ESC, MAIL, PHONE, RLO, make_diagnosis, make_report
from rich.cells import cell_len
from rich.console import Console

from medcot.data.scan import Progress
from medcot.report.data_screen import print_diagnosis, watch_scan


def show(what, *, width=80, encoding="utf-8", terminal=True):
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding)
    print_diagnosis(what, Console(file=file, width=width, force_terminal=terminal, color_system=None))
    file.flush()
    return raw.getvalue().decode(encoding)


def test_a_diagnosis_and_its_report_read_the_same():
    assert show(make_diagnosis()) == show(make_report())


@pytest.mark.parametrize("width", [80, 120])
def test_every_line_fits_the_window(width):
    lines = show(make_report(), width=width).splitlines()
    assert max(map(cell_len, lines)) <= width
    text = "\n".join(line.rstrip() for line in lines)
    assert text.startswith("Red: this data stops a run")
    assert text.index("✕ red    no_reasoning") < text.index("▲ yellow over_length") < text.index("i info   lengths")
    assert "→ Leave these rows out" in text and "(empty)" in text
    assert "EOS, no loss: <|im_end|>" in text and "thinking tag, loss: </think>" in text
    assert "forged_tags  1, accepted" in text
    assert "Raw rows 9; Unreadable 1" in text


def test_a_stream_of_ascii_gets_ascii():
    report = make_report()
    report["sentences"].append("患者 ünï")
    text = show(report, encoding="ascii")
    assert "x red    no_reasoning" in text and "! yellow" in text and "-> Leave" in text
    assert "[[A 54-year-old" in text and "..." in text and "?? ?n?" in text


def test_into_a_file_sentences_go_whole():
    text = show(make_report(), terminal=False)
    says = next(f["says"] for f in make_report()["findings"] if f["id"] == "lengths")
    assert len(says) > 80 and says in text


def test_nothing_in_a_row_moves_the_terminal_or_names_a_person():
    report = make_report()
    for finding in report["findings"]:
        finding["says"] += f" {ESC}{RLO}[bold]"
        finding["fix"] += f" {ESC}"
        finding["evidence"].insert(0, {"row": ESC, "parts": {ESC: f"{ESC}\x07 {PHONE} {MAIL}", "z": "\ud800"}})
    text = show(report)
    assert not set(text) & {"\x1b", "\x07", RLO, "\ud800"}
    assert PHONE not in text and MAIL not in text
    assert "\\u001b" in text and "[bold]" in text


def test_two_pieces_of_evidence_are_enough_and_info_has_none():
    report = make_report()
    for finding in report["findings"]:
        finding["evidence"] = [{"row": f"row-{n}", "parts": {"text": "seen"}} for n in range(5)]
    text = show(report)
    grave = sum(finding["severity"] != "info" for finding in report["findings"])
    assert text.count("row-0") == text.count("row-1") == grave
    assert "row-2" not in text


def test_a_marked_passage_is_in_sight_however_far_behind_it_stands():
    report = make_report()
    finding = next(f for f in report["findings"] if f["id"] == "contamination_confirmed")
    finding["evidence"] = [{"row": "r", "parts": {"training question": "far " * 200 + "⟦the leak⟧ on"}}]
    assert "far ⟦the leak⟧ on" in show(report)


def test_a_clean_source_is_said_to_be_clean():
    text = show({"version": 1, "verdict": "clean", "findings": []})
    assert text.startswith("Clean: no check found fault")


def test_a_scan_is_watched_only_where_it_can_be_seen(monkeypatch):
    progress = Progress(num_rows=2000, num_kept=0, num_bytes=10, total_bytes=20, seconds=1.0)
    with watch_scan(Console(file=io.StringIO()), shown=False) as on_progress:
        assert on_progress is None
    pipe = io.StringIO()
    with watch_scan(Console(file=pipe)) as on_progress:
        on_progress(progress)
        assert pipe.getvalue() == ""
        monkeypatch.setattr("medcot.report.data_screen.PLAIN_EVERY_S", 0.0)
        on_progress(progress)
    assert pipe.getvalue() == "looked at 2,000 rows, 2,000 a second\n"
    screen = io.StringIO()
    with watch_scan(Console(file=screen, force_terminal=True, width=80)) as on_progress:
        on_progress(progress)
    assert "looking at rows" in screen.getvalue() and "2,000 rows, 2,000/s" in screen.getvalue()


def test_the_screen_loads_no_heavy_library():
    names = ("torch", "matplotlib", "jinja2", "scipy", "transformers")
    code = f"import sys, medcot.report.data_screen; print([m for m in {names} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
