"""Local files: what is read, what is said, and that every kind of damage is one clear error."""

import gzip
import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medcot.data.files import Kind, find_kind, read_files, suggest_path
from medcot.errors import DataError

ROWS = [
    {"Question": "What is 尿 pH?", "Complex_CoT": 'Line one\nline two, "quoted"', "Response": "6"},
    {"Question": "NA", "Complex_CoT": "sep \u2028 and \x85 stay", "Response": "007"},
]


def _jsonl(rows: list[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _csv(rows: list[dict], sep: str = ",") -> str:
    def cell(text: str) -> str:
        return '"' + text.replace('"', '""') + '"'

    lines = [sep.join(rows[0])] + [sep.join(cell(value) for value in row.values()) for row in rows]
    return "\r\n".join(lines) + "\r\n"


def _write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def _parquet(path: Path) -> Path:
    pq.write_table(pa.Table.from_pylist(ROWS), path)
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", _jsonl(ROWS)),
        ("a.ndjson", _jsonl(ROWS).replace("\n", "\r\n")),
        ("a.jsonl", b"\xef\xbb\xbf" + _jsonl(ROWS).encode()),
        ("a.jsonl.gz", gzip.compress(_jsonl(ROWS).encode())),
        ("a.json", json.dumps(ROWS, indent=1)),
        ("a.json", json.dumps({"version": 1, "data": ROWS})),
        ("A.JSON", json.dumps(ROWS)),
        ("a.csv", _csv(ROWS)),
        ("a.csv", b"\xef\xbb\xbf" + _csv(ROWS).encode()),
        ("a.csv.gz", gzip.compress(_csv(ROWS).encode())),
        ("a.tsv", _csv(ROWS, "\t")),
    ],
)
def test_every_format_gives_the_same_rows_as_written(tmp_path: Path, name: str, content: str | bytes) -> None:
    path = _write(tmp_path / name, content)
    read = read_files(path)
    assert read.rows == ROWS
    assert read.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert [(part.name, part.num_rows) for part in read.parts] == [(name, 2)]
    assert read.notes == ()


def test_parquet_gives_the_same_rows(tmp_path: Path) -> None:
    assert read_files(_parquet(tmp_path / "a.parquet")).rows == ROWS


@pytest.mark.parametrize(
    ("name", "content", "note"),
    [
        ("a.json", _jsonl(ROWS), "holds JSON Lines"),
        ("a.jsonl", json.dumps(ROWS, indent=1), "holds one JSON list"),
        ("a.jsonl", _jsonl(ROWS).replace("\n", "\n\n \n", 1), "2 blank lines"),
        ("a.csv", _csv(ROWS) + "\r\n", "1 blank line in"),
    ],
)
def test_what_is_read_otherwise_than_named_is_said(tmp_path: Path, name: str, content: str, note: str) -> None:
    read = read_files(_write(tmp_path / name, content))
    assert read.rows == ROWS
    assert note in read.notes[0]


def test_a_lone_object_is_one_row(tmp_path: Path) -> None:
    assert read_files(_write(tmp_path / "a.json", json.dumps(ROWS[0]))).rows == ROWS[:1]


def test_pandas_index_column_gets_a_name(tmp_path: Path) -> None:
    assert read_files(_write(tmp_path / "a.csv", ",Question\n0,Why?\n")).rows == [{"column 1": "0", "Question": "Why?"}]


DAMAGED = {
    "no bytes": ("a.jsonl", b"", ["is empty"]),
    "white space": ("a.csv", "\n \n", ["white space"]),
    "no items": ("a.json", "[]", ["no rows"]),
    "header only": ("a.csv", "Question,Response\n", ["no rows"]),
    "unknown ending": ("a.xlsx", "x", ["'.xlsx'", ".jsonl", "Convert"]),
    "no ending": ("data", "x", ["has no ending"]),
    "binary": ("a.jsonl", b"{}\n\0\1\2", ["binary"]),
    "utf-16": ("a.csv", "Question\nx\n".encode("utf-16"), ["UTF-16"]),
    "latin-1": ("a.csv", "Question\nok\nna\xefve\n".encode("latin-1"), ["line 3", "0xef", "UTF-8"]),
    "broken line": ("a.jsonl", '{"a": 1}\n{"a": "half\n', ["Line 2", '\'{"a": "half\'']),
    "broken line late": ("a.jsonl", '{"a": 1}\n' * 1999 + "{oops}\n", ["Line 2,000", "{oops}"]),
    "line no object": ("a.jsonl", '{"a": 1}\n["b"]\n', ["Line 2", "a list"]),
    "nested too deep": ("a.jsonl", '{"a": ' + "[" * 100_000 + "\n", ["Line 1"]),
    "digits without end": ("a.jsonl", '{"a": ' + "1" * 5000 + "}\n", ["Line 1"]),
    "broken json": ("a.json", '[{"a": 1},\n {"b": }]', ["Line 2", "}]"]),
    "items no objects": ("a.json", '[{"a": 1}, "b"]', ["row 2", "a text"]),
    "several lists": ("a.json", '{"Question": ["a"], "Response": ["b"]}', ["2 lists", "Question, Response"]),
    "no list": ("a.json", '{"Question": {"0": "a"}}', ["0 lists"]),
    "json text": ("a.json", '"hello"', ["a text"]),
    "no header": ("a.csv", f"{'q' * 101},b\nc,d\n", ["no header", "on top"]),
    "numbers for header": ("a.csv", "1,2\n3,4\n", ["no header"]),
    "header twice": ("a.csv", "Q,Q\n1,2\n", ["'Q' twice"]),
    "semicolons": ("a.csv", "Question;Response\na;b\n", ["';'", "commas"]),
    "too many cells": ("a.csv", "Q,R\na,b\na,b,c\n", ["Line 3", "3 cells", "has 2"]),
    "too few cells": ("a.csv", "Q,R\na\n", ["Line 2", "1 cells"]),
    "open quote": ("a.csv", 'Q,R\na,"b\nc,d\n', ["after its row 1", "quote"]),
    "not gzip": ("a.jsonl.gz", b'{"a": 1}\n', ["gzip"]),
    "cut gzip": ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 999)[:-12], ["gzip"]),
    "not parquet": ("a.parquet", b"version https://git-lfs.github.com/spec/v1\n", ["Parquet", "LFS"]),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_one_error_with_place_and_remedy(tmp_path: Path, case: str) -> None:
    name, content, words = DAMAGED[case]
    with pytest.raises(DataError) as caught:
        read_files(_write(tmp_path / name, content))
    for word in words:
        assert word in str(caught.value)
    assert caught.value.remedy
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_cut_parquet(tmp_path: Path) -> None:
    path = _parquet(tmp_path / "a.parquet")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="whole Parquet"):
        read_files(path)


def test_folder_is_read_in_name_order_and_says_what_it_left_out(tmp_path: Path) -> None:
    _write(tmp_path / "b.jsonl", '{"n": 2}\n')
    _write(tmp_path / "a.jsonl", '{"n": 0}\n{"n": 1}\n')
    _write(tmp_path / "README.md", "x")
    _write(tmp_path / ".hidden.csv", "x")
    (tmp_path / "old").mkdir()
    read = read_files(tmp_path)
    assert [row["n"] for row in read.rows] == [0, 1, 2]
    assert [(part.name, part.num_rows) for part in read.parts] == [("a.jsonl", 2), ("b.jsonl", 1)]
    assert "README.md, old/" in read.notes[0]
    digests = [hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in ("a.jsonl", "b.jsonl")]
    listing = f"{digests[0]}  a.jsonl\n{digests[1]}  b.jsonl\n"
    assert read.sha256 == hashlib.sha256(listing.encode()).hexdigest()


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["a.csv", "b.jsonl"], "CSV (a.csv), JSON Lines (b.jsonl)"),
        (["notes.txt"], "holds no data file"),
        ([], "holds no data file"),
        (["a.jsonl", "a.jsonl.gz"], "both a.jsonl and a.jsonl.gz"),
        (["state.json", "dataset_info.json"], "save_to_disk"),
    ],
)
def test_folders_that_cannot_be_meant(tmp_path: Path, names: list[str], words: str) -> None:
    for name in names:
        _write(tmp_path / name, "{}")
    with pytest.raises(DataError) as caught:
        read_files(tmp_path)
    assert words in str(caught.value)


def test_kind_by_name() -> None:
    assert find_kind(Path("x.tar.JSONL.GZ")) is Kind.JSONL
    assert find_kind(Path("x.parquet.gz")) is None
    assert find_kind(Path("x.gz")) is None


def test_suggestion_is_nearest_name_or_the_data_files(tmp_path: Path) -> None:
    _write(tmp_path / "train.jsonl", "{}")
    assert suggest_path(tmp_path / "trian.jsonl") == f"Did you mean '{tmp_path / 'train.jsonl'}'?"
    assert "train.jsonl" in suggest_path(tmp_path / "zzz.csv")
    assert suggest_path(tmp_path / "no" / "x.csv") == ""
