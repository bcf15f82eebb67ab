"""Local files: what is read, what is said, and that every kind of damage is one clear error."""

import gzip
import hashlib
import json
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medcot.data import formats
from medcot.data.files import Kind, Places, find_kind, read_files, stream_files, suggest_path
from medcot.data.formats import parse_lines
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
    "null late": ("a.csv", b"Q,R\n" + b"a,b\n" * 9000 + b"a,\0\n", ["line 9,002", "null"]),
    "utf-16 unmarked": ("a.jsonl", '{"a": 1}\n'.encode("utf-16-le"), ["line 1", "UTF-16"]),
    "mark inside": ("a.jsonl", b'{"a": 1}\n\xef\xbb\xbf{"a": 2}\n', ["Line 2", "BOM"]),
    "returns only": ("a.jsonl", b'{"a": 1}\r{"a": 2}\r', ["Line 1", "carriage return"]),
    "huge cell": ("a.csv", "Q,R\na," + "x" * 200_000 + "\n", ["after its row 1", "131,072", "JSON Lines"]),
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


# Streaming -----------------------------------------------------------------------------------------------------------

MANY = [
    {"Question": f"q {n} 尿 \u2028", "Complex_CoT": 'two\nlines, "quoted"\rthree', "Response": str(n)}
    for n in range(23)
]


def _forms(folder: Path) -> list[Path]:
    lines = _jsonl(MANY)
    pq.write_table(pa.Table.from_pylist(MANY), folder / "a.parquet", row_group_size=7)
    return [
        folder / "a.parquet",
        _write(folder / "a.jsonl", lines.replace("\n", "\n \n", 5)),
        _write(folder / "b.jsonl", b"\xef\xbb\xbf" + lines.replace("\n", "\r\n").encode()),
        _write(folder / "c.jsonl.gz", gzip.compress(lines.encode())),
        _write(folder / "d.json", lines),
        _write(folder / "e.json", json.dumps({"data": MANY})),
        _write(folder / "f.csv", b"\xef\xbb\xbf" + _csv(MANY).encode()),
        _write(folder / "g.tsv", _csv(MANY, "\t").replace("\r\n", "\n")),
        _write(folder / "h.csv.gz", gzip.compress(_csv(MANY).encode())),
        _write(folder / "i.csv", "Question,Response\n" + "".join(f"q {n},{n}\r" for n in range(22)) + "q 22,22"),
    ]


def test_rows_are_streamed_and_fetched_again_by_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "STRIDE", 4)
    for path in _forms(tmp_path):
        stream = stream_files(path)
        rows = [row for row, name in stream if name == path.name]
        if path.name == "i.csv":
            assert rows == [{"Question": f"q {n}", "Response": str(n)} for n in range(23)]
        else:
            assert rows == MANY, path
        assert stream.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        for numbers in ([23], [1], [5, 4, 9, 9, 8, 22], list(range(1, 24)), []):
            assert stream.fetch(numbers) == {number: rows[number - 1] for number in numbers}, path
        assert stream_files(path).fetch([7, 2]) == {2: rows[1], 7: rows[6]}  # without a pass before
        with pytest.raises(DataError, match="Row 24 was asked for, and there are 23"):
            stream.fetch([24])


def test_a_limit_ends_the_parsing_not_the_checksum(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.jsonl", '{"n": 1}\n{"n": 2}\n' + "{broken\n" * 9)
    stream = stream_files(path, limit=2)
    assert [row["n"] for row, _ in stream] == [1, 2] and stream.parts[0].num_rows == 2
    assert stream.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_folder_is_streamed_as_it_is_read(tmp_path: Path) -> None:
    for name, numbers in (("a.jsonl", (1, 2)), ("b.jsonl", (3,)), ("c.jsonl", (4, 5))):
        _write(tmp_path / name, _jsonl([{"n": number} for number in numbers]))
    stream = stream_files(tmp_path)
    seen = [(row["n"], name, stream.places.find(stream.num_rows)) for row, name in stream]
    assert seen[2] == (3, "b.jsonl", ("b.jsonl", 1)) and seen[4] == (5, "c.jsonl", ("c.jsonl", 2))
    assert stream.sha256 == read_files(tmp_path).sha256 and stream.places.several
    assert stream.fetch([5, 1, 3]) == {1: {"n": 1}, 3: {"n": 3}, 5: {"n": 5}}
    first = stream_files(tmp_path, limit=3)
    assert [row["n"] for row, _ in first] == [1, 2, 3] and first.sha256 == stream.sha256
    assert [(part.name, part.num_rows) for part in first.parts] == [("a.jsonl", 2), ("b.jsonl", 1)]
    assert Places(("x",)).find(12) == ("x", 12)


def test_a_file_that_changed_is_not_fetched_from(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.jsonl", '{"n": 1}\n')
    stream = stream_files(path)
    list(stream)
    _write(path, '{"n": 1}\n{"n": 2}\n')
    with pytest.raises(DataError, match="was changed"):
        stream.fetch([1])


def test_memory_stays_with_the_longest_row(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.jsonl", ('{"text": "' + "x" * 1000 + '"}\n') * 8000)
    tracemalloc.start()
    try:
        assert sum(1 for _ in stream_files(path)) == 8000
        assert tracemalloc.get_traced_memory()[1] < 3e6
    finally:
        tracemalloc.stop()


def test_a_row_of_ten_megabytes(tmp_path: Path) -> None:
    big = {"Question": "é" * 5_000_000}
    stream = stream_files(_write(tmp_path / "a.jsonl", _jsonl([big, {"Question": "small"}])))
    assert [row for row, _ in stream] == [big, {"Question": "small"}] and stream.fetch([1]) == {1: big}


def test_a_large_json_value_is_held_and_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "WHOLE_BYTES", 100)
    assert "held in memory" in read_files(_write(tmp_path / "a.json", json.dumps(MANY))).notes[0]


def test_some_lines_alone_are_read_as_in_their_file(tmp_path: Path) -> None:
    data = b"\xef\xbb\xbf" + _jsonl(MANY).replace("\n", "\n\n", 3).encode()
    path = _write(tmp_path / "a.jsonl", data)
    assert parse_lines(data, path, 1) == read_files(path).rows
    for broken in (b'{"a": 1}\n{oops}\n', b'{"a": 1}\n["b"]\n', b'{"a": 1}\n\xff\n', b'{"a": 1}\n\0\n'):
        with pytest.raises(DataError) as of_file:
            read_files(_write(path, broken))
        with pytest.raises(DataError) as of_lines:
            parse_lines(broken, path, 1)
        assert str(of_lines.value) == str(of_file.value) and "ine 2" in str(of_file.value)


TEXTS = st.text(st.characters(codec="utf-8"), max_size=20)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.dictionaries(st.text(max_size=5), VALUES), min_size=1, max_size=6), escaped=st.booleans())
def test_any_json_rows_come_back(tmp_path_factory: pytest.TempPathFactory, rows: list[dict], escaped: bool) -> None:
    text = "".join(json.dumps(row, ensure_ascii=escaped) + "\n" for row in rows)
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    try:
        _write(path, text)
    except UnicodeEncodeError:  # a lone surrogate has no UTF-8; escaped it has
        _write(path, "".join(json.dumps(row) + "\n" for row in rows))
    stream = stream_files(path)
    assert [row for row, _ in stream] == rows and stream.fetch([len(rows)]) == {len(rows): rows[-1]}


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=60), name=st.sampled_from(["x.jsonl", "x.json", "x.csv", "x.tsv", "x.csv.gz"]))
def test_any_bytes_are_rows_or_one_error(tmp_path_factory: pytest.TempPathFactory, data: bytes, name: str) -> None:
    path = _write(tmp_path_factory.getbasetemp() / name, data)
    try:
        assert read_files(path).rows
    except DataError as error:
        assert path.name in str(error)


@settings(max_examples=60, deadline=None)
@given(cells=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=5), end=st.sampled_from(["\n", "\r\n", "\r"]))
def test_any_quoted_cells_come_back(
    tmp_path_factory: pytest.TempPathFactory, cells: list[tuple[str, str]], end: str
) -> None:
    rows = [{"Q": left.replace("\0", ""), "R": right.replace("\0", "")} for left, right in cells]
    path = _write(tmp_path_factory.getbasetemp() / "any.csv", _csv(rows).replace("\r\n", end))
    expected = [{key: value.replace("\r\n", end) for key, value in row.items()} for row in rows]
    stream = stream_files(path)
    assert [row for row, _ in stream] == expected
    assert stream.fetch([len(rows)]) == {len(rows): expected[-1]}
