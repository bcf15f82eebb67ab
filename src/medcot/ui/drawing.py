"""Values to HTML, through the report's templates; nothing else of the pages makes markup.

Jinja escapes every value, and ``make_value_visible`` writes out what a reader would not see (escape codes, marks of
direction). So a template can forget nothing. The style sheet is the report's, its rules held to ``.mc`` by CSS nesting,
so that they do not reach Gradio's controls, whose own style sheet has the same element names.
"""

from __future__ import annotations

import functools
from importlib import resources
from typing import Any

from medcot.report.evidence import make_value_visible
from medcot.report.page import make_environment


@functools.cache
def _macros() -> Any:
    import jinja2  # not at the top: a help page does not need it
    from markupsafe import Markup

    environment = make_environment(autoescape=True, finalize=make_value_visible)
    environment.loader = jinja2.ChoiceLoader([jinja2.PackageLoader("medcot.ui", "."), environment.loader])
    environment.globals.update(safe_svg=Markup)  # our own drawings, and nothing else
    return environment.get_template("pages.html.j2").module


def draw(macro: str, *values: Any, **named: Any) -> str:
    """Return what a macro of ``pages.html.j2`` makes of some values."""
    return f'<div class="mc">{getattr(_macros(), macro)(*values, **named)}</div>'


def panel(html: str, **named: Any) -> Any:
    """Return a place for what ``draw`` makes; Gradio's style for prose, which boxes every table, is left out."""
    import gradio

    return gradio.HTML(html, apply_default_css=False, **named)


def wrap_page(page: str) -> str:
    """Return a page of ours as an element: its ``<main>``, without head and style sheet."""
    inside = page.partition("<main>")[2].rpartition("</main>")[0]
    assert inside, "every page of the report has a main part"
    return f'<div class="mc">{inside}</div>'


@functools.cache
def style_sheet() -> str:
    """Return the report's style sheet held to our own elements, and the pages' own."""
    css = (resources.files("medcot.report") / "page.css").read_text(encoding="utf-8")
    own = (resources.files("medcot.ui") / "pages.css").read_text(encoding="utf-8")
    held = css.replace(":root", "&").replace("\nbody {", "\n& {").replace("\nmain {", "\n.no-main {")
    return f".mc {{\n{held}\n}}\n{own}"
