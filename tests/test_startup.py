"""What goes on while libraries are imported must neither hide an error nor leave the process changed."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest

from medcot.startup import Startup


def test_the_modules_are_there_and_the_collector_works_again(tiny_folder: Path) -> None:
    assert gc.isenabled()
    Startup(str(tiny_folder)).wait()
    assert gc.isenabled() and {"medcot.planning", "medcot.export"} <= sys.modules.keys()


def test_a_library_that_cannot_be_imported_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "medcot.planning", None)
    monkeypatch.delattr(sys.modules["medcot"], "planning", raising=False)
    with pytest.raises(ImportError):
        Startup("embedded").wait()
    assert gc.isenabled()
