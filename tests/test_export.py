"""What is saved must open in plain PEFT and transformers and compute what the tuned model computed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from medcot import export, model
from medcot.errors import ModelError, OutputError

IDS = torch.tensor([[5, 9, 30, 41, 7, 7, 100]])


def tuned(folder: Path, *, precision: str = "fp32", **options: Any) -> tuple[model.LoadedModel, PeftModel]:
    """An adapter after a few large steps, so that it changes the logits a lot."""
    loaded = model.load(str(folder), precision=precision, max_seq_length=64, device="cpu")
    adapted = model.attach_lora(loaded, **({"r": 4, "alpha": 8} | options))
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=3.0)
    for _ in range(4):
        adapted(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loaded, adapted


def logits(network: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return network.eval()(IDS).logits.float()


def plain(folder: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rslora": True},
        {"dora": True},
        {"bias": "all"},
        {"init": "pissa"},
        {"init": "pissa", "rslora": True, "bias": "lora_only"},
        {"targets": ["q_proj", "down_proj"]},
    ],
    ids=str,
)
def test_plain_peft_on_the_unmodified_base_gives_the_tuned_logits(
    tiny_folder: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    loaded, adapted = tuned(tiny_folder, **options)
    saved = export.save_adapter(
        adapted, loaded.tokenizer, tmp_path / "adapter", init=str(options.get("init", "default"))
    )
    base = plain(tiny_folder)
    assert (logits(base) - logits(adapted)).abs().max() > 0.1  # training changed something
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base, saved)), logits(adapted), atol=2e-5, rtol=0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter"]  # no scratch folder is left


def test_the_adapter_folder_opens_by_itself(tiny_folder: Path, tmp_path: Path) -> None:
    loaded, adapted = tuned(tiny_folder)
    folder = export.save_adapter(adapted, loaded.tokenizer, tmp_path / "adapter")
    torch.testing.assert_close(
        logits(AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32)), logits(adapted)
    )
    assert AutoTokenizer.from_pretrained(folder).encode("Na 140") == loaded.tokenizer.encode("Na 140")
    assert {t.dtype for t in load_file(folder / "adapter_model.safetensors").values()} == {torch.float32}
    assert not [p for p in folder.iterdir() if p.suffix in {".bin", ".pt"}]
    card = (folder / "README.md").read_text()
    assert "base_model:" not in card and "not for diagnosis" in card  # a path there would be rejected by the Hub


def test_a_hub_base_is_named_by_id_and_commit(tiny_folder: Path, tmp_path: Path, hub: Any) -> None:
    hub.repos["me/tiny"] = {path.name: path.read_bytes() for path in tiny_folder.iterdir()}
    loaded, adapted = tuned(Path("me/tiny"))
    folder = export.save_adapter(adapted, loaded.tokenizer, tmp_path / "adapter")
    config = model.read_adapter_config(folder)
    assert (config["base_model_name_or_path"], config["revision"]) == ("me/tiny", hub.sha("me/tiny"))
    assert "base_model: me/tiny" in (folder / "README.md").read_text()


def test_saving_leaves_the_model_and_its_configuration_alone(tiny_folder: Path, tmp_path: Path) -> None:
    loaded, adapted = tuned(tiny_folder, init="pissa")
    before = logits(adapted)
    for _ in range(2):  # the second save replaces the first and is the same
        export.save_adapter(adapted, loaded.tokenizer, tmp_path / "adapter", init="pissa")
    assert adapted.peft_config["default"].r == 4 and torch.equal(logits(adapted), before)
    assert model.read_adapter_config(tmp_path / "adapter")["r"] == 8


@pytest.mark.parametrize("init", ["default", "pissa"])
def test_merged_weights_compute_what_the_tuned_model_does(tiny_folder: Path, tmp_path: Path, init: str) -> None:
    loaded, adapted = tuned(tiny_folder, init=init)
    adapter = export.save_adapter(adapted, loaded.tokenizer, tmp_path / "adapter", init=init)
    merged = export.save_merged(loaded, adapter, tmp_path / "merged")
    tensors = load_file(merged.folder / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert merged.base == f"merged into {tiny_folder} in bf16"
    assert 0 < merged.num_bytes <= export.estimate_merged_bytes(loaded.num_params)
    # bf16 has 8 bits of mantissa: the drift from fp32 is that of the unmerged bf16 model, not more
    drift = (logits(plain(merged.folder)) - logits(adapted)).abs().max()
    assert drift < 0.05 * logits(adapted).abs().max()
    assert AutoTokenizer.from_pretrained(merged.folder).eos_token == "</s>"


def test_merging_after_4_bit_training_uses_the_16_bit_base_and_says_so(tiny_folder: Path, tmp_path: Path) -> None:
    loaded, adapted = tuned(tiny_folder, precision="nf4")
    adapter = export.save_adapter(adapted, loaded.tokenizer, tmp_path / "adapter")
    merged = export.save_merged(loaded, adapter, tmp_path / "merged")
    assert "training saw the same weights in nf4" in merged.base
    expected = PeftModel.from_pretrained(plain(tiny_folder), adapter)
    assert (logits(plain(merged.folder)) - logits(expected)).abs().max() < 0.05 * logits(expected).abs().max()
    untouched = load_file(merged.folder / "model.safetensors")["model.embed_tokens.weight"]
    original = load_file(tiny_folder / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(untouched, original.bfloat16())


def test_a_checkpoint_that_exists_in_4_bit_only_is_unpacked(tiny_folder: Path, tmp_path: Path) -> None:
    first = model.load(str(tiny_folder), precision="nf4", max_seq_length=64, device="cpu")
    first.model.save_pretrained(tmp_path / "base")
    first.tokenizer.save_pretrained(tmp_path / "base")
    loaded, adapted = tuned(tmp_path / "base", precision="auto")
    adapter = export.save_adapter(adapted, loaded.tokenizer, tmp_path / "adapter")
    merged = export.save_merged(loaded, adapter, tmp_path / "merged")
    assert "unpacked from nf4 to bf16" in merged.base
    assert "quantization_config" not in json.loads((merged.folder / "config.json").read_text())
    assert (logits(plain(merged.folder)) - logits(adapted)).abs().max() < 0.05 * logits(adapted).abs().max()


def test_adapter_and_model_never_share_a_folder(tiny_folder: Path, tmp_path: Path) -> None:
    loaded, adapted = tuned(tiny_folder)
    adapter = export.save_adapter(adapted, loaded.tokenizer, tmp_path / "adapter")
    with pytest.raises(OutputError, match="holds an adapter"):
        export.save_merged(loaded, adapter, adapter)
    with pytest.raises(OutputError, match="holds a model"):
        export.save_adapter(adapted, loaded.tokenizer, tiny_folder)
    assert not (tiny_folder / "adapter_config.json").exists()


def test_a_full_disk_is_seen_before_writing(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, adapted = tuned(tiny_folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000))
    with pytest.raises(OutputError, match=r"0\.00 GB free"):
        export.save_adapter(adapted, loaded.tokenizer, tmp_path / "run" / "adapter")
    with pytest.raises(OutputError, match="are needed"):
        export.save_merged(loaded, tmp_path, tmp_path / "merged")
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_adapter(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, adapted = tuned(tiny_folder)
    folder = export.save_adapter(adapted, loaded.tokenizer, tmp_path / "adapter")
    before = (folder / "adapter_model.safetensors").read_bytes()

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "save_file", fail)
    with pytest.raises(OutputError, match="No space left on device"):
        export.save_adapter(adapted, loaded.tokenizer, folder)
    assert (folder / "adapter_model.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_an_adapter_for_another_model_is_an_error(
    tiny_folder: Path, tmp_path: Path, embedded: model.LoadedModel
) -> None:
    loaded, adapted = tuned(tiny_folder)
    adapter = export.save_adapter(adapted, loaded.tokenizer, tmp_path / "adapter")
    other = model.load("embedded", precision="fp32", device="cpu")
    with pytest.raises(ModelError, match="cannot be applied to 'embedded'"):
        model.load_adapter(other, adapter)
    with pytest.raises(ModelError, match=r"has no adapter_config\.json"):
        model.read_adapter_config(tiny_folder)


def test_the_embedded_models_adapter_opens_in_plain_peft(tmp_path: Path) -> None:
    loaded = model.load("embedded", precision="fp32", max_seq_length=64, device="cpu")
    adapted = model.attach_lora(loaded, r=2)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.01)
    folder = export.save_adapter(adapted, loaded.tokenizer, tmp_path / "adapter")
    again = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.testing.assert_close(logits(again), logits(adapted), atol=1e-4, rtol=1e-4)


def test_an_adapter_with_a_nan_is_not_merged(tiny_folder: Path, tmp_path: Path) -> None:
    loaded, adapted = tuned(tiny_folder)
    with torch.no_grad():
        next(p for n, p in adapted.named_parameters() if "lora_B" in n)[0, 0] = float("nan")
    adapter = export.save_adapter(adapted, loaded.tokenizer, tmp_path / "adapter")
    with pytest.raises(ModelError, match="cannot be merged"):
        export.save_merged(loaded, adapter, tmp_path / "merged")
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]
