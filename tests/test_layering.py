"""The order of the house: a module imports only from those above it, and what must stay light stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import medcot

SOURCE = Path(medcot.__file__).parent
# One line a storey, top first. A module may import what stands on an earlier line, and its own package; names on one
# line do not know each other. A package is named once, unless a part of it stands elsewhere.
ORDER = """
    errors  records  quiet
    ranks  stages
    recipe  recipes  secrets  shapes
    prompt  precision  weights
    data  clinic  engine  embedded  merging
    accounts
    model  rows
    generate
    train  evaluate  export  hub  serve  tracking_worker
    tracking  report
    machine  folder  asking  planning  proof  diagnosis
    examination  answering
    treatment  evaluation
    job  preview  startup
    admission
    sharing  publishing
    pipeline  doctor  terminal
    exporting  serving
    compat  ui
    cli_eval  cli_export  cli_push  cli_serve  cli_ui
    cli
    __main__
"""
STOREYS = [line.split() for line in ORDER.strip().splitlines()]
PLACE = {name: number for number, names in enumerate(STOREYS) for name in names}
# They work on text and numbers, so a help page, a grade or a table never waits for a tensor library.
LIGHT = [
    *("errors", "records", "recipe", "stages", "secrets", "quiet", "shapes", "prompt", "clinic", "rows", "cli"),
    *("evaluate", "evaluate.grading", "evaluate.lenient", "evaluate.grade_file", "evaluate.stats", "evaluate.tasks"),
    *("data.sources", "data.columns", "data.layouts", "data.benchmarks", "data.checks", "data.packing", "data.scan"),
    *("data.words", "data.quality", "data.identifiers", "data.duplicates", "data.contamination", "data.survival"),
    *("data.tags", "data.lengths", "data.splits", "data.mixtures", "data.licences", "data.spread"),
    *("train.progress", "report.data_screen"),
]


def owner(dotted: str) -> str:
    """The entry of ``ORDER`` that a module (``engine.layers``) belongs to."""
    return dotted if dotted in PLACE else dotted.split(".")[0]


def module_names() -> dict[str, Path]:
    names = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    del names[""]  # medcot/__init__.py, which resolves its names lazily
    return names


MODULES = module_names()


def imports(tree: ast.AST) -> Iterator[str]:
    """What a file takes from medcot anywhere in it, except for the eyes of type checkers."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name the whole path"
            if node.module == "medcot":
                yield from (alias.name for alias in node.names if alias.name in MODULES)
            elif node.module is not None and node.module.startswith("medcot."):
                inner = node.module.removeprefix("medcot.")
                yield from (f"{inner}.{alias.name}" for alias in node.names if f"{inner}.{alias.name}" in MODULES)
                yield inner
        elif isinstance(node, ast.Import):
            yield from (alias.name.removeprefix("medcot.") for alias in node.names if alias.name.startswith("medcot."))
        yield from imports(node)


def test_every_module_has_its_place() -> None:
    assert {owner(name) for name in MODULES} == set(PLACE)


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_from_those_above_it(name: str) -> None:
    own = owner(name)
    taken = {owner(other) for other in imports(ast.parse(MODULES[name].read_text(encoding="utf-8")))} - {own}
    below = {other for other in taken if PLACE[other] >= PLACE[own]}
    assert not below, f"medcot.{name} imports {', '.join(sorted(below))}"


def test_light_modules_load_no_tensor_library() -> None:
    names = ", ".join(f"medcot.{name}" for name in LIGHT)
    heavy = "{'torch', 'transformers', 'peft', 'trl', 'datasets', 'bitsandbytes'} & set(sys.modules)"
    run_python(f"import sys, {names}; heavy = {heavy}; assert not heavy, heavy")


def test_importing_medcot_runs_nothing() -> None:
    run_python(
        "import os, sys; environment = dict(os.environ); before = set(sys.modules); import medcot; "
        "assert dict(os.environ) == environment; "
        "new = {name for name in set(sys.modules) - before if name.split('.')[0] not in sys.stdlib_module_names}; "
        "assert new == {'medcot'}, new"
    )


def test_public_names_resolve() -> None:
    for name in medcot.__all__:
        assert getattr(medcot, name) is not None
    assert dir(medcot) == sorted(medcot.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = medcot.nothing


def test_help_answers() -> None:
    out = subprocess.run(
        [sys.executable, "-m", "medcot", "--help"], capture_output=True, text=True, check=True, timeout=60
    )
    assert "run" in out.stdout and out.stderr == ""


def run_python(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
