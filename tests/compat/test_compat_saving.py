"""Saving and pushing, adapter and merged weights into one place, in any order, and again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from loopback_hub import Fault, LoopbackHub
from medcot.compat import ArgumentError, FastLanguageModel
from medcot.errors import MedcotError, OutputError
from medcot.secrets import SecretName, take_secret

TOKEN = "hf_" + "t" * 34
REPO = "me/model"


@pytest.fixture(scope="module")
def tuned(model_folder: Path) -> tuple[Any, Any]:
    settings: dict[str, Any] = {"max_seq_length": 512, "dtype": "float32", "load_in_4bit": False}
    model, tokenizer = FastLanguageModel.from_pretrained(str(model_folder), **settings)
    model = FastLanguageModel.get_peft_model(model, r=4, lora_alpha=16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model, tokenizer


IDS = torch.tensor([[5, 20, 33, 41, 8]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS, use_cache=False).logits.float()
    return found


def check_folder(tuned: Any, model_folder: Path, folder: Path | str, **more: Any) -> None:
    """The plain reload is the merged model, the nested adapter on the base the tuned one."""
    wanted, without = logits(tuned), logits(AutoModelForCausalLM.from_pretrained(model_folder))
    effect = (wanted - without).norm()
    merged = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **more)
    assert (logits(merged) - wanted).norm() < 0.05 * effect  # bf16's rounding; twice would be off by all of it
    nested = {"subfolder": "adapter"} if isinstance(folder, str) else {}
    place = folder if isinstance(folder, str) else folder / "adapter"
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    assert torch.allclose(logits(PeftModel.from_pretrained(base, place, **nested, **more)), wanted, atol=1e-4)


@pytest.mark.parametrize("order", ["adapter, merged", "merged, adapter", "adapter, merged, adapter, merged"])
def test_one_folder_for_both(tuned: tuple[Any, Any], model_folder: Path, tmp_path: Path, order: str) -> None:
    model, tokenizer = tuned
    folder = tmp_path / "both"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    for kind in order.split(", "):
        if kind == "adapter":
            model.save_pretrained(str(folder))
            tokenizer.save_pretrained(str(folder))
        else:
            model.save_pretrained_merged(str(folder), tokenizer, save_method="merged_16bit")
    assert (folder / "notes.txt").read_text() == "mine"
    assert not (folder / "adapter_config.json").exists() and not (folder / "adapter_model.safetensors").exists()
    check_folder(model, model_folder, folder)
    assert not list(tmp_path.glob(".both-*")), "nothing is left beside it"


def test_weights_of_an_earlier_merge_go(tuned: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = tuned
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"old")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    model.save_pretrained_merged(tmp_path, tokenizer)
    assert [path.name for path in tmp_path.glob("model*")] == ["model.safetensors"]


def test_four_bits_and_the_adapter_alone(tuned: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = tuned
    model.save_pretrained_merged(tmp_path / "four", tokenizer, save_method="merged_4bit_forced")
    config = json.loads((tmp_path / "four" / "config.json").read_text())
    assert config["quantization_config"]["bnb_4bit_quant_type"] == "nf4"
    model.save_pretrained_merged(tmp_path / "lora", tokenizer, save_method="lora")
    assert (tmp_path / "lora" / "adapter_config.json").is_file() and not (tmp_path / "lora" / "config.json").exists()


def test_bad_saves_name_the_remedy(tuned: tuple[Any, Any], model_folder: Path, tmp_path: Path) -> None:
    model, tokenizer = tuned
    with pytest.raises(ArgumentError, match="Did you mean 'merged_16bit'"):
        model.save_pretrained_merged(tmp_path / "x", tokenizer, save_method="merged_16")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        model.save_pretrained(tmp_path / "file")
    base, _ = FastLanguageModel.from_pretrained(str(model_folder), max_seq_length=512)
    with pytest.raises(ArgumentError, match="no adapter"):
        base.save_pretrained_merged(tmp_path / "x", tokenizer)


def test_an_interrupted_save_leaves_nothing_half(
    tuned: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = tuned
    folder = tmp_path / "m"
    model.save_pretrained(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("medcot.compat.saving.merge", fail)
        with pytest.raises(OutputError, match="No space left"):
            model.save_pretrained_merged(folder, tokenizer)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("order", ["adapter, tokenizer, merged", "tokenizer, merged, adapter", "merged, merged"])
def test_one_repository_for_both(tuned: tuple[Any, Any], model_folder: Path, hub: LoopbackHub, order: str) -> None:
    model, tokenizer = tuned
    repo = "me/" + order.replace(", ", "-")  # the client remembers what a name resolved to, beyond this Hub's life
    take_secret(SecretName.HUGGING_FACE, TOKEN, "test")
    pushes = {
        "adapter": lambda: model.push_to_hub(repo),
        "tokenizer": lambda: tokenizer.push_to_hub(repo),
        "merged": lambda: model.push_to_hub_merged(repo, tokenizer, save_method="merged_16bit"),
    }
    for kind in order.split(", "):
        assert repo in pushes[kind]()
        assert hub.private[repo] is True
    files = set(hub.repos[repo])
    assert "adapter_config.json" not in files and {"config.json", "model.safetensors", "tokenizer.json"} <= files
    if "adapter" in order:
        assert {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"} <= files
        check_folder(model, model_folder, repo, token=TOKEN)


def test_a_name_alone_is_the_owners(tuned: tuple[Any, Any], hub: LoopbackHub) -> None:
    tuned[0].push_to_hub("short", token=TOKEN)
    assert set(hub.repos) == {"me/short"} and hub.tokens == {f"Bearer {TOKEN}"}


def test_public_is_only_what_is_said_to_be(tuned: tuple[Any, Any], hub: LoopbackHub) -> None:
    model, tokenizer = tuned
    model.push_to_hub("me/open", token=TOKEN, private=False)
    tokenizer.push_to_hub("me/open", token=TOKEN, private=False)
    assert hub.private["me/open"] is False
    for push in (model.push_to_hub, tokenizer.push_to_hub, model.push_to_hub_merged):
        with pytest.raises(OutputError, match="Pass private=False"):
            push("me/open", token=TOKEN)
    assert "config.json" not in hub.repos["me/open"]


def test_without_a_token_nothing_is_sent(tuned: tuple[Any, Any], hub: LoopbackHub) -> None:
    with pytest.raises(OutputError, match="no Hugging Face token"):
        tuned[0].push_to_hub(REPO)
    assert not hub.requests


def test_a_push_that_is_refused_in_the_middle_loses_nothing(tuned: tuple[Any, Any], hub: LoopbackHub) -> None:
    model, tokenizer = tuned
    model.push_to_hub(REPO, token=TOKEN)
    hub.faults = [Fault("POST /api/models/.*/commit/main", status=403, times=9)]
    with pytest.raises(MedcotError):
        model.push_to_hub_merged(REPO, tokenizer, token=TOKEN)
    assert "adapter_config.json" in hub.repos[REPO] and "config.json" not in hub.repos[REPO]
    hub.faults.clear()
    model.push_to_hub_merged(REPO, tokenizer, token=TOKEN)
    assert "adapter/adapter_config.json" in hub.repos[REPO] and "config.json" in hub.repos[REPO]


# GGUF, with the embedded model: the tiny ones' tokenizer is of a kind that llama.cpp has no twin of ------------------


@pytest.mark.slow
def test_gguf_files_hold_the_tuned_model(tmp_path: Path, hub: LoopbackHub) -> None:
    settings: dict[str, Any] = {"max_seq_length": 512, "dtype": "float32", "load_in_4bit": False}
    model, tokenizer = FastLanguageModel.from_pretrained("embedded", **settings)
    model = FastLanguageModel.get_peft_model(model, r=4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    model.save_pretrained_gguf(tmp_path / "g", tokenizer, quantization_method=["not_quantized", "q8_0"])
    assert sorted(path.name for path in (tmp_path / "g").iterdir()) == ["g-f16.gguf", "g-q8_0.gguf"]
    again, _ = FastLanguageModel.from_pretrained(str(tmp_path / "g" / "g-f16.gguf"), **settings)
    wanted, got = logits(model).log_softmax(-1), logits(again).log_softmax(-1)
    assert (wanted.exp() * (wanted - got)).sum(-1).max() < 1e-3
    with model.disable_adapter():
        assert (wanted.exp() * (wanted - logits(model).log_softmax(-1))).sum(-1).max() > 1e-2
    model.push_to_hub_gguf("me/gguf-repo", tokenizer, token=TOKEN, quantization_method="q8_0")
    assert "gguf-q8_0.gguf" in hub.repos["me/gguf-repo"] and hub.private["me/gguf-repo"]


def test_a_kind_of_gguf_that_there_is_not(tuned: tuple[Any, Any], tmp_path: Path) -> None:
    with pytest.raises(MedcotError, match="Did you mean 'q8_0'"):
        tuned[0].save_pretrained_gguf(tmp_path / "g", tuned[1], quantization_method="q9_0")
    assert not (tmp_path / "g").exists()
