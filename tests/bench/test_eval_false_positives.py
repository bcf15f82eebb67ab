"""The promise about verdicts, by the bench that prints it: no more false alarms than said, and what can be found is."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

from medcot.evaluate.power import minimum_detectable_effect
from medcot.evaluate.stats import Verdict
from medcot.evaluate.verdicts import compare_tasks

BENCH = Path(__file__).parents[2] / "bench"
CELLS = [(n, flip_rate) for n in (200, 500, 1273) for flip_rate in (0.1, 0.2, 0.3)]


@pytest.fixture(scope="module")
def bench():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCH)
        yield importlib.import_module("eval_false_positives")


@pytest.mark.parametrize(("n", "flip_rate"), CELLS)
def test_without_a_change_at_most_64_of_1000_are_called_one(bench, n, flip_rate):
    before, after = bench.draw_same(np.random.default_rng(bench.SEED), 1000, n, flip_rate)
    assert (before != after).mean() == pytest.approx(flip_rate, rel=0.03)  # as assumed
    assert abs(before.mean() - after.mean()) < 0.003
    assert 0.02 <= bench.share_called(before, after) <= 0.064


@pytest.mark.parametrize(("n", "flip_rate"), CELLS)
def test_at_the_printed_effect_75_to_85_percent_are_found(bench, n, flip_rate):
    effect = minimum_detectable_effect(n, flip_rate)
    before, after = bench.draw_changed(np.random.default_rng(bench.SEED), 1000, n, flip_rate, effect)
    assert (before != after).mean() == pytest.approx(flip_rate, rel=0.03)
    assert after.mean() - before.mean() == pytest.approx(effect, abs=0.003)
    assert 0.75 <= bench.share_called(before, after) <= 0.85


def test_the_shares_are_those_of_the_verdicts_in_words(bench):
    effect = minimum_detectable_effect(200, 0.2)
    before, after = bench.draw_changed(np.random.default_rng(1), 40, 200, 0.2, effect)
    verdicts = [
        compare_tasks({"task": (was[:, None].tolist(), now[:, None].tolist())})[0].verdict
        for was, now in zip(before, after, strict=True)
    ]
    called = sum(verdict is not Verdict.NO_CHANGE for verdict in verdicts) / 40
    assert called == pytest.approx(bench.share_called(before, after)) and Verdict.WORSE not in verdicts


def test_several_seeds_and_several_tasks_raise_no_more_alarms(bench):
    assert bench.share_called_with_seeds(300, 60, 0.2, (4, 4)) <= 0.08
    assert bench.share_called_with_seeds(300, 60, 0.2, (1, 4)) <= 0.08
    holm, without = bench.share_called_in_suite(1000, 200, 0.2, 5)
    assert holm <= 0.064 < 0.1 < without


def test_the_bench_prints_and_keeps_its_table(bench, capsys, monkeypatch):
    kept = []
    monkeypatch.setattr(bench, "save_result", lambda *entry: kept.append(entry))
    monkeypatch.setattr(sys, "argv", ["eval_false_positives.py", "--runs", "20", "--sizes", "200", "--save"])
    bench.main()
    printed = capsys.readouterr().out
    assert "| 200       |       20% |" in printed and "after Holm" in printed and "percentile bootstrap" in printed
    name, _, result, details = kept[0]
    assert name == "eval_false_positives" and result in printed and details in printed
