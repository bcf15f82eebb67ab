"""Loading and adapters: every argument of the tutorial, by its meaning, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from loopback_hub import LoopbackHub
from medcot import engine
from medcot.compat import (
    ArgumentError,
    FastLanguageModel,
    NotCoveredError,
    get_chat_template,
    is_bf16_supported,
    is_bfloat16_supported,
)
from medcot.errors import ModelError, NetworkError, RecipeError
from medcot.secrets import SecretName, find_secret

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def load(folder: Path, **more: Any) -> tuple[Any, Any]:
    settings: dict[str, Any] = {"max_seq_length": 512, "dtype": None, "load_in_4bit": True, "token": None}
    return FastLanguageModel.from_pretrained(model_name=str(folder), **settings | more)


def recipe_of(model: Any) -> Any:
    return vars(model)["_medcot_session"].recipe


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a CPU says")
def test_a_cpu_has_no_bfloat16_to_speak_of() -> None:
    assert is_bfloat16_supported() is False and is_bf16_supported() is False


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a CPU does")
def test_four_bits_are_for_gpus(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        model, _ = load(model_folder)
    assert recipe_of(model).model.precision == "auto" and engine.explain(model).fast
    assert capsys.readouterr().out.count("load_in_4bit and load_in_8bit are for GPUs") == 1


@pytest.mark.parametrize("dtype", [torch.float32, "float32", torch.bfloat16, "bfloat16"])
def test_dtype_is_what_weights_are_held_in(model_folder: Path, dtype: Any) -> None:
    model, _ = load(model_folder, dtype=dtype, load_in_4bit=False)
    assert str(model.dtype).removeprefix("torch.") == str(dtype).removeprefix("torch.")


def test_the_tutorials_adapter(model_folder: Path) -> None:
    model, _ = load(model_folder)
    model = FastLanguageModel.get_peft_model(
        model, r=16, target_modules=SEVEN, lora_alpha=32, lora_dropout=0, bias="none",
        use_gradient_checkpointing="unsloth", random_state=3407, use_rslora=True, loftq_config=None,
    )  # fmt: skip
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.use_rslora, config.bias) == (16, 32, True, "none")
    assert set(config.target_modules) == set(SEVEN) and engine.explain(model).fast
    assert recipe_of(model).train.gradient_checkpointing == "auto" and recipe_of(model).lora.seed == 3407


@pytest.mark.parametrize(
    ("word", "meaning"), [(True, "on"), (False, "off"), ("unsloth", "auto"), ("offload", "offload")]
)
def test_checkpointing_keeps_its_meaning(model_folder: Path, word: Any, meaning: str) -> None:
    model = FastLanguageModel.get_peft_model(load(model_folder)[0], use_gradient_checkpointing=word)
    assert recipe_of(model).train.gradient_checkpointing == meaning
    FastLanguageModel.for_training(model, use_gradient_checkpointing=meaning != "on")
    assert model.training and recipe_of(model).train.gradient_checkpointing == ("off" if meaning == "on" else "on")


def test_a_random_state_decides_the_start(model_folder: Path) -> None:
    def start(seed: int) -> torch.Tensor:
        model = FastLanguageModel.get_peft_model(load(model_folder)[0], random_state=seed)
        return next(p for name, p in model.named_parameters() if "lora_A" in name).detach()

    assert torch.equal(start(1), start(1)) and not torch.equal(start(1), start(2))


def test_a_saved_adapter_is_loaded_to_be_trained_on(model_folder: Path, tmp_path: Path) -> None:
    model, tokenizer = load(model_folder, dtype="float32", load_in_4bit=False)
    model = FastLanguageModel.get_peft_model(model, r=4, lora_alpha=8)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    model.save_pretrained(tmp_path / "lora_model")
    again, _ = load(tmp_path / "lora_model", dtype="float32", load_in_4bit=False)
    ids = tokenizer(["A patient"], return_tensors="pt").input_ids
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    trained = [p for p in again.parameters() if p.requires_grad]
    assert len(trained) == 28 and recipe_of(again).lora.r == 4
    assert FastLanguageModel.get_peft_model(again, r=4, lora_alpha=8) is again
    with pytest.raises(NotCoveredError, match="has an adapter of r=4"):
        FastLanguageModel.get_peft_model(again, r=16)


def test_a_folder_with_model_and_adapter_is_ambiguous(model_folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "adapter_config.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(ModelError, match="holds a model and an adapter"):
        load(tmp_path)


def test_a_token_is_used_and_kept(hub: LoopbackHub, model_folder: Path) -> None:
    token = "hf_" + "x" * 34
    hub.make("me/tiny", {p.name: p.read_bytes() for p in model_folder.iterdir()})
    model, _ = FastLanguageModel.from_pretrained("me/tiny", max_seq_length=512, load_in_4bit=False, token=token)
    assert hub.tokens == {f"Bearer {token}"} and model.config._name_or_path == "me/tiny"
    kept = find_secret(SecretName.HUGGING_FACE)
    assert kept is not None and kept.value == token and token not in repr(kept)


def test_an_adapter_comes_from_the_hub(hub: LoopbackHub, model_folder: Path, tmp_path: Path) -> None:
    model = FastLanguageModel.get_peft_model(load(model_folder)[0], r=4)
    model.save_pretrained(tmp_path / "lora")
    hub.make("me/lora", {p.name: p.read_bytes() for p in (tmp_path / "lora").iterdir()})
    again, _ = FastLanguageModel.from_pretrained("me/lora", max_seq_length=512, token="hf_" + "x" * 34)
    assert again.peft_config["default"].r == 4
    with pytest.raises((ModelError, NetworkError)):
        FastLanguageModel.from_pretrained("me/nothing", max_seq_length=512)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({"load_in_4bit": True, "load_in_8bit": True}, ArgumentError, "one precision"),
        ({"dtype": torch.int8, "load_in_4bit": False}, ArgumentError, "float16, bfloat16 or float32"),
        ({"max_seq_lenght": 3}, ArgumentError, "Did you mean 'max_seq_length'"),
        ({"full_finetuning": True}, NotCoveredError, "medcot trains adapters"),
        ({"max_seq_length": 100_000}, ModelError, "at most 512"),
    ],
)
def test_bad_loading_names_the_remedy(
    model_folder: Path, call: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        load(model_folder, **call)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({"r": 0}, RecipeError, "lora.r"),
        ({"target_modules": ["q_porj"]}, ModelError, "Did you mean 'q_proj'"),
        ({"modules_to_save": ["lm_head"]}, NotCoveredError, "modules_to_save"),
        ({"init_lora_weights": "gaussian"}, NotCoveredError, "gaussian"),
        ({"use_gradient_checkpointing": "sometimes"}, ArgumentError, "'unsloth', True or False"),
        ({"loftq_config": {"loftq_bits": 4}}, ModelError, "loftq"),
        ({"lora_alfa": 3}, ArgumentError, "Did you mean 'lora_alpha'"),
    ],
)
def test_bad_adapters_name_the_remedy(
    model_folder: Path, call: dict[str, Any], error: type[Exception], message: str
) -> None:
    model, _ = load(model_folder)
    with pytest.raises(error, match=message):
        FastLanguageModel.get_peft_model(model, **call)
    FastLanguageModel.get_peft_model(model)  # nothing was lost


def test_idle_arguments_are_said_once(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        load(model_folder, device_map="sequential", fast_inference=False, fix_tokenizer=True)
    said = capsys.readouterr().out
    assert said.count("device_map is not needed") == 1 and "fast_inference" not in said


def test_chat_templates_are_the_models_own(model_folder: Path) -> None:
    _, tokenizer = load(model_folder)
    with pytest.raises(NotCoveredError, match="llama-3"):
        get_chat_template(tokenizer, chat_template="llama-3")
    changed = get_chat_template(tokenizer, chat_template="{{ messages[0].content }}")
    assert changed.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    assert get_chat_template(changed) is changed
