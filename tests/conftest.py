"""Shared fixtures: tiny Llamas on disk, rows and a recipe for them, the embedded model, and a Hub on loopback."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from loopback_hub import LoopbackHub
    from medcot.model import LoadedModel

TINY_SEED = 7


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 2 layers and hidden size 64 with random weights, and a byte-level tokenizer of 262 tokens."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from medcot.quiet import quiet_libraries

    folder = tmp_path_factory.mktemp("tiny")
    specials = ["<s>", "</s>", "<think>", "</think>"]
    tokens = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "cd"]
    vocab = {token: i for i, token in enumerate(tokens)}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b"), ("c", "d")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    with torch.random.fork_rng(), quiet_libraries():
        torch.manual_seed(TINY_SEED)
        config = LlamaConfig(
            vocab_size=len(vocab),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            bos_token_id=0,
            eos_token_id=1,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with weights that depend on nothing but NumPy's generator, so that losses can be stored."""
    import shutil

    import numpy as np
    import torch
    from safetensors.torch import load_file, save_file

    copied = tmp_path_factory.mktemp("golden") / "model"
    shutil.copytree(tiny_folder, copied)
    weights = load_file(copied / "model.safetensors")
    draws = np.random.default_rng(3407)
    for name in sorted(weights):
        if not name.endswith("norm.weight"):
            weights[name] = torch.from_numpy(draws.normal(0, 0.08, tuple(weights[name].shape)).astype("float32"))
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    return copied


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eighteen short rows of sums."""
    from tiny_runs import make_rows, write_rows

    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", make_rows())


@pytest.fixture(scope="session")
def recipe_file(model_folder: Path, rows_file: Path) -> Path:
    """A recipe that is done in a second or two: no graded problems, one short question."""
    import yaml

    values = {
        "model": {"source": str(model_folder), "precision": "fp32", "max_seq_length": 512},
        "prompt": "short",
        "data": str(rows_file),
        "lora": {"r": 8, "alpha": 16},
        "train": {"batch_size": 4, "max_steps": 4, "warmup": 2, "learning_rate": 0.01, "logging_steps": 1},
        "ask": {"max_new_tokens": 4},
        "evaluate": {"source": None},
        "tracking": "none",
    }
    path = rows_file.with_name("tiny.yaml")
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="session")
def embedded() -> LoadedModel:
    """The embedded model in fp32; shared by all tests, so none may change it (attach_lora does: load your own)."""
    from medcot.model import load

    return load("embedded", precision="fp32", device="cpu")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """A Hub on 127.0.0.1 that huggingface_hub talks to for the length of one test, with a cache of its own."""
    from huggingface_hub import constants, hf_api

    from loopback_hub import LoopbackHub

    with LoopbackHub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(hf_api.api, "endpoint", server.url)  # of the functions without a client, made at import
        # transformers keeps the client of its first call, and with it the address of an earlier test's Hub.
        monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        yield server
