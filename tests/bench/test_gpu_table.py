"""The engine's table from made-up lines: what is missing is never a zero, the last of a repeated run counts, the best
of several settings stands."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"
PROVENANCE = {"machine": "a GPU", "versions": {"torch": "2.11.0"}, "date": "2026-11-22"}


@pytest.fixture(scope="module")
def table():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCH)
        yield importlib.import_module("gpu_table")


def ours(figure: str, value: float | None, **settings) -> str:
    return json.dumps({"figure": figure, "system": "medcot", "value": value, "unit": "?", **settings, **PROVENANCE})


def result(kind: str, tok_s: float, peak: float = 30.0, **cfg: str) -> str:
    return f"RESULT {json.dumps({'kind': kind, 'cfg': cfg, 'tok_s': tok_s, 'peak_GB': peak})}"


def cells(table, lines: list[str], key: str) -> dict[str, str]:
    """The cells of a goal's row, by column."""
    printed = table.build_table(table.read_lines(lines)).splitlines()
    split = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed]
    index = [goal.key for goal in table.GOALS].index(key)
    return dict(zip(split[0], split[2 + index], strict=True))


def test_nothing_measured_is_said_and_never_zero(table):
    for goal in table.GOALS:
        row = cells(table, [], goal.key)
        assert row["medcot"] == "not measured"
        assert row["ratio"] == "–" and row["met"] == "–"
        assert "0.0" not in row["medcot"]
    assert cells(table, [], "tutorial-nf4")["peers"] == "Unsloth 4,138 (2×4; before) · TRL 2,670 (2×4; before)"
    assert cells(table, [], "tutorial-nf4")["ceiling"] == "not measured"
    assert cells(table, [], "fp8")["peers"] == "–"


def test_measured_peers_take_the_place_of_those_known_before(table):
    lines = [
        result("unsloth", 4000.0, 6.4, bs="2", ga="4"),
        result("unsloth", 10_000.0, bs="8", ga="1", gc="0"),
        result("unsloth", 12_000.0, bs="8", ga="1", gc="0", q="0"),
        ours("tutorial-nf4", 18_000.0, rows=8, labels=table.WHOLE),
    ]
    row = cells(table, lines, "tutorial-nf4")
    assert row["peers"] == "Unsloth 4,000 (2×4) · TRL 2,670 (2×4; before)"
    assert row["ratio"] == "4.50×" and row["met"] == "yes"
    assert cells(table, lines, "best-nf4")["peers"] == "Unsloth 10,000 (8×1, no checkpointing)"
    assert cells(table, lines, "best-bf16")["peers"] == "Unsloth 12,000 (8×1, no checkpointing)"
    # The best known setting was not run again, and is not beaten by another.
    assert cells(table, lines, "nf4-recompute")["peers"] == "Unsloth 9,703 (4×1, packed to 2048; before)"
    assert cells(table, lines, "tutorial-2x4")["peers"] == "Unsloth 6.4 GiB (2×4)"


def test_best_of_the_settings_and_the_last_of_a_repeated_run(table):
    def line(value, rows, labels=table.WHOLE):
        return ours("best-bf16", value, case="best-bf16", rows=rows, labels=labels)

    lines = [line(30_000.0, 8), line(18_000.0, 8), line(17_000.0, 20), line(19_000.0, 20, table.TRAINED)]
    row = cells(table, lines, "best-bf16")
    assert row["medcot"] == "18,000 (8 rows)"
    assert row["answer labels only"] == "19,000 (20 rows)"
    assert row["met"] == "no"


def test_the_tutorial_setting_may_be_the_best_one(table):
    lines = [ours("tutorial-nf4", 19_000.0, rows=8), ours("best-nf4", 18_500.0, rows=20)]
    assert cells(table, lines, "best-nf4")["medcot"] == "19,000 (8 rows)"


def test_out_of_memory_is_a_failure_and_no_value(table):
    lines = [ours("fp8", None, rows=20, error="out of memory: tried to allocate 2 GiB")]
    row = cells(table, lines, "fp8")
    assert row["medcot"] == "out of memory" and row["met"] == "no" and row["ratio"] == "–"
    lines.append(ours("fp8", 30_000.0, rows=8))
    assert cells(table, lines, "fp8")["medcot"] == "30,000 (8 rows)"


def test_peak_memory_needs_its_rate_too(table):
    def line(value):
        return ours("tutorial-2x4", value, case="tutorial-2x4", rows=8, peak_gib=5.5)

    row = cells(table, [line(5000.0)], "tutorial-2x4")
    assert row["medcot"] == "5.5 GiB at 5,000 tokens/s" and row["met"] == "yes" and row["ratio"] == "1.16×"
    assert row["must reach"] == "≤ 5.6 GiB at ≥ 4,900 tokens/s"
    assert cells(table, [line(4000.0)], "tutorial-2x4")["met"] == "no"


def test_longest_row_is_the_longest_that_fits(table):
    lines = ["CTX 24576 ok peak 11.9 reserved 14.0 s/step 8.1", "CTX 40960 OOM CUDA out of memory"]
    lines += [ours("context", n, fits=n < 60_000, cap_gib=14.5) for n in (40_960, 57_344, 65_536)]
    row = cells(table, lines, "context")
    assert row["peers"] == "Unsloth 24,576 tokens"
    assert row["medcot"] == "57,344 tokens" and row["met"] == "yes" and row["ratio"] == "2.33×"
    assert cells(table, [lines[-1]], "context")["medcot"] == "did not fit"


def test_the_tutorials_script_is_reckoned_for_the_full_question(table):
    parts = {"whole": 200.0, "gen_before_s": 16.0, "gen_before_tok_s": 25.0, "gen_after_s": 20.0}
    parts |= {"gen_after_tok_s": 20.0, "save_merged": 38.6}
    lines = [f"SEED {json.dumps(parts)}", "HFGEN batch64 bf16 tok/s 945", "HFCB tok/s 731 16384 22.4"]
    row = cells(table, [*lines, ours("job", 64.0)], "job")
    assert row["peers"] == "Unsloth 272.0 s (400 tokens a question, reckoned for 1,200)"  # 200 + 800/25 + 800/20
    assert row["ratio"] == "4.25×" and row["met"] == "yes"
    assert cells(table, lines, "answer-nf4")["peers"] == "Unsloth 25"
    assert cells(table, lines, "answers-bf16")["peers"] == "transformers 945 (generate)"


def test_ceilings_come_from_the_same_run(table):
    line = json.dumps({"figure": "ceiling-bf16", "system": "ceiling", "value": 21_800.4, **PROVENANCE})
    assert cells(table, [line], "best-nf4")["ceiling"] == "21,800"
    assert cells(table, [line], "fp8")["ceiling"] == "not measured"
    assert cells(table, [line], "job")["ceiling"] == "53.0 s (reckoned)"


def test_other_lines_are_left_aside_and_a_damaged_one_is_not(table):
    found = table.read_lines(["Loading weights: 100%", "", "{'loss': 3.1}", '{"loss": 3.1}'])
    assert not found.ours and not found.peers
    with pytest.raises(ValueError):
        table.read_lines(['{"figure": "fp8", "val'])
    with pytest.raises(ValueError):
        table.read_lines(["RESULT {'kind'"])


def test_the_page_names_machine_and_versions(table):
    text = table.describe(table.read_lines([ours("job", 64.0)]))
    assert text.startswith("a GPU\n\ntorch 2.11.0\n\n")


def test_save_wants_one_machine(table, tmp_path, monkeypatch):
    path = tmp_path / "lines.jsonl"
    path.write_text("\n".join([ours("job", 64.0), ours("fp8", 30_000.0, rows=8)]))
    kept = []
    monkeypatch.setattr(table, "save_result", lambda *entry: kept.append(entry))
    monkeypatch.setattr("sys.argv", ["gpu_table.py", str(path), "--save"])
    table.main()
    assert kept[0][:3] == ("gpu_table", "a GPU", "2 of 10 figures met")
    path.write_text(path.read_text() + "\n" + ours("job", 60.0).replace("a GPU", "another"))
    with pytest.raises(SystemExit):
        table.main()
