import pytest
from report_folder import RunFolder, make_side

from medcot.report import words
from medcot.report.charts import draw_accuracy, draw_training
from medcot.report.words import judge, judge_data


@pytest.mark.parametrize(
    ("before", "after", "p_value", "tone", "says"),
    [
        (0, 3, 0.001, "better", "Accuracy improved from 0.0"),
        (3, 0, 0.001, "worse", "Accuracy got worse, from 75.0"),
        (0, 3, 0.05, "open", "a rise of this size can be chance"),
        (3, 0, 0.25, "open", "a fall of this size can be chance"),
        (2, 2, 1.0, "open", "stayed the same"),
        (0, 3, None, "open", "the paired test is missing"),
    ],
)
def test_the_verdict_follows_the_test_and_not_the_bars(before, after, p_value, tone, says):
    delta = (after - before) / 4
    verdict = judge(
        {"eval": {"before": make_side(before), "after": make_side(after), "delta": delta, "p_value": p_value}}
    )
    assert verdict.tone == tone
    assert says in verdict.sentence
    assert ("cannot be told" in verdict.headline or "can be told" in verdict.headline) == (tone == "open")


def test_the_verdict_of_several_tasks_is_holms_and_not_the_pools():
    side = make_side(2)
    same = {"verdict": "no detectable change", "interval": None, "p_adjusted": 0.06, "before": side, "after": side}
    tasks = {name: {"change": same | {"task": name, "delta": 0.1}} for name in "ab"}
    evaluation = {"before": make_side(0), "after": make_side(3), "delta": 0.75, "p_value": 0.001, "tasks": tasks}
    assert judge({"eval": evaluation}).headline == "No detectable change on any of 2 tasks"
    tasks["b"]["change"] |= {"verdict": "worse", "delta": -0.1}
    assert judge({"eval": evaluation}).tone == "worse"
    assert judge({"eval": evaluation | {"tasks": {"a": tasks["a"]}}}).tone == "open"


def _finding(name, severity):
    return {"id": name, "severity": severity}


@pytest.mark.parametrize(
    ("verdict", "findings", "tone", "sentence"),
    [
        ("red", [_finding("a", "red")], "worse", "1 finding stops a run before its first step: a. Do what it says under"
         " each, or accept it by name in data.accept."),
        ("red", [_finding(n, "red") for n in "abc"] + [_finding("y", "yellow")], "worse", "3 findings stop a run before"
         " its first step: a, b and c. Do what it says under each, or accept it by name in data.accept. 1 finding is"
         " for you to judge."),
        ("yellow", [_finding("y", "yellow"), _finding("z", "yellow"), _finding("ok", "red")], "open", "2 findings are"
         " for you to judge. Red, but accepted by the recipe: ok."),
        ("clean", [_finding("i", "info")], "better", "Nothing stops a run or needs your judgement."),
        (None, [], "none", "There is no verdict of the data doctor's."),
    ],
)  # fmt: skip
def test_the_data_verdict_names_what_stops_a_run(verdict, findings, tone, sentence):
    said = judge_data({"verdict": verdict, "findings": findings, "accepted": ["ok"]})
    assert (said.tone, said.sentence) == (tone, sentence)


def test_a_running_evaluation_is_not_called_absent():
    assert "has not been graded" in judge({"status": "running", "eval": {"source": "x"}}).sentence


@pytest.mark.parametrize(
    ("form", "value", "text"),
    [
        (words.percent, 0.5, "50.0 %"),
        (words.percent, None, "–"),
        (words.points, 0.54, "+54.0"),
        (words.points, -0.031, "−3.1"),
        (words.points, -0.0001, "0.0"),
        (words.p_text, 0.00003, "p < 0.0001"),
        (words.p_text, 0.0004, "p = 0.0004"),
        (words.p_text, 0.0312, "p = 0.031"),
        (words.p_text, 0.0499, "p = 0.050"),
        (words.p_text, 1.0, "p = 1.000"),
        (words.count, 12345, "12,345"),
        (words.count, "?", "–"),
        (words.number, 2e-4, "0.0002"),
        (words.number, 2e-5, "2e-5"),
        (words.number, 1.25e7, "1.25e7"),
        (words.number, -0.5, "−0.5"),
        (words.number, 0, "0"),
        (words.number, float("nan"), "not a finite number"),
        (words.params, 134515008, "134.5 M"),
        (words.params, 8030261248, "8.03 B"),
        (words.seconds, 0.84, "0.8 s"),
        (words.seconds, 59.7, "1 min 00 s"),
        (words.seconds, 7620, "2 h 07 min"),
        (words.interval, [0.462, 0.653], "46.2–65.3 %"),
        (words.interval, None, "–"),
        (words.change_interval, {"low": -0.02, "high": 0.1, "method": "x"}, "−2.0 to +10.0"),
        (words.change_interval, (0.0, 0.1), "0.0 to +10.0"),
        (words.change_interval, None, "–"),
        (words.size, -0.0004, "0.0"),
        (words.join, ["a", "b", "c"], "a, b and c"),
        (words.label, "memory_gb", "Memory, GB"),
        (words.label, "free_water_deficit", "Free water deficit"),
    ],
)
def test_figures_as_words(form, value, text):
    assert form(value).replace("\u202f", " ") == text


def test_charts_take_the_colours_of_the_page_and_leave_out_what_is_missing():
    metrics = [RunFolder.metric(step) for step in (10, 20)]
    charts = draw_training(metrics)
    assert [chart.title for chart in charts] == [
        "Training loss",
        "Learning rate",
        "Gradient norm",
        "Tokens per second",
        "Memory, GB",
    ]
    for chart in charts:
        assert "#0a00" not in chart.svg and "var(--after)" in chart.svg
        assert chart.svg.startswith("<svg") and "<script" not in chart.svg
    assert [name for _, name in charts[3].legend] == ["all tokens", "trained tokens"]
    assert [chart.title for chart in draw_training([{"step": 1, "loss": 2.0, "grad_norm": None}])] == ["Training loss"]
    assert draw_training([]) == []
    assert draw_training([{"step": 1, "loss": float("inf")}]) == []


def test_the_accuracy_chart_says_its_figures_aloud():
    chart = draw_accuracy([("before", make_side(0)), ("after", make_side(4))])
    assert "before 0.0" in chart.svg and "after 100.0" in chart.svg
    assert "aria-label" in chart.svg
