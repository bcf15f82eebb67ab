"""The report of a run: one self-contained HTML page and a model card, drawn from the run folder alone.

``folder`` reads what the run left (missing pieces are named, never invented), ``words`` turns figures into sentences,
``charts`` draws, ``page`` fills ``page.html.j2``, ``card`` fills ``card.md.j2``. Nothing here needs the model, so a
report can be drawn again later, on another machine, and while a run is still going.

An evaluation has a page too: ``eval_views`` arranges its figures as rows, ``eval_words`` says what they mean,
``eval_charts`` draws, ``eval_tables`` gathers, and ``eval_parts.html.j2`` holds the tables that ``eval_page`` and a
run's report have in common. What a terminal shows is in the files that end in ``_screen``.
"""

from __future__ import annotations

from medcot.report.card import render_card
from medcot.report.page import render_report

__all__ = ["render_card", "render_report"]
