"""The pages in a real Chromium: what they do, and that nothing written by anybody does anything in them."""

from __future__ import annotations

import dataclasses
import json
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from medcot import folder
from medcot.records import Completion, Finish
from tiny_runs import make_rows, run_job, write_rows

CHROMIUM = shutil.which("chromium")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytest.importorskip("gradio", reason="gradio is not installed")
if CHROMIUM is None:
    pytest.skip("there is no chromium on this machine", allow_module_level=True)

from medcot.answering import choose_run  # noqa: E402 -- after the skips, which need nothing of medcot
from medcot.ui.app import Setting, opened  # noqa: E402
from medcot.ui.shelf import Shelf  # noqa: E402
from medcot.ui.voice import Voice, open_speaker  # noqa: E402

PATIENCE_MS = 20_000
PHONE, DESK = {"width": 390, "height": 844}, {"width": 1200, "height": 900}
# What a downloaded data set or a model may write. Had it any effect, there would be a dialog, an element called
# "injected", a request to evil.invalid, or a link or picture where text should be.
HOSTILE = (
    '<img src="http://evil.invalid/a.png" onerror="alert(1)"><script>alert(2)</script><b id="injected">bold</b>'
    " [a link](javascript:alert(3)) ![a picture](http://evil.invalid/b.png) https://evil.invalid"
    ' </div></details><iframe src="http://evil.invalid/c"></iframe> ${alert(4)} {{alert(5)}} {% raw %} $x^2$ **bold**'
    " \x1b[31mred\x1b[0m \x1b]8;;http://evil.invalid\x07here\x1b]8;;\x07 \u202eback\u202c"
)
SEEN = ['<img src="http://evil.invalid/a.png" onerror="alert(1)">', "[a link](javascript:alert(3))", "**bold**",
        "${alert(4)} {{alert(5)}}", "\\u001b[31mred", "\\u202eback"]  # fmt: skip


class Speaking:
    """The real speaker, and for two questions one that can be waited for, or that writes what no model should."""

    def __init__(self, real: Any) -> None:
        self.real, self.go_on = real, threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def say(self, question: str, limits: Any, *, on_text: Any, **options: Any) -> Any:
        if question == "hostile":
            on_text(HOSTILE, True)
            on_text(HOSTILE, False)
            spoken = self.real.say("How many?", limits, **options)
            done = Completion(HOSTILE, HOSTILE, HOSTILE, True, Finish.EOS, 3, 2, 1)
            return dataclasses.replace(spoken, completion=done, forced=False)
        if question != "hold":
            return self.real.say(question, limits, on_text=on_text, **options)
        self.go_on.clear()
        told: list[str] = []

        def hold(piece: str, in_think: bool) -> None:
            on_text(piece, in_think)
            told.append(piece)
            if len(told) == 3:
                assert self.go_on.wait(30)

        return self.real.say(question, limits, on_text=hold, **options)


@pytest.fixture(scope="module")
def runs(recipe_file, tmp_path_factory) -> Path:
    """A folder of runs: a whole one, one that is training, and one whose every text is hostile."""
    root = tmp_path_factory.mktemp("ui") / "runs"
    run_job(recipe_file, root / "whole", "evaluate.source=builtin:clinic:4", "evaluate.max_new_tokens=8")
    _write_outcomes(root / "whole", "cups")
    live = root / "live"
    shutil.copytree(root / "whole", live, ignore=shutil.ignore_patterns("checkpoints", "adapter"))
    facts = json.loads((live / "run.json").read_text())
    folder.write_json(live / "run.json", {**facts, "status": "running", "eval": None, "train": {}})
    folder.write_lines(live / "metrics.jsonl", [_metrics(step) for step in (1, 2)])
    hostile = root / "<img src=x onerror=alert(9)>"
    shutil.copytree(root / "whole", hostile, ignore=shutil.ignore_patterns("checkpoints", "adapter"))
    _write_outcomes(hostile, HOSTILE)
    folder.write_json(hostile / "run.json", {**facts, "status": HOSTILE, "error": HOSTILE})
    (hostile / "report.html").write_text(f"<p>the report</p>{HOSTILE}<script>top.document.title='taken'</script>")
    report = json.loads((root / "whole" / "data" / "report.json").read_text())
    report["findings"][0] |= {"says": HOSTILE, "severity": "red", "fix": HOSTILE, "evidence": [
        {"row": HOSTILE, "parts": {"question": HOSTILE}}]}  # fmt: skip
    report["sentences"] = [HOSTILE]
    folder.write_json(hostile / "data" / "report.json", report)
    return root


def _metrics(step: int) -> dict[str, Any]:
    return {"step": step, "loss": 3.0 / step, "learning_rate": 0.1, "grad_norm": 1.0, "tokens_per_s": 100.0,
            "elapsed_s": 1.0 * step, "tokens": 10 * step}  # fmt: skip


def _write_outcomes(run: Path, text: str) -> None:
    """Give a run's graded questions outcomes of which one was gained and one lost, and this text."""
    for when, outcomes in (("before", "wrong correct wrong correct"), ("after", "correct wrong wrong correct")):
        path = run / "samples" / f"{when}.jsonl"
        lines = folder.read_lines(path)
        graded = [line for line in lines if line["kind"] == "eval"]
        assert len(graded) == 4
        for line, outcome, name in zip(graded, outcomes.split(), ("first", "second", "third", "fourth"), strict=True):
            question = f"{name} question: {text}"
            line |= {"outcome": outcome, "question": question, "gold": text, "parsed": text, "text": text}
            line |= {"think": f"{when} {text}", "answer": f"{when} {text}", "closed": True, "finish": "eos"}
        folder.write_lines(path, lines)


@pytest.fixture(scope="module")
def speaking(runs) -> Speaking:
    return Speaking(open_speaker(choose_run(runs / "whole")))


@pytest.fixture(scope="module")
def address(runs, speaking) -> Iterator[str]:
    voice = Voice(choose_run(runs / "whole"))
    voice._speaker = speaking
    with opened(Setting(voice, Shelf(runs), "whole", budget=48, answer_tokens=32), 0) as (url, server):
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        deadline = time.monotonic() + 30
        while not server.started:
            assert thread.is_alive() and time.monotonic() < deadline
            time.sleep(0.05)
        yield url
        speaking.go_on.set()
        server.stop()
        thread.join(20)
        assert not thread.is_alive(), "the server ends when it is told to"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=CHROMIUM)
        yield found
        found.close()


@pytest.fixture
def page(browser, address) -> Iterator[Any]:
    """A page of its own; at its end nothing was asked of anybody else, nothing popped up, no script broke."""
    context = browser.new_context(viewport=DESK)
    context.set_default_timeout(PATIENCE_MS)
    found, asked, wrong = context.new_page(), [], []
    context.on("request", lambda request: asked.append(request))
    found.on("dialog", lambda dialog: (wrong.append(f"dialog {dialog.message}"), dialog.dismiss()))
    found.on("pageerror", lambda error: wrong.append(f"error {error}"))
    found.on("console", lambda message: message.type == "error" and wrong.append(f"console {message.text}"))
    found.on("response", lambda reply: reply.status >= 400 and wrong.append(f"{reply.status} {reply.url}"))
    found.blocked = []  # what a test expects the browser to tell that it has blocked
    found.goto(address)
    found.wait_for_selector("#ask-question textarea")
    yield found
    context.close()
    # A browser at times reports what the page's policy stopped before it was sent; its failure then says so.
    abroad = [sent for sent in asked if not sent.url.startswith((address, "data:", "blob:"))]
    assert asked and [sent.url for sent in abroad if sent.failure != "csp"] == []
    assert [each for each in wrong if not any(blocked in each for blocked in found.blocked)] == []


def _open(page: Any, name: str) -> None:
    page.get_by_role("tab", name=name).first.click()


def _wait_text(page: Any, selector: str, text: str) -> str:
    page.wait_for_function(
        "([selector, text]) => document.querySelector(selector)?.innerText.includes(text)", arg=[selector, text]
    )
    return str(page.locator(selector).inner_text())


def _choose(page: Any, box: str, name: str) -> None:
    page.locator(f"{box} input").click()
    page.get_by_role("option", name=name, exact=True).click()


def _ask(page: Any, question: str) -> None:
    page.locator("#ask-question textarea").fill(question)
    page.locator("#ask-go").click()


# Ask ------------------------------------------------------------------------------------------------------------------


def test_an_answer_streams_with_its_thinking_folded(page, speaking):
    page.locator("#ask-budget input[type=number]").fill("16")
    _ask(page, "hold")
    _wait_text(page, "#ask-status", "Thinking,")
    assert not page.locator("#ask-think").is_visible()
    page.locator("#ask-thinking button").first.click()
    page.wait_for_function("document.querySelector('#ask-think .cursor')")
    first, clock = page.locator("#ask-think").inner_text(), page.locator("#ask-status").inner_text()
    page.wait_for_function("before => document.querySelector('#ask-status').innerText != before", arg=clock)
    assert first.strip() and "Final answer" not in page.locator("#ask-answer").inner_text()
    speaking.go_on.set()
    said = _wait_text(page, "#ask-status", "answered in")
    assert "closed at the budget" in said and "Thought for" in said
    assert page.locator("#ask-think").is_visible(), "what the reader unfolded stays unfolded"
    assert len(page.locator("#ask-think").inner_text()) > len(first)
    assert "Final answer:" in page.locator("#ask-answer").inner_text()


def test_stop_stops(page, speaking):
    _ask(page, "hold")
    _wait_text(page, "#ask-status", "Thinking,")
    page.locator("#ask-stop").click()
    page.wait_for_timeout(300)
    speaking.go_on.set()
    assert "tokens" in _wait_text(page, "#ask-status", "Stopped.")


def test_base_and_tuned_answer_differently(page):
    answers = []
    for who in ("tuned", "base"):
        page.get_by_role("radio", name=who).first.check()
        _ask(page, f"How many cups for the {who[0]}?"[:-4])
        _wait_text(page, "#ask-status", "answered in")
        answers.append(page.locator("#ask-answer").inner_text())
    assert answers[0] != answers[1]


def test_what_cannot_be_asked_is_said(page):
    _ask(page, "   ")
    _wait_text(page, "#ask-status", "There is no question")
    _ask(page, "Now <think> what </think> this")
    assert "<think>" in _wait_text(page, "#ask-status", "think")


def test_the_keyboard_reaches_question_and_answer(page):
    page.keyboard.press("Tab")
    for _ in range(12):
        if page.evaluate("document.activeElement.closest('#ask-question') != null"):
            break
        page.keyboard.press("Tab")
    page.keyboard.type("How many cups?")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id || document.activeElement.closest('[id]').id") == "ask-go"
    page.keyboard.press("Enter")
    _wait_text(page, "#ask-status", "answered in")
    stops = set()
    for _ in range(30):
        page.keyboard.press("Tab")
        stops.add(page.evaluate("document.activeElement.closest('[id]')?.id ?? ''"))
    assert len(stops) > 4, "no control keeps the focus to itself"


# Compare --------------------------------------------------------------------------------------------------------------


def test_compare_shows_both_and_what_flipped(page):
    _open(page, "Compare")
    page.locator("#compare-question textarea").fill("How many cups?")
    page.locator("#compare-go").click()
    _wait_text(page, "#compare-base-status", "answered in")
    _wait_text(page, "#compare-tuned-status", "answered in")
    flips = page.locator("#flips")
    assert "1 wrong before, right after; 1 right before, wrong after, of 4 graded answers" in flips.inner_text()
    item = flips.locator(".group.gained .item")
    assert "first question" in item.inner_text() and not item.locator(".side .answer").first.is_visible()
    item.locator("summary").first.click()
    assert [side.inner_text() for side in item.locator(".side .answer").all()] == ["before cups", "after cups"]
    assert not item.locator(".think .text").first.is_visible(), "transcripts have their thinking folded"
    page.locator("#flips-which").get_by_role("radio", name="lost", exact=True).check()
    page.wait_for_function("!document.querySelector('#flips .group.gained')")
    assert "second question" in flips.inner_text() and "first question" not in flips.inner_text()


# Runs -----------------------------------------------------------------------------------------------------------------


def test_curves_go_on_while_a_run_trains(page, runs):
    _open(page, "Runs")
    _choose(page, "#runs-run", "live")
    _wait_text(page, "#runs-detail", "3 → 1.5")
    with (runs / "live" / "metrics.jsonl").open("a") as log:
        log.write(json.dumps(_metrics(3)) + "\n" + '{"step": 4, "lo')  # and a line that is being written
    assert "1 s" not in _wait_text(page, "#runs-detail", "3 → 1")[:5]
    page.wait_for_function("document.querySelector('#runs-detail figcaption span').innerText == '3 → 1'")
    assert page.locator("#runs-detail svg.chart").count() >= 4
    assert "running" in page.locator("#runs-table").inner_text()


def test_a_run_that_began_after_the_pages_is_listed(page, runs):
    shutil.copytree(runs / "live", runs / "younger")
    try:
        _open(page, "Runs")
        _wait_text(page, "#runs-table", "younger")
        for tab, box in (("Runs", "#runs-run"), ("Compare", "#flips-run"), ("Data", "#data-run")):
            _open(page, tab)
            page.wait_for_timeout(300)
            _choose(page, box, "younger")
        _wait_text(page, "#data-findings", "Findings")
    finally:
        shutil.rmtree(runs / "younger")


def test_a_report_is_framed_without_rights(page):
    _open(page, "Runs")
    _wait_text(page, "#runs-detail", "whole")
    page.locator("#runs-show").click()
    frame = page.wait_for_selector("#runs-report iframe")
    assert frame.get_attribute("sandbox") == ""
    assert "Intended use" in frame.content_frame().locator("body").inner_text()


# Data -----------------------------------------------------------------------------------------------------------------


def test_a_row_shows_its_spans_and_its_loss(page, runs):
    _open(page, "Data")
    _wait_text(page, "#data-row", "Row 1 of the first 18")
    assert "Findings" in page.locator("#data-findings").inner_text()
    spans = page.locator("#data-row .spans .span")
    looks = [(set(span.get_attribute("class").split()) - {"span"}) for span in spans.all()]
    assert looks == [{"question", "no-loss"}, {"prompt", "no-loss"}, {"tag", "no-loss"}, {"prompt", "no-loss"},
                     {"think"}, {"tag"}, {"answer"}, {"eos"}] or looks[0] == {"question", "no-loss"}, looks  # fmt: skip
    by_look = {look: span.inner_text() for span, look in zip(spans.all(), map(frozenset, looks), strict=True)}
    assert "How many?" in by_look[frozenset({"question", "no-loss"})]
    assert "Final answer: 0 cups" in by_look[frozenset({"answer"})] and "</s>" in by_look[frozenset({"eos"})]
    assert "I add 0 and 0" in by_look[frozenset({"think"})]
    page.locator("#data-number input").fill("3")
    page.keyboard.press("Tab")
    assert "Final answer: 4 cups" in _wait_text(page, "#data-row", "Row 3 of the first 18")


def test_a_file_that_is_named_is_looked_at(page, tmp_path):
    hostile = dict.fromkeys(("Question", "Complex_CoT", "Response"), HOSTILE)
    rows = write_rows(tmp_path / "named.jsonl", [*make_rows(6), hostile])
    _open(page, "Data")
    page.locator("#data-named input, #data-named textarea").first.fill(str(rows))
    page.locator("#data-look").click()
    _wait_text(page, "#data-findings", "named.jsonl")
    _wait_text(page, "#data-row", "named")
    page.locator("#data-named input, #data-named textarea").first.fill(str(tmp_path / "none.jsonl"))
    page.locator("#data-look").click()
    _wait_text(page, "#data-findings", "cannot be read")


# Whatever is written --------------------------------------------------------------------------------------------------


def _check_inert(page: Any, place: str) -> None:
    text = page.locator(place).inner_text()
    for seen in SEEN:
        assert seen in text, (place, seen)
    bad = f"{place} :is(img, script, a[href]:not([href^='#']), iframe, #injected)"
    assert page.locator(bad).count() == 0, place


def test_a_hostile_answer_is_text(page):
    _ask(page, "hostile")
    page.locator("#ask-thinking button").first.click()
    _wait_text(page, "#ask-status", "answered in")
    _check_inert(page, "#ask-think")
    _check_inert(page, "#ask-answer")


def test_a_hostile_question_is_text(page):
    _ask(page, HOSTILE.replace("\x1b", "").replace("\x07", ""))
    _wait_text(page, "#ask-status", "answered in")
    assert page.locator("#injected").count() == 0


def test_a_hostile_run_is_text(page, runs):
    name = "<img src=x onerror=alert(9)>"
    # Of the report, whose page is shown as it is: the sandbox has no scripts, and the policy reaches into it.
    page.blocked += ["Blocked script execution in 'about:srcdoc'", "'http://evil.invalid/a.png' violates",
                     "Framing 'http://evil.invalid/'"]  # fmt: skip
    _open(page, "Compare")
    _choose(page, "#flips-run", name)
    page.wait_for_function("document.querySelector('#flips').textContent.includes('img src')")
    for summary in page.locator("#flips .item > summary").all():
        summary.click()
    for summary in page.locator("#flips .think > summary").all():
        summary.click()
    _check_inert(page, "#flips")
    _open(page, "Runs")
    _choose(page, "#runs-run", name)
    _wait_text(page, "#runs-detail", "img src=x")
    _check_inert(page, "#runs-detail")
    page.locator("#runs-show").click()
    frame = page.wait_for_selector("#runs-report iframe").content_frame()
    frame.wait_for_selector("text=the report")
    assert page.title() == "medcot" and page.locator("#injected").count() == 0
    _open(page, "Data")
    _choose(page, "#data-run", name)
    page.wait_for_function("document.querySelector('#data-findings .fix')?.textContent.includes('img')")
    page.evaluate("document.querySelectorAll('#data-findings details').forEach(details => details.open = true)")
    _check_inert(page, "#data-findings")


# For everybody --------------------------------------------------------------------------------------------------------


UNNAMED = """() => [...document.querySelectorAll('input, textarea, button')].filter(e => e.offsetParent
    && !(e.labels?.length || e.getAttribute('aria-label') || e.innerText.trim() || e.title)).map(e => e.outerHTML)"""


def test_each_page_fits_a_phone_and_says_what_it_is_not_for(page):
    page.set_viewport_size(PHONE)
    for name in ("Ask", "Compare", "Runs", "Data"):
        _open(page, name)
        page.wait_for_timeout(400)
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"], name
        note = page.locator("#masthead .intended")
        assert note.is_visible() and "Not for diagnosis" in note.inner_text()
        assert page.evaluate(UNNAMED) == [], name
