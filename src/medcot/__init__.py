"""medcot: fine-tune open reasoning models on medical chain-of-thought, with proof of what changed.

Public names are resolved on first use, so that importing the package runs nothing, loads no tensor library and sets no
environment variable.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "run": "medcot.pipeline",
    "plan": "medcot.pipeline",
    "load_recipe": "medcot.recipe",
    "list_recipes": "medcot.recipe",
    "Recipe": "medcot.recipe",
    "MedcotError": "medcot.errors",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'medcot' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
