"""Loading, refusing and adapting models; a tiny random Llama, and the embedded model where its facts matter."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from medcot import model, precision, shapes
from medcot.errors import MedcotError, ModelError, NetworkError, UnsafeWeightsError

if TYPE_CHECKING:
    from loopback_hub import LoopbackHub

IDS = torch.tensor([[5, 9, 30, 41, 7, 7, 100]])


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that the test may damage."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def load_tiny(folder: Path, precision: str = "fp32", **options: Any) -> model.LoadedModel:
    return model.load(str(folder), precision=precision, max_seq_length=64, device="cpu", **options)


# --- what loading gives -----------------------------------------------------------------------------------------------


def test_a_folder_loads_frozen_in_eval_mode_with_a_pad_token(tiny_folder: Path) -> None:
    loaded = load_tiny(tiny_folder)
    assert loaded.precision == "fp32" and loaded.dtype == torch.float32 and loaded.device.type == "cpu"
    assert not loaded.model.training and not any(p.requires_grad for p in loaded.model.parameters())
    assert loaded.resolved == loaded.name == str(tiny_folder)
    assert loaded.model.config._attn_implementation == "sdpa"
    assert loaded.tokenizer.pad_token_id == loaded.tokenizer.eos_token_id == 1
    stored = load_file(tiny_folder / "model.safetensors")
    assert torch.equal(loaded.model.get_input_embeddings().weight, stored["model.embed_tokens.weight"])
    assert loaded.num_params == sum(tensor.numel() for tensor in stored.values())


def test_loading_prints_nothing(tiny_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model.attach_lora(load_tiny(tiny_folder, "int8"))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["bf16", "fp16", "nf4", "int8"])
def test_precisions_on_a_cpu_stay_near_fp32(tiny_folder: Path, name: str) -> None:
    exact = load_tiny(tiny_folder)
    loaded = load_tiny(tiny_folder, name)
    assert loaded.precision == name and loaded.num_params == exact.num_params
    with torch.no_grad():
        probabilities = [m.model(IDS).logits.float().softmax(-1) for m in (exact, loaded)]
    assert not torch.equal(*probabilities)
    torch.testing.assert_close(*probabilities, atol=2e-3, rtol=0)


def test_a_quantised_checkpoint_is_taken_as_it_is(tiny_folder: Path, tmp_path: Path) -> None:
    first = load_tiny(tiny_folder, "nf4")
    first.model.save_pretrained(tmp_path)
    first.tokenizer.save_pretrained(tmp_path)
    again = load_tiny(tmp_path, "auto")
    assert again.precision == "nf4" and again.num_params == first.num_params and again.notes == ()
    assert "is already quantised (nf4)" in load_tiny(tmp_path, "fp32").notes[0]
    with torch.no_grad():
        assert torch.equal(first.model(IDS).logits, again.model(IDS).logits)


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16"), ({"avx2": True}, "fp32"), ({"bf16": True}, "fp32")],
)
def test_auto_on_a_cpu_is_what_the_cpu_is_fast_at(
    capabilities: dict[str, bool], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "__all__", [*torch.cpu.__all__, "get_capabilities"])
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    chosen, dtype, note = precision.choose_precision("auto", torch.device("cpu"))
    assert (chosen, dtype) == (expected, precision.DTYPES[expected])
    assert note is not None and expected in note
    assert precision.choose_precision("nf4", torch.device("cpu"))[:2] == ("nf4", precision.DTYPES[expected])


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16"), (False, "fp16")])
def test_auto_on_a_gpu_is_fp16_where_bf16_is_emulated(
    native: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    assert precision.choose_precision("auto", torch.device("cuda"))[0] == expected


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_only_pickled_weights_are_refused_unless_allowed(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UnsafeWeightsError, match=r"only pickled weights \(pytorch_model.bin\)"):
        load_tiny(folder)
    assert load_tiny(folder, allow_pickle=True).precision == "fp32"


@pytest.mark.parametrize("name", ["model.pt", "model.pth", "model.bin", "model.ckpt"])
def test_a_pickled_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04")
    with pytest.raises(UnsafeWeightsError, match="pickled file"):
        load_tiny(tmp_path / name)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_remote_code_is_refused_unless_trusted(folder: Path, name: str) -> None:
    edit_json(folder / name, auto_map={"AutoModelForCausalLM": "modeling.Evil"})
    (folder / "modeling.py").write_text("raise SystemExit('ran remote code')")
    with pytest.raises(UnsafeWeightsError, match=f"auto_map in {name}"):
        load_tiny(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "has no config.json"),
        (lambda f: (f / "model.safetensors").unlink(), "has no weights"),
        (lambda f: (f / "adapter_config.json").write_text("{}"), "holds an adapter beside a model"),
        (lambda f: (f / "config.json").write_text("{"), "is not JSON"),
        (lambda f: edit_json(f / "config.json", model_type="llamb"), "cannot read the architecture 'llamb'"),
        (lambda f: edit_json(f / "config.json", model_type="t5"), "no text decoder"),
        (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer that can be read"),
        (lambda f: edit_json(f / "tokenizer_config.json", eos_token=None), "no EOS token"),
        (lambda f: (f / "model.safetensors").write_bytes(b"no"), "cannot be read"),
        (lambda f: edit_json(f / "config.json", hidden_size=32), "cannot be read"),
    ],
)
def test_a_damaged_folder_says_what_is_wrong(folder: Path, damage: Any, message: str) -> None:
    damage(folder)
    with pytest.raises(ModelError, match=message):
        load_tiny(folder)


def test_a_missing_weight_is_an_error_not_a_random_start(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weights, the first being model.layers.1.mlp.up_proj.weight"):
        load_tiny(folder)


def test_lengths_beyond_the_model_are_an_error(tiny_folder: Path) -> None:
    with pytest.raises(ModelError, match="at most 512 tokens"):
        model.load(str(tiny_folder), max_seq_length=513)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("DeepSeek-R1-Distill-Llama-8B", "Write 'deepseek-ai/DeepSeek-R1-Distill-Llama-8B'"),
        ("embeded", "Did you mean 'embedded'"),
        ("./nowhere", "no file or folder"),
        ("some/deep/path", "no file or folder"),
        ("nowhere.gguf", "no file or folder"),
    ],
)
def test_a_source_that_is_nothing_is_an_error(source: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        model.load(source)


def test_a_file_that_is_not_gguf_is_an_error(tiny_folder: Path) -> None:
    with pytest.raises(ModelError, match="is not a GGUF file"):
        load_tiny(tiny_folder / "model.safetensors")


def test_unknown_precision_and_device_are_errors(tiny_folder: Path) -> None:
    with pytest.raises(ModelError, match="Did you mean 'bf16'"):
        load_tiny(tiny_folder, "bf61")
    with pytest.raises(ModelError, match="no device"):
        precision.choose_device("gpu")


# --- GGUF -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def gguf_file(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as an unquantised GGUF file, written the way llama.cpp's converter does."""
    import gguf

    path = tmp_path_factory.mktemp("gguf") / "tiny-f32.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(262)
    vocab = json.loads((tiny_folder / "tokenizer.json").read_text())["model"]["vocab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(vocab, key=vocab.__getitem__))
    writer.add_token_types([gguf.TokenType.CONTROL] * 4 + [gguf.TokenType.NORMAL] * 258)
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, tensor in load_file(tiny_folder / "model.safetensors").items():
        if heads := {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2]):  # llama.cpp rotates neighbours, not halves
            tensor = tensor.view(heads, 2, -1, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_loads_unpacked(tiny_folder: Path, gguf_file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    loaded = load_tiny(gguf_file)
    assert capfd.readouterr() == ("", "")
    assert loaded.name == str(gguf_file) and loaded.tokenizer.eos_token == "</s>"
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(IDS).logits, load_tiny(tiny_folder).model(IDS).logits)
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert model.model_shape(str(gguf_file)) == model.model_shape(str(tiny_folder))


def test_a_gguf_file_is_not_quantised_again(gguf_file: Path) -> None:
    with pytest.raises(ModelError, match="already rounded"):
        load_tiny(gguf_file, "nf4")


@pytest.mark.parametrize("kept", [5000, 100_000])  # within the header, within the weights
def test_a_truncated_gguf_file_is_an_error(gguf_file: Path, tmp_path: Path, kept: int) -> None:
    (tmp_path / "cut.gguf").write_bytes(gguf_file.read_bytes()[:kept])
    with pytest.raises(ModelError):
        load_tiny(tmp_path / "cut.gguf")


def test_a_gguf_file_on_the_hub_loads(hub: LoopbackHub, tiny_folder: Path, gguf_file: Path) -> None:
    hub.repos["me/ggufs"] = {gguf_file.name: gguf_file.read_bytes()}
    assert load_tiny(Path(f"me/ggufs/{gguf_file.name}")).num_params == load_tiny(tiny_folder).num_params
    with pytest.raises(ModelError, match="not in the repository"):
        load_tiny(Path("me/ggufs/other.gguf"))


# --- the Hub ----------------------------------------------------------------------------------------------------------


def publish(hub: LoopbackHub, folder: Path, repo: str = "me/tiny") -> None:
    hub.repos[repo] = {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_hub_model_loads_and_then_works_offline(
    hub: LoopbackHub, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(hub, tiny_folder)
    hub.repos["me/tiny"]["original/model.safetensors"] = b"a copy nobody needs"
    loaded = load_tiny(Path("me/tiny"))
    commit = hub.sha("me/tiny")
    assert (loaded.name, loaded.revision, loaded.resolved) == ("me/tiny", commit, f"me/tiny@{commit}")
    assert not [line for line in hub.requests if "original" in line]
    hub.deny = (503, {})
    with torch.no_grad():
        assert torch.equal(loaded.model(IDS).logits, load_tiny(Path("me/tiny")).model(IDS).logits)


def test_hub_weights_are_refused_before_they_are_downloaded(hub: LoopbackHub, folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    publish(hub, folder)
    with pytest.raises(UnsafeWeightsError):
        load_tiny(Path("me/tiny"))
    assert not [line for line in hub.requests if "pytorch_model.bin" in line]


def test_an_unknown_hub_id_names_the_nearest_distill(hub: LoopbackHub) -> None:
    with pytest.raises(ModelError, match="Did you mean 'deepseek-ai/DeepSeek-R1-Distill-Llama-8B'"):
        model.load("deepseek-ai/DeepSeek-R1-Distil-Llama-8b")


def test_a_gated_model_says_where_to_accept_its_terms(hub: LoopbackHub) -> None:
    hub.deny = (403, {"X-Error-Code": "GatedRepo"})
    with pytest.raises(ModelError, match=r"https://huggingface\.co/me/gated"):
        model.load("me/gated")


def test_no_network_says_how_to_work_offline(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
        with pytest.raises(NetworkError, match="hf download me/tiny --local-dir DIR"):
            model.load("me/tiny")


# --- shapes -----------------------------------------------------------------------------------------------------------


def test_the_distill_table_counts_what_transformers_builds() -> None:
    from transformers import LlamaConfig, Qwen2Config

    for name, shape in shapes.DISTILLS.items():
        make = LlamaConfig if "Llama" in name else Qwen2Config
        config = make(
            num_hidden_layers=shape.num_layers,
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            vocab_size=shape.vocab,
            max_position_embeddings=131072,
            tie_word_embeddings=False,
        )
        assert shapes.compute_shape(config) == shape, name


def test_shapes_need_no_network_and_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"not read")
    shape = model.model_shape(str(folder))
    assert (shape.num_layers, shape.hidden, shape.heads, shape.kv_heads, shape.head_dim) == (2, 64, 4, 2, 16)
    assert model.model_shape("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B").num_params == 7_615_616_512


def test_the_embedded_model_is_what_its_constants_say(embedded: model.LoadedModel) -> None:
    shape = shapes.compute_shape(embedded.model.config)
    assert shape == model.model_shape("embedded") and shape.num_params == embedded.num_params
    tokenizer = embedded.tokenizer
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.pad_token == "<|im_end|>" and len(tokenizer) == shape.vocab
    assert embedded.model.generation_config.eos_token_id == tokenizer.eos_token_id
    # Digits stand alone and do not split a run of spaces, as in the original tokenizer.
    assert tokenizer.tokenize("a  42 mg") == ["a", "ĠĠ", "4", "2", "Ġmg"]


def test_the_embedded_model_speaks_english(embedded: model.LoadedModel) -> None:
    ids = embedded.tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        top = embedded.model(ids).logits[0, -1].argmax()
    assert embedded.tokenizer.decode(top) == " Paris"


# --- LoRA -------------------------------------------------------------------------------------------------------------


def lora_tensors(loaded: model.LoadedModel, **options: Any) -> dict[str, torch.Tensor]:
    adapted = model.attach_lora(loaded, **({"r": 4, "alpha": 8} | options))
    return {name: p.detach().clone() for name, p in adapted.named_parameters() if p.requires_grad}


def test_lora_starts_from_its_seed_in_fp32_and_leaves_the_global_state(tiny_folder: Path) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = lora_tensors(load_tiny(tiny_folder, "bf16"))
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    second = lora_tensors(load_tiny(tiny_folder, "bf16"))
    other = lora_tensors(load_tiny(tiny_folder, "bf16"), seed=1)
    assert len(first) == 2 * 7 * 2 and {t.dtype for t in first.values()} == {torch.float32}
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [({}, 0.0), ({"rslora": True}, 0.0), ({"dora": True}, 1e-5), ({"init": "pissa"}, 1e-5)],
)
def test_an_untrained_adapter_changes_nothing(tiny_folder: Path, options: dict[str, Any], tolerance: float) -> None:
    loaded = load_tiny(tiny_folder)
    with torch.no_grad():
        before = loaded.model(IDS).logits
        after = model.attach_lora(loaded, r=4, **options)(IDS).logits
    torch.testing.assert_close(after, before, atol=tolerance, rtol=0)


def test_nf4_on_a_cpu_gives_the_gradients_of_its_unpacked_weights(tiny_folder: Path) -> None:
    packed, unpacked = load_tiny(tiny_folder, "nf4"), load_tiny(tiny_folder, "nf4")
    unpacked.model.dequantize(packed.dtype)
    unpacked.model.requires_grad_(False)
    gradients = []
    for loaded in (packed, unpacked):
        adapted = model.attach_lora(loaded, r=4)
        adapted(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append({n: p.grad.flatten() for n, p in adapted.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]
    for name, gradient in gradients[0].items():
        if gradient.any() or gradients[1][name].any():  # A's gradient is zero while B is
            assert torch.cosine_similarity(gradient, gradients[1][name], dim=0) > 0.99, name


@pytest.mark.parametrize(
    ("precision", "options", "message"),
    [
        ("fp32", {"targets": ["q_prj"]}, "names 'q_prj'.*Did you mean 'q_proj'"),
        ("nf4", {"init": "loftq"}, "already quantised have lost it|computes LoftQ's 4-bit rounding on a GPU"),
        ("nf4", {"init": "pissa"}, "needs them in 16 or 32 bit"),
        ("fp32", {"init": "pissa", "dora": True}, "cannot be converted"),
        ("fp32", {"init": "pisa"}, "Did you mean 'pissa'"),
    ],
)
def test_lora_settings_that_cannot_work_say_why(
    tiny_folder: Path, precision: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(MedcotError, match=message):
        model.attach_lora(load_tiny(tiny_folder, precision), **options)
