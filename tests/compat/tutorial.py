"""The tutorial's cells run in this process: stand-ins for what is Kaggle's, rows of our own, a Hub on loopback."""

from __future__ import annotations

import importlib
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "notebooks" / "from_unsloth.ipynb"
TOKEN = "hf_" + "t" * 34
WANDB_KEY = "w" * 40


def bench_module(name: str) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "bench"))
        return importlib.import_module(name)


def write_rows(path: Path, count: int = 40) -> Path:
    """Short problems in the layout of the tutorial's data set."""
    rows = [
        {
            "Question": f"A patient drinks {i} cups and then {i % 5} more. How many?",
            "Complex_CoT": f"I add {i} and {i % 5}. " * (1 + i % 3) + f"That is {i + i % 5}.",
            "Response": f"{i + i % 5} cups",
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def stand_in_for_kaggle(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a Kaggle notebook imports for its secrets."""
    module = types.ModuleType("kaggle_secrets")
    module.__spec__ = importlib.machinery.ModuleSpec("kaggle_secrets", None)

    class BackendError(Exception):
        pass

    class CredentialError(Exception):
        pass

    class UserSecretsClient:
        def get_secret(self, label: str) -> str:
            held = {"HUGGINGFACE_TOKEN": TOKEN, "wandb": WANDB_KEY}
            if label not in held:
                raise BackendError(label)
            return held[label]

    module.BackendError, module.CredentialError = BackendError, CredentialError  # type: ignore[attr-defined]
    module.UserSecretsClient = UserSecretsClient  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "kaggle_secrets", module)


def run_tutorial(parameters: dict[str, Any], *, skip: frozenset[str] = frozenset()) -> dict[str, Any]:
    """Run every cell but the one that installs; return what the cells have left."""
    notebook = bench_module("notebook_cells")
    cells = [cell for cell in notebook.read_cells(NOTEBOOK) if not cell.tags & skip]
    ran = list(notebook.run_cells(cells, parameters, also=frozenset({"network"})))
    names: dict[str, Any] = ran[-1][1]
    return names
