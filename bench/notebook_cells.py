"""The cells of a notebook, to be run one after the other with names of one's own.

The notebooks in ``notebooks/`` tag their cells: ``parameters`` holds what may be changed, ``install`` and ``network``
need one of the two, and other words name parts of the job.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NEEDY = {"install", "network"}


@dataclass(frozen=True)
class Cell:
    """A code cell."""

    number: int
    source: str
    tags: frozenset[str]


def read_cells(path: Path) -> list[Cell]:
    """Return a notebook's code cells."""
    book = json.loads(path.read_text(encoding="utf-8"))
    return [
        Cell(number, "".join(cell["source"]), frozenset(cell["metadata"].get("tags", ())))
        for number, cell in enumerate(book["cells"])
        if cell["cell_type"] == "code"
    ]


def run_cells(
    cells: list[Cell], parameters: Mapping[str, Any], *, also: frozenset[str] = frozenset()
) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Run cells in one namespace; yields each before it runs, and at the end nothing more.

    Args:
        cells: of one notebook.
        parameters: take the place of what the cells tagged ``parameters`` say.
        also: tags that are run although they need a network.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in cells:
        if cell.tags & (NEEDY - also) and not cell.tags & also:
            continue
        yield cell, names
        exec(compile(cell.source, f"cell {cell.number}", "exec"), names)
        if "parameters" in cell.tags:
            names.update(parameters)
