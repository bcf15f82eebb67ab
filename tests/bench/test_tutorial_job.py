"""The bench of the tutorial's cells, with a tiny model: every part has its time, and the figures are the run's."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tiny_runs import make_rows, write_rows

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(scope="module")
def bench() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        yield importlib.import_module("tutorial_job")


def test_the_cells_run_and_are_timed(
    bench: Any, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Path(shutil.copytree(model_folder, tmp_path / "tiny"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    rows, out = write_rows(tmp_path / "rows.jsonl", make_rows()), tmp_path / "out.jsonl"
    arguments = [str(model), str(rows), "--steps", "4", "--tokens", "8", "--peer", "--json", str(out)]
    monkeypatch.setattr("sys.argv", ["tutorial_job.py", *arguments])
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    bench.main()
    line = json.loads(out.read_text())
    assert set(line["parts"]) == set(bench.PARTS) and line["parts"]["train"] > 0
    assert line["steps"] == 4 and 1 <= line["answer_tokens"] <= 8
    assert line["losses"][0] > 0 and line["metrics"]["train_tokens_per_second"] > 0
    said = capsys.readouterr().out
    assert "Unsloth s" in said and "| training" in said


def test_the_peers_answers_are_reckoned_at_their_rate(bench: Any) -> None:
    peer = bench.reckon_peer(1200)
    assert peer["ask_before"] == pytest.approx(46.9, abs=0.1) and peer["whole"] == pytest.approx(256.6, abs=0.2)
