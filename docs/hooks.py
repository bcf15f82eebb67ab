"""What mkdocs is told besides mkdocs.yml: the pages outside docs/ that the site carries, and where links to them lead.

The README is the short version and the place of the tables; no sentence of it is repeated here. A page in docs/ links
to ``../README.md#recipes``, which is right for whoever reads the file in the repository, and the site carries the
README as a page, so the same link must become ``readme.md#recipes``. Links to files that are not carried (sources, the
licence) become plain text, since the site has no repository to point into.

The theme's offline search would fetch one script from another site; ``frame-worker.js`` stands in for it.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.utils import get_relative_url

ROOT = Path(__file__).parents[1]
# Path in the repository to page or file of the site.
CARRIED = {
    "README.md": "readme.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "bench/RESULTS.md": "results.md",
    "notebooks/from_unsloth.ipynb": "notebooks/from_unsloth.ipynb",
    "notebooks/medcot_kaggle.ipynb": "notebooks/medcot_kaggle.ipynb",
    "notebooks/medcot_colab.ipynb": "notebooks/medcot_colab.ipynb",
}
_FOREIGN_WORKER = "https://unpkg.com/iframe-worker/shim"
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#:]+)(#[^)\s]*)?\)")


def on_files(files: Files, *, config: MkDocsConfig, **_: Any) -> Files:
    """Add the pages from outside docs/."""
    for source, target in CARRIED.items():
        files.append(File.generated(config, target, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Send links to where the site has what they name."""
    sources = {target: source for source, target in CARRIED.items()}
    here = posixpath.dirname(sources.get(page.file.src_uri, f"docs/{page.file.src_uri}"))
    return rewrite(markdown, here)


def on_post_page(output: str, *, page: Any, **_: Any) -> str:
    """Put our worker in the place of the theme's."""
    return output.replace(_FOREIGN_WORKER, get_relative_url("frame-worker.js", page.url))


def on_post_template(output: str, *, template_name: str, **_: Any) -> str:
    """The same for the page of what is not found, whose addresses are from the root."""
    return output.replace(_FOREIGN_WORKER, "/frame-worker.js") if template_name == "404.html" else output


def rewrite(markdown: str, here: str) -> str:
    """Return a page's text with its links made for the site.

    Args:
        markdown: the text.
        here: folder of the page in the repository, from its root.
    """

    def send(match: re.Match[str]) -> str:
        mark, text, path, anchor = match.groups(default="")
        target = posixpath.normpath(posixpath.join(here, path))
        if target.startswith("docs/"):
            return f"{mark}[{text}]({target.removeprefix('docs/')}{anchor})"
        return f"{mark}[{text}]({CARRIED[target]}{anchor})" if target in CARRIED else text

    return _LINK.sub(send, markdown)
