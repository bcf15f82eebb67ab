"""Out of the door and back: trained, exported, pushed, pulled, loaded plainly, served; everywhere the same answer.

In float32, greedily, token for token: the tuned model in medcot, the adapter in PEFT, the merged weights in
transformers, both as they came back from the Hub, and the server asked by OpenAI's client.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import snapshot_download
from peft import PeftModel
from running import running
from transformers import AutoModelForCausalLM, AutoTokenizer

from loopback_hub import LoopbackHub
from medcot.exporting import export, verify
from medcot.model import load
from medcot.prompt import Style, encode_prompt, split_completion
from medcot.publishing import push
from medcot.records import Finish, Run
from medcot.serving import Wish, choose
from tiny_runs import make_rows
from tiny_tuned import ROOM, make_base, make_run

NUM_TOKENS = 24
QUESTION = make_rows()[3]["Question"]


def answer(model: Any, tokenizer: Any) -> tuple[str, str]:
    """What plain transformers writes, as thinking and answer."""
    prompt = encode_prompt(QUESTION, Style.SHORT, tokenizer)
    with torch.no_grad():
        ids = model.generate(
            torch.tensor([prompt]), max_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()  # fmt: skip
    found = split_completion(ids, tokenizer, num_prompt_tokens=len(prompt), finish=Finish.EOS)
    return found.think, found.answer


@pytest.mark.parametrize("family", ["llama", "qwen2", pytest.param("embedded", marks=pytest.mark.slow)])
def test_the_same_answer_everywhere(
    family: str, tiny_folder: Path, hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 34)
    if family == "embedded":
        run = make_run(tmp_path, Path(family), "train.learning_rate=0.002")
        plain = load(family, precision="fp32", device="cpu").model
    else:
        base = make_base(tmp_path / "base", tiny_folder, family)
        run = make_run(tmp_path, base)
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    made = export(run, ["adapter", "merged-32bit", "merged-16bit", "merged-4bit", "gguf:q8_0", "ollama"], **ROOM)
    assert all(one["proof"]["passed"] for one in made.values())
    repos = {"adapter": "me/tuned", "merged-32bit": "me/tuned-merged", "gguf:q8_0": "me/tuned-gguf"}
    for kind, repo in repos.items():
        assert push(Run(run), repo, [kind]).private
    pulled = {kind: Path(snapshot_download(repo, cache_dir=tmp_path / "pulled")) for kind, repo in repos.items()}
    for kind, folder in pulled.items():
        path = next(folder.glob("*.gguf")) if kind.startswith("gguf") else folder
        assert verify(path, run, **ROOM).passed, kind

    tokenizer = AutoTokenizer.from_pretrained(pulled["adapter"])
    answers = {
        "base": answer(plain, tokenizer),
        "adapter": answer(PeftModel.from_pretrained(plain, pulled["adapter"]).eval(), tokenizer),
        "merged": answer(AutoModelForCausalLM.from_pretrained(pulled["merged-32bit"], dtype="auto"), tokenizer),
    }
    for target in (run, pulled["merged-32bit"]):
        who = choose(str(target))
        wish = Wish(who if target == run else choose_short(target), slots=2, context_tokens=512, temperature=0)
        with running(wish) as server:
            for model in ["tuned", "base"] if target == run else ["base"]:
                message = server.client().chat.completions.create(
                    model=model, messages=[{"role": "user", "content": QUESTION}], max_tokens=NUM_TOKENS
                ).choices[0].message  # fmt: skip
                answers[f"served {target.name} {model}"] = message.reasoning_content, message.content
    wanted = answers["adapter"]
    assert answers.pop("base") == answers.pop(f"served {run.name} base") != wanted
    assert {name: text for name, text in answers.items() if text != wanted} == {}


def choose_short(target: Path) -> Any:
    """A model without a run, asked in the style that its run was trained in, and held in full."""
    return replace(choose(str(target)), style=Style.SHORT, precision="fp32")
