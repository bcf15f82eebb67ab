"""What a run takes out of its data, and what the doctor says of it; and the same doctor on a source by itself."""

from __future__ import annotations

import json
import pickle
import random
from pathlib import Path
from typing import Any

import pytest

from medcot import prompt
from medcot.admission import build_tools, diagnose, save_report
from medcot.data.findings import Finding, Severity
from medcot.diagnosis import Diagnosis, Tools, known_ids, load_items, unreadable
from medcot.errors import DataError, RecipeError, UnfitDataError
from medcot.examination import SAMPLE, Tokens, examine_source
from medcot.planning import list_problems, load_tasks
from medcot.recipe import Recipe, load_recipe
from medcot.rows import encode_examples, read_examples
from medcot.treatment import check_left, examine_rows, examine_texts, run_items, treat

WORDS = (
    *("fever", "cough", "rash", "oedema", "pallor", "jaundice", "ascites", "wheeze", "stridor", "syncope", "tremor"),
    *("ataxia", "ptosis", "miosis", "nausea", "colic", "melaena", "dysuria", "haematuria", "polyuria", "thirst"),
    *("fatigue", "malaise", "anorexia", "cachexia", "clubbing", "cyanosis", "bruising", "petechiae"),
)


def question(number: int) -> str:
    """One of many that share no run of words."""
    told = random.Random(number).sample(WORDS, 20)
    return f"Case {number}: a patient has {' and '.join(told)}. Which test comes first?"


def row(number: int, **changed: str) -> dict[str, str]:
    reasoning = (
        f"In case {number} the {WORDS[number % 29]} matters most, and it points away from the {WORDS[number % 7]}."
        f" Since the {WORDS[(number + 5) % 29]} came first, a blood count is both quick and telling here, so it leads."
    )
    return {
        "Question": question(number),
        "Complex_CoT": reasoning,
        "Response": f"A blood count comes first in case {number}.",
        **changed,
    }


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in rows))
    return path


@pytest.fixture
def make(recipe_file: Path, tmp_path: Path) -> Any:
    """Write rows and return a recipe for them."""

    def build(rows: list[dict[str, Any]], *overrides: str) -> Recipe:
        data = write(tmp_path / "own.jsonl", rows)
        return load_recipe(recipe_file, [f"data={data}", "model.max_seq_length=2048", *overrides])

    return build


def look(recipe: Recipe) -> tuple[Any, Diagnosis]:
    raw = read_examples(recipe)
    items = run_items(recipe, [])
    treated = treat(raw, recipe, items)
    check_left(raw, treated)
    return treated, examine_texts(raw, treated, recipe, build_tools(recipe, items))


def found(diagnosis: Diagnosis, name: str) -> Finding:
    (finding,) = [finding for finding in diagnosis.findings if finding.id == name]
    return finding


ROWS = [row(number) for number in range(12)]


def test_clean_rows_stay_as_they_are(make: Any) -> None:
    recipe = make(ROWS)
    treated, diagnosis = look(recipe)
    assert len(treated.raw.examples) == 12 and not any(treated.counts.values())
    data = encode_examples(treated.raw, recipe, build_tools(recipe, ()).tokenizer)
    whole = diagnosis.joined(examine_rows(data, recipe, build_tools(recipe, ()).tokenizer))
    assert whole.verdict == "clean" and not whole.stops and whole.headline == "nothing to object to"
    assert found(whole, "survival").count == 12 and whole.counts["rows"] == 12


def test_copies_are_left_out_and_counted(make: Any) -> None:
    near = row(3, Response="A blood count comes first in case 3, promptly.")
    rows = [*ROWS, row(3), row(5), near]
    for policy, left in (("exact", 13), ("near", 12), ("none", 15)):
        treated, diagnosis = look(make(rows, f"data.remove_duplicates={policy}"))
        assert len(treated.raw.examples) == left
        assert treated.counts["removed_exact"] == 2 * (policy != "none")
        assert treated.counts["removed_near"] == (policy == "near")
        finding = found(diagnosis, "duplicates_exact")
        assert finding.count == 2 and finding.severity is Severity.YELLOW
        assert ("left out" in finding.says) is (policy != "none")
        assert ("left out" in found(diagnosis, "duplicates_near").says) is (policy == "near")
    assert [example.id for example in treated.raw.examples][-1] == "own:15"


def test_questions_of_a_benchmark_are_left_out(make: Any, tmp_path: Path) -> None:
    item = {
        "question": question(4),
        "options": {"A": "a", "B": "b", "C": "c", "D": "d"},
        "answer_idx": "A",
        "answer": "a",
    }
    others = [item | {"question": question(number)} for number in range(40, 45)]
    against = f"data.against=[medqa={write(tmp_path / 'exam.jsonl', [item, *others])}]"
    treated, diagnosis = look(make(ROWS, against))
    assert treated.counts["removed_contaminated"] == 1
    assert "own:5" not in [example.id for example in treated.raw.examples]
    finding = found(diagnosis, "contamination_confirmed")
    assert finding.severity is Severity.YELLOW and finding.rows == ("own:5",) and "left out" in finding.says
    treated, diagnosis = look(make(ROWS, against, "data.remove_contaminated=false"))
    assert len(treated.raw.examples) == 12 and [f.id for f in diagnosis.stops] == ["contamination_confirmed"]
    accepted = look(make(ROWS, against, "data.remove_contaminated=false", "data.accept=contamination_confirmed"))[1]
    assert not accepted.stops and accepted.verdict == "clean" and accepted.exit_code == 0


@pytest.mark.parametrize(("policy", "severity"), [("report", "red"), ("mask", "yellow"), ("refuse", "red")])
def test_identifiers(make: Any, policy: str, severity: str) -> None:
    known = row(7, Question=question(7) + " Reach her at jane.roe@example.org or 555-867-5309.")
    treated, diagnosis = look(make([*ROWS[:7], known], f"data.identifiers={policy}"))
    finding = found(diagnosis, "identifiers")
    assert finding.severity == severity and bool(diagnosis.stops) is (severity == "red")
    assert ("jane.roe" in treated.raw.examples[-1].question) is (policy != "mask")
    assert treated.counts["masked_rows"] == (policy == "mask")
    assert "jane.roe" not in json.dumps(diagnosis.report("1")), "evidence is masked"


def test_nothing_left_of_a_source_or_of_what_is_held_out_is_an_error(make: Any, tmp_path: Path) -> None:
    item = {"question": question(4), "options": {k: k for k in "ABCD"}, "answer_idx": "A", "answer": "A"}
    exam = write(tmp_path / "exam.jsonl", [item])
    with pytest.raises(UnfitDataError, match=r"none is left of the training rows of .*remove_contaminated=false"):
        look(make([row(4)], f"data.against=[medqa={exam}]"))
    held = write(tmp_path / "held.jsonl", [row(2)])
    with pytest.raises(UnfitDataError, match=r"none is left of the validation rows of .*held\.jsonl"):
        look(make(ROWS, f"data.validation={held}"))


def test_validation_that_training_has(make: Any, tmp_path: Path) -> None:
    held = write(tmp_path / "held.jsonl", [row(2), row(30)])
    for policy in ("exact", "none"):
        treated, diagnosis = look(make(ROWS, f"data.validation={held}", f"data.remove_duplicates={policy}"))
        finding = found(diagnosis, "validation_shared")
        assert finding.count == 1 and finding.rows == ("held:1",) and finding.severity is Severity.YELLOW
        assert len(treated.raw.validation) == (1 if policy == "exact" else 2)
        assert diagnosis.sources[-1]["source"] == str(held)


def test_near_copies_across_a_split_are_found(make: Any) -> None:
    twins = [row(number, Question=question(number) + " Today") for number in range(40)]
    _, diagnosis = look(make([*(row(number) for number in range(40)), *twins], "data.validation=0.3"))
    assert found(diagnosis, "validation_shared").count > 3


def test_a_finding_to_accept_must_exist(make: Any) -> None:
    with pytest.raises(RecipeError, match=r"data\.accept names 'identifier'.*Did you mean 'identifiers'"):
        look(make(ROWS, "data.accept=identifier"))
    assert {"no_reasoning", "reasoning_lost", "forged_tags"} <= known_ids()


def test_built_in_problems_are_not_held_against_themselves_but_all_else_is(recipe_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file, ["data=builtin:clinic[:20]", "evaluate.source=builtin:clinic:5"])
    items = run_items(recipe, list_problems(load_tasks(recipe.evaluate)))
    assert len(items) == 5
    own = read_examples(recipe)
    assert not any(treat(own, recipe, items).counts.values())
    leak = [{"Question": e.question, "Complex_CoT": f"{e.reasoning} Indeed.", "Response": e.response} for _, e in items]
    leaked = write(tmp_path / "leak.jsonl", leak)
    mixed = load_recipe(recipe_file, [f"data=[{leaked},'builtin:clinic[:20]']", "evaluate.source=builtin:clinic:5"])
    raw = read_examples(mixed)
    treated = treat(raw, mixed, items)
    assert treated.counts["removed_contaminated"] == 5
    with pytest.raises(UnfitDataError, match=r"leak\.jsonl"):
        check_left(raw, treated)


def test_the_rows_of_a_run_have_a_checksum(make: Any) -> None:
    def digest(*overrides: str) -> str:
        recipe = make(ROWS, *overrides)
        return encode_examples(look(recipe)[0].raw, recipe, build_tools(recipe, ()).tokenizer).digest

    assert digest() == digest() != digest("train.train_on_prompt=true")


def test_built_in_problems_can_be_looked_at(recipe_file: Path) -> None:
    diagnosis = diagnose("builtin:clinic[:30]", str(recipe_file))
    assert diagnosis.exit_code == 0 and found(diagnosis, "survival").count == 30


def test_a_source_by_itself(make: Any, tmp_path: Path) -> None:
    rows = [*ROWS, row(3), row(20, Complex_CoT=""), row(21, Response=" ")]
    diagnosis = diagnose(str(write(tmp_path / "rows.jsonl", rows)), str(make(ROWS) and write_recipe(make, tmp_path)))
    assert diagnosis.verdict == "red" and diagnosis.exit_code == 1
    assert found(diagnosis, "no_reasoning").count == 1 and found(diagnosis, "no_answer").count == 1
    assert found(diagnosis, "duplicates_exact").count == 1
    assert diagnosis.counts["raw_rows"] == 15 and diagnosis.sources[0]["sha256"]
    summary = diagnosis.summary()
    assert set(summary) == {"findings", "verdict"}
    assert all(set(said) == {"id", "severity", "count", "rows", "says", "fix"} for said in summary["findings"])
    save_report(diagnosis, tmp_path / "out")
    kept = json.loads((tmp_path / "out" / "report.json").read_text())
    assert kept["verdict"] == "red" and (tmp_path / "out" / "report.html").stat().st_size > 1000


def write_recipe(make: Any, folder: Path) -> Path:
    from medcot.recipe import dump_recipe

    path = folder / "recipe.yaml"
    path.write_text(dump_recipe(make(ROWS)))
    return path


def test_without_a_tokenizer_it_says_what_was_not_checked(make: Any) -> None:
    recipe = make(ROWS)
    diagnosis = examine_source(recipe, Tools(None, prompt.Style("short"), (), "no network"), workers=1)
    assert found(diagnosis, "survival_unchecked").severity is Severity.YELLOW
    assert found(diagnosis, "contamination_unchecked").severity is Severity.INFO
    assert not [finding for finding in diagnosis.findings if finding.id == "survival"]


def test_large_sources_are_sampled_by_content(make: Any) -> None:
    recipe = make(ROWS)
    tools = build_tools(recipe, ())
    check = Tokens(recipe, tools.tokenizer, size=5)
    assert pickle.loads(pickle.dumps(check)).tokenizer is None, "it does not travel to the workers"
    from medcot.data.findings import Chunk, InMemory

    examples = read_examples(recipe).examples
    halves = [check.map(Chunk(1, 6, examples[:6])), check.map(Chunk(7, 6, examples[6:]))]
    one = check.reduce(halves, InMemory(examples))
    other = check.reduce([check.map(Chunk(1, 12, examples))], InMemory(examples))
    assert one == other and SAMPLE > 1000
    counted = next(finding for finding in one if finding.id == "survival")
    assert 5 <= counted.count <= 12


def test_what_cannot_be_read_is_a_finding(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    diagnosis = diagnose(str(tmp_path / "empty.jsonl"))
    assert diagnosis.exit_code == 2 and [finding.id for finding in diagnosis.findings] == ["source_unreadable"]
    assert diagnosis.findings[0].fix == unreadable(DataError("a", "b", diagnosis.findings[0].fix)).findings[0].fix


def test_benchmarks_are_loaded_by_name(tmp_path: Path) -> None:
    item = {"question": question(4), "options": {k: k for k in "ABCD"}, "answer_idx": "A", "answer": "A"}
    assert [name for name, _ in load_items([f"medqa={write(tmp_path / 'exam.jsonl', [item])}"])] == ["medqa"]
