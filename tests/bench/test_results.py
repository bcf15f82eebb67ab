"""The file of results keeps its table, and every entry its machine and date."""

from __future__ import annotations

import datetime
import importlib.util
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(scope="module")
def results():
    spec = importlib.util.spec_from_file_location("bench_results", BENCH / "results.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_entry_is_one_line_above_and_its_table_below(results, tmp_path):
    path = tmp_path / "RESULTS.md"
    results.save_result("first", "a machine", "2x", "| a |\n|---|", path)
    results.save_result("second", "another machine", "3x", "details", path)
    text = path.read_text(encoding="utf-8")
    today = datetime.date.today().isoformat()
    table = text.partition(results.HEADER)[2].partition("\n\n")[0].splitlines()
    assert table == [f"| {today} | a machine | first | 2x |", f"| {today} | another machine | second | 3x |"]
    assert text.index(f"## {today} first") < text.index(f"## {today} second")
    assert text.count("Machine: a machine") == 1


def test_the_kept_results_have_the_table(results):
    assert results.RESULTS.read_text(encoding="utf-8").startswith(results.PREAMBLE)


def test_a_table_lines_up(results):
    lines = results.format_table(["system", "tok/s"], [["plain", "300"], ["medcot", "1000"]]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1] == "|--------|------:|"
