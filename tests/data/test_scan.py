"""The scan finds the same however it is cut and whoever maps; nothing is mapped twice, and no cache is believed."""

from __future__ import annotations

import functools
import gzip
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from medcot.data import tallies
from medcot.data.pieces import LinesPiece, SourcePieces, SpilledPiece
from medcot.data.plans import Counts
from medcot.data.scan import PieceReader, Progress, Scanned, scan
from medcot.data.sources import stream_rows
from medcot.data.tallies import TallyStore, UntrustedTallyError
from medcot.errors import DataError, OutputError
from toy_checks import Numbered, ToyBuilder, my_children, traced

NUM_ROWS = 57
NEEDLES = (1, 20, 21, 40, 57)


def rows(num: int = NUM_ROWS) -> list[dict[str, object]]:
    made: list[dict[str, object]] = [
        {"q": f"question {n}{' needle' if n in NEEDLES else ''}"} for n in range(1, num + 1)
    ]
    made[9] = {"q": None}
    return made


def write_lines(path: Path, items: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return path


def cut(path: Path | str, scratch: Path, rows_per_piece: int = 10) -> SourcePieces:
    return SourcePieces(stream_rows(str(path)), scratch, rows_per_piece=rows_per_piece)


def run(path: Path | str, scratch: Path, *checks: Numbered, size: int = 10, **options: object) -> Scanned:
    return scan(cut(path, scratch, size), ToyBuilder(), checks or (Numbered(),), **options)  # type: ignore[arg-type]


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "rows.jsonl", rows())


# What is found -------------------------------------------------------------------------------------------------------


def test_findings_do_not_depend_on_chunks_and_workers(lines: Path, tmp_path: Path) -> None:
    one = run(lines, tmp_path, size=1000)
    expected = tuple(f"{n} rows.jsonl question {n} needle" for n in NEEDLES)
    assert [(f.count, f.rows) for f in one.findings] == [(len(NEEDLES), expected)]
    for size, workers in ((1, 1), (7, 1), (7, 2), (19, 3), (57, 2)):
        other = run(lines, tmp_path, size=size, workers=workers)
        assert other.findings == one.findings
        assert (other.figures.num_rows, other.figures.num_examples) == (NUM_ROWS, NUM_ROWS - 1)
        assert other.figures.counts == Counts(NUM_ROWS, Counter(), Counter({"q is no text": 1}))
        assert other.figures.num_chunks == -(-NUM_ROWS // size)
        assert other.figures.num_tallies == other.figures.num_mapped == 2 * other.figures.num_chunks


def test_every_kind_of_source_gives_the_same(lines: Path, tmp_path: Path) -> None:
    wanted = [(f.count, [row.split(" ", 2)[::2] for row in f.rows]) for f in run(lines, tmp_path).findings]
    text = lines.read_bytes()
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(text))
    (tmp_path / "list.json").write_text(json.dumps(rows()))
    (tmp_path / "list.jsonl").write_text(json.dumps(rows()))
    (tmp_path / "windows.jsonl").write_bytes(b"\xef\xbb\xbf" + text.replace(b"\n", b"\r\n"))
    parts = text.splitlines(keepends=True)
    for folder, pack in (("plain", bytes), ("zipped", gzip.compress)):
        (tmp_path / folder).mkdir()
        for number, part in enumerate((parts[:20], [b"\n", *parts[20:33]], parts[33:])):
            name = f"{number}.jsonl" + (".gz" if pack is gzip.compress else "")
            (tmp_path / folder / name).write_bytes(pack(b"".join(part)))
    names = ("packed.jsonl.gz", "list.json", "list.jsonl", "windows.jsonl", "plain", "zipped")
    for name in names:
        found = run(tmp_path / name, tmp_path, size=8)
        assert [(f.count, [row.split(" ", 2)[::2] for row in f.rows]) for f in found.findings] == wanted, name
    assert run(tmp_path / "plain", tmp_path).findings[0].rows[2] == "21 1.jsonl question 21 needle"
    assert run(tmp_path / "zipped", tmp_path).findings[0].rows[2] == "21 1.jsonl.gz question 21 needle"


@pytest.mark.parametrize(
    "name", ["rows.jsonl", "folder", "rows.jsonl[:21]", "folder[:21]", "folder[:35]", "folder[:90]"]
)
def test_a_cut_stream_knows_what_a_pass_would_know(lines: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    text = lines.read_bytes().splitlines(keepends=True)
    (tmp_path / "folder" / "a.jsonl").write_bytes(b"\n \n" + b"".join(text[:30]) + b"\n")
    (tmp_path / "folder" / "b.jsonl").write_bytes(b"".join(text[30:]).removesuffix(b"\n"))
    (tmp_path / "folder" / "README.md").write_text("words")
    read = stream_rows(str(tmp_path / name))
    expected = [row for row, _ in read]
    pieces = cut(tmp_path / name, tmp_path)
    all_pieces = list(pieces)
    assert all(isinstance(piece, LinesPiece) for piece in all_pieces)
    assert [row for piece in all_pieces for row in piece.read()] == expected
    assert [piece.pick([piece.num_rows - 1])[0] for piece in all_pieces] == [piece.read()[-1] for piece in all_pieces]
    for figure in ("source", "num_rows", "sha256", "parts", "notes", "places"):
        assert getattr(pieces.figures, figure) == getattr(read, figure), figure
    assert pieces.total_bytes == sum(path.stat().st_size for path in (tmp_path / "folder").glob("*.jsonl")) or (
        not name.startswith("folder")
    )


def test_blank_lines_are_those_of_the_reader(tmp_path: Path) -> None:
    path = tmp_path / "blank.jsonl"
    path.write_bytes('\ufeff\n{"q": "a"}\n\u3000\n\x0c\n  {"q": "b"}\n\x85\n\n{"q": "c"}'.encode())
    read = stream_rows(str(path))
    expected = [row for row, _ in read]
    for size in (1, 2, 3, 100):
        pieces = cut(path, tmp_path, size)
        assert [row for piece in pieces for row in piece.read()] == expected
        assert pieces.figures.notes == read.notes


@pytest.mark.parametrize(
    "line",
    [
        *(b'{"q": "cut', b'["q"]', b'{"q": "\xe9"}', b'{"q": "a\0b"}', b'{"q": "a"} {"q": "b"}', b"word"),
        *(b'\xef\xbb\xbf{"q": "a"}', b"\xef\xbb\xbf"),  # a mark where no file begins
    ],
)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_broken_line_is_named_as_the_reader_names_it(tmp_path: Path, line: bytes, workers: int) -> None:
    path = write_lines(tmp_path / "rows.jsonl", rows())
    whole = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"\n" + b"".join([*whole[:34], line + b"\n", *whole[34:]]))
    with pytest.raises(DataError, match=r"[Ll]ine 36") as by_reader:
        list(stream_rows(str(path)))
    with pytest.raises(DataError) as by_scan:
        run(path, tmp_path, workers=workers)
    assert str(by_scan.value) == str(by_reader.value)


@pytest.mark.parametrize("content", [b"", b" \n\n", b"\xff\xfe{\0}\0"])
def test_what_holds_no_rows_is_said_as_the_reader_says_it(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError) as by_reader:
        list(stream_rows(str(path)))
    with pytest.raises(DataError) as by_scan:
        run(path, tmp_path)
    assert str(by_scan.value) == str(by_reader.value)


def test_a_file_that_changes_meanwhile_is_no_mixture(lines: Path, tmp_path: Path) -> None:
    pieces = list(cut(lines, tmp_path))
    lines.write_bytes(lines.read_bytes().replace(b"question 33", b"question XX"))
    assert pieces[0].read() == rows()[:10]
    with pytest.raises(DataError, match="changed while it was being read"):
        pieces[3].read()


def test_a_long_row_ends_its_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medcot.data.pieces.MOST_BYTES_PER_PIECE", 1000)
    path = write_lines(tmp_path / "rows.jsonl", [{"q": "x" * 5000 if n == 4 else "short"} for n in range(8)])
    assert [(piece.first, piece.num_rows) for piece in cut(path, tmp_path)] == [(1, 5), (6, 3)]


def test_rows_are_fetched_by_number(lines: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(rows()))
    for name, kind in (("rows.jsonl", LinesPiece), ("rows.json", SpilledPiece)):
        pieces = list(cut(tmp_path / name, tmp_path))
        assert all(isinstance(piece, kind) for piece in pieces)
        reader = PieceReader(pieces, ToyBuilder())
        for numbers in ([57, 1, 11, 11], [], [30], [57, 56]):
            fetched = reader.fetch(numbers)
            assert {n: e.id for n, e in fetched.items()} == {n: f"toy:{n}" for n in numbers}
            assert all(f"question {n}" in e.question for n, e in fetched.items())
        with pytest.raises(AssertionError, match="row 10 makes no example"):
            reader.fetch([10])


def test_progress_counts_rows_and_bytes(lines: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    cache = tmp_path / "cache"
    for _ in range(2):
        pieces = cut(lines, tmp_path)
        scan(pieces, ToyBuilder(), [Numbered()], cache=cache, on_progress=seen.append, total_bytes=pieces.total_bytes)
    assert [p.num_rows for p in seen] == [10, 20, 30, 40, 50, 57] * 2
    assert seen[-1].num_bytes == seen[-1].total_bytes == lines.stat().st_size
    assert [p.num_kept for p in seen] == [0] * 6 + [10, 20, 30, 40, 50, 57]
    assert seen[5].rows_per_s > 0 and seen[-1].rows_per_s == 0


# The cache -----------------------------------------------------------------------------------------------------------


def mapped(trace: Path) -> list[int]:
    """First rows of the chunks mapped since the last call."""
    firsts = sorted(first for _, first in traced(trace))
    trace.unlink(missing_ok=True)
    return firsts


def test_only_what_changed_is_mapped_again(lines: Path, tmp_path: Path) -> None:
    cache, trace = tmp_path / "cache", tmp_path / "trace"

    def again(*checks: Numbered, path: Path = lines, size: int = 10) -> list[int]:
        scan(cut(path, tmp_path, size), ToyBuilder(), checks, cache=cache)
        return mapped(trace)

    check, other = Numbered(trace=trace), Numbered(word="question 4", trace=trace, name="other")
    assert again(check) == [1, 11, 21, 31, 41, 51]
    assert again(check) == []
    assert again(check, other) == [1, 11, 21, 31, 41, 51]  # the new one only
    assert again(check, Numbered(word="question 5", trace=trace, name="other")) == [1, 11, 21, 31, 41, 51]
    assert again(check, other) == []
    text = lines.read_bytes()
    lines.write_bytes(text.replace(b"question 33", b"question 3 3, mended"))  # of another length
    assert again(check) == [31]
    lines.write_bytes(text + b'{"q": "one more"}\n')
    assert again(check) == [51]
    lines.write_bytes(text)
    assert again(check) == []
    lines.write_bytes(b'{"q": "new"}\n' * 10 + text)  # the same chunks, but their rows have other numbers
    assert again(check) == [1, 11, 21, 31, 41, 51, 61]
    lines.write_bytes(text)
    lines.rename(tmp_path / "other.jsonl")  # the examples name their file
    assert again(check, path=tmp_path / "other.jsonl") == [1, 11, 21, 31, 41, 51]
    assert len(again(check, path=tmp_path / "other.jsonl", size=57)) == 1


def test_another_builder_or_code_makes_everything_anew(
    lines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = []
    for builder, code in (("a", "1"), ("a", "1"), ("b", "1"), ("b", "2")):
        monkeypatch.setattr(tallies, "_hash_code", lambda code=code: code)
        done = scan(cut(lines, tmp_path), ToyBuilder(builder), [Numbered()], cache=tmp_path / "cache")
        counts.append(done.figures.num_mapped)
    assert counts == [12, 0, 12, 12]


def poison(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "cut short":
        path.write_bytes(data[:-3])
    elif how == "one bit":
        path.write_bytes(data[:-5] + bytes([data[-5] ^ 1]) + data[-4:])
    elif how == "foreign":
        path.write_bytes(b"something else")
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "of another chunk":
        path.write_bytes(next(p for p in path.parent.parent.glob("*/*.tally") if p != path).read_bytes())
    elif how == "a program":  # with the right checksum: somebody who knows how
        key = path.stem
        content = pickle.dumps(functools.partial(os.system, f"touch {path.parents[2] / 'hacked'}"))
        path.write_bytes(tallies._MAGIC + tallies._checksum(key, content) + content)


@pytest.mark.parametrize("how", ["cut short", "one bit", "foreign", "empty", "of another chunk", "a program"])
def test_a_poisoned_cache_is_not_believed(lines: Path, tmp_path: Path, how: str) -> None:
    cache = tmp_path / "cache"
    first = run(lines, tmp_path, cache=cache)
    victim = sorted(cache.glob("*/*.tally"))[3]
    poison(victim, how)
    second = run(lines, tmp_path, cache=cache)
    assert second.findings == first.findings
    assert (second.figures.num_distrusted, second.figures.num_mapped) == (1, 1)
    assert not (tmp_path / "hacked").exists()


def test_the_programs_refused_would_have_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return os.system, (f"touch {tmp_path / 'hacked'}",)

    store = TallyStore(tmp_path / "cache")
    store.save("ab", pickle.dumps(Evil()))
    with pytest.raises(UntrustedTallyError, match=r"names posix\.system"):
        store.load("ab", "medcot")
    assert not (tmp_path / "hacked").exists()
    pickle.loads(pickle.dumps(Evil()))
    assert (tmp_path / "hacked").exists()


@pytest.mark.parametrize(
    "program",
    [
        b"cmedcot.data.tallies\nos\n.",  # a module that ours imports
        b"\x80\x04\x8c\x13medcot.data.tallies\x94\x8c\tos.system\x94\x93.",  # what is inside of it
        b"\x80\x04\x8c\x13medcot.data.tallies\x94\x8c\x0eos.stat_result\x94\x93.",  # there, and a tuple like ours
        b"cmedcot.data.children\n_Child\n.",  # a class, but no record
        b"cbuiltins\neval\n.",
    ],
)
def test_a_tally_names_nothing_but_records(tmp_path: Path, program: bytes) -> None:
    pickle.loads(program)  # the plain unpickler finds them all
    store = TallyStore(tmp_path)
    store.save("ab", program)
    with pytest.raises(UntrustedTallyError, match="which no tally holds"):
        store.load("ab", "medcot.data.duplicates")


def test_a_cache_that_vanishes_amid_the_scan_costs_time_only(lines: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"

    def burn(progress: Progress) -> None:
        for path in cache.glob("*/*.tally"):
            path.unlink()

    done = run(lines, tmp_path, cache=cache, on_progress=burn)
    assert done.findings == run(lines, tmp_path).findings
    assert done.figures.num_distrusted == 12 and done.figures.num_mapped == 24


def test_pruning_takes_the_old_then_the_longest_unused_and_nothing_foreign(tmp_path: Path) -> None:
    store = TallyStore(tmp_path)
    now = time.time()
    for key, age_s in (("aa1", 40 * 86_400), ("aa2", 9_000), ("bb1", 8_000), ("bb2", 10)):
        store.save(key, pickle.dumps("x" * 1000))
        path = tmp_path / key[:2] / f"{key}.tally"
        os.utime(path, (now - age_s, now - age_s))
    draft, foreign = tmp_path / "aa" / ".aa9.77.tmp", tmp_path / "aa" / "thesis.tex"
    for path in (draft, foreign):
        path.write_text("x" * 10_000)
        os.utime(path, (now - 40 * 86_400,) * 2)
    assert store.prune() == 2  # a month old: the tally, and the draft of a killed process
    assert sorted(path.name for path in tmp_path.glob("*/*")) == ["aa2.tally", "bb1.tally", "bb2.tally", "thesis.tex"]
    assert store.prune(most_bytes=2_500) == 1 and not (tmp_path / "aa" / "aa2.tally").exists()
    assert store.holds("bb1")  # and so it is used now
    assert store.prune(most_bytes=0) == 0  # another scan may be at it
    assert foreign.exists() and not draft.exists()


def test_a_cache_that_cannot_be_written_is_named(lines: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="XDG_CACHE_HOME"):
        run(lines, tmp_path, cache=tmp_path / "file" / "cache")


# Workers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fail", "error", "words"),
    [
        ("data", DataError, "The row says trouble. It must not. Mend it."),
        ("bug", ChildProcessError, "a bug in the check"),
        ("die", ChildProcessError, "ended with status 7"),
    ],
)
def test_trouble_in_a_worker_reaches_the_parent(tmp_path: Path, fail: str, error: type, words: str) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [{"q": "trouble" if n == 33 else "fine"} for n in range(1, 58)])
    with pytest.raises(error, match=words.replace(".", r"\.")):
        run(path, tmp_path, Numbered(fail=fail), workers=2, cache=tmp_path / "cache")
    assert not my_children()
    done = run(path, tmp_path, Numbered(), workers=2, cache=tmp_path / "cache")
    assert done.figures.num_mapped < done.figures.num_tallies  # what was done before the trouble is kept


SCRIPT = """
import signal, sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have the tests' own children ignore it
sys.path[:0] = {paths}
from test_scan import cut
from toy_checks import Numbered, ToyBuilder
from medcot.data.scan import scan
folder = Path({folder!r})
check = Numbered(trace=folder / "trace", nap_s=0.3)
scan(cut(folder / "rows.jsonl", folder), ToyBuilder(), [check], workers=2, cache=folder / "cache")
"""


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGINT])
def test_a_scan_that_was_killed_goes_on_and_leaves_nobody_behind(tmp_path: Path, signum: int) -> None:
    write_lines(tmp_path / "rows.jsonl", rows(57) + rows(57) * 5)
    script = SCRIPT.format(paths=[str(Path(__file__).parent), str(Path(__file__).parents[1])], folder=str(tmp_path))
    parent = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, start_new_session=True)
    try:
        wait_until(lambda: len(list((tmp_path / "cache").glob("*/*.tally"))) >= 12)
        children = psutil.Process(parent.pid).children()
        assert len(children) == 2
    finally:
        os.killpg(parent.pid, signum) if signum == signal.SIGINT else parent.kill()
    _, words = parent.communicate(timeout=20)
    assert (b"KeyboardInterrupt" in words) == (signum == signal.SIGINT)
    wait_until(lambda: not any(child.is_running() for child in children))
    kept = {path.name for path in (tmp_path / "cache").glob("*/*.tally")}
    assert 12 <= len(kept) < 70
    (tmp_path / "trace").unlink()
    done = run(tmp_path / "rows.jsonl", tmp_path, Numbered(trace=tmp_path / "trace"), cache=tmp_path / "cache")
    assert done.figures.num_tallies == 70 and done.figures.num_mapped == 70 - len(kept)
    num_mapped = len(mapped(tmp_path / "trace"))
    assert 35 - len(kept) // 2 <= num_mapped <= 35 - len(kept) // 2 + 1  # killed between the two files of a chunk
    assert done.findings == run(tmp_path / "rows.jsonl", tmp_path).findings


def wait_until(condition: object, timeout_s: float = 20.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)


MEMORY = """
import sys
from pathlib import Path
sys.path[:0] = {paths}
from test_scan import cut
from toy_checks import Memory, Numbered, ToyBuilder, peak_mb
from medcot.data.scan import scan
path = Path({path!r})
before = peak_mb()
done = scan(cut(path, path.parent, 1000), ToyBuilder(), [Numbered(), Memory()], workers=2)
found, memory = done.findings
assert done.figures.num_rows == {num_rows} and found.count == 1 and memory.count == 2
print(peak_mb() - before, memory.says.removesuffix("."))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, name: str) -> None:
    num_rows = 50_000 if name == "rows.jsonl" else 30_000  # of a kilobyte
    if name == "rows.jsonl":
        row = json.dumps({"q": "x" * 1000}) + "\n"
        text = row * (num_rows - 1) + json.dumps({"q": "needle"}) + "\n"
    else:
        text = "q\n" + ("x" * 1000 + "\n") * (num_rows - 1) + "needle\n"
    (tmp_path / name).write_text(text)
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    script = MEMORY.format(paths=paths, path=str(tmp_path / name), num_rows=num_rows)
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    parent_mb, child_mb = map(float, out.stdout.split())
    assert parent_mb < 15 and child_mb < 10, (parent_mb, child_mb)
