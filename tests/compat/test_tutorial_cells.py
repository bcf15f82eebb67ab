"""The tutorial's cells, from the secrets to the push, run as they stand in the notebook."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tutorial import TOKEN, run_tutorial, stand_in_for_kaggle, write_rows

from loopback_hub import LoopbackHub

REPO = "me/DeepSeek-R1-Medical-COT"


def prepare(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    stand_in_for_kaggle(monkeypatch)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(folder))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("NETRC", str(folder / "netrc"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "datasets"))


def parameters(model: str, rows: Path, **more: Any) -> dict[str, Any]:
    source = {"path": "json", "data_files": str(rows), "split": "train"}
    names = {"new_model_local": "DeepSeek-R1-Medical-COT", "new_model_online": REPO}
    return {"model_name": model, "dataset_source": source, **names, **more}


def longer(model_folder: Path, folder: Path) -> Path:
    """The tiny model, said to be good for the tutorial's 2,048 tokens."""
    copied = Path(shutil.copytree(model_folder, folder / "tiny"))
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    return copied


def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids, use_cache=False).logits.float()
    return found


def check_run(names: dict[str, Any], hub: LoopbackHub, folder: Path, num_steps: int) -> None:
    """What must be true at the end, whatever the model."""
    stats = names["trainer_stats"]
    assert stats.global_step == num_steps
    assert math.isclose(stats.training_loss, stats.metrics["train_loss"])
    assert {"train_runtime", "train_samples_per_second", "train_steps_per_second"} <= stats.metrics.keys()
    losses = [line["loss"] for line in names["trainer"].state.log_history if "loss" in line]
    assert losses[-1] < losses[0]
    local = folder / "DeepSeek-R1-Medical-COT"
    assert not (local / "adapter_config.json").exists() and (local / "adapter" / "adapter_config.json").is_file()
    files = set(hub.repos[REPO])
    assert {"config.json", "model.safetensors", "tokenizer.json", "adapter/adapter_config.json"} <= files
    assert "adapter/adapter_model.safetensors" in files and "adapter_config.json" not in files
    assert hub.private[REPO] is True and hub.tokens == {f"Bearer {TOKEN}"}
    check_reload(names, folder)


def check_reload(names: dict[str, Any], folder: Path) -> None:
    """A plain reload, of the folder and of the repository, gives the merged model; and the adapter gives the tuned."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = names["inputs"].input_ids
    local = folder / "DeepSeek-R1-Medical-COT"
    plain = AutoModelForCausalLM.from_pretrained(local, dtype=torch.float32)
    assert type(plain).__name__ == "LlamaForCausalLM", "no adapter was applied"
    merged = logits_of(plain, ids)
    pulled = AutoModelForCausalLM.from_pretrained(REPO, dtype=torch.float32, token=TOKEN)
    assert torch.equal(logits_of(pulled, ids), merged)
    assert AutoTokenizer.from_pretrained(REPO, token=TOKEN).eos_token == names["EOS_TOKEN"]
    session = vars(names["model"])["_medcot_session"]
    base = AutoModelForCausalLM.from_pretrained(session.loaded.name, dtype=torch.float32)
    without = logits_of(base, ids)
    tuned = logits_of(PeftModel.from_pretrained(base, local / "adapter"), ids)
    # In 16 bit the merged weights are rounded once more; applying the adapter twice would be off by as much as it adds.
    effect = (tuned - without).norm()
    assert (merged - tuned).norm() < 0.2 * effect, "merged weights are base and adapter, once"


@pytest.fixture
def fresh_wandb() -> Any:
    wandb = pytest.importorskip("wandb")
    yield wandb
    if wandb.run is not None:
        wandb.finish()
    wandb.teardown()


def test_the_tutorial_runs_to_its_end(
    model_folder: Path,
    hub: LoopbackHub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fresh_wandb: Any,
) -> None:
    prepare(monkeypatch, tmp_path)
    rows = write_rows(tmp_path / "rows.jsonl")
    names = run_tutorial(parameters(str(longer(model_folder, tmp_path)), rows, max_steps=30, max_new_tokens=12))
    check_run(names, hub, tmp_path, num_steps=30)
    said = capsys.readouterr().out
    assert "step 10/30" in said and "step 30/30" in said and "step  1/30" not in said
    for once in ("fp16=True is ignored", "dataset_num_proc is not needed", "load_in_4bit", "the W&B run that is open"):
        assert said.count(once) == 1, once
    assert TOKEN not in said
    kept = b"".join(path.read_bytes() for path in tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert b"train/loss" in kept and b"train/train_samples_per_second" not in kept and kept.count(b"train/epoch") >= 3


@pytest.mark.slow
def test_the_tutorial_runs_to_its_end_with_a_real_model(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_wandb: Any
) -> None:
    prepare(monkeypatch, tmp_path)
    rows = write_rows(tmp_path / "rows.jsonl", 200)
    names = run_tutorial(parameters("embedded", rows, max_new_tokens=60))
    check_run(names, hub, tmp_path, num_steps=60)
    assert len(names["trainer"].state.log_history) == 7  # at steps 10, 20 … 60, and the statistics
