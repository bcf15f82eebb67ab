"""Finished tiny runs, one a family; tests copy a run before they change it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tiny_tuned import make_base, make_run


@pytest.fixture(scope="session")
def finished_runs(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the finished run of a family, made when first asked for."""
    made: dict[str, Path] = {}

    def find(name: str) -> Path:
        if name not in made:
            root = tmp_path_factory.mktemp(name.replace(" ", "-"))
            made[name] = make_run(root, make_base(root / "base", tiny_folder, name))
        return made[name]

    return find


@pytest.fixture
def tuned_run(finished_runs: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """Return a copy of the finished run of a family, to change as one likes."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(finished_runs(name), tmp_path / "tuned-1"))

    return copy
