"""The page of an evaluation says what its lines say, whatever is in them and whatever of them is missing."""

import re
import statistics
from dataclasses import asdict, replace
from functools import lru_cache

import pytest
import test_page
from test_page import Elements, plain

from made_lines import make_lines, make_respondent, make_task
from medcot.evaluate.lines import group_by_task
from medcot.evaluate.power import compute_plan
from medcot.evaluate.results import Respondent, build_results
from medcot.records import AnswerKind
from medcot.report import eval_page
from medcot.report.eval_page import render_evaluation
from medcot.report.eval_views import (
    build_outcomes,
    build_pooled_topics,
    build_topics,
    view_results,
)
from medcot.report.eval_words import judge_evaluation
from medcot.report.words import points

# No markup, no formula, no template, no mark of direction may come through.
EVIL = f"{test_page.EVIL} $\\alpha_{{$ \u202e\x1b[31m"
MEDQA = make_task(num_items=80)
PUBMEDQA = make_task("pubmedqa", 40, AnswerKind.YESNO)
MEDCALC = make_task("medcalc-bench", 30, AnswerKind.NUMBER)
CONTROLS = [replace(MEDQA, control=name) for name in ("rotate-1", "blank", "no-thinking")]
KINDS = ("one", "two", "seeds", "many", "budgets", "failures", "nasty", "controls only")


def fail(one):
    nothing = dict.fromkeys(("text", "think", "answer"), "")
    failed = {"outcome": "failed", "lenient_outcome": "failed", "parsed": None, "finish": None, **nothing}
    return replace(one, lines=[{**line, **failed, "error": "TimeoutError: none came"} for line in one.lines])


def poison(one):
    def spoil(line):
        spoilt = {key: f"{line[key]}{EVIL}" for key in ("topic", "question", "think", "answer", "task")}
        return {**line, **spoilt, "error": EVIL, "parsed": line["parsed"] and line["parsed"] + EVIL}

    tasks = {task + EVIL: {**facts, "sentences": [EVIL], "sha256": EVIL} for task, facts in one.tasks.items()}
    return Respondent(one.name + EVIL, {"source": EVIL, EVIL: EVIL}, [spoil(line) for line in one.lines], tasks)


def add_budgets(one, chances):
    lines = [
        line
        for cap, chance in chances.items()
        for line in make_lines(replace(MEDQA, control=f"budget-{cap}"), chance, cap=cap, rng_seed=len(one.name))
    ]
    return replace(one, lines=[*one.lines, *lines])


def make_plan(tasks):
    plans = [(task.base, compute_plan(len(task.items), num_tasks=len(tasks), effects=())) for task in tasks]
    return [{"task": name, "sentence": plan.describe(), **asdict(plan)} for name, plan in plans]


@lru_cache
def make_case(kind):
    """Return results, as results.json holds them, and the respondents they are of."""
    respondents, extra = answer(kind)
    return {**build_results(respondents), **extra}, respondents


def answer(kind):
    three, extra = [MEDQA, PUBMEDQA, MEDCALC], {}
    if kind == "one":
        extra = {"plan": make_plan(three), "settings": {"temperature": 0.6, "seeds": [0, 1]}, "status": "complete"}
        extra |= {"timing": {"all": 12.5}, "machine": {"cores": 2}, "versions": {"medcot": "0.1"}, "suite": "medicine"}
        return [make_respondent("base", 0.55, three)], extra
    if kind == "two":
        tasks = [*three, *CONTROLS]
        return [make_respondent("base", 0.4, tasks), make_respondent("tuned", 0.7, tasks)], {"plan": make_plan(three)}
    if kind == "seeds":
        tasks = [MEDQA, CONTROLS[0]]
        return [make_respondent(name, 0.5, tasks, seeds=range(3)) for name in ("base", "tuned")], extra
    if kind == "many":
        names = ["medqa", "medqa-5", "medmcqa", "mmlu-medical"]
        tasks = [make_task(name, 30) for name in names]
        models = [("base", 0.4), ("tuned", 0.9), ("worse one", 0.1), ("others", 0.4)]
        return [make_respondent(name, accuracy, tasks) for name, accuracy in models], extra
    if kind == "budgets":
        models = [make_respondent(name, 0.5, [MEDQA]) for name in ("base", "tuned")]
        return [add_budgets(one, {256: 0.2, 1024: 0.6, 2048: 0.61}) for one in models], extra
    if kind == "failures":
        extra = {"status": "failed", "error": "the server went away"}
        return [fail(make_respondent("base", 0.5, [MEDQA])), make_respondent("tuned", 0.5, [MEDQA])], extra
    if kind == "controls only":
        return [make_respondent("base", 0.5, CONTROLS)], extra
    one = dict.fromkeys(("status", "error", "suite", "created"), EVIL) | {"settings": {EVIL: EVIL}}
    one |= {"timing": {EVIL: 2.0}, "plan": [{"task": MEDQA.base + EVIL, "sentence": EVIL}], "versions": {EVIL: EVIL}}
    return [poison(make_respondent(name, 0.5, [MEDQA])) for name in ("base", "tuned")], one


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    found = {}
    for kind in KINDS:
        path = tmp_path_factory.mktemp("page") / "report.html"
        assert render_evaluation(*make_case(kind), path, title=f"Of {kind}") == path
        assert [it.name for it in path.parent.iterdir()] == ["report.html"]
        found[kind] = path.read_text(encoding="utf-8")
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_one_file_that_asks_for_nothing_and_keeps_text_text(pages, kind):
    elements = Elements(pages[kind])
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form"} & set(elements.tags)
    assert not [key for _, key, _ in elements.attributes if key in {"src", "srcset", "action"} or key.startswith("on")]
    ids = [value for _, key, value in elements.attributes if key == "id"]
    links = [value for _, key, value in elements.attributes if key in {"href", "xlink:href"}]
    assert len(ids) == len(set(ids)) and {link[1:] for link in links} <= set(ids)
    assert "default-src 'none'" in pages[kind] and not re.search(r"url\((?!#)|@import", pages[kind])
    assert "{{" not in pages[kind] or kind == "nasty"
    for tag in ("details", "section", "div", "table", "span", "p", "ul"):
        assert elements.tags.count(tag) == pages[kind].count(f"</{tag}>"), tag
    assert len(pages[kind]) < 1_000_000


def test_nasty_text_is_shown_and_does_nothing(pages):
    assert "alert(1)" in plain(pages["nasty"]) and "{{ 7*7 }}" in plain(pages["nasty"])
    assert "\\u202e" in pages["nasty"] and not set(pages["nasty"]) & {"\u202e", "\x1b"}


def test_one_model_stands_against_the_floor(pages):
    text = plain(pages["one"]).replace("\u202f", " ")
    view = view_results(make_case("one")[0])
    score = view.rows[0].scores[0]
    assert f"medqa {100 * score['accuracy']:.1f} %" in text and "of always giving the commonest answer)" in text
    assert "80 questions of 80, 4 options" in text and f"lenient {100 * score['lenient']['accuracy']:.1f} %" in text
    assert "What these questions can show" in text and "is found with 80% probability" in text
    assert "Questions that flipped" not in text and "minus" not in text
    for option in ("--controls rotate", "--controls blank", "--controls no-thinking", "--budgets", "--seeds 4"):
        assert f"{option}" in text
    for fact in ("Temperature", "12 s", "Versions", "medicine", "results.json"):
        assert fact in text
    assert "Not all questions were answered" not in text


def test_two_models_have_deltas_verdicts_flips_and_controls(pages):
    text = plain(pages["two"]).replace("\u202f", " ")
    results = make_case("two")[0]
    (comparison,) = results["comparisons"]
    change = comparison["tasks"][0]
    assert "tuned against base: better on medqa" in text
    assert f"+{100 * change['delta']:.1f}" in text and f"{100 * change['flip_rate']:.1f} % flipped" in text
    for kind in ("gained", "lost"):
        assert f"medqa: {kind}{change[kind]}" in text
    assert "Answers that did not follow" in text and "Thinking makes no difference that can be told" in text
    assert "the options give some away" in text
    assert "--controls" not in text and "--budgets" in text
    assert text.index("better on medqa") < text.index("Accuracy with 95") < text.index("It came to")
    assert pages["two"].count('class="side before"') == pages["two"].count('class="side after"') > 20


def test_groups_are_capped_and_say_where_the_rest_is(tmp_path, monkeypatch):
    monkeypatch.setattr(eval_page, "MAX_FOLDED", 3)
    results, respondents = make_case("two")
    page = render_evaluation(results, respondents, tmp_path / "p.html").read_text()
    total = results["comparisons"][0]["tasks"][0]["gained"]
    assert page.count('class="item"') <= 3 * 6
    assert f"{total - 3} more are lines of items/base/medqa.jsonl and items/tuned/medqa.jsonl." in plain(page)


def test_many_models_are_compared_with_the_first(pages):
    text = plain(pages["many"])
    assert "Against base, better: tuned; worse: worse one; no detectable change: others" in text
    assert "tuned: better on 4 of 4 tasks" in text
    assert "not over the models" in text and "and minus base" in text


def test_several_seeds_vote(pages):
    text = plain(pages["seeds"]).replace("\u202f", " ")
    score = make_case("seeds")[0]["scores"]["base"]["medqa"]
    assert f"{100 * score['seed_flip_rate']:.1f} % of the questions change their verdict between two seeds" in text
    assert f"the majority of 3 is right on {100 * score['votes']['majority']['3']:.1f} %" in text
    assert "Calibration error" in text and "sign flips over questions" in text
    assert 'id="majority-0-' in pages["seeds"] and 'id="calibration-0-' in pages["seeds"]
    moved = pages["seeds"][pages["seeds"].index("Options that change places") :]
    assert "–</td>" not in moved[: moved.index("</table>")], "that two seeds differ too is told"
    assert "--seeds" not in text


def test_budgets_are_drawn_and_one_recommended(pages):
    text = plain(pages["budgets"])
    assert "Serve with" in text and 'id="budgets-0-' in pages["budgets"] and "--budgets" not in text
    assert all(f"{budget}" in text for budget in ("256", "1,024", "2,048"))


def test_failures_are_said_with_their_reason(pages):
    text = plain(pages["failures"])
    assert "No answer came from base" in text and "80 × TimeoutError: none came" in text
    assert "The evaluation stopped: the server went away" in text and "Not all questions were answered" in text
    assert "Generation failed; there is no text." in text


def test_controls_alone_make_a_page(pages):
    text = plain(pages["controls only"])
    assert "No graded answers" in text and "Options without the question" in text


def test_a_task_that_one_side_lacks_is_named(tmp_path):
    respondents = [make_respondent("base", 0.5, [MEDQA, PUBMEDQA]), make_respondent("tuned", 0.5, [MEDQA])]
    page = render_evaluation(build_results(respondents), respondents, tmp_path / "p.html").read_text()
    assert "tuned against base: no question of pubmedqa was put to both" in plain(page)
    assert "–" in plain(page)


def test_every_share_of_answers_adds_up():
    view = view_results(make_case("two")[0])
    outcomes = build_outcomes(view)
    assert len(outcomes) == 6
    assert all(sum(line.shares.values()) == pytest.approx(1) for line in outcomes)
    assert min(outcomes[0].shares.values()) > 0 and outcomes[0].cut == outcomes[0].shares["unfinished"]
    topics = build_topics(view.rows[0])
    assert (
        sum(topic.changes[0].delta for topic in topics)
        == view.rows[0].changes[0]["gained"] - view.rows[0].changes[0]["lost"]
    )


def _render(respondents, path, **extra):
    page = render_evaluation({**build_results(respondents), **extra}, respondents, path / "p.html").read_text()
    return plain(page).replace("\u202f", " ")


def test_topics_of_unequal_numbers_of_answers_change_by_shares():
    tasks = [make_task(num_items=80), make_task(num_items=60)]  # the second side lacks questions, too
    respondents = [
        make_respondent(name, 0.5, [task], seeds=range(seeds))
        for name, task, seeds in zip(("base", "tuned"), tasks, (1, 4), strict=True)
    ]
    row = view_results(build_results(respondents)).rows[0]
    for topic in build_topics(row):
        shares = [
            statistics.fmean(
                line["outcome"] == "correct"
                for line in one.lines
                if line["topic"] == topic.name and int(line["id"].split("-")[1]) < 60
            )
            for one in respondents
        ]
        assert topic.changes[0].is_share and topic.changes[0].delta == pytest.approx(shares[1] - shares[0])


def test_the_page_shows_shares_of_topics_in_points(tmp_path):
    lines = make_lines(MEDQA, 0.5, seeds=range(4))
    respondents = [
        Respondent(name, {}, [line for line in lines if line["seed"] in seeds])
        for name, seeds in (("base", (0,)), ("tuned", range(4)))
    ]
    text = _render(respondents, tmp_path)
    changes = [topic.changes[0].delta for topic in build_topics(view_results(build_results(respondents)).rows[0])]
    assert all(abs(change) < 1 and f"{points(change)}points" in text for change in changes)


def test_a_topic_that_one_side_does_not_know_has_no_change():
    lines = make_lines(MEDQA, 0.5)
    nameless = [{**line, "topic": None} for line in lines]
    results = build_results([Respondent("base", {}, nameless), Respondent("tuned", {}, lines)])
    assert [topic.changes for topic in build_topics(view_results(results).rows[0])] == [(None,)] * 3


def test_topics_pooled_over_a_run():
    counts = {"n": 10, "correct": 5}
    sides = [("before", {"topics": {"a": counts, "b": counts}}), ("after", {"topics": {"a": {"n": 40, "correct": 30}}})]
    _, (first, second) = build_pooled_topics(sides)
    assert first.changes[0].is_share and first.changes[0].delta == 0.25 and second.changes == (None,)
    _, (alone,) = build_pooled_topics([("before", {"topics": {"a": counts}}), ("after", {"topics": {"a": counts}})])
    assert not alone.changes[0].is_share and alone.changes[0].delta == 0
    assert build_pooled_topics(sides[:1])[1][0].changes == ()


def test_no_change_says_which_one_would_have_been_found():
    results = build_results([Respondent(name, {}, make_lines(MEDQA, 0.5)) for name in ("base", "tuned")])
    results["plan"] = make_plan([MEDQA])
    found = 100 * results["plan"][0]["detectable"]
    said = f"a change of {found:.1f} points was likely to be found"
    assert said in judge_evaluation(view_results(results), results).sentence
    results["plan"].append({"task": "other", "detectable": 2 * results["plan"][0]["detectable"]})
    said = f"a change of {found:.1f} to {2 * found:.1f} points, by task, was likely"
    assert said in judge_evaluation(view_results(results), results).sentence


def test_notes_of_the_results_stand_above_all_figures(tmp_path):
    respondents = [make_respondent("base", 0.5, [MEDQA])]
    text = _render(respondents, tmp_path, notes=["base thought 512 tokens, tuned 2,048."])
    assert text.index("base thought 512 tokens, tuned 2,048.") < text.index("What became of the answers")


def test_how_each_model_was_asked_is_listed(tmp_path):
    one = make_respondent("base", 0.5, [MEDQA])
    asked = {"think_tokens": 4321, "ending": "free"}
    text = _render([replace(one, facts={**one.facts, "settings": asked})], tmp_path)
    assert "Think tokens4321" in text.replace("4,321", "4321") and "Endingfree" in text and "Settings" not in text


def test_a_comparison_sends_to_the_folders_compared(tmp_path, monkeypatch):
    monkeypatch.setattr(eval_page, "MAX_FOLDED", 3)
    respondents = make_case("two")[1]
    text = _render(respondents, tmp_path, kind="comparison", folders=["evals/one", "evals/two"])
    assert "more are lines of the folders compared." in text and "items/" not in text
    assert "Every answer is a line of a file in the folders compared: evals/one and evals/two." in text
    assert "in the folders compared." in _render(respondents, tmp_path, kind="comparison")
    assert "folders compared" not in _render(respondents, tmp_path, kind="evaluation")


def _rotate(read):
    rotated = make_lines(CONTROLS[0], 0.5, rng_seed=3)
    kept = [line if read(place) else {**line, "parsed": None} for place, line in enumerate(rotated)]
    return Respondent("base", {}, [*make_lines(MEDQA, 0.99), *kept])


def test_rotations_that_could_not_be_read_are_left_out_and_counted(tmp_path):
    some, none = _rotate(lambda place: place % 2), _rotate(lambda place: False)
    agreement = build_results([some])["controls"]["base"]["medqa"]["rotate-1"]["agreement"]
    text = _render([some], tmp_path)
    moved = text[text.index("Options that change places") :]
    assert re.search(rf"by 1\s*{agreement['n']}\s*{100 * agreement['flip_rate']:.1f} %", moved)
    assert re.search(rf"–\s*{agreement['num_unread']}\s", moved) and "Nothing can be told" not in text
    text = _render([none], tmp_path)
    assert "Nothing can be told: none of 80 was read in both orders" in text


def test_two_seeds_differ_by_answers_that_were_read(tmp_path):
    def answer(line):
        # Seed 0 always says A, seed 1 says A of even questions and nothing of odd ones: those read never differ.
        odd = int(line["id"].split("-")[1]) % 2
        return {**line, "parsed": None, "outcome": "unparsed"} if line["seed"] and odd else {**line, "parsed": "A"}

    lines = [answer(line) for line in make_lines(MEDQA, 0.99, seeds=(0, 1))]
    one = Respondent("base", {}, [*lines, *make_lines(CONTROLS[0], 0.9)])
    results = build_results([one])
    ((_, by_seed),) = eval_page.build_rotations(results, view_results(results), {"base": group_by_task(one.lines)})
    assert by_seed == 0


def test_the_same_results_give_the_same_bytes(tmp_path):
    first, second = (render_evaluation(*make_case("budgets"), tmp_path / f"{n}.html").read_bytes() for n in (1, 2))
    assert first == second
