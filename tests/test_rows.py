"""Sources to rows of tokens: every row accounted for, through mixtures, held-out questions and revisions."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from medcot import rows
from medcot.data.splits import Side, Split
from medcot.errors import DataError, RecipeError
from medcot.recipe import Recipe, load_recipe

START = {"prompt": {"style": "short"}, "train": {"max_steps": None, "epochs": 1}, "model": {"max_seq_length": 150}}


@pytest.fixture(scope="module")
def tokenizer(tiny_folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_folder)


def make_recipe(*overrides: str, **data: Any) -> Recipe:
    return load_recipe(Recipe(), overrides, {**START, "data": data} if data else START)


def write(path: Path, count: int, what: str = "cups", start: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = (
        {"Question": f"How many {what} are {i} and 1?", "Complex_CoT": f"{i} + 1.", "Response": f"{i + 1} {what}"}
        for i in range(start, start + count)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def long_row(number: int) -> str:
    return json.dumps({"Question": f"Long {number}?", "Complex_CoT": "so. " * 200, "Response": "Yes."}) + "\n"


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Two files of one name, 10 and 30 rows."""
    return write(tmp_path / "a" / "rows.jsonl", 10), write(tmp_path / "b" / "rows.jsonl", 30, "spoons")


def weighted(pair: tuple[Path, Path], *weights: float) -> list[dict[str, Any]]:
    return [{"source": str(path), "weight": weight} for path, weight in zip(pair, weights, strict=True)]


# Several sources ------------------------------------------------------------------------------------------------------


def test_without_weights_all_rows_come_once_and_keep_id_and_source(pair, tokenizer):
    recipe = make_recipe(sources=list(pair))
    raw = rows.read_examples(recipe)
    assert [example.id for example in raw.examples[:1] + raw.examples[10:11]] == ["rows:1", "rows@2:1"]
    assert {example.source for example in raw.examples} == {"rows.jsonl"}
    data = rows.encode_examples(raw, recipe, tokenizer)
    assert sorted(row.id for row in data.rows) == sorted(example.id for example in raw.examples)
    assert len({row.id for row in data.rows}) == 40
    assert [row.id for row in data.rows] != sorted((row.id for row in data.rows), key=lambda id: "@" in id)


def test_three_sources_of_one_name_and_two_clinics_have_their_own_ids(pair, tmp_path):
    third = write(tmp_path / "c" / "rows.jsonl", 5)
    recipe = make_recipe(sources=[*pair, third, "builtin:clinic[:7]", "builtin:clinic[:9]"])
    raw = rows.read_examples(recipe)
    assert len({example.id for example in raw.examples}) == len(raw.examples) == 10 + 30 + 5 + 7 + 9
    assert raw.parts[2].examples[0].id == "rows@3:1"


def test_weights_are_met_and_what_is_left_out_is_said(pair, tokenizer):
    recipe = make_recipe(sources=weighted(pair, 1, 1))
    data = rows.encode_examples(rows.read_examples(recipe), recipe, tokenizer)
    second = [row.id for row in data.rows if "@2" in row.id]
    assert (len(data.rows), len(second), len(set(second))) == (20, 10, 10)
    assert any(f"10 of 20 rows are from {pair[1]}, which has 30; 20 of them are left out." in s for s in data.sentences)
    assert rows.encode_examples(rows.read_examples(recipe), recipe, tokenizer).rows == data.rows
    other = load_recipe(recipe, ["data.seed=1"])
    assert rows.encode_examples(rows.read_examples(other), other, tokenizer).rows != data.rows


def test_repeats_are_asked_for_and_said(pair, tokenizer):
    recipe = make_recipe(sources=weighted(pair, 1, 2), repeat=True)
    data = rows.encode_examples(rows.read_examples(recipe), recipe, tokenizer)
    assert len(data.rows) == 45 and len({row.id for row in data.rows}) == 40
    assert any("which has 10; 5 are repeats." in sentence for sentence in data.sentences)


def test_proportions_are_those_of_the_rows_that_fit(pair, tokenizer):
    pair[0].write_text(pair[0].read_text() + "".join(long_row(number) for number in range(20)))
    recipe = make_recipe(sources=weighted(pair, 1, 1))
    data = rows.encode_examples(rows.read_examples(recipe), recipe, tokenizer)
    assert len(data.rows) == 20 and len(data.quarantined) == 20
    assert all(f"(in {pair[0]})" in item.reason for item in data.quarantined)
    assert [item.row_number for item in data.quarantined] == list(range(11, 31))


def test_lineage_counts_every_row(pair, tokenizer):
    pair[1].write_text(pair[1].read_text() + '{"Question": "", "Complex_CoT": "a", "Response": "b"}\n' + long_row(1))
    recipe = make_recipe("data.validation=0.2", sources=weighted(pair, 1, 2))
    data = rows.encode_examples(rows.read_examples(recipe), recipe, tokenizer)
    facts = data.facts()
    assert facts["rows"] == len(data.rows) and facts["quarantined"] == 2
    for part, path in zip(facts["sources"], pair, strict=True):
        assert part["source"] == str(path) and part["split"] == "train"
        assert part["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert part["drawn"] + part["left_out"] == part["rows"] and part["repeats"] == 0
    kinds = ("unreadable", "removed", "held_out", "unfit", "rows")
    counts = [{key: part[key] for key in kinds} for part in facts["sources"]]
    assert [part["raw_rows"] for part in facts["sources"]] == [sum(part.values()) for part in counts] == [10, 32]
    held_out = data.validation_facts()
    assert held_out is not None and held_out["held_out"] == sum(part["held_out"] for part in counts)
    assert sum(part["unfit"] for part in counts) + held_out["held_out"] - held_out["rows"] == 1  # the long row
    assert [part["unreadable"] for part in counts] == [0, 1] and all(part["held_out"] for part in counts)
    assert sum(part["drawn"] for part in facts["sources"]) == facts["rows"]
    assert json.loads(json.dumps(facts)) == facts


def test_the_checksum_follows_every_source(pair):
    def digest() -> str:
        return rows.read_examples(make_recipe(sources=list(pair), validation="builtin:clinic[:5]")).sha256

    first = digest()
    assert first == digest() and len(first) == 64
    write(pair[1], 29, "spoons")
    assert digest() != first


def test_one_source_says_what_it_always_said(pair, tokenizer):
    recipe = make_recipe(f"data={pair[0]}")
    data = rows.encode_examples(rows.read_examples(recipe), recipe, tokenizer)
    assert [row.id for row in data.rows] == [f"rows:{number}" for number in range(1, 11)]
    assert data.facts()["sha256"] == hashlib.sha256(pair[0].read_bytes()).hexdigest()
    assert "sources" not in data.facts() and data.validation_facts() is None and data.validation == []
    assert data.lineage()[0]["drawn"] == 10
    as_list = make_recipe(sources=[pair[0]])
    assert rows.encode_examples(rows.read_examples(as_list), as_list, tokenizer).rows == data.rows


def test_a_source_that_fails_is_named(pair, tokenizer):
    pair[1].write_text(long_row(1))
    recipe = make_recipe(sources=list(pair))
    with pytest.raises(DataError, match=r"b/rows\.jsonl: No row is left of 1"):
        rows.encode_examples(rows.read_examples(recipe), recipe, tokenizer)


def test_sentences_say_of_which_source_they_are(pair):
    raw = rows.read_examples(make_recipe(sources=list(pair)))
    assert any(s.startswith(f"{pair[0]}: ") for s in raw.sentences)
    assert any(s.startswith(f"{pair[1]}: ") for s in raw.sentences)


# Held-out questions ---------------------------------------------------------------------------------------------------


def test_held_out_rows_are_those_of_the_split_and_none_is_lost(pair, tokenizer):
    recipe = make_recipe("data.validation=0.2", f"data={pair[1]}")
    raw = rows.read_examples(recipe)
    split = Split(0.2, recipe.data.seed)
    assert raw.validation and all(split.side(example.question) is Side.VALIDATION for example in raw.validation)
    assert all(split.side(example.question) is Side.TRAIN for example in raw.examples)
    assert len(raw.examples) + len(raw.validation) == 30
    data = rows.encode_examples(raw, recipe, tokenizer)
    assert {row.id for row in data.validation} == {example.id for example in raw.validation}
    assert not {row.id for row in data.rows} & {row.id for row in data.validation}
    facts = data.validation_facts()
    assert facts is not None and (facts["fraction"], facts["seed"]) == (0.2, 3407)
    assert facts["rows"] == len(raw.validation) and facts["trained_tokens"] > 0
    assert any("20% of the questions" in sentence for sentence in data.sentences)


def test_a_question_in_two_sources_is_on_one_side(tmp_path):
    files = [write(tmp_path / name, 40) for name in ("a.jsonl", "b.jsonl")]
    raw = rows.read_examples(make_recipe("data.validation=0.3", sources=files))
    trained, held_out = ({example.question for example in side} for side in (raw.examples, raw.validation))
    assert trained and held_out and not trained & held_out
    assert len(raw.validation) == 2 * len(held_out)


def test_what_is_held_out_is_not_weighted(pair, tokenizer):
    recipe = make_recipe("data.validation=0.3", sources=weighted(pair, 1, 1))
    raw = rows.read_examples(recipe)
    data = rows.encode_examples(raw, recipe, tokenizer)
    assert len(data.validation) == len(raw.validation) == sum(len(part.held_out) for part in raw.parts)


def test_a_validation_source_is_read_apart(pair, tokenizer):
    recipe = make_recipe(f"data={pair[0]}", f"data.validation={pair[1]}")
    raw = rows.read_examples(recipe)
    assert (len(raw.examples), len(raw.validation)) == (10, 30)
    assert raw.validation[0].id == "rows@2:1"
    data = rows.encode_examples(raw, recipe, tokenizer)
    assert (len(data.rows), len(data.validation)) == (10, 30)
    facts = data.validation_facts()
    assert facts is not None and facts["source"] == str(pair[1])
    assert facts["sha256"] == hashlib.sha256(pair[1].read_bytes()).hexdigest()
    assert raw.source == str(pair[0])


def test_validation_on_training_rows_is_refused(pair):
    for overrides in ([f"data={pair[0]}", f"data.validation={pair[0]}[:5]"], ["data.validation=builtin:clinic[:9]"]):
        with pytest.raises(RecipeError, match=r"measures memory.*Set data\.validation=0\.05"):
            rows.read_examples(make_recipe(*overrides))


def test_a_validation_without_rows_is_refused(pair, tokenizer):
    with pytest.raises(DataError, match=r"data\.validation=0\.0001 of 10 different questions holds out none"):
        rows.read_examples(make_recipe("data.validation=0.0001", f"data={pair[0]}"))
    pair[1].write_text(long_row(1))
    recipe = make_recipe(f"data={pair[0]}", f"data.validation={pair[1]}")
    with pytest.raises(DataError, match="validation: No row is left of 1"):
        rows.encode_examples(rows.read_examples(recipe), recipe, tokenizer)


# Revisions ------------------------------------------------------------------------------------------------------------


def test_revised_rows_leave_or_change_on_both_sides(pair, tokenizer):
    recipe = make_recipe("data.validation=0.3", sources=weighted(pair, 1, 1))
    raw = rows.read_examples(recipe)
    gone = {raw.examples[0].id, raw.validation[0].id}

    def revise(example: Any) -> Any:
        return None if example.id in gone else dataclasses.replace(example, response="masked")

    revised = raw.revise(revise)
    assert len(revised.examples) == len(raw.examples) - 1 and len(revised.validation) == len(raw.validation) - 1
    assert {example.response for example in (*revised.examples, *revised.validation)} == {"masked"}
    assert revised.sha256 == raw.sha256 and revised.quarantined == raw.quarantined
    data = rows.encode_examples(revised, recipe, tokenizer)
    assert [part["removed"] for part in data.lineage()] == [2, 0]
    assert data.lineage()[0]["rows"] == len(raw.parts[0].examples) - 1


def test_accepted_findings_must_exist():
    rows.check_accepted(["eos_missing"], {"eos_missing", "bos_doubled"})
    with pytest.raises(RecipeError, match=r"data\.accept names 'eos_mising'.*Did you mean 'eos_missing'"):
        rows.check_accepted(["eos_mising"], {"eos_missing", "bos_doubled"})


def test_a_giant_is_over_the_limit_without_being_tokenised(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", 3)
    giant = {"Question": "Why?", "Complex_CoT": "so " * 200_000, "Response": "So."}
    path.write_text(path.read_text() + json.dumps(giant) + "\n")
    recipe = make_recipe(source=str(path))
    data = rows.encode_examples(rows.read_examples(recipe), recipe, tokenizer)
    assert len(data.rows) == 3 and data.num_over_length == 1
    assert data.quarantined[0].reason == "600,007 bytes of text; over the limit however it is tokenised"
