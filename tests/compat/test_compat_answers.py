"""``model.generate`` of a notebook: transformers' own answers, by medcot's decoding where that covers the call."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, TextStreamer

from medcot.compat import FastLanguageModel
from medcot.compat.answers import Declined, read_call

LENGTHS = (5, 9, 3)


@pytest.fixture(scope="module")
def tuned(model_folder: Path) -> tuple[Any, Any]:
    settings: dict[str, Any] = {"max_seq_length": 512, "dtype": "float32", "load_in_4bit": False}
    model, tokenizer = FastLanguageModel.from_pretrained(str(model_folder), **settings)
    model = FastLanguageModel.get_peft_model(model, r=4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return model, tokenizer


@pytest.fixture
def fast(tuned: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """The same, failing where transformers' own path is taken."""
    from transformers import LlamaForCausalLM

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("transformers' own path was taken")

    monkeypatch.setattr(LlamaForCausalLM, "generate", refuse)
    return tuned


def padded(tokenizer: Any) -> dict[str, torch.Tensor]:
    """Three prompts, padded on the left."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(5, 250, (length,), generator=generator) for length in LENGTHS]
    ids = torch.full((3, 9), tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(rows):
        ids[place, 9 - len(row) :], mask[place, 9 - len(row) :] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def test_greedy_answers_are_transformers_own(tuned: tuple[Any, Any]) -> None:
    model, tokenizer = tuned
    inputs = padded(tokenizer)
    ours = model.generate(**inputs, max_new_tokens=20, use_cache=True)
    theirs = model.generate(**inputs, max_new_tokens=20, use_cache=True, num_beams=1, top_k=None, max_time=1e9)
    assert torch.equal(ours, theirs)
    with model.disable_adapter():
        base = model.generate(**inputs, max_new_tokens=20)
    assert not torch.equal(base, ours)


def test_the_calls_of_notebooks_are_fast(fast: tuple[Any, Any]) -> None:
    model, tokenizer = fast
    inputs = padded(tokenizer)
    one = inputs["input_ids"][:1, 4:]
    wanted = model.generate(**inputs, max_new_tokens=4)
    assert torch.equal(model.generate(one, max_new_tokens=4)[0], wanted[0, 4:])
    assert torch.equal(
        model.generate(inputs=one, generation_config=GenerationConfig(max_new_tokens=4, eos_token_id=1))[0],
        wanted[0, 4:],
    )
    assert model.generate(**inputs, max_new_tokens=4, do_sample=True, temperature=0.6, top_p=0.95).shape == (3, 13)


def test_draws_follow_torchs_seed(fast: tuple[Any, Any]) -> None:
    model, tokenizer = fast
    inputs = padded(tokenizer)
    settings = {**inputs, "max_new_tokens": 12, "do_sample": True, "temperature": 1.5}
    torch.manual_seed(5)
    first, second = model.generate(**settings), model.generate(**settings)
    torch.manual_seed(5)
    assert torch.equal(model.generate(**settings), first) and not torch.equal(first, second)


def test_a_streamer_gets_every_token(fast: tuple[Any, Any], capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = fast
    prompt = tokenizer(["A patient drinks"], return_tensors="pt")
    out = model.generate(**prompt, max_new_tokens=10, streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out.strip() == tokenizer.decode(out[0, prompt.input_ids.shape[1] :]).strip()


def test_rows_that_end_early_are_padded(tuned: tuple[Any, Any]) -> None:
    model, tokenizer = tuned
    inputs = padded(tokenizer)
    written = model.generate(**inputs, max_new_tokens=30)
    ended = int(written[0, 12])  # the first row ends at its fourth token, if that is EOS
    model.generation_config.eos_token_id, own = [1, ended], model.generation_config.eos_token_id
    try:
        ours = model.generate(**inputs, max_new_tokens=30)
        theirs = model.generate(**inputs, max_new_tokens=30, max_time=1e9)
    finally:
        model.generation_config.eos_token_id = own
    assert torch.equal(ours, theirs) and (ours[0, 13:] == tokenizer.pad_token_id).all()


def test_an_answer_ends_at_the_tokenizers_eos_too(fast: tuple[Any, Any]) -> None:
    model, tokenizer = fast
    model.generation_config.eos_token_id, own = 7, model.generation_config.eos_token_id
    try:
        call = read_call(model, tokenizer, (), {"input_ids": torch.tensor([[5]]), "max_new_tokens": 3})
        assert call.prompts == [[5]] and call.pad_token_id == min(7, tokenizer.eos_token_id)
    finally:
        model.generation_config.eos_token_id = own


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ({"num_beams": 2}, "num_beams=2"),
        ({"repetition_penalty": 1.2}, "repetition_penalty=1.2"),
        ({"do_sample": True, "top_k": 20}, "top_k=20"),
        ({"do_sample": True, "min_p": 0.1}, "min_p=0.1"),
        ({"eos_token_id": 7}, "ends at eos_token_id=7"),
        ({"max_new_tokens": None}, "no max_new_tokens"),
        ({"logits_processor": [object()]}, "logits_processor"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate"),
        ({"stopping_criteria": [object()]}, "stopping_criteria"),
        ({"attention_mask": torch.tensor([[1, 1, 0]])}, "padding is not on the left"),
    ],
)
def test_more_than_a_plain_answer_is_transformers_business(
    tuned: tuple[Any, Any], setting: dict[str, Any], reason: str
) -> None:
    model, tokenizer = tuned
    call = {"input_ids": torch.tensor([[5, 6, 7]]), "max_new_tokens": 3} | setting
    with pytest.raises(Declined, match=reason):
        read_call(model, tokenizer, (), call)


def test_it_is_said_once_why_a_call_is_slow(tuned: tuple[Any, Any], capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = tuned
    inputs = padded(tokenizer)
    for _ in range(2):
        assert model.generate(**inputs, max_new_tokens=2, num_beams=2).shape == (3, 11)
    assert capsys.readouterr().out.count("num_beams=2") == 1


def test_the_models_own_sampling_is_used(tuned: tuple[Any, Any]) -> None:
    model, tokenizer = tuned
    config = model.generation_config
    own = copy.deepcopy(config)
    try:
        config.do_sample, config.temperature, config.top_p = True, 0.6, 0.95
        call = read_call(model, tokenizer, (), {"input_ids": torch.tensor([[5]]), "max_new_tokens": 3})
        assert (call.sampling.temperature, call.sampling.top_p) == (0.6, 0.95)
        call = read_call(model, tokenizer, (torch.tensor([[5]]),), {"max_new_tokens": 3, "do_sample": False})
        assert call.sampling.temperature == 0
    finally:
        model.generation_config = model.get_base_model().generation_config = own


def test_classes_are_as_before(tuned: tuple[Any, Any], model_folder: Path, tmp_path: Path) -> None:
    from peft import PeftModelForCausalLM
    from transformers import LlamaForCausalLM

    model, tokenizer = tuned
    assert isinstance(model, PeftModelForCausalLM) and isinstance(model.get_base_model(), LlamaForCausalLM)
    assert type(model.get_base_model()).__name__ == "LlamaForCausalLM"
    assert not hasattr(AutoModelForCausalLM.from_pretrained(model_folder), "save_pretrained_merged")
    inputs = padded(tokenizer)
    wanted = model.generate(**inputs, max_new_tokens=5)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied.generate(**inputs, max_new_tokens=5), wanted)
    assert pickle.loads(pickle.dumps(tokenizer))("ab").input_ids == tokenizer("ab").input_ids


def test_a_model_is_freed_when_nobody_holds_it(model_folder: Path) -> None:
    settings: dict[str, Any] = {"max_seq_length": 512, "dtype": "float32", "load_in_4bit": False}
    model, tokenizer = FastLanguageModel.from_pretrained(str(model_folder), **settings)
    seen = weakref.ref(model)
    del model, tokenizer
    gc.collect()
    assert seen() is None
