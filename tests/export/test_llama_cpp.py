"""llama.cpp itself: it opens what is written, makes medcot's tokens of every prompt, and computes the tuned model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from medcot.errors import ModelError
from medcot.export import llama_cpp
from medcot.prompt import Style, encode_prompt
from real_tokenizers import load_r1
from tiny_tuned import export, verify

pytest.importorskip("llama_cpp")
Runs = Callable[[str], Path]


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_llama_cpp_computes_the_tuned_model(tuned_run: Runs, name: str) -> None:
    run = tuned_run(name)
    made, _ = export(run, "gguf:f32", "gguf:q8_0", "gguf:q4_k_m", "ollama")
    for kind, facts in made.items():
        assert facts["proof"]["passed"] and facts["proof"]["reader"].startswith("llama.cpp"), kind
    assert made["gguf:f32"]["proof"]["kl_mean"] < 1e-6
    assert "made q4_k_m by llama.cpp" in made["gguf:q4_k_m"]["base"]
    assert [path.name for path in (run / "gguf-q4_k_m").iterdir()] == ["tuned-1-q4_k_m.gguf"]
    assert verify(run / "gguf-q4_k_m" / "tuned-1-q4_k_m.gguf", run).passed


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "llama tied", "qwen2", "qwen3", "mistral"])
def test_every_family_in_every_kind(tuned_run: Runs, name: str) -> None:
    from medcot.export.kinds import QUANTS

    made, _ = export(tuned_run(name), *(f"gguf:{quant}" for quant in QUANTS), num_prompts=16, num_tokens=32)
    assert len(made) == len(QUANTS)


@pytest.mark.slow
def test_llama_cpp_makes_medcots_tokens_of_real_prompts(tmp_path: Path) -> None:
    """R1's Qwen tokenizer with a tiny model behind it, and questions with numbers, units and letters of other kinds."""
    from medcot import clinic
    from medcot.export.adapter import save_adapter
    from medcot.export.gguf import write_gguf
    from medcot.export.merged import Base, open_merged
    from medcot.export.turns import build_jinja, build_turns
    from medcot.model import attach_lora, load
    from tiny_models import build_base

    tokenizer = load_r1()
    build_base("qwen2", vocab_size=151_936, num_key_value_heads=2, intermediate_size=128).save_pretrained(
        tmp_path / "b"
    )
    tokenizer.save_pretrained(tmp_path / "b")
    loaded = load(str(tmp_path / "b"), precision="fp32", max_seq_length=64, device="cpu")
    base = Base.of(loaded)
    adapter = save_adapter(attach_lora(loaded, r=2), tokenizer, tmp_path / "adapter")
    for style in Style:
        turns = build_turns(style, tokenizer)
        path = tmp_path / f"{style}.gguf"
        write_gguf(
            open_merged(base, adapter),
            tokenizer,
            path,
            quant="f16",
            name="x",
            add_bos=turns.added,
            chat_template=build_jinja(turns),
        )
        questions = [made.question for made in clinic.generate(40, split="test", seed=1)]
        questions += ["Δ 5 µg/kg — naïve?  I'LL go:\n\n\t250mg, 1,000 ml", "患者今年45岁。", "Ünïcode’s “quotes” 3½"]
        prompts = [encode_prompt(question, style, tokenizer) for question in questions]
        _, tokens = llama_cpp.read_logits(path, [[1, 2]], [0], [turns.put(question) for question in questions])
        assert tokens == prompts, style


def test_a_file_that_llama_cpp_cannot_use_is_an_error_and_not_the_end(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF\x03\0\0\0nothing")
    with pytest.raises(ModelError, match=r"llama\.cpp cannot use 'x\.gguf'"):
        llama_cpp.read_logits(tmp_path / "x.gguf", [[1, 2]], [0], [])
    with pytest.raises(ModelError, match=r"llama\.cpp cannot use 'x\.gguf'"):
        llama_cpp.quantise(tmp_path / "x.gguf", tmp_path / "y.gguf", "q4_k_m")


def test_a_llama_quantize_on_the_path_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "llama-quantize"
    program.write_text('#!/bin/sh\necho "$@" > "$2"\n')
    program.chmod(0o755)
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda name: str(program) if name == "llama-quantize" else None)
    llama_cpp.quantise(tmp_path / "a", tmp_path / "b", "q4_k_m")
    assert (tmp_path / "b").read_text().split()[-1] == "Q4_K_M"
    program.write_text('#!/bin/sh\necho "error: broken" >&2\nexit 3\n')
    with pytest.raises(ModelError, match=r"exit code 3\): error: broken"):
        llama_cpp.quantise(tmp_path / "a", tmp_path / "b", "q4_k_m")


@pytest.mark.slow
def test_the_embedded_model_from_a_finished_run(tmp_path: Path) -> None:
    """A short run of the embedded model through every kind; its base is a GGUF in 4 bit."""
    from tiny_runs import make_rows, run_job, write_rows

    rows = write_rows(tmp_path / "rows.jsonl", make_rows())
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(
        json.dumps(
            {
                "model": {"source": "embedded", "max_seq_length": 256},
                "prompt": "short",
                "data": str(rows),
                "train": {"batch_size": 4, "max_steps": 20, "warmup": 2, "learning_rate": 0.002, "logging_steps": 10},
                "ask": {"max_new_tokens": 4},
                "evaluate": {"source": None},
                "tracking": "none",
            }
        )
    )
    run_job(recipe, tmp_path / "tuned-1")
    kinds = ["adapter", "merged-16bit", "merged-32bit", "merged-4bit", "gguf:q8_0", "gguf:q4_k_m", "ollama"]
    made, _ = export(tmp_path / "tuned-1", *kinds)
    assert list(made) == kinds and all(facts["proof"]["passed"] for facts in made.values())
    assert made["adapter"]["proof"]["answers_changed"] == made["merged-32bit"]["proof"]["answers_changed"] == 0
    assert "embedded model's weights, unpacked from 4-bit GGUF" in made["merged-16bit"]["base"]
