"""The report of a run: one self-contained HTML page and a model card, drawn from the run folder alone.

``folder`` reads what the run left (missing pieces are named, never invented), ``words`` turns figures into sentences,
``charts`` draws, ``page`` fills ``page.html.j2``, ``card`` fills ``card.md.j2``. Nothing here needs the model, so a
report can be drawn again later, on another machine, and while a run is still going.
"""

from __future__ import annotations

from medcot.report.card import render_card
from medcot.report.page import render_report

__all__ = ["render_card", "render_report"]
