"""What accelerate() takes, what it turns away and why, and that it leaves the model's files as they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from medcot.engine import accelerate, engine_of, explain, hold_in_fp8, release
from medcot.errors import ModelError
from tiny_models import TARGETS, attach, build_base, build_model, flatten, make_rows, plain_logits, relative


def test_every_part_is_named() -> None:
    model = build_model("llama")
    explanation = accelerate(model)
    assert explanation.fast and explanation.reason is None and explain(model) == explanation
    text = str(explanation)
    assert {line.split(":")[0] for line in text.splitlines()} == set(explanation.parts)
    for part in ("projections", "attention", "norm", "loss"):
        assert part in text
    # On a CPU: no kernels of Triton's, no flash attention, and the base as it is.
    assert "base dense" in explanation.parts["projections"] and "padded" in explanation.parts["attention"]
    assert explanation.parts["norm, rotary, SwiGLU"].startswith("plain torch")


def test_a_model_never_accelerated_says_so() -> None:
    model = build_model("llama")
    assert engine_of(model) is None
    assert str(explain(model)) == "plain path: accelerate() was not called on it"


def test_accelerating_twice_builds_one_engine() -> None:
    model = build_model("llama")
    first = accelerate(model)
    engine = engine_of(model)
    assert accelerate(model) == first and engine_of(model) is engine


def test_release_forgets() -> None:
    model = build_model("llama")
    accelerate(model)
    release(model)
    assert engine_of(model) is None and not explain(model).fast
    release(model)
    assert accelerate(model).fast


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=20, n_positions=16))


def gelu() -> Any:
    return attach(build_base("llama", hidden_act="gelu"))


def with_trained(name: str) -> Any:
    model = build_model("llama")
    model.get_base_model().get_submodule(name).requires_grad_(True)
    return model


def with_two_adapters() -> Any:
    from peft import LoraConfig

    model = build_model("llama")
    model.add_adapter("second", LoraConfig(r=2, target_modules=TARGETS))
    model.base_model.set_adapter(["default", "second"])
    return model


def with_another_linear() -> Any:
    class Odd(nn.Linear):
        pass

    base = build_base("llama")
    base.model.layers[1].mlp.up_proj = Odd(64, 112, bias=False).requires_grad_(False)
    return base


REASONS = {
    "an unknown family": (gpt2, "the engine knows llama, mistral, qwen2, qwen3, not gpt2"),
    "another activation": (gelu, "layer 0: its activation is gelu"),
    "dropout": (lambda: attach(build_base("llama"), lora_dropout=0.1), "LoRA dropout is above 0"),
    "DoRA": (lambda: attach(build_base("llama"), use_dora=True), "DoRA"),
    "a bias in the adapter": (lambda: attach(build_base("llama"), lora_bias=True), "not a plain pair of A and B"),
    "a trained bias": (lambda: attach(build_base("qwen2"), bias="all"), "q_proj/k_proj/v_proj: its base weights are"),
    "a part of a group": (
        lambda: attach(build_base("llama"), target_modules=["q_proj", "v_proj"]),
        "only some of the projections that share its input have an adapter",
    ),
    "unequal scales": (
        lambda: attach(build_base("llama"), alpha_pattern={"k_proj": 32}),
        "the projections that share its input have different LoRA scales",
    ),
    "two adapters": (with_two_adapters, "several adapters are active at once"),
    "a trained base": (lambda: with_trained("model.layers.1.mlp.down_proj"), "layer 1: down_proj: its base weights"),
    "a trained embedding": (lambda: with_trained("model.embed_tokens"), "embed_tokens is being trained"),
    "a trained head": (lambda: with_trained("lm_head"), "lm_head is being trained"),
    "a trained norm": (lambda: with_trained("model.layers.0.input_layernorm"), "its norms are being trained"),
    "a trained last norm": (lambda: with_trained("model.norm"), "norm is being trained"),
    "an unknown linear layer": (with_another_linear, "layer 1: gate_proj/up_proj: its base is Odd on cpu"),
}


@pytest.mark.parametrize("case", REASONS)
def test_the_plain_path_has_a_reason(case: str) -> None:
    build, words = REASONS[case]
    model = build()
    explanation = accelerate(model)
    assert not explanation.fast and engine_of(model) is None
    assert words in str(explanation) and str(explanation).startswith("plain path: ")
    assert explain(model) == explanation


def test_a_model_turned_away_later_loses_its_engine() -> None:
    model = build_model("llama")
    accelerate(model)
    model.get_base_model().lm_head.requires_grad_(True)
    assert not accelerate(model).fast
    assert engine_of(model) is None


def test_adapters_on_whole_groups_only() -> None:
    model = attach(build_base("llama"), target_modules=["q_proj", "k_proj", "v_proj", "down_proj"])
    rows = make_rows([20, 3])
    wanted = torch.cat(plain_logits(model, rows))
    assert accelerate(model).fast
    engine = engine_of(model)
    assert engine is not None
    ids, lengths = torch.cat([row[0] for row in rows]), [20, 3]
    assert relative(engine.logits(engine.hidden_states(ids, lengths)), wanted) < 1e-5


@pytest.mark.parametrize("build", [lambda: build_base("llama"), gpt2], ids=["llama", "gpt2"])
def test_eight_bit_products_need_a_gpu_and_a_known_family(build: Any) -> None:
    model = build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ModelError, match=r"precision fp8 for a (llama|gpt2) model on cpu"):
        hold_in_fp8(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# --- what is saved ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_names_and_values_stay(family: str) -> None:
    model = build_model(family)
    before = {name: (tensor.clone(), tensor.dtype) for name, tensor in model.state_dict().items()}
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    accelerate(model)
    after = model.state_dict()
    assert list(after) == list(before)
    for name, (value, dtype) in before.items():
        assert torch.equal(after[name], value) and after[name].dtype == dtype
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trainable


def test_a_saved_adapter_opens_in_plain_peft(tmp_path: Path) -> None:
    from peft import PeftModel

    model = build_model("qwen2")
    rows = make_rows([20, 3])
    accelerate(model)
    model.save_pretrained(tmp_path)
    opened = PeftModel.from_pretrained(build_base("qwen2"), tmp_path)
    assert torch.equal(torch.cat(plain_logits(opened, rows)), torch.cat(plain_logits(model, rows)))


def test_a_saved_base_opens_in_plain_transformers(tmp_path: Path) -> None:
    """Fused weights share memory, which safetensors refuses unless each is seen to be a part of its own."""
    from transformers import AutoModelForCausalLM

    base = build_base("llama")
    accelerate(base)
    base.save_pretrained(tmp_path)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert opened.keys() == base.state_dict().keys()
    assert all(torch.equal(opened[name], value) for name, value in base.state_dict().items())


def test_training_an_accelerated_model_changes_the_adapter_alone(tmp_path: Path) -> None:
    """What is saved after a step opens in plain PEFT and gives the accelerated model's logits."""
    from peft import PeftModel

    model = build_model("qwen3")
    rows = make_rows([20, 3])
    accelerate(model)
    engine = engine_of(model)
    assert engine is not None
    before = torch.cat(plain_logits(model, rows)).detach()
    loss, _ = engine.summed_loss(*flatten(rows))
    loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2).step()
    model.save_pretrained(tmp_path)
    opened = torch.cat(plain_logits(PeftModel.from_pretrained(build_base("qwen3"), tmp_path), rows)).detach()
    ids, _, lengths = flatten(rows)
    assert relative(engine.logits(engine.hidden_states(ids, lengths)), opened) < 1e-5
    assert relative(before, opened) > 0.01


def test_merging_after_release_is_pefts_own() -> None:
    model, twin = build_model("llama"), build_model("llama")
    accelerate(model)
    release(model)
    merged, wanted = model.merge_and_unload().state_dict(), twin.merge_and_unload().state_dict()
    assert merged.keys() == wanted.keys() and all(torch.equal(merged[name], wanted[name]) for name in wanted)
