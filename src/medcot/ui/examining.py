"""The page of data: what the doctor found in a run's rows or in a source that is named, and a row span by span.

A source is named as on the command line: a path, a Hub id, ``builtin:clinic[:200]``. That reads what the person who
started the pages may read, so it is offered on loopback only, where whoever sits at the browser is that person; behind
another address the box takes built-in sources alone, whatever a request says.
"""

from __future__ import annotations

import asyncio
import functools
import json
import re
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gradio as gr

from medcot.errors import DataError, MedcotError, did_you_mean
from medcot.prompt import THINK_CLOSE, THINK_OPEN
from medcot.recipe import Recipe, list_recipes, load_recipe
from medcot.records import Run
from medcot.report.evidence import NAMES, Look, Piece, mask_pieces
from medcot.ui.drawing import draw, panel, wrap_page
from medcot.ui.shelf import Shelf, stamp

if TYPE_CHECKING:
    from medcot.data.scan import Progress

MOST_ROWS = 50  # of a source, that can be looked at one by one
BUILT_IN = "builtin:"
LOOK_EVERY_S = 0.3
_TAGS = re.compile(f"({re.escape(THINK_OPEN)}|{re.escape(THINK_CLOSE)})")


@dataclass(frozen=True, slots=True)
class Source:
    """Whose rows are looked at: a run's, or a source's with the settings of a shipped recipe."""

    run: str | None = None
    named: str = ""
    recipe: str = "default"


@dataclass(frozen=True, slots=True)
class SpannedRow:
    """A row to show."""

    id: str
    pieces: tuple[Piece, ...]
    num_tokens: int
    num_trained: int


def check_named(named: str, recipe: str, *, on_loopback: bool) -> Source:
    """Return a source that was named.

    Raises:
        DataError: nothing was named, or what only the person at this machine may name.
    """
    named = named.strip()
    if not named:
        raise DataError("No source is named", "It is a path, a Hub id or a built-in source", "Write one into the box")
    if not on_loopback and not named.startswith(BUILT_IN):
        raise DataError(
            f"'{named}' was asked for from another address",
            "Files and data sets are read for whoever sits at this machine; others see runs and built-in sources",
            "Start 'medcot ui' on loopback, or name builtin:clinic[:200]",
        )
    if recipe not in list_recipes():
        raise DataError(f"No recipe is called '{recipe}'", "It is a shipped one", did_you_mean(recipe, list_recipes()))
    return Source(None, named, recipe)


def draw_run_findings(shelf: Shelf, name: str | None) -> str:
    """Return what the doctor found in the rows of a run."""
    from medcot.report.data_page import render_data_page

    if not name:
        return draw("hint", "No run is chosen.")
    try:
        path = shelf.find(name).data / "report.json"
        if not path.is_file():
            return draw("hint", "This run has no data report: it is older than the doctor, or has not come so far.")
        return wrap_page(render_data_page(json.loads(path.read_text(encoding="utf-8"))))
    except MedcotError as error:
        return draw("notice", error.value, error.rule, error.remedy)
    except (ValueError, AttributeError) as error:
        return draw("notice", f"data/report.json cannot be read: {error}", "The doctor writes it", "Look again")


async def look_at(source: Source) -> AsyncIterator[str]:
    """Let the doctor look at a source, yielding how far it is, and at last its findings."""
    from medcot import __version__
    from medcot.admission import diagnose
    from medcot.report.data_page import render_data_page

    seen: list[Progress] = []
    yield draw("status", "busy", "Looking at the rows …")
    looking = asyncio.create_task(
        asyncio.to_thread(diagnose, source.named, source.recipe, workers=1, on_progress=seen.append)
    )
    while not looking.done():
        await asyncio.wait([looking], timeout=LOOK_EVERY_S)
        if seen and not looking.done():
            yield draw("status", "busy", f"Looked at {seen[-1].num_rows:,} rows, {seen[-1].rows_per_s:,.0f} a second …")
    try:
        yield wrap_page(render_data_page(looking.result().report(__version__)))
    except MedcotError as error:
        yield draw("notice", error.value, error.rule, error.remedy)


def draw_row(shelf: Shelf, source: Source, number: float | None) -> str:
    """Return a row of a source, 1 being the first, its spans coloured by kind and loss."""
    try:
        if source.run is not None:
            run = shelf.find(source.run)
            rows = _run_rows(run, stamp(run)[:1])
        elif source.named:
            rows = _named_rows(source.named, source.recipe)
        else:
            return draw("hint", "No source is chosen.")
    except MedcotError as error:
        return draw("notice", error.value, error.rule, error.remedy)
    place = min(max(int(number or 1), 1), len(rows))
    row = rows[place - 1]
    return draw("row", row.id, place, len(rows), row.pieces, NAMES, row.num_tokens, row.num_trained)


@functools.lru_cache(maxsize=4)
def _run_rows(run: Run, when: object) -> tuple[SpannedRow, ...]:
    """Read a run's first rows; ``when`` only tells the cache that the run has changed."""
    return read_rows(load_recipe(run.recipe))


@functools.lru_cache(maxsize=4)
def _named_rows(named: str, recipe: str) -> tuple[SpannedRow, ...]:
    return read_rows(load_recipe(recipe, [f"data.source={named}"]))


def read_rows(recipe: Recipe) -> tuple[SpannedRow, ...]:
    """Return the first rows of each of a recipe's sources, as they are before any are left out.

    Raises:
        MedcotError: the source cannot be read, no row of it can be encoded, or the tokenizer is not to be had.
    """
    from medcot.admission import build_tools
    from medcot.rows import encode_whole, read_examples

    tokenizer = build_tools(recipe, ()).tokenizer
    assert tokenizer is not None, "build_tools raises where there is no tokenizer"
    examples = [e for part in _beginnings(recipe) for e in read_examples(part).examples[:MOST_ROWS]]
    encoded = encode_whole(examples, recipe, tokenizer)
    if not encoded.rows:
        reason = encoded.quarantined[0].reason if encoded.quarantined else "the source is empty"
        raise DataError(f"None of the first rows can be shown: {reason}", "A row is encoded first", "Look at the data")
    return tuple(_span(row, tokenizer) for row in encoded.rows)


def _beginnings(recipe: Recipe) -> Sequence[Recipe]:
    """Return the recipe once for each of its sources, with no more of it than is shown."""
    from medcot.data.sources import parse_slice
    from medcot.stages import DataStage, Origin

    parts = []
    for origin in recipe.data.origins:
        name, count = parse_slice(str(origin.source))
        # Generated problems depend on how many are asked for, and cost little; of a file no more is read than is shown.
        fewer = origin.source if name.startswith(BUILT_IN) else f"{name}[:{min(count or MOST_ROWS, MOST_ROWS)}]"
        values = {key: getattr(origin, key) for key in Origin.model_fields} | {"source": fewer}
        parts.append(recipe.model_copy(update={"data": DataStage(**values)}))
    return parts


def _span(row: Any, tokenizer: Any) -> SpannedRow:
    """Cut a row into what is coloured alike; identifiers are masked over the whole of it."""
    from medcot.prompt import decode_spans

    cut = []
    for span in decode_spans(row, tokenizer):
        for place, text in enumerate(_TAGS.split(span.text)):
            if text:
                cut.append((text, Look.TAG if place % 2 else Look(str(span.kind)), span.has_loss))
    masked = mask_pieces([text for text, _, _ in cut])
    pieces = tuple(Piece(text, look, loss) for text, (_, look, loss) in zip(masked, cut, strict=True) if text)
    return SpannedRow(row.id, pieces, row.num_tokens, row.num_trained_tokens)


def build_page(shelf: Shelf, name: str | None, tab: Any, *, on_loopback: bool) -> None:
    """Build the page, inside a tab; a first row is read when somebody looks at the tab."""
    with gr.Row():
        run = gr.Dropdown(list(shelf.runs()), value=name, label="The rows of a run", elem_id="data-run")
        named = gr.Textbox(
            label="Or of a file, a folder or a Hub data set" if on_loopback else "Or of a built-in source",
            placeholder="my.jsonl or builtin:clinic[:200]" if on_loopback else "builtin:clinic[:200]",
            max_lines=1, max_length=500, elem_id="data-named",
        )  # fmt: skip
        recipe = gr.Dropdown(list(list_recipes()), value="default", label="With the settings of", elem_id="data-recipe")
    look = gr.Button("Look at it", variant="primary", elem_id="data-look")
    with gr.Row():
        number = gr.Number(1, label=f"Row, of the first {MOST_ROWS}", precision=0, minimum=1, maximum=MOST_ROWS,
                           elem_id="data-number")  # fmt: skip
    row = panel(draw("status", "busy", "Reading the first rows …"), elem_id="data-row")
    findings = panel(draw_run_findings(shelf, name), elem_id="data-findings")
    source = gr.State(Source(name))

    async def on_look(text: str, settings: str) -> AsyncIterator[Any]:
        try:
            chosen = check_named(text or "", settings, on_loopback=on_loopback)
        except MedcotError as error:
            yield gr.skip(), draw("notice", error.value, error.rule, error.remedy), gr.skip()
            return
        async for found in look_at(chosen):
            yield chosen, found, gr.skip()
        yield chosen, gr.skip(), await asyncio.to_thread(draw_row, shelf, chosen, 1)

    def on_choose(chosen: str | None) -> Any:
        picked = Source(chosen)
        return picked, draw_run_findings(shelf, chosen), draw_row(shelf, picked, 1), 1

    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    gr.on([look.click, named.submit], on_look, [named, recipe], [source, findings, row], **quiet)
    # One at a time and in order, else what was drawn for the choice before could come last.
    quiet |= {"concurrency_limit": 1, "concurrency_id": "rows"}
    run.change(on_choose, run, [source, findings, row, number], **quiet)

    def on_open(which: float | None, picked: Source) -> Any:
        found = draw_run_findings(shelf, picked.run) if picked.run else gr.skip()
        return gr.Dropdown(choices=list(shelf.runs())), found, draw_row(shelf, picked, which)

    number.change(lambda which, picked: draw_row(shelf, picked, which), [number, source], row, **quiet)
    tab.select(on_open, [number, source], [run, findings, row], **quiet)
