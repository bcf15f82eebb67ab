"""Every kind, of every family: exported, read back by its own library, proven, and found out where it was changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from medcot import exporting
from medcot.errors import MissingExtraError, ModelError, OutputError, UnequalError
from medcot.export import equality, llama_cpp, making
from medcot.export.kinds import KINDS, detect_kind, folder_of, parse_kinds
from medcot.prompt import Style, encode_prompt
from tiny_runs import read_facts
from tiny_tuned import export, verify

PLAIN = ["adapter", "merged-16bit", "merged-32bit", "merged-4bit"]
Runs = Callable[[str], Path]


@pytest.fixture
def no_llama(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without llama-cpp-python, where transformers reads GGUF files back."""
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: False)
    monkeypatch.setattr(llama_cpp.shutil, "which", lambda _: None)


OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("llama tied", "qwen3", "mistral")]


@pytest.mark.parametrize("name", ["llama", "qwen2", *OTHERS])
def test_every_plain_kind_is_the_tuned_model(tuned_run: Runs, name: str) -> None:
    run = tuned_run(name)
    made, printed = export(run, *PLAIN)
    facts = read_facts(run)["exports"]
    assert facts == json.loads(json.dumps(made)) and list(facts) == PLAIN
    for kind in PLAIN:
        proof, folder = facts[kind]["proof"], folder_of(kind, run)
        assert proof["passed"] and proof["prompts"] == 6 and proof["positions"] > 20, (kind, proof)
        assert proof["kl_mean"] <= proof["threshold"]["kl_mean"] and "transformers" in proof["reader"]
        assert facts[kind]["folder"] == folder.name and detect_kind(folder) == kind
        sums = {path.name: exporting.hash_file(path) for path in folder.iterdir() if path.suffix != ".md"}
        assert facts[kind]["files"] == sums
        assert f"✓ {kind}" in printed or f"ok {kind}" in printed
        assert verify(folder, run).passed
    assert not [path.name for path in run.iterdir() if path.name.startswith(".") and path.name != ".lock"]
    assert "merged into" in facts["merged-16bit"]["base"] and "nf4" in facts["merged-4bit"]["base"]


def test_adapter_and_merged_write_the_tuned_models_greedy_answers_token_for_token(tuned_run: Runs) -> None:
    run = tuned_run("llama")
    made, _ = export(run, "adapter", "merged-32bit")
    assert [made[kind]["proof"]["answers_changed"] for kind in made] == [0, 0]
    base = read_facts(run)["model"]["source"]
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), run / "adapter"
    )
    merged: Any = AutoModelForCausalLM.from_pretrained(run / "merged-32bit", dtype=torch.float32)
    untuned: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    from transformers import AutoTokenizer

    ids = torch.tensor([encode_prompt("How many cups?", Style.SHORT, AutoTokenizer.from_pretrained(base))])
    answers = [
        model.generate(ids, do_sample=False, max_new_tokens=32, pad_token_id=1)[0].tolist()
        for model in (adapted, merged, untuned)
    ]
    assert answers[0] == answers[1] != answers[2]


@pytest.mark.parametrize("name", ["llama", "llama tied", "qwen2", "qwen3", "mistral"])
@pytest.mark.usefixtures("no_llama")
def test_gguf_is_the_tuned_model_to_transformers_own_reader(tuned_run: Runs, name: str) -> None:
    run = tuned_run(name)
    made, _ = export(run, "gguf:f32", "gguf:q8_0", "ollama")
    assert list(made) == ["gguf:f32", "gguf:q8_0", "ollama"]
    for facts in made.values():
        assert "transformers" in facts["proof"]["reader"] and "not installed" in facts["proof"]["reader"]
    assert made["gguf:f32"]["proof"]["kl_mean"] < 1e-6
    assert (run / "gguf-q8_0" / "tuned-1-q8_0.gguf").is_file() and (run / "ollama" / "Modelfile").is_file()


@pytest.mark.usefixtures("no_llama")
def test_k_quants_without_llama_cpp_name_the_extra_before_anything_is_done(tuned_run: Runs) -> None:
    run = tuned_run("qwen2")
    with pytest.raises(MissingExtraError, match=r"\.\[llama\]"):
        export(run, "merged-16bit", "gguf:q4_k_m")
    assert not (run / "merged").exists()


def hold_in_nf4(run: Path, source: Path) -> None:
    """Make a run one whose base was held in NF4, read from ``source``."""
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["model"] |= {"source": str(source), "precision": "nf4"}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    facts = read_facts(run)
    facts["model"] |= {"source": str(source), "precision": "nf4"}
    (run / "run.json").write_text(json.dumps(facts))


def test_an_nf4_run_is_merged_into_the_16_bit_base_and_says_so(tuned_run: Runs) -> None:
    run = tuned_run("llama")
    hold_in_nf4(run, Path(read_facts(run)["model"]["source"]))
    made, _ = export(run, "adapter", "merged-16bit")
    assert "training saw the same weights in nf4" in made["merged-16bit"]["base"]
    assert made["adapter"]["proof"]["kl_mean"] < 1e-6 and "nf4" in made["adapter"]["proof"]["tuned"]
    merged = made["merged-16bit"]["proof"]
    assert 1e-3 < merged["kl_mean"] < merged["threshold"]["kl_mean"] != equality.LIMITS["16bit"].kl_mean


def test_a_base_in_4_bit_only_is_unpacked_and_its_original_can_be_named(tuned_run: Runs, tmp_path: Path) -> None:
    from medcot.model import load

    run = tuned_run("llama")
    original = Path(read_facts(run)["model"]["source"])
    packed = load(str(original), precision="nf4", max_seq_length=64, device="cpu")
    packed.model.save_pretrained(tmp_path / "packed")
    packed.tokenizer.save_pretrained(tmp_path / "packed")
    hold_in_nf4(run, tmp_path / "packed")
    made, _ = export(run, "merged-16bit", "gguf:f16")
    assert "unpacked from nf4 to bf16" in made["merged-16bit"]["base"]
    assert made["merged-16bit"]["proof"]["kl_mean"] < 1e-3  # the very weights of training
    made, _ = export(run, "merged-16bit", original=str(original))
    assert f"merged into {original} in bf16, named as the original" in made["merged-16bit"]["base"]


# --- what is wrong is found out ---------------------------------------------------------------------------------------


def alter_safetensors(folder: Path) -> None:
    """Change one matrix, as little as a mistake would."""
    path = next(folder.glob("*.safetensors"))
    tensors = load_file(path)
    name = next(name for name in tensors if "down_proj" in name and tensors[name].ndim == 2)
    tensors[name] = tensors[name].flip(0).contiguous()
    save_file(tensors, path, metadata={"format": "pt"})


def alter_gguf(folder: Path) -> None:
    from gguf import GGUFReader

    path = next(folder.glob("*.gguf"))
    tensor = next(t for t in GGUFReader(path).tensors if t.name == "blk.0.ffn_down.weight")
    data = bytearray(path.read_bytes())
    start, size = int(tensor.data_offset), int(tensor.n_bytes)
    data[start : start + size] = data[start + size // 2 : start + size] + data[start : start + size // 2]
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("kind", [*PLAIN, "gguf:q8_0", "ollama"])
def test_an_altered_tensor_is_found_out(tuned_run: Runs, tmp_path: Path, kind: str) -> None:
    run = tuned_run("qwen2")
    export(run, kind)
    pulled = Path(shutil.copytree(folder_of(kind, run), tmp_path / "pulled"))
    assert verify(pulled, run).passed
    (alter_gguf if kind.startswith(("gguf", "ollama")) else alter_safetensors)(pulled)
    with pytest.raises(UnequalError, match="is not the file that was exported") as caught:
        verify(pulled, run)
    assert "nats from the tuned model's" in str(caught.value) or "does not open" in str(caught.value)
    assert caught.value.exit_code == 1
    facts = read_facts(run)
    facts["exports"] = {}  # with no checksum to go by
    (run / "run.json").write_text(json.dumps(facts))
    with pytest.raises(UnequalError, match="nats from the tuned model's"):
        verify(pulled, run)


def test_another_template_another_tokenizer_and_a_missing_file_are_found_out(tuned_run: Runs, tmp_path: Path) -> None:
    run = tuned_run("qwen2")
    export(run, "ollama", "merged-16bit")
    modelfile = run / "ollama" / "Modelfile"
    modelfile.write_text(modelfile.read_text().replace('{{ "\\n" }}', '{{ "\\n\\n" }}'))
    with pytest.raises(UnequalError, match="TEMPLATE is not the run's prompt style"):
        verify(run / "ollama", run)
    merged = Path(shutil.copytree(run / "merged", tmp_path / "copy"))
    tokenizer = json.loads((merged / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = []
    (merged / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UnequalError, match=r"tokenizer\.json is not the file"):
        verify(merged, run)
    (merged / "generation_config.json").unlink()
    with pytest.raises(UnequalError, match=r"generation_config\.json is missing"):
        verify(merged, run)


def test_an_adapter_beside_merged_weights_is_refused_and_found_out(tuned_run: Runs) -> None:
    run = tuned_run("qwen2")
    export(run, "merged-16bit")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(run / "adapter" / name, run / "merged")
    with pytest.raises(UnequalError, match="adapter beside merged weights"):
        verify(run / "merged", run)
    with pytest.raises(OutputError, match="holds an adapter"):
        export(run, "merged-16bit")


def test_a_failed_proof_leaves_nothing_that_is_taken_for_good_and_the_others_are_made(
    tuned_run: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tuned_run("qwen2")
    first, _ = export(run, "merged-16bit")
    real = making.make

    def wrong(tuned: Any, kind: str, work: Path) -> str:
        words = real(tuned, kind, work)
        if kind == "merged-16bit":
            alter_safetensors(work)
        return words

    monkeypatch.setattr(making, "make", wrong)
    with pytest.raises(UnequalError, match=r"merged-16bit is not the tuned model: .* nats"):
        export(run, "merged-16bit", "merged-32bit")
    assert (run / "merged.failed").is_dir() and (run / "merged-32bit" / "config.json").is_file()
    facts = read_facts(run)["exports"]
    assert facts["merged-16bit"] == first["merged-16bit"] and facts["merged-32bit"]["proof"]["passed"]
    assert verify(run / "merged", run).passed  # the good one still stands
    monkeypatch.setattr(making, "make", real)
    export(run, "merged-16bit")
    assert not (run / "merged.failed").exists()


def test_another_adapter_than_the_measured_one_is_not_exported(tuned_run: Runs) -> None:
    run = tuned_run("qwen2")
    facts = read_facts(run)
    facts["eval"] = {"adapter_sha256": "0" * 64}
    (run / "run.json").write_text(json.dumps(facts))
    with pytest.raises(UnequalError, match="not the one that was measured"):
        export(run, "merged-16bit")


# --- the disk ---------------------------------------------------------------------------------------------------------


def test_a_full_disk_is_seen_before_the_model_is_asked(tuned_run: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tuned_run("qwen2")
    monkeypatch.setattr(exporting, "open_tuned", lambda *_: pytest.fail("it was asked"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=50_000_000))
    with pytest.raises(OutputError, match="GB are needed"):
        export(run, "merged-16bit", "merged-4bit")  # one of them would fit
    assert not (run / "merged").exists()


@pytest.mark.parametrize("stops", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_export_leaves_what_stood_before(
    tuned_run: Runs, monkeypatch: pytest.MonkeyPatch, stops: Any
) -> None:
    run = tuned_run("qwen2")
    export(run, "gguf:q8_0")
    before = {path.name: path.read_bytes() for path in (run / "gguf-q8_0").iterdir()}

    def stop(*_: object) -> None:
        raise stops

    from medcot.export import gguf

    monkeypatch.setattr(gguf, "_encode", stop)
    with pytest.raises(KeyboardInterrupt if stops is KeyboardInterrupt else OutputError):
        export(run, "gguf:q8_0")
    assert {path.name: path.read_bytes() for path in (run / "gguf-q8_0").iterdir()} == before
    assert not [path.name for path in run.iterdir() if path.name.startswith(".gguf")]


def test_exports_go_where_they_are_told(tuned_run: Runs, tmp_path: Path) -> None:
    run, out = tuned_run("qwen2"), tmp_path / "elsewhere"
    made, _ = export(run, "adapter", "merged-16bit", out=out)
    assert made["adapter"]["folder"] == str(out / "adapter") and (out / "merged" / "config.json").is_file()
    page = (out / "serve.md").read_text()
    assert "--enable-lora --lora-modules tuned=./adapter --max-lora-rank 8" in page
    assert "vllm serve ./merged" in page and "--reasoning-parser deepseek_r1" in page
    assert "merged-16bit" in (run / "README.md").read_text()


# --- words ------------------------------------------------------------------------------------------------------------


def test_kinds_are_read_as_people_write_them() -> None:
    assert parse_kinds("adapter, merged-16bit,gguf") == ["adapter", "merged-16bit", "gguf:q8_0"]
    assert parse_kinds("gguf:q8_0,Q4_K_M,ollama,q4_k_m") == ["gguf:q8_0", "gguf:q4_k_m", "ollama", "ollama:q4_k_m"]
    assert parse_kinds("gguf,gguf:q8_0") == ["gguf:q8_0"]
    for text in ("merged", "gguf:q9", "merged-16bit:q8_0", ""):
        with pytest.raises(ModelError, match=r"Kinds are|It is one of"):
            parse_kinds(text)
    assert KINDS[0] == "adapter"


def test_what_is_no_artefact_is_no_artefact(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is no artefact"):
        detect_kind(tmp_path)
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(UnequalError, match="does not open"):
        detect_kind(tmp_path)
