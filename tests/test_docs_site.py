"""The docs site: every command and every Python block of docs/*.md is run, and the built site asks nobody for anything.

A page's commands run in its order, in a folder that holds what the page says is there: a tiny finished run as
``runs/latest``, and the files that the page itself shows (a block with ``title="my.yaml"``), with tiny models in the
place of large ones. ``SWAPS`` lists what is put in another's place and why. What cannot be run here, ``PARSED`` lists
with its reason: its words go through the real command line's parser, and a recipe through ``load_recipe``.
"""

from __future__ import annotations

import ast
import functools
import http.client
import importlib
import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner

from medcot import cli
from medcot.recipe import list_recipes, load_recipe
from test_docs import known_keys

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {path.name: path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("*.md"))}
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)

# A pattern of the command, and why its words are only parsed.
PARSED = {
    r"medcot run( --dry-run| --resume| tracking=none --dry-run)?": "the default job: minutes, and 98 MB from PyPI",
    r"medcot run (tutorial|r1)-\S+.*": "a model of gigabytes from the Hub, and a GPU",
    r"medcot export .* --base deepseek-ai/.*": "15 GB from the Hub",
    r"medcot eval (medqa:200|quick) .*deepseek.com.*": "somebody's API, for money",
    r"medcot eval medqa:200,pubmedqa:100 .*": "benchmarks from the Hub",
    r"medcot serve .*": "runs until it is stopped; the same service answers the page's requests below",
    r"medcot ui.*": "runs until it is stopped; tests/ui opens the pages in a browser",
}
# What is put in another's place before a command is run, and why.
SWAPS = {
    "eval builtin ": ("eval builtin:clinic:2 ", "400 questions are 2 here"),
    "eval quick --endpoint": ("eval builtin:clinic:2 --endpoint", "its tasks are on the Hub"),
    "medqa.jsonl:50": ("medqa.jsonl:4", "50 questions are 4 here"),
    "evals/mine evals/file": ("evals/file evals/file", "evals/mine is made from the Hub's tasks"),
    "--budgets 256,1024": ("--budgets 4,8", "the tiny model's context is 512 tokens"),
    "medcot ask ": ("medcot ask --max-new-tokens 4 ", "a tiny model babbles"),
    "medcot eval ": (
        "medcot eval --think-tokens 4 --answer-tokens 4 --no-cache ",
        "and the user's cache stays as it is",
    ),
    "medcot export ": ("medcot export --prompts 2 --tokens 4 ", "a proof of two questions is a proof of the command"),
    "medcot verify ": ("medcot verify --prompts 2 --tokens 4 ", "as above"),
}
TINY = {
    "prompt": "short",
    "lora": {"r": 8, "alpha": 16},
    "ask": {"max_new_tokens": 4},
    "evaluate": {"source": None},
    "tracking": "none",
}


@dataclass(frozen=True)
class Place:
    """Where a page's commands run: the folder, and the address of what ``medcot serve`` would serve there."""

    folder: Path
    model: Path
    url: str


def blocks(page: str, language: str) -> list[str]:
    return [text for found, _, text in BLOCK.findall(PAGES[page]) if found == language]


def commands(page: str) -> list[str]:
    return [line for text in blocks(page, "console") for line in text.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def finished(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run, trained until its predictions have clear favourites, as a real one's have."""
    from tiny_runs import run_job

    out = tmp_path_factory.mktemp("finished") / "tiny-1"
    run_job(recipe_file, out, "train.max_steps=30", "train.learning_rate=0.02", "train.logging_steps=10")
    return out


@pytest.fixture(scope="module")
def service(finished: Path) -> Iterator[str]:
    sys.path.insert(0, str(Path(__file__).parent / "serve"))
    from running import running

    from medcot.serving import Wish, choose

    with running(Wish(choose(str(finished)), slots=2, context_tokens=512, max_tokens=8, temperature=0)) as one:
        yield one.url


@pytest.fixture
def place(
    finished: Path, service: str, model_folder: Path, hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Place]:
    """A folder with what the pages speak of; pushes go to a Hub on loopback."""
    folder = tmp_path / "here"
    shutil.copytree(finished, folder / "runs" / "tiny-1")
    (folder / "runs" / "latest").symlink_to("tiny-1")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_TOKEN", "hf_not_a_real_one_0123456789abcdefg")
    for page in PAGES.values():
        for _, name, text in BLOCK.findall(page):
            if name:
                Path(name).write_text(shrink(text, model_folder) if name.endswith(".yaml") else text, encoding="utf-8")
    question = {
        "question": "Which drug? ",
        "options": {"A": "One", "B": "Two", "C": "Three", "D": "Four"},
        "answer_idx": "B",
        "answer": "Two",
    }
    lines = [json.dumps(question | {"question": f"Which drug has number {n}?"}) for n in range(60)]
    Path("medqa.jsonl").write_text("\n".join(lines), encoding="utf-8")
    root, own = logging.getLogger(), logging.getLogger("medcot")
    before = root.level, own.level, own.propagate, list(own.handlers)
    yield Place(folder, model_folder, service)
    root.setLevel(before[0])  # each command turns logging down for its process
    own.setLevel(before[1])
    own.propagate, own.handlers = before[2], before[3]


def shrink(text: str, model: Path) -> str:
    """The page's recipe with a tiny model: what the page says of data stays."""
    values = yaml.safe_load(text)
    values |= TINY | {"model": {"source": str(model), "precision": "fp32", "max_seq_length": 512}}
    values["train"] = values.get("train", {}) | {"epochs": None, "max_steps": 1, "batch_size": 2}
    return yaml.safe_dump(values)


def parse(words: list[str]) -> None:
    """Put words through the command line's parser; a recipe and its overrides are resolved too."""
    command: Any = typer.main.get_command(cli.app)
    name, *rest = words
    with command.commands[name].make_context(name, rest) as context:
        given = context.params
    if name == "run":
        recipe, overrides = cli.split_arguments(given["arguments"] or [])
        load_recipe(recipe, overrides)


def run_command(line: str, place: Place) -> None:
    program, *words = shlex.split(line)
    if program == "medcot" and any(re.fullmatch(pattern, line) for pattern in PARSED):
        parse(words)
    elif program == "medcot":
        parse(words)
        for text, (other, _) in SWAPS.items():
            line = line.replace(text, other)
        done = CliRunner().invoke(cli.app, shlex.split(line.replace("http://127.0.0.1:8000", place.url))[1:])
        assert done.exit_code == 0, f"{line}\n{done.output}\n{done.exception!r}"
    elif program == "curl":
        assert line.startswith("curl http://127.0.0.1:8000/")
        ask(words, place.url)
    elif program == "export":
        name, _, value = " ".join(words).partition("=")
        done = subprocess.run(["bash", "-c", f"echo {value}"], capture_output=True, text=True, check=True)
        assert re.fullmatch(r"[0-9a-f]{24,}", done.stdout.strip()), "a key that nobody guesses"
        assert name == "MEDCOT_API_KEY" or f"-env {name}" in "".join(PAGES.values())
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
            "optional-dependencies"
        ]
        extra = re.fullmatch(r"pip install -c constraints\.txt '\.\[(\w+)\]'", line)
        assert extra and extra.group(1) in extras
    else:
        pytest.fail(f"nobody runs '{line}'")


def ask(words: list[str], url: str) -> None:
    """What curl would do, and with curl itself where there is one."""
    address = words[0].replace("http://127.0.0.1:8000", url)
    if shutil.which("curl"):
        done = subprocess.run(["curl", "-sf", address, *words[1:]], capture_output=True, text=True, timeout=20)
        assert done.returncode == 0, done.stdout
        text = done.stdout
    else:
        connection = http.client.HTTPConnection(url.removeprefix("http://"))
        body = words[words.index("-d") + 1] if "-d" in words else None
        connection.request("POST" if body else "GET", address.removeprefix(url), body)
        reply = connection.getresponse()
        text = reply.read().decode()
        assert reply.status == 200, text
    assert "chat/completions" not in address or json.loads(text)["choices"]


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)])
def test_every_command_of_a_page_runs(page: str, place: Place) -> None:
    for line in commands(page):
        run_command(line, place)


def test_nothing_in_the_tables_of_this_file_is_stale() -> None:
    every = [line for page in PAGES for line in commands(page)]
    assert [pattern for pattern in PARSED if not any(re.fullmatch(pattern, line) for line in every)] == []
    assert [text for text in SWAPS if not any(text in line for line in every)] == []


@pytest.mark.parametrize(
    "block", [pytest.param(text, id=f"{page}-{n}") for page in PAGES for n, text in enumerate(blocks(page, "python"))]
)
def test_every_python_block_runs(block: str, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module or "")
            assert all(alias.name in dir(module) for alias in node.names)
    block = block.replace("http://127.0.0.1:8000", place.url).replace('"embedded"', repr(str(place.model)))
    exec(compile(block, "docs", "exec"), {"__name__": "docs"})


def test_every_recipe_key_and_recipe_that_a_page_names_exists() -> None:
    prefix = "|".join(sorted({key.partition(".")[0] for key in known_keys()}))
    text = "\n".join(PAGES.values())
    keys = set(re.findall(rf"(?<=[`\s])((?:{prefix})\.[a-z_.]+)(?=[`=])", text))
    assert keys - known_keys() == set()
    assert len(keys) > 8
    named = set(re.findall(r"`((?:r1|tutorial)-[a-z0-9.-]+)`", text))
    assert named <= set(list_recipes()) and len(named) >= 8


def test_every_metric_that_a_page_names_is_counted() -> None:
    source = (ROOT / "src/medcot/serve/metrics.py").read_text(encoding="utf-8")
    named, counted = (set(re.findall(pattern, text)) for pattern, text in
                      ((r"`(medcot_\w+)`", PAGES["serving.md"]), (r'"(medcot_\w+)"', source)))  # fmt: skip
    assert named == counted


def test_the_tables_are_what_the_planner_says() -> None:
    sys.path.insert(0, str(DOCS))
    import make_tables

    tables = make_tables.make_tables()
    names = set()
    for name, page in PAGES.items():
        names |= {match.group(2) for match in make_tables.MARKED.finditer(page)}
        assert make_tables.replace(page, tables) == page, f"run python docs/make_tables.py: {name} is stale"
    assert names == set(tables)


def sentences(text: str) -> set[str]:
    """Sentences of prose of at least eight words, plain."""
    prose = re.sub(r"```.*?```|<!--.*?-->", "", text, flags=re.DOTALL)
    plain = " ".join(re.sub(r"[*`_>]|\]\([^)]*\)|\[", "", prose).split()).lower()
    return {part for part in re.split(r"(?<=[.:;|])\s", plain) if len(part.split()) >= 8}


def test_no_sentence_is_written_twice() -> None:
    seen = dict.fromkeys(sentences((ROOT / "README.md").read_text(encoding="utf-8")), "README.md")
    twice = []
    for name, page in PAGES.items():
        found = sentences(page)
        twice += [(sentence, seen[sentence], name) for sentence in found & set(seen)]
        seen |= dict.fromkeys(found, name)
    assert twice == []


# The built site -------------------------------------------------------------------------------------------------------


@functools.cache
def build(folder: Path) -> str:
    """Build the site; return what was said."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}  # an advertisement
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs", reason="the extra 'docs' is not installed")
    pytest.importorskip("mkdocstrings", reason="the extra 'docs' is not installed")
    folder = tmp_path_factory.mktemp("site")
    build(folder)
    return folder


def test_the_site_has_every_page_with_the_intended_use_beneath(site: Path) -> None:
    made = {path.stem for path in site.glob("*.html")}
    assert {Path(name).stem for name in PAGES} | {"readme", "results", "changelog"} <= made
    for path in site.glob("*.html"):
        assert "Not for diagnosis, treatment or any other decision about a patient" in path.read_text(encoding="utf-8")
    assert "medcot.pipeline.run" in (site / "api.html").read_text(encoding="utf-8")


def test_the_site_asks_nobody_for_anything(site: Path) -> None:
    outside = re.compile(r"""<(?:script|link|img|iframe|source|object)\b[^>]*\b(?:src|href|data)=["']?(?:https?:)?//""")
    for path in site.rglob("*.html"):
        assert outside.findall(path.read_text(encoding="utf-8")) == [], path.name
    for path in site.rglob("*.css"):
        assert re.findall(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", path.read_text(encoding="utf-8")) == [], path


def test_in_a_browser_pages_fit_a_phone_search_works_and_no_request_leaves(site: Path) -> None:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium")
    requests: list[str] = []
    with api.sync_playwright() as player:
        browser = player.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 390, "height": 800})
        page.on("request", lambda request: requests.append(request.url))
        for name in ("index", "choosing-a-model", "exporting", "api"):
            page.goto(f"file://{site}/{name}.html")
            wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
            assert wide <= 0, f"{name} is {wide} pixels wider than the screen"
        page.set_viewport_size({"width": 1200, "height": 900})
        page.click(".md-search__input")
        page.keyboard.type("unpacked")
        page.wait_for_selector(".md-search-result__item", timeout=20_000)
        assert "A model for your card" in page.inner_text(".md-search-result")
        browser.close()
    assert [url for url in requests if not url.startswith(("file:", "data:", "blob:", "about:"))] == []
