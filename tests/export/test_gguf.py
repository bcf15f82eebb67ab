"""GGUF files say what llama.cpp needs to know, and no tokenizer gets a name that is not its own."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from medcot.errors import ModelError
from medcot.export import gguf, gguf_tokenizer, kinds
from real_tokenizers import load_r1, load_smol
from tiny_tuned import LLAMA3


def name_of(tokenizer: PreTrainedTokenizerBase) -> str:
    return gguf_tokenizer.read_vocabulary(tokenizer, 160_000, add_bos=False).pre


def test_the_kinds_that_are_named_are_those_that_are_written() -> None:
    assert tuple(gguf.WRITTEN) == kinds.WRITTEN_HERE


def test_tokenizers_get_llama_cpps_names(tiny_folder: Path) -> None:
    assert name_of(AutoTokenizer.from_pretrained(tiny_folder)) == "gpt-2"
    assert name_of(load_smol()) == "smollm"
    assert name_of(load_r1()) == "qwen2"


@pytest.mark.parametrize("change", ["expression", "prefix", "whole words", "normalizer"])
def test_a_tokenizer_without_a_twin_is_refused(tiny_folder: Path, change: str) -> None:
    from tokenizers import Regex, normalizers, pre_tokenizers

    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    core = tokenizer.backend_tokenizer
    if change == "expression":
        core.pre_tokenizer = pre_tokenizers.Split(Regex(r"\d\d"), "isolated")
    elif change == "prefix":
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    elif change == "whole words":
        core.model.ignore_merges = True
    else:
        core.normalizer = normalizers.Lowercase()
    with pytest.raises(ModelError, match=r"no twin in llama\.cpp"):
        name_of(tokenizer)


def test_token_types_tell_control_tokens_tags_and_unused_rows_apart() -> None:
    tokenizer = load_r1()
    vocabulary = gguf_tokenizer.read_vocabulary(tokenizer, 152_064, add_bos=True)
    kinds = dict(zip(vocabulary.tokens, vocabulary.types, strict=True))
    assert (kinds["<｜User｜>"], kinds["<think>"], kinds["the"], kinds["[PAD152063]"]) == (3, 4, 1, 5)
    assert vocabulary.special["eos"] == tokenizer.eos_token_id and len(vocabulary.merges) > 100_000
    with pytest.raises(ModelError, match="Every token has a row"):
        gguf_tokenizer.read_vocabulary(tokenizer, 1000, add_bos=True)


def test_llama_3s_divisors_are_transformers_own() -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = AutoConfig.for_model("llama", hidden_size=128, num_attention_heads=1, rope_parameters=LLAMA3)
    stretched, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1 / LLAMA3["rope_theta"] ** (torch.arange(0, 128, 2) / 128)  # type: ignore[operator]
    divisors = gguf._llama3_divisors(gguf._rope(config), 128)
    np.testing.assert_allclose(divisors, (plain / stretched).numpy(), rtol=1e-5)
    assert divisors.min() == 1 and divisors.max() == 8


def test_rows_are_reordered_as_llama_cpp_rotates_them() -> None:
    rows = torch.arange(16).view(16, 1)  # two heads of eight dimensions
    wanted = [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]
    assert gguf.permute(rows, 2).flatten().tolist() == wanted


def test_what_llama_cpp_would_compute_otherwise_is_refused() -> None:
    llama = AutoConfig.for_model("llama")
    assert gguf.find_family(llama).permuted and not gguf.find_family(AutoConfig.for_model("qwen3")).permuted
    with pytest.raises(ModelError, match="architecture 'gpt2'"):
        gguf.find_family(AutoConfig.for_model("gpt2"))
    with pytest.raises(ModelError, match="a window of 64 tokens"):
        gguf.find_family(AutoConfig.for_model("mistral", sliding_window=64, max_position_embeddings=512))
    dynamic = copy.deepcopy(llama)
    dynamic.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(ModelError, match="rotary scaling 'dynamic'"):
        gguf._add_sizes(SimpleNamespace(**dict.fromkeys(_setters(), lambda *_: None)), dynamic, 10)  # type: ignore[arg-type]


def _setters() -> list[str]:
    from gguf import GGUFWriter

    return [name for name in dir(GGUFWriter) if name.startswith("add_")]
