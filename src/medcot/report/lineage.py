"""Where training rows come from and what became of them, arranged as a table for the pages and the card.

The doctor writes what it knows of each source in plain JSON, and what it knows differs: a file has no revision, a
single source no mixture, most state no licence. So columns are those that any source fills, in the order of the way
from raw rows to training; a number that is not known here stands last under its own name rather than nowhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

from medcot.report import words
from medcot.report.evidence import make_visible

_COUNTS = ("raw_rows", "unreadable", "removed", "held_out", "unfit", "rows", "left_out", "repeats", "drawn")
_SHORT_SHA = 12


@dataclass(frozen=True, slots=True)
class SourceLine:
    """One source; ``counts`` has a number or ``None`` for each column of the table."""

    name: str
    part: str  # configuration and split, or nothing
    revision: str | None
    sha256: str | None
    licence: str | None
    counts: tuple[int | None, ...]

    @property
    def short_sha256(self) -> str:
        """What of a checksum fits into a table."""
        return f"{(self.sha256 or '')[:_SHORT_SHA]}…"


@dataclass(frozen=True, slots=True)
class Lineage:
    """All sources; false where there is none."""

    labels: tuple[str, ...]  # of the counts
    lines: tuple[SourceLine, ...]

    def __bool__(self) -> bool:
        return bool(self.lines)


def build_lineage(sources: Sequence[Mapping[str, Any]]) -> Lineage:
    """Arrange the ``sources`` of data/report.json; what is no number and not known here is left out."""
    found = list(dict.fromkeys(key for source in sources for key, value in source.items() if _is_count(value)))
    keys = [key for key in _COUNTS if key in found] + [key for key in found if key not in _COUNTS]
    return Lineage(
        tuple(make_visible(words.label(key)) for key in keys), tuple(_read(source, keys) for source in sources)
    )


def _read(source: Mapping[str, Any], keys: Sequence[str]) -> SourceLine:
    part = make_visible(", ".join(f"{key} {source[key]}" for key in ("config", "split") if source.get(key)))
    licence = source.get("licence") or source.get("license")
    counts = tuple(source[key] if _is_count(source.get(key)) else None for key in keys)
    name = make_visible(public_name(source.get("source") or "not named"))
    return SourceLine(name, part, _text(source.get("revision")), _text(source.get("sha256")), _text(licence), counts)


def public_name(source: Any) -> str:
    """Return a source as others may see it: of a path on this machine, which nobody else has, the last part."""
    text = str(source)
    return PureWindowsPath(text).name if Path(text).is_absolute() or PureWindowsPath(text).is_absolute() else text


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _text(value: Any) -> str | None:
    return None if value in (None, "") else make_visible(str(value))
