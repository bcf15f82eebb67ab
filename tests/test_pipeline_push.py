"""A recipe that names repositories: the run pushes its adapter and its merged weights, each with the run's card."""

from __future__ import annotations

from pathlib import Path

import pytest

from loopback_hub import LoopbackHub
from tiny_runs import read_facts, run_job

REPOS = {"adapter": "me/tiny-adapter", "merged-16bit": "me/tiny-merged"}


def test_a_run_pushes_what_its_recipe_names(
    recipe_file: Path, hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 34)
    out = tmp_path / "run"
    wishes = [f"push.adapter={REPOS['adapter']}", f"push.merged={REPOS['merged-16bit']}", "save.merged=true"]
    _, output = run_job(recipe_file, out, *wishes, "train.max_steps=1", "evaluate.source=null", "ask.max_new_tokens=2")
    assert all(hub.private[repo] for repo in REPOS.values())
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "README.md"} <= {
        *hub.repos[REPOS["adapter"]]
    }
    assert {"config.json", "model.safetensors", "README.md"} <= {*hub.repos[REPOS["merged-16bit"]]}
    assert (
        hub.repos[REPOS["adapter"]]["adapter_model.safetensors"]
        == (out / "adapter" / "adapter_model.safetensors").read_bytes()
    )
    assert "Not for diagnosis" in hub.repos[REPOS["adapter"]]["README.md"].decode()
    pushes = read_facts(out)["hub"]
    assert {repo: push["kind"] for repo, push in pushes.items()} == {repo: kind for kind, repo in REPOS.items()}
    assert "push adapter" in output and "push merged-16bit" in output
