"""The page that asks: a question, a thinking budget, the thinking folded and streamed, a clock, and a stop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from medcot.errors import MedcotError, RecipeError
from medcot.report import words
from medcot.ui.drawing import draw, panel
from medcot.ui.voice import MOST_ANSWER, MOST_THINKING, Look, State, Voice, Wish

EVERY_S = 0.25  # a look at the answer
MOST_QUESTION = 20_000  # characters
SEED = 3407
TOP_P = 0.95
NO_MODEL = (
    "No model is open",
    "An answer needs a finished run, or a model",
    "Start again with 'medcot ui --run RUN' or 'medcot ui --model embedded'.",
)


@dataclass(frozen=True, slots=True)
class Shown:
    """The three places of one answer."""

    status: Any
    think: Any
    answer: Any

    @property
    def parts(self) -> list[Any]:
        """As outputs of an event."""
        return [self.status, self.think, self.answer]


def build_answer(elem: str) -> Shown:
    """Build the places of one answer; the thinking is folded, and stays as the reader leaves it."""
    status = panel(draw("status", "idle", "Nothing has been asked yet."), elem_id=f"{elem}-status")
    with gr.Accordion("Thinking", open=False, elem_id=f"{elem}-thinking"):
        think = panel(draw("thinking", "", False), elem_id=f"{elem}-think")
    return Shown(status, think, panel(draw("answer", "", False, ""), elem_id=f"{elem}-answer"))


@dataclass(frozen=True, slots=True)
class Settings:
    """The controls of a question."""

    budget: Any
    answer_tokens: Any
    temperature: Any
    seed: Any

    @property
    def parts(self) -> list[Any]:
        """As inputs of an event."""
        return [self.budget, self.answer_tokens, self.temperature, self.seed]


def build_settings(budget: int, answer_tokens: int, elem: str) -> Settings:
    """Build the controls that decide how a question is answered."""
    slider = gr.Slider(
        0, MOST_THINKING, value=budget, step=16, label="Thinking budget, tokens", elem_id=f"{elem}-budget",
        info="At the cap the thinking is closed, and the final answer asked for.",
    )  # fmt: skip
    with gr.Accordion("More", open=False), gr.Row():
        temperature = gr.Slider(0, 2, value=0.6, step=0.05, label="Temperature", info="0 takes the likeliest token.")
        answer = gr.Slider(16, MOST_ANSWER, value=answer_tokens, step=16, label="Longest answer, tokens")
        seed = gr.Number(SEED, label="Seed", precision=0, minimum=0, maximum=2**31 - 1)
    return Settings(slider, answer, temperature, seed)


def read_wish(question: str, base: bool, values: Sequence[Any]) -> Wish:
    """Return what was asked, checked again: a request may come from elsewhere than the page.

    Raises:
        RecipeError: no question, one too long, or a setting out of its range.
    """
    question = str(question or "").strip()
    if not question:
        raise RecipeError("There is no question", "A model answers a question", "Write one into the box")
    if len(question) > MOST_QUESTION:
        raise RecipeError(
            f"A question of {len(question):,} characters", f"It may have {MOST_QUESTION:,}", "Shorten the question"
        )
    budget, answer, temperature, seed = (float(value if value is not None else -1) for value in values)
    limits = (("Thinking budget", budget, 0, MOST_THINKING), ("Longest answer", answer, 1, MOST_ANSWER),
              ("Temperature", temperature, 0, 2), ("Seed", seed, 0, 2**31 - 1))  # fmt: skip
    for name, value, low, high in limits:
        if not low <= value <= high:
            raise RecipeError(f"{name} {value:g}", f"It is from {low} to {high:,}", "Set it anew")
    return Wish(question, base, int(budget), int(answer), temperature, TOP_P, int(seed))


def draw_look(look: Look) -> list[str]:
    """Return the three places of an answer as it stands."""
    if look.error is not None:
        return [
            draw("notice", *look.error),
            draw("thinking", look.think, False),
            draw("answer", look.answer, False, ""),
        ]
    kind, text = _say(look)
    is_open = look.state is State.WRITING
    in_think = is_open and not look.answer
    none = "" if look.spoken is None else _say_why_none(look.spoken.completion.closed)
    return [
        draw("status", kind, text),
        draw("thinking", look.think, in_think),
        draw("answer", look.answer, is_open, none),
    ]


def _say_why_none(closed: bool) -> str:
    return "The thinking was closed, and no answer followed." if closed else "No answer: the thinking is not closed."


def _say(look: Look) -> tuple[str, str]:
    if look.state is State.WAITING:
        before = f"{look.ahead} answer{'s' if look.ahead != 1 else ''} before this one" if look.ahead else "next"
        return "waiting", f"Waiting: {before}."
    if look.state is State.LOADING:
        return "busy", "Loading the model; this is done once."
    think, answer = words.seconds(look.think_s), words.seconds(look.answer_s)
    if look.state is State.WRITING:
        return "busy", f"Thinking, {think} …" if not look.answer else f"Thought for {think}; answering, {answer} …"
    if look.spoken is None:
        return "stopped", "Stopped before the first token."
    done = look.spoken.completion
    spent = f"Thought for {think} ({words.count(done.num_think_tokens)} tokens"
    spent += ", closed at the budget)" if look.spoken.forced else ")"
    spent += f"; answered in {answer} ({words.count(done.num_answer_tokens)} tokens)."
    return ("stopped", f"Stopped. {spent}") if look.state is State.STOPPED else ("done", spent)


def _draw_error(value: str, rule: str, remedy: str, think: str = "", answer: str = "") -> list[str]:
    """Return the three places of an answer that went wrong."""
    return [draw("notice", value, rule, remedy), draw("thinking", think, False), draw("answer", answer, False, "")]


async def stream(
    voice: Voice | None, question: str, bases: Sequence[bool], values: Sequence[Any], owner: str
) -> AsyncIterator[list[str]]:
    """Answer a question once for each of ``bases``, yielding the places of all of them until all are over."""
    try:
        if voice is None:
            raise RecipeError(*NO_MODEL)
        answering = [voice.ask(read_wish(question, base, values), owner) for base in bases]
    except MedcotError as error:
        blank = [draw("status", "idle", "Not asked."), draw("thinking", "", False), draw("answer", "", False, "")]
        yield [*_draw_error(error.value, error.rule, error.remedy), *blank * (len(bases) - 1)]
        return
    try:
        while True:
            over = all(one.over for one in answering)  # before looking: what is over has all its text
            yield [part for one in answering for part in draw_look(voice.look(one))]
            if over:
                return
            await asyncio.sleep(EVERY_S)
    finally:  # also when the browser has gone
        for one in answering:
            one.stop()


def describe(voice: Voice | None) -> str:
    """Return the line that says who answers."""
    if voice is None:
        return draw("notice", *NO_MODEL)
    choice = voice.choice
    rows = [("Model", choice.source), ("prompt style", choice.style.value), ("held in", choice.precision)]
    if choice.adapter is not None:
        rows.insert(1, ("tuned", choice.name))
    return draw("model_line", rows)


def build_page(voice: Voice | None, budget: int, answer_tokens: int) -> None:
    """Build the page, inside a tab."""
    panel(describe(voice))
    question = gr.Textbox(label="Question", lines=4, max_lines=12, max_length=MOST_QUESTION, elem_id="ask-question",
                          placeholder="A 54-year-old man …")  # fmt: skip
    with gr.Row():
        ask = gr.Button("Ask", variant="primary", elem_id="ask-go", min_width=100)
        stop = gr.Button("Stop", elem_id="ask-stop", min_width=100)
    names = ["tuned", "base"] if voice is not None and voice.has_adapter else ["base"]
    who = gr.Radio(names, value=names[0], label="Who answers", elem_id="ask-who")
    settings = build_settings(budget, answer_tokens, "ask")
    shown = build_answer("ask")

    async def on_ask(request: gr.Request, text: str, name: str, *values: Any) -> AsyncIterator[list[str]]:
        async for parts in stream(voice, text, [name == "base"], values, str(request.session_hash)):
            yield parts

    async def on_stop(request: gr.Request) -> None:
        if voice is not None:
            voice.stop(str(request.session_hash))

    inputs = [question, who, *settings.parts]
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": None}
    gr.on([ask.click, question.submit], on_ask, inputs, shown.parts, trigger_mode="once", **quiet)
    stop.click(on_stop, None, None, **quiet)
