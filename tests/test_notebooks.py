"""The notebooks are what their sources make, hold no outputs, and run from top to bottom in a kernel of their own."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tiny_runs import make_rows, write_rows

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ROOT / "notebooks"
NAMES = ("medcot_kaggle", "medcot_colab", "from_unsloth")
NEEDY = {"install", "network"}


@pytest.fixture(scope="module")
def builder() -> Any:
    spec = importlib.util.spec_from_file_location("build_notebooks", NOTEBOOKS / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_what_its_source_makes(builder: Any, name: str) -> None:
    kept = (NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8")
    assert kept == builder.build(name), "run 'python notebooks/build.py'"
    cells = json.loads(kept)["cells"]
    assert not any(cell.get("outputs") for cell in cells)
    assert all(cell.get("execution_count") is None for cell in cells)


@pytest.mark.parametrize("name", NAMES)
def test_what_needs_a_network_is_tagged(name: str) -> None:
    for cell in json.loads((NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]:
        source, tags = "".join(cell["source"]), set(cell["metadata"].get("tags", ()))
        if cell["cell_type"] == "code" and any(
            word in source for word in ("%pip", "push_to_hub", "push_folder", "wandb.")
        ):
            assert tags & NEEDY, source


def run_notebook(name: str, parameters: dict[str, Any], folder: Path) -> str:
    """Run a notebook's cells in a kernel, without those that need a network; return what they printed."""
    import nbformat
    from nbclient import NotebookClient

    book = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    cells = []
    for cell in book.cells:
        tags = set(cell.metadata.get("tags", ()))
        if cell.cell_type == "code" and not tags & NEEDY:
            cells.append(cell)
            if "parameters" in tags:
                cells.append(
                    nbformat.v4.new_code_cell("\n".join(f"{key} = {value!r}" for key, value in parameters.items()))
                )
    book.cells = cells
    NotebookClient(book, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()
    outputs = [output for cell in book.cells for output in cell.outputs]
    texts = [output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs]
    return "".join("".join(text) for text in texts)


@pytest.fixture
def quiet_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    return tmp_path


def test_the_whole_job_in_a_kernel(quiet_kernel: Path, recipe_file: Path) -> None:
    parameters = {
        "edition": "cpu",
        "recipe": str(recipe_file),
        "overrides": ["evaluate.source=builtin:clinic:2", "evaluate.max_new_tokens=4", "evaluate.reuse=false"],
        "folder": str(quiet_kernel / "run"),
        "max_new_tokens": 8,
    }
    said = run_notebook("medcot_colab", parameters, quiet_kernel)
    assert "accuracy 0.0% → 0.0% of 2" in said and "loss " in said
    assert (quiet_kernel / "run" / "report.html").is_file() and (quiet_kernel / "run-adapter.zip").is_file()


def tutorial_parameters(model: str, folder: Path, **more: Any) -> dict[str, Any]:
    rows = write_rows(folder / "rows.jsonl", make_rows())
    source = {"path": "json", "data_files": str(rows), "split": "train"}
    return {"model_name": model, "dataset_source": source, "new_model_local": "tuned", "hf_token": None, **more}


def test_the_tutorials_notebook_in_a_kernel(quiet_kernel: Path, model_folder: Path) -> None:
    import shutil

    model = Path(shutil.copytree(model_folder, quiet_kernel / "tiny"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    said = run_notebook(
        "from_unsloth", tutorial_parameters(str(model), quiet_kernel, max_steps=4, max_new_tokens=8), quiet_kernel
    )
    assert "train_loss" in said and "step 4/4" in said and said.count("fp16=True is ignored") == 1
    assert (quiet_kernel / "tuned" / "model.safetensors").is_file()
    assert (quiet_kernel / "tuned" / "adapter" / "adapter_config.json").is_file()


@pytest.mark.slow
def test_the_tutorials_notebook_with_the_embedded_model(quiet_kernel: Path) -> None:
    parameters = tutorial_parameters("embedded", quiet_kernel, max_steps=10, max_new_tokens=60)
    said = run_notebook("from_unsloth", parameters, quiet_kernel)
    assert "train_loss" in said and (quiet_kernel / "tuned" / "model.safetensors").is_file()


@pytest.mark.slow
def test_the_whole_job_with_the_embedded_model(quiet_kernel: Path) -> None:
    overrides = [
        "train.epochs=null",
        "train.max_steps=20",
        "evaluate.source=builtin:clinic:10",
        "data=builtin:clinic[:120]",
    ]
    parameters = {
        "recipe": "default",
        "overrides": overrides,
        "folder": str(quiet_kernel / "run"),
        "max_new_tokens": 60,
    }
    said = run_notebook("medcot_kaggle", parameters, quiet_kernel)
    assert "of 10:" in said and (quiet_kernel / "run" / "report.html").is_file()
