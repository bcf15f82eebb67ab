"""Evaluation sets: the real ones as counted, local files under a set's name, and what a name promises."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from medcot.data.benchmarks import BENCHMARKS, load_benchmark
from medcot.data.choices import find_stem
from medcot.data.layouts import LAYOUTS
from medcot.errors import DataError
from medcot.records import AnswerKind

SHARED = Path(__file__).parents[2] / "../shared/data"
ITEM = {"question": "Which?", "options": {"A": "x", "B": "y", "C": "z", "D": "w"}, "answer_idx": "B", "answer": "y"}


@pytest.mark.parametrize(
    ("source", "num_items", "num_options", "gold"),
    [
        ("medqa=MedQA-USMLE-4-options/test.jsonl", 1273, 4, {"A": 353, "B": 309, "C": 346, "D": 265}),
        ("pubmedqa=PubMedQA/pqa_labeled.jsonl", 500, 3, {"A": 276, "B": 169, "C": 55}),
        ("medmcqa=medmcqa/validation_head.jsonl", 100, 4, {"A": 37, "B": 27, "C": 19, "D": 17}),
        ("mmlu-medical=mmlu-medical/test_head.jsonl", 100, 4, None),
        ("medxpertqa=MedXpertQA/text_head.jsonl", 30, 10, None),
        ("medical-o1-verifiable-problem=medical-o1-verifiable-problem/train.jsonl", 198, None, None),
        ("medical-o1-mcq.jsonl", 198, None, None),
        ("MedXpertQA/text_head.jsonl", 30, 10, None),
        ("PubMedQA/pqa_labeled.jsonl", 500, 3, None),
        ("medical-o1-reasoning-SFT/train.jsonl", 198, None, None),
    ],
)
def test_real_sets(source: str, num_items: int, num_options: int | None, gold: dict[str, int] | None) -> None:
    name, _, path = source.rpartition("=")
    if not (SHARED / path).exists():
        pytest.skip(f"the real set is not here ({SHARED / path})")
    found = load_benchmark(f"{name}={SHARED / path}" if name else str(SHARED / path))
    assert (len(found.items), found.quarantined, found.num_options) == (num_items, [], num_options)
    assert found.sha256 == hashlib.sha256((SHARED / path).read_bytes()).hexdigest() and found.revision is None
    letters = [item for item in found.items if item.answer_kind is AnswerKind.LETTER]
    assert all(item.options and item.gold in item.options for item in letters)
    assert all(find_stem(item).strip() and "Answer Choices" not in item.question for item in found.items)
    if gold is not None:
        assert {letter: sum(item.gold == letter for item in found.items) for letter in gold} == gold
    if name:
        assert found.items[16].id == f"{name}:17"


def _write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_local_file_goes_under_a_name_or_its_own(tmp_path: Path) -> None:
    path = _write(tmp_path / "mine.jsonl", ITEM, {**ITEM, "answer_idx": "Z"})
    named = load_benchmark(f"medqa={path}")
    assert (named.name, named.items[0].id, named.num_options) == ("medqa", "medqa:1", 4)
    assert "1 items; medqa has 1,273 on the Hub." in named.sentences
    assert len(named.quarantined) == 1 and any("set aside" in sentence for sentence in named.sentences)
    own = load_benchmark(f"{path}[:1]")
    assert (own.name, own.items[0].id, own.quarantined) == (str(path), "mine:1", [])
    assert load_benchmark(str(_write(tmp_path / "plain.jsonl", {"question": "Why?"}))).items[0].gold is None


def test_other_options_than_the_name_promises_are_refused(tmp_path: Path) -> None:
    five = {**ITEM, "options": {**ITEM["options"], "E": "v"}}
    path = _write(tmp_path / "five.jsonl", five)
    with pytest.raises(DataError, match=r"medqa has 4, .* Write medqa-5="):
        load_benchmark(f"medqa={path}")
    assert load_benchmark(f"medqa-5={path}").num_options == 5
    with pytest.raises(DataError, match="options of different numbers"):
        load_benchmark(f"medqa={_write(path, ITEM, five)}")


def test_other_subjects_are_left_out_and_counted(tmp_path: Path) -> None:
    row = {"question": "Which?", "choices": ["a", "b", "c", "d"], "answer": 1}
    path = _write(tmp_path / "x.jsonl", {**row, "subject": "anatomy"}, {**row, "subject": "law"})
    found = load_benchmark(f"mmlu-medical={path}")
    assert [item.id for item in found.items] == ["mmlu-medical:1"]
    assert any(sentence.startswith("1 of other subjects left out") for sentence in found.sentences)
    with pytest.raises(DataError, match="of another subject"):
        load_benchmark(f"mmlu-medical={_write(path, {**row, 'subject': 'law'})}")


def test_wrong_names_and_layouts(tmp_path: Path) -> None:
    path = _write(tmp_path / "x.jsonl", ITEM)
    with pytest.raises(DataError, match="'medqua' names no evaluation set"):
        load_benchmark(f"medqua={path}")
    with pytest.raises(DataError, match=r"no column 'final_decision'|no column 'context'"):
        load_benchmark(f"pubmedqa={path}")
    with pytest.raises(DataError, match="does not exist"):
        load_benchmark("medqa=nowhere.jsonl")


def test_the_table_agrees_with_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []

    def refuse(source: str, **settings: Any) -> None:
        asked.append((source, settings))
        raise DataError("x", "y", "z")

    monkeypatch.setattr("medcot.data.benchmarks.stream_rows", refuse)
    for name, known in BENCHMARKS.items():
        assert known.layout in LAYOUTS
        for source in (f"{name}[:3]", f"{name}={known.hub_id}[:3]"):
            with pytest.raises(DataError):
                load_benchmark(source, token="t")
            settings = {"config": known.config, "split": known.split, "revision": None, "token": "t"}
            assert asked[-1] == (f"{known.hub_id}[:3]", settings)
