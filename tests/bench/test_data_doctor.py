"""The bench of the data doctor: its rows are what it says, and a small run finds what was planted."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(scope="module")
def load_bench():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCH)
        yield importlib.import_module


def test_rows_are_a_function_of_seed_and_number(load_bench, tmp_path):
    rows = load_bench("synthetic_rows")
    planted = rows.write_rows(tmp_path / "rows.jsonl", 2000)
    lines = (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    assert 900 < sum(map(len, lines)) / len(lines) < 1400  # a kilobyte
    assert [json.loads(line) for line in lines] == [rows.make_row(number)[0] for number in range(1, 2001)]
    assert len(lines) - len(set(lines)) == planted["exact"]
    for kind, share in rows.PLANTED.items():
        assert planted[kind] == pytest.approx(2000 * share, rel=0.7, abs=6), kind
    assert rows.make_row(77, seed=1) != rows.make_row(77)


def test_a_small_run_finds_what_was_planted(load_bench, capsys, monkeypatch):
    bench = load_bench("data_doctor")
    monkeypatch.setattr(sys, "argv", ["data_doctor.py", "--rows", "300", "2500"])
    measured = []
    measure = bench.measure
    monkeypatch.setattr(bench, "measure", lambda *args: measured.append(measure(*args)) or measured[-1])
    bench.main()
    out = capsys.readouterr().out
    assert "| 2,500 " in out and "to the power of" in out
    large = measured[-1]
    assert large.facts["num_rows"] == 2500 and large.peak_mb > 30
    found, planted = large.facts["findings"], large.planted
    assert found["duplicates_exact"] == planted["exact"]
    assert found["duplicates_near"] == pytest.approx(planted["near"], abs=3)
    assert found["contamination_confirmed"] == planted["leaked"]
    assert found["identifiers"] == planted["identifier"]
