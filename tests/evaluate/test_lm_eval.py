"""The export reads as lm-evaluation-harness's own files: by its schema, written down here, and by its own reader."""

from __future__ import annotations

import importlib.util
import json
import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from made_lines import make_lines, make_respondent, make_task
from medcot.errors import DataError, OutputError
from medcot.evaluate.lm_eval import FILTERS, INVALID, METRICS, export_lm_eval
from medcot.evaluate.resampling import summarise_seeds
from medcot.evaluate.results import Respondent, build_results
from medcot.records import AnswerKind

# As lm_eval 0.4.13 writes them: results_*.json without what a tokenizer or a group adds, and samples_*.jsonl.
RESULT_KEYS = {
    "results", "group_subtasks", "configs", "versions", "n-shot", "higher_is_better", "n-samples", "config",
    "git_hash", "date", "pretty_env_info", "transformers_version", "lm_eval_version", "upper_git_hash",
    "task_hashes", "model_source", "model_name", "model_name_sanitized", "system_instruction",
    "system_instruction_sha", "fewshot_as_multiturn", "chat_template", "chat_template_sha",
    "total_evaluation_time_seconds",
}  # fmt: skip
CONFIG_KEYS = {
    "model", "model_args", "batch_size", "batch_sizes", "device", "use_cache", "limit", "bootstrap_iters",
    "gen_kwargs", "random_seed", "numpy_seed", "torch_seed", "fewshot_seed",
}  # fmt: skip
SAMPLE_KEYS = {
    "doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "filter", "metrics", "doc_hash",
    "prompt_hash", "target_hash",
}  # fmt: skip
MEDQA, PUBMEDQA = make_task("medqa", 60), make_task("pubmedqa", 30, AnswerKind.YESNO)
KWARGS = {"temperature": 0.6, "top_p": 0.95, "think_tokens": 2048, "answer_tokens": 64}
SETTINGS = {**KWARGS, "seeds": [0], "flip_rate": 0.2}
needs_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed")

Export = tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]


def read(folder: Path) -> Export:
    """A model's newest results and its samples by task, found as the harness's own tools find them."""
    (figures,) = folder.glob("results_*.json")
    time = figures.stem.removeprefix("results_")
    samples = {}
    for path in folder.glob("samples_*.jsonl"):
        name = path.name
        assert name[name.rfind("_") + 1 :] == f"{time}.jsonl"
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
        samples[name[name.find("_") + 1 : name.rfind("_")]] = rows
    return json.loads(figures.read_text(encoding="utf-8")), samples


def export(folder: Path, **settings: Any) -> dict[str, Export]:
    base = make_respondent("org/base: 8B", 0.4, [MEDQA, PUBMEDQA, replace(MEDQA, control="rotate-1")], **settings)
    tuned = make_respondent("tuned", 0.6, [MEDQA], **settings)
    results = {**build_results([base, tuned]), "settings": SETTINGS}
    paths = export_lm_eval(results, [base, tuned], folder)
    assert sorted(paths) == sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.name: read(path) for path in folder.iterdir()}


def test_the_files_have_the_keys_of_the_harness(tmp_path: Path) -> None:
    found = export(tmp_path)
    assert set(found) == {"org__base__ 8B", "tuned"}
    for name, (figures, samples) in found.items():
        assert set(figures) == RESULT_KEYS | {"medcot_version"} and set(figures["config"]) == CONFIG_KEYS
        assert figures["model_name_sanitized"] == name
        tasks = set(figures["results"])
        assert tasks == set(samples) and "medcot_medqa" in tasks
        for key in ("configs", "versions", "n-shot", "higher_is_better", "n-samples", "task_hashes"):
            assert set(figures[key]) == tasks
        for task, rows in samples.items():
            assert all(set(row) == SAMPLE_KEYS | set(METRICS) for row in rows)
            assert figures["n-samples"][task]["effective"] * len(FILTERS) == len(rows)
    assert set(found["org__base__ 8B"][1]) == {"medcot_medqa", "medcot_pubmedqa", "medcot_medqa_rotate-1"}


def test_what_is_not_known_is_null(tmp_path: Path) -> None:
    figures, _ = export(tmp_path)["tuned"]
    for key in ("git_hash", "date", "lm_eval_version", "transformers_version", "total_evaluation_time_seconds"):
        assert figures[key] is None
    assert figures["versions"] == {"medcot_medqa": None}
    assert figures["config"]["model_args"] == {"pretrained": "made", "dtype": "bf16", "backend": "local"}
    assert figures["configs"]["medcot_medqa"]["metadata"]["sha256"] == MEDQA.sha256


def test_what_is_known_is_told(tmp_path: Path) -> None:
    one = make_respondent("one", 0.5, [MEDQA, replace(MEDQA, control="budget-256")])
    known = {"created": "2026-11-22T20:00:00+00:00", "timing": {"all": 12.5}, "versions": {"transformers": "5.23.0"}}
    export_lm_eval({**build_results([one]), **known, "settings": SETTINGS}, [one], tmp_path)
    figures, samples = read(tmp_path / "one")
    assert figures["date"] == 1795377600.0 and figures["total_evaluation_time_seconds"] == "12.5"
    assert figures["transformers_version"] == "5.23.0" and figures["lm_eval_version"] is None
    assert figures["config"]["gen_kwargs"] == {"temperature": 0.6, "top_p": 0.95}
    # A budget has a limit of its own, so that of the task is not said of it.
    (row, *_) = samples["medcot_medqa_budget-256"]
    assert row["arguments"]["gen_args_0"]["arg_1"] == {"temperature": 0.6, "top_p": 0.95}


@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)])
def test_figures_are_those_of_our_results(tmp_path: Path, seeds: tuple[int, ...]) -> None:
    figures, samples = export(tmp_path, seeds=seeds)["tuned"]
    tuned = make_respondent("tuned", 0.6, [MEDQA], seeds=seeds)
    ours = build_results([tuned])["scores"]["tuned"]["medqa"]
    theirs = figures["results"]["medcot_medqa"]
    assert theirs["exact_match,strict"] == pytest.approx(ours["accuracy"])
    assert theirs["exact_match,lenient"] == pytest.approx(ours["lenient"]["accuracy"])
    for key in ("unparsed", "unfinished", "failed"):
        assert theirs[f"{key},strict"] * ours["answers"] == pytest.approx(ours[key])
    rights = [[line["outcome"] == "correct" for line in tuned.lines if line["id"] == item.example.id]
              for item in MEDQA.items]  # fmt: skip
    assert theirs["exact_match_stderr,strict"] == pytest.approx(summarise_seeds(rights).standard_error)
    assert figures["configs"]["medcot_medqa"]["repeats"] == len(seeds)
    assert all(len(row["resps"][0]) == len(seeds) for row in samples["medcot_medqa"])


def test_samples_say_what_was_asked_and_read(tmp_path: Path) -> None:
    figures, samples = export(tmp_path)["tuned"]
    lines = {line["id"]: line for line in make_respondent("tuned", 0.6, [MEDQA]).lines}
    rows = samples["medcot_medqa"]
    for row in rows:
        line = lines[row["doc"]["id"]]
        assert row["arguments"]["gen_args_0"] == {"arg_0": line["prompt"], "arg_1": KWARGS}
        assert row["resps"] == [[line["text"]]] and row["target"] == line["gold"]
        expected = (line["parsed"] or INVALID) if row["filter"] == "strict" else line["answer"]
        assert row["filtered_resps"] == [expected]
    assert any(row["filtered_resps"] == [INVALID] for row in rows)
    strict = [row for row in rows if row["filter"] == "strict"]
    assert statistics.fmean(row["exact_match"] for row in strict) == pytest.approx(
        figures["results"]["medcot_medqa"]["exact_match,strict"]
    )


def test_a_question_has_one_number_for_all_models(tmp_path: Path) -> None:
    lines = make_lines(MEDQA, 0.5)
    one = Respondent("one", {}, lines)
    other = Respondent("other", {}, lines[::-1])
    export_lm_eval(build_results([one, other]), [one, other], tmp_path)
    first, second = ({(row["doc_id"], row["doc_hash"]) for row in read(tmp_path / name)[1]["medcot_medqa"]}
                     for name in ("one", "other"))  # fmt: skip
    assert first == second and {number for number, _ in first} == set(range(60))
    figures = read(tmp_path / "one")[0]
    assert figures["n-samples"]["medcot_medqa"] == {"original": None, "effective": 60}  # no facts, no claim
    assert figures["model_source"] is None


def test_a_viewer_that_knows_the_harness_only_finds_its_way(tmp_path: Path) -> None:
    # The fields that its scripts/zeno_visualize.py reads.
    for figures, samples in export(tmp_path).values():
        assert isinstance(figures["config"]["model_args"], dict)
        for task, config in figures["configs"].items():
            rows = samples[task]
            assert config["output_type"] == "generate_until" and config["filter_list"]
            ids = [f"{row['doc_id']}.{row['filter']}" for row in rows]
            assert len(set(ids)) == len(ids)
            assert all(isinstance(row["arguments"]["gen_args_0"]["arg_0"], str) for row in rows)
            assert all(str(row["filtered_resps"][0]) is not None for row in rows)
            for metric in config["metric_list"]:
                assert all(isinstance(row[metric["metric"]], float) for row in rows)


def test_strange_names_and_texts_are_kept(tmp_path: Path) -> None:
    lines = [{**line, "task": "sets/my set.jsonl", "text": "a\u2028b \ud800", "answer": "\ud800"}
             for line in make_lines(MEDQA, 0.5)]  # fmt: skip
    one = Respondent("..", {}, lines)
    export_lm_eval(build_results([one]), [one], tmp_path / "out")
    figures, samples = read(tmp_path / "out" / "model")
    assert figures["results"]["medcot_sets-my-set.jsonl"]["alias"] == "sets/my set.jsonl"
    assert samples["medcot_sets-my-set.jsonl"][0]["resps"] == [["a\u2028b \ud800"]]
    assert not math.isnan(figures["results"]["medcot_sets-my-set.jsonl"]["exact_match_stderr,strict"])


def test_one_question_has_no_standard_error(tmp_path: Path) -> None:
    one = Respondent("one", {}, make_lines(MEDQA, 0.5)[:1])
    export_lm_eval(build_results([one]), [one], tmp_path)
    assert read(tmp_path / "one")[0]["results"]["medcot_medqa"]["exact_match_stderr,strict"] == "N/A"


def test_names_that_are_one_file_are_refused(tmp_path: Path) -> None:
    lines = make_lines(MEDQA, 0.5)
    pair = [Respondent("a/b", {}, lines), Respondent("A__b", {}, lines)]
    with pytest.raises(DataError, match="another name"):
        export_lm_eval(build_results(pair), pair, tmp_path)
    tasks = [{**line, "task": task} for task in ("a:b", "a/b") for line in lines]
    one = Respondent("one", {}, tasks)
    with pytest.raises(DataError, match="'a:b' and 'a/b'"):
        export_lm_eval(build_results([one]), [one], tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    one = Respondent("one", {}, make_lines(MEDQA, 0.5))
    with pytest.raises(OutputError, match="cannot be written"):
        export_lm_eval(build_results([one]), [one], tmp_path / "file")


@needs_lm_eval
def test_the_harness_reads_it(tmp_path: Path) -> None:
    from lm_eval import result_schema, utils

    found = export(tmp_path, seeds=(0, 1))
    for name, (figures, samples) in found.items():
        assert set(figures) - {"medcot_version"} <= set(result_schema.EvalResults.__annotations__)
        assert all(set(row) >= result_schema.SampleResult.__required_keys__ for row in samples["medcot_medqa"])
        table = utils.make_table(figures)
        accuracy = figures["results"]["medcot_medqa"]["exact_match,strict"]
        assert "|strict |" in table and f"{accuracy:.4f}" in table and "exact_match|↑" in table
        assert utils.sanitize_model_name(figures["model_name"]) == name
        files = [path.as_posix() for path in (tmp_path / name).iterdir()]
        assert json.loads(Path(utils.get_latest_filename(utils.get_results_filenames(files))).read_text()) == figures
        names = {utils.get_file_task_name(Path(path).name) for path in utils.get_sample_results_filenames(files)}
        assert names == set(samples)
        for task, rows in samples.items():
            digests = [row["doc_hash"] + row["prompt_hash"] + row["target_hash"] for row in rows]
            assert figures["task_hashes"][task] == utils.hash_string("".join(digests))
            document = json.dumps(rows[0]["doc"], indent=2, ensure_ascii=False)
            assert rows[0]["doc_hash"] == utils.hash_string(document)


@needs_lm_eval
def test_the_harness_would_aggregate_to_the_same_figures(tmp_path: Path) -> None:
    from lm_eval.api.metrics import mean, mean_stderr

    figures, samples = export(tmp_path, seeds=(0, 1))["tuned"]
    for filter_name in FILTERS:
        values = [row["exact_match"] for row in samples["medcot_medqa"] if row["filter"] == filter_name]
        theirs = figures["results"]["medcot_medqa"]
        assert theirs[f"exact_match,{filter_name}"] == pytest.approx(mean(values))
        assert theirs[f"exact_match_stderr,{filter_name}"] == pytest.approx(mean_stderr(values))
