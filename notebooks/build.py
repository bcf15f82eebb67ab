"""Makes the notebooks from the Python files beside them, so that what is reviewed is text and not JSON.

A source is a Python file in the "percent" format that Jupytext and editors know: ``# %%`` begins a cell, ``[markdown]``
makes it prose, ``tags=...`` puts tags on it, ``# %pip`` and ``# !`` lines are what only a notebook can run. A cell
tagged with an edition (``kaggle``, ``colab``) is in that edition alone. Outputs are never kept. Tags that matter:

- ``install`` and ``network`` need one of them; the tests skip these cells, and a notebook shows the tag;
- ``parameters`` holds what is yours to change; the tests put their own values behind it;
- any other word names a part of the job, whose time ``bench/tutorial_job.py`` takes.

    python notebooks/build.py            # write them
    python notebooks/build.py --check    # say which are not what their source makes
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

HERE = Path(__file__).parent
EDITIONS = {
    "medcot_kaggle": ("medcot", "kaggle"),
    "medcot_colab": ("medcot", "colab"),
    "from_unsloth": ("from_unsloth", ""),
}
NAMES = {edition for _, edition in EDITIONS.values() if edition}
MARK = re.compile(r"^# %%(?P<markdown> \[markdown\])?(?: tags=(?P<tags>[\w,]+))?$", re.MULTILINE)


@dataclass(frozen=True)
class Cell:
    """A cell of a source."""

    text: str
    is_markdown: bool
    tags: tuple[str, ...]


def read_source(path: Path, edition: str = "") -> Iterator[Cell]:
    """The cells of a source that belong to an edition."""
    parts = MARK.split(path.read_text(encoding="utf-8"))[1:]
    for markdown, tags, text in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
        named = tuple(tags.split(",")) if tags else ()
        if edition in named or not NAMES & set(named):
            body = text.strip("\n")
            body = re.sub(r"^# ?", "", body, flags=re.MULTILINE) if markdown else re.sub(r"(?m)^# (?=[%!])", "", body)
            yield Cell(body, bool(markdown), tuple(tag for tag in named if tag not in NAMES))


def build(name: str) -> str:
    """Return a notebook as it is to be saved."""
    source, edition = EDITIONS[name]
    cells = []
    for number, cell in enumerate(read_source(HERE / f"{source}.py", edition)):
        made = (new_markdown_cell if cell.is_markdown else new_code_cell)(cell.text)
        made.id = f"cell-{number}"  # nbformat's own is random, and every build would differ
        made.metadata = {"tags": list(cell.tags)} if cell.tags else {}
        cells.append(made)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    book = new_notebook(cells=cells, metadata={"kernelspec": kernel, "language_info": {"name": "python"}})
    nbformat.validate(book)
    return nbformat.writes(book, indent=1) + "\n"


def main() -> None:
    """Write the notebooks, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where one is stale")
    options = parser.parse_args()
    stale = [name for name in EDITIONS if not (path := path_of(name)).exists() or path.read_text() != build(name)]
    if not options.check:
        for name in EDITIONS:
            path_of(name).write_text(build(name), encoding="utf-8")
    elif stale:
        raise SystemExit(f"not what their sources make: {', '.join(stale)}; run 'python notebooks/build.py'")


def path_of(name: str) -> Path:
    """Where a notebook is kept."""
    return HERE / f"{name}.ipynb"


if __name__ == "__main__":
    main()
