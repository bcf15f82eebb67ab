"""A run pushed to a Hub on loopback: what goes, what is refused, what is noted, and the command around it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner

from loopback_hub import Fault, LoopbackHub
from medcot import cli_push
from medcot.errors import DataError, ModelError, OutputError, RecipeError
from medcot.hub import Kind
from medcot.publishing import Plan, plan_push, push
from medcot.records import Run

TOKEN = "hf_" + "t" * 34
LLAMA = "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"
PROOF = {
    "prompts": 20, "positions": 1600, "kl_mean": 1e-4, "kl_max": 0.01, "top1": 0.999, "answers_changed": 0,
    "answers": 20, "threshold": {"kl_mean": 0.01, "top1": 0.98}, "reader": "transformers 5.23.0", "passed": True,
}  # fmt: skip


class MadeRun:
    """A finished run with an adapter, and exports as ``medcot export`` records them."""

    def __init__(self, folder: Path) -> None:
        self.run = Run(folder)
        adapter = self.run.adapter
        adapter.mkdir(parents=True)
        (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "/home/someone/model", "r": 8}')
        (adapter / "adapter_model.safetensors").write_bytes(b"\x01" * 1000)
        (adapter / "tokenizer.json").write_text("{}")
        (adapter / "README.md").write_text("the short one")
        (adapter / "optimizer.pt").write_bytes(b"state")
        self.facts: dict[str, Any] = {
            "status": "complete",
            "model": {"source": "embedded", "precision": "bf16"},
            "data": {"train": {"source": "builtin:clinic", "rows": 5, "quarantined": 0}},
            "train": {"steps": 3, "seconds": 60.0},
            "exports": {},
        }
        self.write()

    def write(self) -> None:
        self.run.facts.write_text(json.dumps(self.facts))

    def read(self) -> dict[str, Any]:
        return dict(json.loads(self.run.facts.read_text()))

    def export(self, kind: str, files: dict[str, bytes], **changes: Any) -> Path:
        folder = self.run.folder / "exports" / kind.replace(":", "-")
        folder.mkdir(parents=True)
        for name, content in files.items():
            (folder / name).write_bytes(content)
        listed = {n: {"bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()} for n, c in files.items()}
        where = str(folder.relative_to(self.run.folder))
        self.facts["exports"][kind] = {"folder": where, "files": listed, "base": "b", "proof": PROOF, **changes}
        self.write()
        return folder

    def base(self, source: str) -> None:
        self.facts["model"]["source"] = source
        self.write()


@pytest.fixture
def made(tmp_path: Path) -> MadeRun:
    return MadeRun(tmp_path / "run")


@pytest.fixture
def token(monkeypatch: pytest.MonkeyPatch, hub: LoopbackHub) -> str:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return TOKEN


def names(plan: Plan) -> list[str]:
    return [parcel.name for parcel in plan.parcels]


def content(plan: Plan, name: str) -> str:
    source = next(parcel.source for parcel in plan.parcels if parcel.name == name)
    return source.decode() if isinstance(source, bytes) else source.read_text()


def head(card: str) -> dict[str, Any]:
    return dict(yaml.safe_load(card.split("---\n")[1]))


def test_an_adapter_goes_with_tokenizer_card_and_notice_and_nothing_else(made: MadeRun) -> None:
    plan = plan_push(made.run, "me/model")
    assert names(plan) == ["NOTICE", "README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json"]
    assert plan.private and plan.kind is Kind.ADAPTER
    assert "the short one" not in content(plan, "README.md") and "adapter = 'me/model'" in content(plan, "README.md")
    assert "no proof of export" in plan.notes[0]


def test_the_base_is_called_by_its_public_name(made: MadeRun) -> None:
    for source, name in [
        ("embedded", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("/home/someone/model", "model"),
        ("some/base", "some/base"),
    ]:
        made.base(source)
        plan = plan_push(made.run, "me/model")
        config = json.loads(content(plan, "adapter_config.json"))
        assert config == {"base_model_name_or_path": name, "r": 8}
        for parcel in plan.parcels:
            text = parcel.source if isinstance(parcel.source, bytes) else parcel.source.read_bytes()
            assert b"/home/someone" not in text


def test_a_dry_run_needs_no_network_and_no_token(made: MadeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a dry run opened a socket")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert names(plan_push(made.run, "me/model")) == names(plan_push(made.run, "me/model"))


def test_what_arrived_is_noted_and_the_second_push_changes_nothing(made: MadeRun, hub: LoopbackHub, token: str) -> None:
    first = push(made.run, "me/model")
    noted = made.read()["hub"]["me/model"]
    assert (noted["kind"], noted["commit"], noted["private"]) == ("adapter", hub.sha("me/model"), True)
    assert noted["url"] == f"{hub.url}/me/model" and hub.private["me/model"]
    assert {n: f["sha256"] for n, f in noted["files"].items()} == {
        n: hashlib.sha256(c).hexdigest() for n, c in hub.repos["me/model"].items()
    }
    second = push(made.run, "me/model")
    assert (second.commit, second.num_changed, len(hub.commits["me/model"])) == (first.commit, 0, 2)
    assert token not in made.run.facts.read_text()


def test_a_push_that_fails_notes_nothing(made: MadeRun, hub: LoopbackHub, token: str) -> None:
    hub.faults = [Fault("POST /api/models/.*/commit/main", status=403, times=9)]
    with pytest.raises(OutputError):
        push(made.run, "me/model")
    assert "hub" not in made.read() and dict(hub.repos["me/model"]) == {}


def test_ggufs_gather_and_the_card_is_of_all_of_them(made: MadeRun, hub: LoopbackHub, token: str) -> None:
    made.export("gguf:q8_0", {"m-Q8_0.gguf": b"8" * 50})
    made.export("gguf:q4_k_m", {"m-Q4_K_M.gguf": b"4" * 50})
    push(made.run, "me/ggufs", ["gguf:q8_0"])
    push(made.run, "me/ggufs", ["gguf:q4_k_m"])
    assert {name for name in hub.repos["me/ggufs"] if name.endswith(".gguf")} == {"m-Q8_0.gguf", "m-Q4_K_M.gguf"}
    card = hub.repos["me/ggufs"]["README.md"].decode()
    assert "| gguf:q8\\_0 | transformers 5.23.0 |" in card and "| gguf:q4\\_k\\_m |" in card
    assert made.read()["hub"]["me/ggufs"]["kind"] == "gguf:q8_0, gguf:q4_k_m"
    assert len(hub.commits["me/ggufs"]) == 3
    push(made.run, "me/all", ["gguf:q8_0,q4_k_m"])
    assert head(hub.repos["me/all"]["README.md"].decode())["library_name"] == "gguf"
    assert len(hub.commits["me/all"]) == 2


@pytest.mark.parametrize(
    ("kind", "library", "relation"),
    [("merged-16bit", "transformers", "finetune"), ("merged-4bit", "transformers", "quantized")],
)
def test_merged_weights_have_a_card_of_their_own(
    made: MadeRun, hub: LoopbackHub, token: str, kind: str, library: str, relation: str
) -> None:
    made.export(kind, {"config.json": b"{}", "model.safetensors": b"w" * 99, "trainer.pt": b"x"})
    push(made.run, "me/merged", [kind])
    there = hub.repos["me/merged"]
    assert set(there) == {"NOTICE", "README.md", "config.json", "model.safetensors", "tokenizer.json"}
    found = head(there["README.md"].decode())
    assert (found["library_name"], found["base_model_relation"]) == (library, relation)
    with pytest.raises(OutputError, match="already holds a model"):
        push(made.run, "me/merged", ["adapter"])


def test_kinds_that_share_no_repository_are_refused(made: MadeRun) -> None:
    for kind in ("merged-16bit", "gguf:q8_0"):
        made.export(kind, {"config.json": b"{}"})
    for what in (["adapter", "merged-16bit"], ["merged-16bit", "merged-4bit"], ["gguf:q8_0", "adapter"]):
        with pytest.raises(RecipeError, match="a repository each"):
            plan_push(made.run, "me/model", what)
    with pytest.raises(ModelError, match="export kind 'mergd'") as caught:
        plan_push(made.run, "me/model", ["mergd"])
    assert "Did you mean" in caught.value.remedy
    with pytest.raises(ModelError, match="no kind"):
        plan_push(made.run, "me/model", [])


def test_two_files_of_one_name_share_no_repository(made: MadeRun) -> None:
    made.export("gguf:q8_0", {"model.gguf": b"8"})
    made.export("ollama", {"model.gguf": b"8", "Modelfile": b"FROM ./model.gguf"})
    assert {"model.gguf", "Modelfile"} <= set(names(plan_push(made.run, "me/x", ["gguf:q8_0", "ollama"])))
    made.export("gguf:q4_k_m", {"model.gguf": b"4"})
    with pytest.raises(RecipeError, match=r"each have a 'model\.gguf'"):
        plan_push(made.run, "me/x", ["gguf:q8_0", "gguf:q4_k_m"])


@pytest.mark.parametrize("repo", ["model", "me/a/b", "me/", "me/x y", "../x"])
def test_a_bad_repository_id_is_met_before_anything_else(made: MadeRun, repo: str) -> None:
    with pytest.raises(OutputError, match="is no repository id"):
        plan_push(made.run, repo)


def test_what_is_not_there_says_how_to_make_it(made: MadeRun) -> None:
    for kind in ("merged-16bit", "merged-32bit", "gguf:q8_0", "ollama", "ollama:q4_k_m"):
        with pytest.raises(OutputError, match="medcot export") as caught:
            plan_push(made.run, "me/model", [kind])
        assert f"--to {kind}" in caught.value.remedy
    with pytest.raises(DataError, match=r"run\.json"):
        plan_push(Run(made.run.folder / "nowhere"), "me/model")


def test_bytes_that_are_not_those_that_were_proven_stay_at_home(made: MadeRun) -> None:
    folder = made.export("merged-16bit", {"config.json": b"{}", "model.safetensors": b"w" * 99})
    (folder / "model.safetensors").write_bytes(b"x" * 99)
    with pytest.raises(OutputError, match=r"model\.safetensors' has changed since it was exported"):
        plan_push(made.run, "me/model", ["merged-16bit"])
    made.export("merged-4bit", {"config.json": b"{}"}, proof={**PROOF, "passed": False})
    with pytest.raises(OutputError, match="failed its proof"):
        plan_push(made.run, "me/model", ["merged-4bit"])


def test_a_llama_may_be_shown_to_others_only_by_its_name_and_with_its_licence(made: MadeRun) -> None:
    made.base(LLAMA)
    private = plan_push(made.run, "me/medical-8b")
    assert any('does not begin with "Llama"' in note and "me/Llama-medical-8b" in note for note in private.notes)
    assert any("no copy of the Llama 3.1 Community License Agreement" in note for note in private.notes)
    with pytest.raises(OutputError, match="does not begin"):
        plan_push(made.run, "me/medical-8b", public=True)
    with pytest.raises(OutputError, match="no copy of the Llama") as caught:
        plan_push(made.run, "me/Llama-medical-8b", public=True)
    assert "https://www.llama.com/llama3_1/license/" in caught.value.remedy
    (made.run.folder / "LICENSE").write_text("LLAMA 3.1 COMMUNITY\nLICENSE AGREEMENT\n…")
    plan = plan_push(made.run, "me/Llama-medical-8b", public=True)
    assert {"LICENSE", "NOTICE"} <= set(names(plan)) and not plan.private
    notice = content(plan, "NOTICE")
    assert "Llama 3.1 is licensed under the Llama 3.1 Community License, Copyright © Meta Platforms" in notice
    assert "Copyright (c) 2023 DeepSeek" in notice
    assert "**Built with Llama**" in content(plan, "README.md")


def test_a_qwen_distill_has_no_naming_duty(made: MadeRun) -> None:
    made.base("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B")
    plan = plan_push(made.run, "me/medical-7b", public=True)
    assert "Apache License" in content(plan, "NOTICE") and "Built with" not in content(plan, "README.md")


def test_a_token_in_a_file_stops_the_plan(made: MadeRun) -> None:
    (made.run.adapter / "tokenizer.json").write_text('"hf_' + "a" * 34 + '"')
    with pytest.raises(OutputError, match=r"'tokenizer\.json' holds a Hugging Face token"):
        plan_push(made.run, "me/model")


Call = Callable[..., Any]


@pytest.fixture
def call(made: MadeRun, monkeypatch: pytest.MonkeyPatch) -> Call:
    app = typer.Typer()
    app.command()(cli_push.push)
    app.callback()(lambda: None)
    monkeypatch.setenv("COLUMNS", "100")
    return lambda *words: CliRunner().invoke(app, ["push", str(made.run.folder), *words])


def test_the_command_lists_what_would_go(call: Call) -> None:
    shown = call("--repo", "me/model", "--dry-run")
    assert shown.exit_code == 0, shown.output
    assert "adapter to me/model (private): 5 files" in shown.output and "Nothing was sent" in shown.output
    assert "adapter_model.safetensors" in shown.output and "optimizer.pt" not in shown.output
    plan = json.loads(call("--repo", "me/model", "--dry-run", "--json").stdout)
    (weights,) = [file for file in plan["files"] if file["path"] == "adapter_model.safetensors"]
    assert weights["sha256"] == hashlib.sha256(b"\x01" * 1000).hexdigest() and weights["bytes"] == 1000
    assert weights["from"].endswith("adapter/adapter_model.safetensors")


def test_the_command_pushes_and_says_what_it_compared(call: Call, hub: LoopbackHub, token: str) -> None:
    shown = call("--repo", "me/model", "--verify", "download")
    assert shown.exit_code == 0, shown.output
    assert "5 of 5 files sent in one commit" in shown.output and "5 downloaded and compared" in shown.output
    assert "no commit was made" in call("--repo", "me/model").output
    assert json.loads(call("--repo", "me/model", "--json").stdout)["num_changed"] == 0
    assert token not in shown.output


def test_a_mismatch_ends_with_code_1_and_a_mistake_with_2(call: Call, hub: LoopbackHub, token: str) -> None:
    hub.spoil = {"adapter_model.safetensors"}
    shown = call("--repo", "me/model")
    assert shown.exit_code == 1 and "adapter_model.safetensors" in shown.output
    for words in (["--verify", "al"], ["--what", "adaptor"]):
        assert call("--repo", "me/other", *words).exit_code == 2
    hub.deny = (401, {})
    shown = call("--repo", "me/other")
    assert shown.exit_code == 2 and "does not accept the token" in shown.output and token not in shown.output


def test_without_a_token_it_says_how_to_log_in(call: Call, hub: LoopbackHub) -> None:
    shown = call("--repo", "me/model")
    assert shown.exit_code == 2 and "hf auth login" in " ".join(shown.output.split())
