"""Templates for other programs put exactly the run's prompt around a question, token for token."""

from __future__ import annotations

import pytest
from go_template import render
from jinja2 import Environment
from jinja2.sandbox import ImmutableSandboxedEnvironment

from medcot.export.commands import build_commands
from medcot.export.ollama import build_modelfile, read_template
from medcot.export.turns import Turns, build_go, build_jinja, build_turns
from medcot.prompt import Style, encode_prompt
from real_tokenizers import load_r1, load_smol

QUESTION = 'A 37 kg woman has "4 mL/h"  of\n5 % glucose; 250 mg?\n\n\tWhat {{ next }}, Δ?'
TOKENIZERS = {"smol": load_smol, "r1": load_r1}


def go(turns: Turns, *messages: tuple[str, str, str], think: bool | None = None) -> str:
    data = {
        "Messages": [{"Role": role, "Content": text, "Thinking": thinking} for role, text, thinking in messages],
        "IsThinkSet": think is not None,
        "Think": bool(think),
    }
    return render(build_go(turns), data)


def jinja(turns: Turns, *messages: tuple[str, str], **settings: object) -> str:
    environment: Environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)  # as transformers'
    asked = [{"role": role, "content": text} for role, text in messages]
    return environment.from_string(build_jinja(turns)).render(messages=asked, add_generation_prompt=True, **settings)


@pytest.mark.parametrize("style", list(Style))
@pytest.mark.parametrize("name", TOKENIZERS)
def test_one_question_is_the_runs_prompt_token_for_token(name: str, style: Style) -> None:
    tokenizer = TOKENIZERS[name]()
    turns, wanted = build_turns(style, tokenizer), encode_prompt(QUESTION, style, tokenizer)
    text = go(turns, ("user", QUESTION, ""))
    assert text == turns.put(QUESTION)
    assert tokenizer(text, add_special_tokens=turns.added)["input_ids"] == wanted  # as llama.cpp does it
    assert go(turns, ("user", QUESTION, ""), think=True) == text
    whole = jinja(turns, ("user", QUESTION))
    assert tokenizer(whole, add_special_tokens=False)["input_ids"] == wanted  # as vLLM does it
    assert "<think>" in turns.opening and text.rstrip().endswith("<think>")


def test_r1_gets_its_bos_once() -> None:
    turns = build_turns(Style.CHAT, load_r1())
    assert turns.added and turns.bos == "<｜begin▁of▁sentence｜>" and not turns.head.startswith(turns.bos)
    assert jinja(turns, ("user", "x")).count(turns.bos) == 1 and turns.bos not in go(turns, ("user", "x", ""))


def test_earlier_turns_keep_answers_and_lose_thinking() -> None:
    turns = build_turns(Style.CHAT, load_r1())
    said = [("system", "Be brief.", ""), ("user", "One?", ""), ("assistant", "1", "I count."), ("user", "Two?", "")]
    wanted = "Be brief.\n\n<｜User｜>One?<｜Assistant｜>1<｜end▁of▁sentence｜><｜User｜>Two?<｜Assistant｜><think>\n"
    assert go(turns, *said) == wanted
    written = [(role, f"<think>{think}</think>\n\n{text}" if think else text) for role, text, think in said]
    assert jinja(turns, *written) == turns.bos + wanted


def test_thinking_can_be_left_out_and_gone_on_with() -> None:
    turns = build_turns(Style.SHORT, load_smol())
    assert go(turns, ("user", "x", ""), think=False) == "x\n<think></think>\n\n"
    assert jinja(turns, ("user", "x"), enable_thinking=False) == "x\n<think></think>\n\n"
    assert go(turns, ("user", "x", ""), ("assistant", "", "I")) == "x\n<think>I</think>"


def test_a_modelfile_says_sampling_stops_and_what_it_is_not_for(tmp_path: pytest.TempPathFactory) -> None:
    turns = build_turns(Style.TUTORIAL, load_smol())
    text = build_modelfile(
        "x.gguf", turns, temperature=0.6, top_p=0.95, context=4096, stops=("<|im_end|>", "<|im_end|>"), title="T"
    )
    path = tmp_path / "Modelfile"  # type: ignore[operator]
    path.write_text(text)
    assert read_template(path) == build_go(turns)
    assert "# For research and education; not for diagnosis or treatment." in text and "FROM ./x.gguf" in text
    assert text.count('PARAMETER stop "<|im_end|>"') == 1
    for line in ("temperature 0.6", "top_p 0.95", "top_k 0", "repeat_penalty 1", "num_ctx 4096"):
        assert f"PARAMETER {line}\n" in text


def test_commands_are_whole() -> None:
    told = {"base": "me/base", "rank": 12, "context": 4096, "template": "./chat.jinja"}
    adapter = build_commands("adapter", "./my adapter", **told)  # type: ignore[arg-type]
    assert "vllm serve me/base --enable-lora --lora-modules 'tuned=./my adapter' --max-lora-rank 16" in adapter["vLLM"]
    assert "--reasoning-parser deepseek_r1" in adapter["vLLM"] and "--lora-paths" in adapter["SGLang"]
    assert "./merged --served-model-name tuned" in build_commands("merged-16bit", "./merged", **told)["vLLM"]  # type: ignore[arg-type]
    assert "-m ./gguf/x.gguf" in build_commands("gguf:q8_0", "./gguf", file="x.gguf", **told)["llama.cpp"]  # type: ignore[arg-type]
    assert "ollama create tuned" in build_commands("ollama", "./ollama", **told)["Ollama"]  # type: ignore[arg-type]
