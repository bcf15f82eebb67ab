"""Tables on a terminal and in a file."""

from __future__ import annotations

import io

from rich.cells import cell_len
from rich.console import Console

from medcot.report.screen import Column, Screen, Sections

NAMES = ["DeepSeek-R1-Distill-Llama-8B", "a\nb", "诊断学习模型诊断学习模型诊断学习模型"]


def tabulate(*, width: int, terminal: bool = True, encoding: str = "utf-8") -> list[str]:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding)
    screen = Screen(Console(file=file, width=width, force_terminal=terminal, color_system=None))
    table = Sections(
        screen, "set", [Column("name", folds=True), Column("un-\nread", right=True), Column("gone/\nlost")]
    )
    table.open("a heading that is longer than the first column")
    for number, name in enumerate(NAMES):
        table.add(name, f"{10**number:,}", ("−1", "red"))
    table.print()
    file.flush()
    return raw.getvalue().decode(encoding).splitlines()


def test_what_does_not_fit_is_folded_at_hyphens_and_nothing_is_lost() -> None:
    lines = [line.rstrip() for line in tabulate(width=36)]
    assert max(map(cell_len, lines)) <= 36
    assert lines[:2] == [" " * 26 + "un-  gone/", "name" + " " * 21 + "read  lost"]
    assert " ".join(lines[2:4]) == "a heading that is longer than the first column"
    assert lines[4].split() == ["DeepSeek-R1-Distill-", "1", "−1"] and lines[5].split() == ["Llama-8B"]
    last = [line.split()[0] for line in lines[7:]]
    assert len(last) > 1 and "".join(last) == NAMES[-1]


def test_what_fits_is_not_folded() -> None:
    lines = tabulate(width=80)
    assert len(lines) == 6 and lines[2].rstrip() == "a heading that is longer than the first column"
    assert len({cell_len(line) for line in lines[3:]}) == 1


def test_in_a_file_rows_are_whole_and_carry_their_heading() -> None:
    head, *rows = tabulate(width=20, terminal=False)
    assert head.split() == ["set", "name", "unread", "gone/lost"]
    assert all(row.startswith("a heading that is longer than the first column  ") for row in rows)
    assert [row.split()[-2:] for row in rows] == [["1", "−1"], ["10", "−1"], ["100", "−1"]]


def test_ascii_is_enough() -> None:
    lines = tabulate(width=80, encoding="ascii")
    assert lines[3].endswith("1  -1") and "?" in lines[5]
