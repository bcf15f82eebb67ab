"""The page that compares: base and tuned model on one question side by side, and the graded answers that flipped."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import gradio as gr

from medcot.errors import MedcotError
from medcot.report.folder import read_folder
from medcot.report.page import MAX_FOLDED, build_groups
from medcot.ui.asking import MOST_QUESTION, build_answer, build_settings, describe, stream
from medcot.ui.drawing import draw, panel
from medcot.ui.shelf import Shelf
from medcot.ui.voice import Voice

FILTERS = {"gained and lost": ("gained", "lost"), "gained": ("gained",), "lost": ("lost",),
           "all": ("gained", "lost", "both-wrong", "both-right")}  # fmt: skip


def draw_flips(shelf: Shelf, name: str | None, which: str) -> str:
    """Return the graded questions of a run by how their verdict moved."""
    if not name:
        return draw("hint", "No run is chosen.")
    try:
        pairs = [pair for pair in read_folder(shelf.find(name)).pairs("eval") if pair.before and pair.after]
    except MedcotError as error:
        return draw("notice", error.value, error.rule, error.remedy)
    kinds = FILTERS.get(which, FILTERS["gained and lost"])
    groups = [group for group in build_groups(pairs) if group[1] in kinds]
    return draw("flips", groups, len(pairs), MAX_FOLDED)


def build_page(voice: Voice | None, shelf: Shelf, name: str | None, tab: Any, budget: int, answer_tokens: int) -> None:
    """Build the page, inside a tab; ``name`` is the run whose answers are listed first."""
    panel(describe(voice))
    _build_side_by_side(voice, budget, answer_tokens)
    panel(draw("flips_heading"))
    with gr.Row():
        run = gr.Dropdown(list(shelf.runs()), value=name, label="Run", elem_id="flips-run")
        which = gr.Radio(list(FILTERS), value="gained and lost", label="Show", elem_id="flips-which")
    flips = panel(draw_flips(shelf, name, "gained and lost"), elem_id="flips")

    def on_change(chosen: str | None, kind: str) -> str:
        return draw_flips(shelf, chosen, kind)

    def on_open(chosen: str | None, kind: str) -> Any:
        return gr.Dropdown(choices=list(shelf.runs())), draw_flips(shelf, chosen, kind)

    # One at a time and in order, else what was drawn for the choice before could come last.
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    quiet |= {"concurrency_limit": 1, "concurrency_id": "flips"}
    tab.select(on_open, [run, which], [run, flips], **quiet)
    for control in (run, which):
        control.change(on_change, [run, which], flips, **quiet)


def _build_side_by_side(voice: Voice | None, budget: int, answer_tokens: int) -> None:
    if voice is not None and not voice.has_adapter:
        panel(draw("hint", "There is no adapter, so there is nothing to compare the base with."))
        return
    question = gr.Textbox(label="Question for both", lines=3, max_lines=12, max_length=MOST_QUESTION,
                          elem_id="compare-question")  # fmt: skip
    with gr.Row():
        ask = gr.Button("Ask both", variant="primary", elem_id="compare-go", min_width=100)
        stop = gr.Button("Stop", elem_id="compare-stop", min_width=100)
    settings = build_settings(budget, answer_tokens, "compare")
    with gr.Row():
        with gr.Column(min_width=300, elem_classes="before"):
            panel(draw("side_heading", "Base"))
            base = build_answer("compare-base")
        with gr.Column(min_width=300):
            panel(draw("side_heading", "Tuned"))
            tuned = build_answer("compare-tuned")

    async def on_ask(request: gr.Request, text: str, *values: Any) -> AsyncIterator[list[str]]:
        async for parts in stream(voice, text, [True, False], values, str(request.session_hash)):
            yield parts

    async def on_stop(request: gr.Request) -> None:
        if voice is not None:
            voice.stop(str(request.session_hash))

    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": None}
    outputs = [*base.parts, *tuned.parts]
    gr.on([ask.click, question.submit], on_ask, [question, *settings.parts], outputs, trigger_mode="once", **quiet)
    stop.click(on_stop, None, None, **quiet)
