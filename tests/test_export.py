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
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from medcot import merging, model
from medcot.errors import ModelError, OutputError
from medcot.export import adapter as adapter_files
from medcot.export import merged as merged_weights
from medcot.export.adapter import save_adapter
from medcot.export.merged import estimate_merged_bytes, save_merged
from medcot.weights import find_weights
from tiny_models import build_base

INDEX = "model.safetensors.index.json"
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
    saved = save_adapter(adapted, loaded.tokenizer, tmp_path / "adapter", init=str(options.get("init", "default")))
    base = plain(tiny_folder)
    assert (logits(base) - logits(adapted)).abs().max() > 0.1  # training changed something
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base, saved)), logits(adapted), atol=2e-5, rtol=0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter"]  # no scratch folder is left


def test_the_adapter_folder_opens_by_itself(tiny_folder: Path, tmp_path: Path) -> None:
    loaded, adapted = tuned(tiny_folder)
    folder = save_adapter(adapted, loaded.tokenizer, tmp_path / "adapter")
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
    folder = save_adapter(adapted, loaded.tokenizer, tmp_path / "adapter")
    config = model.read_adapter_config(folder)
    assert (config["base_model_name_or_path"], config["revision"]) == ("me/tiny", hub.sha("me/tiny"))
    assert "base_model: me/tiny" in (folder / "README.md").read_text()


def test_saving_leaves_the_model_and_its_configuration_alone(tiny_folder: Path, tmp_path: Path) -> None:
    loaded, adapted = tuned(tiny_folder, init="pissa")
    before = logits(adapted)
    for _ in range(2):  # the second save replaces the first and is the same
        save_adapter(adapted, loaded.tokenizer, tmp_path / "adapter", init="pissa")
    assert adapted.peft_config["default"].r == 4 and torch.equal(logits(adapted), before)
    assert model.read_adapter_config(tmp_path / "adapter")["r"] == 8


@pytest.mark.parametrize("init", ["default", "pissa"])
def test_merged_weights_compute_what_the_tuned_model_does(tiny_folder: Path, tmp_path: Path, init: str) -> None:
    loaded, adapted = tuned(tiny_folder, init=init)
    adapter = save_adapter(adapted, loaded.tokenizer, tmp_path / "adapter", init=init)
    merged = save_merged(loaded, adapter, tmp_path / "merged")
    tensors = load_file(merged.folder / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert merged.base == f"merged into {tiny_folder} in bf16"
    assert 0 < merged.num_bytes <= estimate_merged_bytes(loaded.num_params)
    # bf16 has 8 bits of mantissa: the drift from fp32 is that of the unmerged bf16 model, not more
    drift = (logits(plain(merged.folder)) - logits(adapted)).abs().max()
    assert drift < 0.05 * logits(adapted).abs().max()
    assert AutoTokenizer.from_pretrained(merged.folder).eos_token == "</s>"


def test_merging_after_4_bit_training_uses_the_16_bit_base_and_says_so(tiny_folder: Path, tmp_path: Path) -> None:
    loaded, adapted = tuned(tiny_folder, precision="nf4")
    adapter = save_adapter(adapted, loaded.tokenizer, tmp_path / "adapter")
    merged = save_merged(loaded, adapter, tmp_path / "merged")
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
    adapter = save_adapter(adapted, loaded.tokenizer, tmp_path / "adapter")
    merged = save_merged(loaded, adapter, tmp_path / "merged")
    assert "unpacked from nf4 to bf16" in merged.base
    assert "quantization_config" not in json.loads((merged.folder / "config.json").read_text())
    assert (logits(plain(merged.folder)) - logits(adapted)).abs().max() < 0.05 * logits(adapted).abs().max()


# --- streaming against PEFT -------------------------------------------------------------------------------------------

CHECKPOINTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama in shards": ("llama", {}),
    "tied embeddings": ("llama", {"tie_word_embeddings": True}),
    "qwen2 with biases": ("qwen2", {}),
}


def write_checkpoint(folder: Path, tokenizer: Path, name: str, dtype: torch.dtype) -> Path:
    """A tiny base in several shards, with the tokenizer of another."""
    family, sizes = CHECKPOINTS[name]
    base = build_base(family, dtype, vocab_size=262, eos_token_id=1, **sizes)
    base.save_pretrained(folder, max_shard_size="60KB")
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    assert (folder / "model.safetensors.index.json").is_file()
    return folder


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_streamed_weights_are_the_rounded_sums_and_their_folder_is_what_peft_would_have_saved(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype
) -> None:
    folder = write_checkpoint(tmp_path / "base", tiny_folder, name, dtype)
    loaded, adapted = tuned(folder)
    adapter = save_adapter(adapted, loaded.tokenizer, tmp_path / "adapter")
    monkeypatch.setattr(merging, "PIECE_WEIGHTS", 1000)  # several pieces a matrix, the last one shorter
    monkeypatch.setattr(merging, "SHARD_BYTES", 50_000)
    streamed = save_merged(loaded, adapter, tmp_path / "streamed")
    exact = PeftModel.from_pretrained(plain(folder), adapter).merge_and_unload()
    wanted = {key: value.bfloat16() for key, value in exact.state_dict().items()}
    if "tied" in name:
        del wanted["lm_head.weight"]
    got = all_tensors(streamed.folder)
    assert got.keys() == wanted.keys() and sum(not torch.equal(got[key], wanted[key]) for key in got) == 0
    assert len(list(streamed.folder.glob("*.safetensors"))) > 3
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(streamed.folder, dtype=torch.float32)),
        logits(exact.bfloat16().float()),
    )

    monkeypatch.setattr(merged_weights, "find_updates", lambda *_: None)
    usual = save_merged(loaded, adapter, tmp_path / "usual")
    for key, value in all_tensors(usual.folder).items():  # PEFT rounds the product, then the sum
        torch.testing.assert_close(got[key], value, rtol=2**-7, atol=2**-8 * float(value.abs().max()))
    files = {p.name for p in usual.folder.iterdir() if p.suffix != ".safetensors"}
    assert {p.name for p in streamed.folder.iterdir() if p.suffix != ".safetensors"} == files | {INDEX}
    for file in files - {INDEX}:
        assert (streamed.folder / file).read_bytes() == (usual.folder / file).read_bytes(), file
    assert streamed.base == usual.base
    index = json.loads((streamed.folder / INDEX).read_text())
    assert index["weight_map"].keys() == got.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in got.values())


@pytest.mark.parametrize(
    ("options", "streams"),
    [
        ({}, True),
        ({"rslora": True}, True),
        ({"init": "pissa"}, True),
        ({"dora": True}, False),
        ({"bias": "all"}, False),
    ],
    ids=str,
)
def test_what_streaming_does_not_cover_is_left_to_peft(
    tiny_folder: Path, tmp_path: Path, options: dict[str, Any], streams: bool
) -> None:
    loaded, adapted = tuned(tiny_folder, **options)
    init = str(options.get("init", "default"))
    adapter = save_adapter(adapted, loaded.tokenizer, tmp_path / "adapter", init=init)
    assert (merging.find_updates(find_weights(str(tiny_folder)), adapter) is not None) == streams
    merged = save_merged(loaded, adapter, tmp_path / "merged")
    drift = (logits(plain(merged.folder)) - logits(adapted)).abs().max()
    assert drift < 0.05 * logits(adapted).abs().max()


def test_a_head_that_is_the_embedding_too_is_left_to_peft(tiny_folder: Path, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "base", tiny_folder, "tied embeddings", torch.float32)
    loaded, adapted = tuned(folder, targets=["q_proj", "lm_head"])
    adapter = save_adapter(adapted, loaded.tokenizer, tmp_path / "adapter")
    assert merging.find_updates(find_weights(str(folder)), adapter) is None


def test_integers_in_a_checkpoint_and_a_single_number_are_copied(tiny_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "base"))
    tensors = load_file(folder / "model.safetensors")
    extra = {"steps": torch.tensor([3, 1 << 40]), "flags": torch.tensor([True, False, True]), "one": torch.tensor(0.1)}
    save_file(tensors | extra, folder / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "merged").mkdir()
    merging.write_merged(
        find_weights(str(folder)), {}, tmp_path / "merged", dtype=torch.float16, device=torch.device("cpu")
    )
    got = all_tensors(tmp_path / "merged")
    assert got.keys() == tensors.keys() | extra.keys()
    for key, value in (tensors | extra).items():
        assert torch.equal(got[key], value.half() if value.is_floating_point() else value), key


def test_adapter_and_model_never_share_a_folder(tiny_folder: Path, tmp_path: Path) -> None:
    loaded, adapted = tuned(tiny_folder)
    adapter = save_adapter(adapted, loaded.tokenizer, tmp_path / "adapter")
    with pytest.raises(OutputError, match="holds an adapter"):
        save_merged(loaded, adapter, adapter)
    with pytest.raises(OutputError, match="holds a model"):
        save_adapter(adapted, loaded.tokenizer, tiny_folder)
    assert not (tiny_folder / "adapter_config.json").exists()


def test_a_full_disk_is_seen_before_writing(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, adapted = tuned(tiny_folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000))
    with pytest.raises(OutputError, match=r"0\.00 GB free"):
        save_adapter(adapted, loaded.tokenizer, tmp_path / "run" / "adapter")
    with pytest.raises(OutputError, match="are needed"):
        save_merged(loaded, tmp_path, tmp_path / "merged")
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_adapter(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, adapted = tuned(tiny_folder)
    folder = save_adapter(adapted, loaded.tokenizer, tmp_path / "adapter")
    before = (folder / "adapter_model.safetensors").read_bytes()

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(adapter_files, "save_file", fail)
    with pytest.raises(OutputError, match="No space left on device"):
        save_adapter(adapted, loaded.tokenizer, folder)
    assert (folder / "adapter_model.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_an_adapter_for_another_model_is_an_error(
    tiny_folder: Path, tmp_path: Path, embedded: model.LoadedModel
) -> None:
    loaded, adapted = tuned(tiny_folder)
    adapter = save_adapter(adapted, loaded.tokenizer, tmp_path / "adapter")
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
    folder = save_adapter(adapted, loaded.tokenizer, tmp_path / "adapter")
    again = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.testing.assert_close(logits(again), logits(adapted), atol=1e-4, rtol=1e-4)


def test_an_adapter_with_a_nan_is_not_merged(tiny_folder: Path, tmp_path: Path) -> None:
    loaded, adapted = tuned(tiny_folder)
    with torch.no_grad():
        next(p for n, p in adapted.named_parameters() if "lora_B" in n)[0, 0] = float("nan")
    adapter = save_adapter(adapted, loaded.tokenizer, tmp_path / "adapter")
    with pytest.raises(ModelError, match="cannot be merged"):
        save_merged(loaded, adapter, tmp_path / "merged")
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]
