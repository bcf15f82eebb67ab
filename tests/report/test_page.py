import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import yaml
from data_reports import MAIL, make_report
from report_folder import make_sample

from made_lines import make_respondent, make_task
from medcot.errors import DataError
from medcot.report import page as page_module
from medcot.report import render_report
from medcot.report.folder import read_folder

EVIL = """<script>alert(1)</script><img src=x onerror=alert(1)>"' onload='x' {{ 7*7 }} </details></style>&amp;"""


class Elements(HTMLParser):
    """Collects what a browser would act on."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, key, value) for key, value in attrs]

    def handle_data(self, data):
        self.text.append(data)


def draw(folder):
    return render_report(folder.run).read_text(encoding="utf-8")


def plain(html):
    return " ".join("".join(Elements(re.sub(r"<style.*?</style>", "", html, flags=re.S)).text).split())


def poison(value):
    """Put EVIL behind every text of a JSON value, and in place of the keys that are shown."""
    if isinstance(value, str):
        return value + EVIL
    if isinstance(value, list):
        return [poison(inner) for inner in value]
    return {key: poison(inner) for key, inner in value.items()} if isinstance(value, dict) else value


def test_the_report_holds_the_facts_of_the_run(folder):
    text = plain(draw(folder))
    for fact in ["3,197", "391,204", "214,880", "134.5\u202fM", "2 min 05 s".replace(" ", "\u202f", 1), "2.5 → 0.31"]:
        assert " ".join(fact.split()) in text
    assert "from 25.0 % (95 % interval 5.0–45.0 %) to 50.0 %" in text.replace("\u202f", " ")
    assert "exact McNemar p = 0.500" in text
    assert "2 went from wrong to right, 1 from right to wrong" in text
    assert "empty 'Response'" in text
    assert "Not for diagnosis" in text


def test_one_file_that_asks_for_nothing(folder):
    elements = Elements(draw(folder))
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form"} & set(elements.tags)
    assert [(tag, key) for tag, key, _ in elements.attributes if key in {"src", "srcset", "action"}] == []
    links = [value for _, key, value in elements.attributes if key in {"href", "xlink:href"}]
    assert links and all(link.startswith("#") for link in links)
    assert "default-src 'none'" in draw(folder)
    assert not re.search(r"url\((?!#)|@import", draw(folder))


def test_every_anchor_has_its_target_and_every_id_is_its_own(folder):
    elements = Elements(draw(folder))
    ids = [value for _, key, value in elements.attributes if key == "id"]
    assert len(ids) == len(set(ids))
    assert {value[1:] for tag, key, value in elements.attributes if tag == "a" and key == "href"} <= set(ids)


def test_text_from_anywhere_stays_text(folder):
    clean = Elements(draw(folder))
    folder.facts = poison(folder.facts)
    folder.facts["eval"]["before"]["topics"] = {EVIL: {"n": 4, "correct": 1}}
    folder.facts["eval"]["after"]["topics"] = {EVIL: {"n": 4, "correct": 2}}
    folder.facts |= {"machine": {EVIL: EVIL}, "versions": {EVIL: EVIL}, "timing": {EVIL: 3.0}, "error": EVIL}
    folder.facts["data"][EVIL] = {EVIL: EVIL, "source": EVIL}
    folder.write_facts()
    for name in ("before", "after"):
        lines = (folder.run.samples / f"{name}.jsonl").read_text().splitlines()
        shown = ("topic", "question", "gold", "prompt", "text", "think", "answer", "parsed")
        samples = [json.loads(line) for line in lines]
        folder.write(f"samples/{name}.jsonl", [s | dict.fromkeys(shown, EVIL) for s in samples])
    folder.write("data/quarantine.jsonl", [{"row_number": 1, "reason": EVIL, "row": {}}])
    folder.run.recipe.write_text(yaml.safe_dump({"name": EVIL, "description": EVIL, "lora": {EVIL: EVIL}}))
    html = draw(folder)
    dirty = Elements(html)
    assert "<script" not in html and "<img" not in html
    assert set(dirty.tags) <= set(clean.tags) | {"p"}
    assert not [key for _, key, _ in dirty.attributes if key.startswith("on")]
    assert dirty.tags.count("details") == html.count("</details>")
    assert "alert(1)" in plain(html) and "{{ 7*7 }}" in plain(html)


@pytest.mark.parametrize("facts", [{}, {"status": "running"}, {"eval": None, "data": None, "train": None}])
def test_a_folder_with_nothing_but_run_json(folder, facts):
    for path in [folder.run.metrics, folder.run.recipe, folder.run.samples / "before.jsonl"]:
        path.unlink()
    (folder.run.samples / "after.jsonl").unlink()
    folder.facts = facts
    folder.write_facts()
    html = draw(folder)
    assert "No graded evaluation" in html
    assert "<svg" not in html


def test_the_data_doctors_verdict_stands_with_the_data(folder):
    report = make_report(sentences=["never shown here"])
    folder.facts["data"]["doctor"] = {key: report[key] for key in ("findings", "verdict")}
    folder.write_facts()
    folder.run.recipe.write_text("data: {accept: [forged_tags]}")
    text = plain(draw(folder))
    assert "Red: this data stops a run" in text and "No reasoning." in text and "Over length." in text
    assert "Red, but accepted by the recipe: forged_tags." in text
    assert "Contamination." not in text  # for the record only: the data report has it
    assert "The data report" not in text and "Where the rows come from" not in text
    (folder.run.data / "report.json").write_text(json.dumps(report))
    (folder.run.data / "report.html").write_text("<html>")
    html = draw(folder)
    assert '<a href="data/report.html">The data report</a>' in html
    assert f'title="{"ab" * 32}"' in html and "/srv/someone" not in html


def test_text_of_the_data_report_stays_text(folder):
    report = poison(make_report())
    for finding in report["findings"]:
        finding["severity"] = finding["severity"].removesuffix(EVIL)
        finding["says"] += f"\x1b\u202e {MAIL}"
    (folder.run.data / "report.json").write_text(json.dumps(report))
    html = draw(folder)
    assert "<script" not in html and "<img" not in html
    assert not set(html) & {"\x1b", "\u202e"} and MAIL not in html
    assert "alert(1)" in plain(html)


@pytest.mark.parametrize(("content", "note"), [("{", "is not JSON"), ("[]", "holds a list")])
def test_a_data_report_that_cannot_be_read_is_said(folder, content, note):
    (folder.run.data / "report.json").write_text(content)
    text = plain(draw(folder))
    assert f"data/report.json {note}" in text
    assert "Red:" not in text


def test_no_evaluation_still_shows_the_asked_questions(folder):
    folder.facts["eval"] = {"source": None, "before": None, "after": None}
    folder.write_facts()
    for name in ("before", "after"):
        folder.write(f"samples/{name}.jsonl", [make_sample("ask", "a0")])
    text = plain(draw(folder))
    assert "cannot say whether the model got better" in text
    assert "Thinking about a0." in text
    assert "Graded questions" not in text


def test_a_run_that_failed_after_the_first_evaluation(folder):
    folder.facts["status"] = "failed"
    folder.facts["error"] = "out of memory"
    folder.facts["eval"] = {"source": "builtin:clinic[:4]", "before": folder.facts["eval"]["before"]}
    folder.write_facts()
    (folder.run.samples / "after.jsonl").unlink()
    text = plain(draw(folder))
    assert "Only half of the comparison is there" in text
    assert "out of memory" in text
    assert "Wrong before; not asked after" in text
    assert "improved" not in text


def test_a_line_cut_by_a_kill_is_skipped_and_said(folder):
    with folder.run.metrics.open("a") as file:
        file.write('{"step": 70, "lo')
    assert "1 unreadable line of metrics.jsonl skipped." in plain(draw(folder))


def test_a_loss_that_is_not_a_number_is_said(folder):
    folder.write("metrics.jsonl", [folder.metric(10), folder.metric(20) | {"loss": float("nan")}])
    assert "1 logging step(s) have a loss that is not a finite number" in plain(draw(folder))


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_no_run_json_is_a_clear_error(folder, content):
    folder.run.facts.unlink()
    if content is not None:
        folder.run.facts.write_text(content)
    with pytest.raises(DataError, match=r"run\.json"):
        render_report(folder.run)
    assert not folder.run.report.exists()


def test_questions_are_grouped_by_how_the_verdict_moved(folder):
    text = plain(draw(folder))
    for title, number in [("Wrong before, right after", 2), ("Right before, wrong after", 1), ("Wrong both times", 1)]:
        assert f"{title}{number}" in text
    assert "Right both times" not in text


def evaluate(folder, names=("medqa", "pubmedqa"), seeds=(0,)):
    """Grade a base and a better model on some tasks."""
    tasks = [make_task(name, 30) for name in names]
    folder.evaluate(*(make_respondent(*it, tasks, seeds=seeds) for it in [("base", 0.3), ("tuned", 0.9)]))


def test_several_tasks_and_seeds_are_told_apart(folder):
    evaluate(folder, seeds=(7, 8))
    html = draw(folder)
    elements, text = Elements(html), plain(html).replace("\u202f", " ")
    assert "Better on 2 of 2 tasks" in text and "After training against the model before: better on medqa" in text
    change = folder.facts["eval"]["tasks"]["pubmedqa"]["change"]
    assert f"+{100 * change['delta']:.1f}" in text and text.count("30 questions of 30") == 2
    assert "Accuracy with 95 % intervals" in text and "sign-flip test over questions" in text
    assert "the majority of 2 is right on" in text and "medqa: " in text and "seed 8" in text
    assert html.count('class="item"') == 120
    assert len(read_folder(folder.run).pairs("eval")) == 120
    ids = [value for _, key, value in elements.attributes if key == "id"]
    assert len(ids) == len(set(ids)) and "<script" not in html


def test_one_task_has_its_table_too(folder):
    evaluate(folder, names=["medqa"])
    text = plain(draw(folder)).replace("\u202f", " ")
    assert "Improved by" in text and "exact McNemar p < 0.0001" in text
    assert "30 questions of 30, 4 options" in text and "Which answers were chosen" in text
    assert "seed 0" not in text and "Several answers" not in text and "Accuracy with 95 % Wilson intervals" in text


def test_an_answer_that_failed_is_no_text(folder):
    lost = make_sample("eval", "q0", "failed", finish=None, text="", think="", answer="", error="none <b>")
    folder.write("samples/before.jsonl", [lost])
    html = draw(folder)
    assert "Generation failed; there is no text. none &lt;b&gt;" in html
    (sample,) = read_folder(folder.run).before
    assert sample.completion is None
    style = html[html.index('id="style"') : html.index('id="asked"')]
    assert style.count("Before") == 0, "what failed is not measured as an empty text"


def test_questions_beyond_the_limit_are_counted(folder, monkeypatch):
    monkeypatch.setattr(page_module, "MAX_FOLDED", 1)
    assert "1 more in samples/before.jsonl" in plain(draw(folder))


def test_thinking_is_folded_and_a_missing_answer_is_said(folder):
    unclosed = make_sample("ask", "a0", closed=False, think="on and on", answer="", finish="length")
    folder.write("samples/before.jsonl", [unclosed])
    html = draw(folder)
    assert "No answer: the thinking was never closed." in html
    assert "stopped at the length limit" in html
    assert re.search(r'<details class="think" open>.*?on and on', html, re.S)
    assert re.search(r'<details class="think">.*?Thinking about a0', html, re.S)


def test_the_same_folder_gives_the_same_bytes(folder):
    assert draw(folder) == draw(folder)
    assert [path.name for path in folder.run.folder.glob("*.partial")] == []


def test_characters_that_utf8_cannot_carry(folder):
    folder.run.samples.joinpath("after.jsonl").write_text(
        json.dumps(make_sample("ask", "a0", answer="half \ud83d a pair \x00 and a null")), encoding="utf-8"
    )
    assert "&#55357;" in draw(folder)


def test_importing_the_report_loads_no_heavy_library():
    names = ("torch", "matplotlib", "jinja2", "scipy", "transformers")
    code = f"import sys, medcot.report; print([m for m in {names} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
