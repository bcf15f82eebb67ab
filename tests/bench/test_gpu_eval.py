"""The bench of the local back end, small and on the CPU: its lines, its table, and what it refuses."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(scope="module")
def bench() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        yield importlib.import_module("gpu_eval")


def test_every_case_writes_all_its_tokens(
    bench: Any, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "lines.jsonl"
    arguments = [str(tiny_folder), "--tiny", "--peer", "--json", str(path)]
    monkeypatch.setattr("sys.argv", ["gpu_eval.py", *arguments])
    bench.main()
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [(line["figure"], line["system"]) for line in lines] == [
        ("eval-bf16", "medcot"),
        ("eval-bf16-lora", "medcot"),
        ("uneven-bf16-lora", "medcot, slots refilled"),
        ("uneven-bf16-lora", "medcot, batch after batch"),
        ("eval-bf16-lora", "transformers"),
    ]
    assert [lines[0]["tokens"], lines[1]["tokens"], lines[4]["tokens"]] == [60, 60, 12]
    assert lines[2]["tokens"] == lines[3]["tokens"] > 0
    assert all(line["value"] > 0 and line["machine"] and line["versions"] for line in lines)
    printed = capsys.readouterr().out
    assert "| uneven-bf16-lora |    medcot, slots refilled |" in printed
    assert printed.splitlines()[-1].startswith("eval: ") and "batch after batch" in printed.splitlines()[-1]


def test_tiny_figures_are_not_kept(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["gpu_eval.py", "folder", "--tiny", "--save"])
    with pytest.raises(SystemExit):
        bench.main()
