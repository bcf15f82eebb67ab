"""Sources: paths, Hub ids and what is neither; the Hub's failures, each as it is really raised.

One small Hub on loopback answers the success path in a process of its own (``HF_ENDPOINT`` is read at import); failures
that need no answer are raised by stand-ins for the two calls we make.
"""

import errno
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import httpx
import huggingface_hub
import pytest
from datasets.data_files import EmptyDatasetError
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from huggingface_hub import errors as hub

from medcot.data.sources import load_rows, parse_slice, stream_rows
from medcot.errors import DataError, MedcotError, NetworkError, OutputError

REAL = Path(__file__).parents[2] / "../shared/data/medical-o1-reasoning-SFT/train.jsonl"
ID = "owner/name"


def test_real_rows() -> None:
    if not REAL.exists():
        pytest.skip(f"the 198 real rows are not here ({REAL})")
    table = load_rows(str(REAL))
    assert len(table.rows) == 198
    assert table.columns == ["Question", "Complex_CoT", "Response"]
    assert table.sha256 == hashlib.sha256(REAL.read_bytes()).hexdigest()
    assert load_rows(f"{REAL}[:5]").rows == table.rows[:5]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("a/b", ("a/b", None)),
        ("a/b[:500]", ("a/b", 500)),
        (" my data.jsonl [: 3] ", ("my data.jsonl", 3)),
        ("data[1]", ("data[1]", None)),
        ("builtin:clinic[:100]", ("builtin:clinic", 100)),
    ],
)
def test_slices(source: str, expected: tuple[str, int | None]) -> None:
    assert parse_slice(source) == expected


@pytest.mark.parametrize("source", ["a[:0]", "a[5:]", "a[1:5]", "a[:x]", "a[:-1]", "[:5]", "a[:]", "a[:²]"])
def test_other_slices_are_refused(source: str) -> None:
    with pytest.raises(DataError, match="first N rows"):
        parse_slice(source)


def test_local_file_slice_columns_and_notes(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n{"b": 2, "a": 3}\n')
    table = load_rows(f"{path}[:1]", config="en", split="test", revision="main")
    assert (table.rows, table.columns, table.source) == ([{"a": 1}], ["a"], str(path))
    assert "config=en, split=test, revision=main was not used" in table.notes[0]
    table = load_rows(f"{path}[:500]")
    assert table.columns == ["a", "b"]
    assert "500 rows were asked for" in table.notes[0] and "has 2" in table.notes[0]


def test_a_stream_says_what_a_table_says(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n\n{"b": 2}\n')
    table, stream = load_rows(f"{path}[:5]", config="en"), stream_rows(f"{path}[:5]", config="en")
    assert [row for row, name in stream if name == "x.jsonl"] == table.rows
    assert (stream.source, stream.revision, stream.sha256) == (table.source, None, table.sha256)
    assert (stream.parts, stream.notes) == (table.parts, table.notes) and len(stream.notes) == 3
    assert stream.fetch([2]) == {2: {"b": 2}} and stream.places.find(2) == ("x.jsonl", 2)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("trian.jsonl", ["does not exist", "Did you mean 'train.jsonl'?"]),
        ("./trian", ["does not exist"]),
        ("a/b/c", ["does not exist"]),
        ("no/such.csv", ["does not exist"]),
        ("train", ["neither", "owner/name", "Did you mean 'train.jsonl'?"]),
        ("my data", ["neither", "owner/name"]),
        ("", ["empty"]),
        ("builtin:clinc", ["builtin:clinic"]),
        ("https://huggingface.co/datasets/me/demo/tree/main", ["Write me/demo"]),
        ("hf://datasets/me/demo", ["Write me/demo"]),
        ("https://example.org/x.jsonl", ["Download the file"]),
        ("x" * 5000, ["neither"]),
    ],
)
def test_what_is_no_source_never_reaches_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, words: list[str]
) -> None:
    (tmp_path / "train.jsonl").write_text("{}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "HfApi", None)
    with pytest.raises(DataError) as caught:
        load_rows(source)
    for word in words:
        assert word in str(caught.value)


def _http(kind: type[hub.HfHubHTTPError], status: int) -> hub.HfHubHTTPError:
    request = httpx.Request("GET", "https://hub.invalid/x?X-Amz-Signature=SECRET")
    return kind("boom SECRET", response=httpx.Response(status, request=request))


class _Api:
    """Stands in for ``HfApi``: raises what it is given, or answers."""

    failure: Exception | None = None

    def __init__(self, token: str | None = None) -> None:
        pass

    def dataset_info(self, *args: object, **kwargs: object) -> None:
        if self.failure is not None:
            raise self.failure


@pytest.fixture
def fail(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., MedcotError]:
    """Return a function that lets the first question or the builder fail, and returns what the caller then meets."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "HfApi", _Api)
    monkeypatch.chdir(tmp_path)

    def run(*, api: Exception | None = None, builder: Exception | None = None, **kwargs: str) -> MedcotError:
        def load(*args: object, **kw: object) -> None:
            assert builder is not None
            raise builder

        monkeypatch.setattr(_Api, "failure", api)
        monkeypatch.setattr(datasets, "load_dataset_builder", load)
        with pytest.raises(MedcotError) as caught:
            load_rows(ID, **kwargs)
        assert "SECRET" not in str(caught.value) and "\n" not in str(caught.value)
        return caught.value

    return run


@pytest.mark.parametrize(
    ("failure", "kind", "words"),
    [
        (_http(hub.RepositoryNotFoundError, 404), DataError, "not on the Hub"),
        (_http(hub.RevisionNotFoundError, 404), DataError, "no revision 'v9'"),
        (_http(hub.GatedRepoError, 403), DataError, "Ask for access on"),
        (_http(hub.HfHubHTTPError, 401), DataError, "HF_TOKEN"),
        (_http(hub.HfHubHTTPError, 503), NetworkError, "HTTP 503"),
        (_http(hub.HfHubHTTPError, 429), NetworkError, "Try again later"),
        (httpx.ConnectError("x"), NetworkError, "HF_HUB_OFFLINE=1"),
        (httpx.ReadTimeout("x"), NetworkError, "download the data file"),
        (hub.OfflineModeIsEnabled("x"), NetworkError, "To work offline"),
        (json.JSONDecodeError("x", "<html>", 0), NetworkError, "cannot be reached"),
        (hub.HFValidationError("x"), DataError, "not a valid Hub id"),
    ],
)
def test_first_question_fails(
    fail: Callable[..., MedcotError], failure: Exception, kind: type[MedcotError], words: str
) -> None:
    error = fail(api=failure, revision="v9")
    assert type(error) is kind and words in str(error)


@pytest.mark.parametrize(
    ("failure", "kind", "words"),
    [
        (DatasetNotFoundError("Dataset 'x' is a gated dataset on the Hub."), DataError, "gated"),
        (DatasetNotFoundError("Revision 'v9' doesn't exist for dataset"), DataError, "no revision"),
        (DatasetNotFoundError("Dataset 'x' doesn't exist on the Hub"), DataError, "not on the Hub"),
        (EmptyDatasetError("x"), DataError, "no data files"),
        (RuntimeError("Dataset scripts are no longer supported, but found x.py"), DataError, "Remote code"),
        (ValueError("BuilderConfig 'fr' not found. Available: ['en', 'zh_mix']"), DataError, "offers en, zh_mix"),
        (ValueError("Couldn't infer the same data file format"), DataError, "cannot be loaded"),
        (ConnectionError("x"), NetworkError, "To work offline"),
        (hub.LocalEntryNotFoundError("x"), NetworkError, "To work offline"),
        (DatasetGenerationError("x"), DataError, "agree in their columns"),
        (OSError("Not enough disk space. Needed: 5 GB"), OutputError, "Free some space"),
        (OSError(errno.ENOSPC, "No space left on device"), OutputError, "HF_HOME"),
    ],
)
def test_builder_fails(
    fail: Callable[..., MedcotError], failure: Exception, kind: type[MedcotError], words: str
) -> None:
    error = fail(builder=failure, config="fr", revision="v9")
    assert type(error) is kind and words in str(error)


def test_bugs_are_not_dressed_up(fail: Callable[..., MedcotError]) -> None:
    with pytest.raises(RuntimeError, match="something else"):
        fail(builder=RuntimeError("something else"))


def test_missing_network_still_thinks_of_a_local_file(fail: Callable[..., MedcotError]) -> None:
    Path("owner").mkdir()
    Path("owner/nam.jsonl").write_text("{}\n")
    assert "Did you mean 'owner/nam.jsonl'?" in str(fail(api=httpx.ConnectError("x")))


def test_library_settings_are_put_back(fail: Callable[..., MedcotError]) -> None:
    verbosity, had_bars = datasets.logging.get_verbosity(), datasets.is_progress_bar_enabled()
    fail(api=httpx.ConnectError("x"))
    assert (datasets.logging.get_verbosity(), datasets.is_progress_bar_enabled()) == (verbosity, had_bars)


# A Hub on loopback ---------------------------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "README.md": b"""---
configs:
- {config_name: en, data_files: en.json}
- {config_name: zh, data_files: zh.json}
---
""",
    "en.json": b'[{"Question": "q1", "Response": "r"}, {"Question": "q2", "Response": null}]',
    "zh.json": '[{"Question": "问", "Response": "答"}]'.encode(),
}


class _Hub(http.server.BaseHTTPRequestHandler):
    """Just enough of the Hub's API for one public data set, ``me/demo``."""

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        wanted = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}").get("paths", [])
        self._send([self._entry(name) for name in wanted if name in FILES])

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        name = path.rpartition("/")[2]
        if path.startswith("/api/datasets/me/demo/tree/"):
            self._send([self._entry(name) for name in FILES])
        elif path.startswith("/api/datasets/me/demo"):
            siblings = [{"rfilename": name} for name in FILES]
            self._send({"id": "me/demo", "sha": COMMIT, "tags": [], "siblings": siblings, "private": False})
        elif path.startswith("/datasets/me/demo/resolve/") and name in FILES:
            self._send(FILES[name])
        else:
            code = "EntryNotFound" if path.startswith("/datasets/me/demo") else "RepoNotFound"
            self._send({"error": code}, status=404, code=code)

    def _entry(self, name: str) -> dict[str, object]:
        return {"type": "file", "path": name, "size": len(FILES[name]), "oid": hashlib.sha1(FILES[name]).hexdigest()}

    def _send(self, body: object, status: int = 200, code: str | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


_ASK = """
import json, sys
from medcot.data.sources import load_rows, stream_rows
from medcot.errors import MedcotError
out = []
for kwargs in json.loads(sys.argv[1]):
    try:
        t = load_rows(**kwargs)
        s = stream_rows(**kwargs)
        assert [row for row, name in s if name == t.source] == t.rows and s.sha256 == t.sha256
        assert s.fetch([len(t.rows), 1]) == {1: t.rows[0], len(t.rows): t.rows[-1]} and s.fetch([]) == {}
        out.append({"rows": t.rows, "revision": t.revision, "sha256": t.sha256, "notes": t.notes, "source": t.source})
    except MedcotError as error:
        out.append({"error": type(error).__name__, "text": str(error)})
print(json.dumps(out))
"""


def _ask(home: Path, cases: list[dict], **env: str) -> list[dict]:
    settings = {"HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1", **env}
    child = subprocess.run(
        [sys.executable, "-c", _ASK, json.dumps(cases)], env={**os.environ, **settings}, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr
    assert child.stderr == "", "the libraries chattered"
    answers: list[dict] = json.loads(child.stdout)
    return answers


def test_hub_on_loopback_then_offline(tmp_path: Path, endpoint: str) -> None:
    online = [
        {"source": "me/demo", "config": "en"},
        {"source": "me/demo[:1]", "config": "en"},
        {"source": "me/demo", "config": "zh"},
        {"source": "me/demo", "config": "znh"},
        {"source": "me/demo"},
        {"source": "me/demo", "config": "en", "split": "tran"},
        {"source": "me/demo", "config": "en", "split": "train[:x]"},
        {"source": "me/other"},
    ]
    whole, first, chinese, wrong, several, split, broken, missing = _ask(tmp_path, online, HF_ENDPOINT=endpoint)
    assert whole["rows"] == json.loads(FILES["en.json"])
    assert (whole["revision"], whole["source"], whole["notes"]) == (COMMIT, "me/demo", [])
    assert first["rows"] == whole["rows"][:1]
    canonical = '{"Question":"问","Response":"答"}\n'.encode()
    assert chinese["sha256"] == hashlib.sha256(canonical).hexdigest()
    assert "offers en, zh. Did you mean 'zh'?" in wrong["text"]
    assert "several configurations. They are en, zh" in several["text"]
    assert "Its splits are train. Did you mean 'train'?" in split["text"]
    assert broken["error"] == missing["error"] == "DataError"

    offline = [
        {"source": "me/demo", "config": "en"},
        {"source": "me/demo", "config": "en", "revision": COMMIT},
        {"source": "me/demo", "config": "en", "revision": "v9"},
        {"source": "me/demo", "config": "fr"},
        {"source": "me/other"},
    ]
    cached, pinned, moved, absent, unknown = _ask(tmp_path, offline, HF_HUB_OFFLINE="1")
    assert cached["rows"] == pinned["rows"] == whole["rows"]
    assert cached["sha256"] == whole["sha256"] and cached["revision"] == COMMIT
    assert "local cache was read" in cached["notes"][0]
    assert moved["error"] == "NetworkError" and COMMIT in moved["text"]
    assert "offers en, zh" in absent["text"]
    assert unknown["error"] == "NetworkError" and "To work offline" in unknown["text"]
