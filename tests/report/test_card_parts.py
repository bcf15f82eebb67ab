"""What the card says beyond scores: terms, proofs, energy, use; and that nothing from outside works in it."""

import ast
import json
import re
import shlex

import pytest
import yaml
from markdown_it import MarkdownIt
from report_folder import make_sample

from medcot.report import render_card
from medcot.report.card import escape_markdown
from medcot.report.card_facts import say_energy
from medcot.report.card_use import Artefact, list_uses
from medcot.report.terms import TERMS, choose_licence, find_terms, write_notice

NASTY = [
    "<script>alert(1)</script>",
    '<img src=x onerror="alert(1)">',
    "[click](javascript:alert(1))",
    "![x](https://evil.example/x.png)",
    "https://evil.example/a www.evil.example someone@evil.example",
    "<https://evil.example>",
    "\x1b[31mred\x1b[0m\x1b]0;title\x07",
    "</details><h1>out</h1>",
    "a | b | c",
    "---\nlicense: mit\n---\n# Title",
    "<think>deep</think>",
    "```\n<b>fenced</b>\n```",
    "\u202eevil",
    "$$x$$ `code` **bold** ~~gone~~",
    "{{ 7 * 7 }} {% raw %}",
]
ALLOWED_HTML = {"<details><summary>By topic</summary>", "</details>"}


def head(card):
    return yaml.safe_load(card.split("---\n")[1])


def render(card):
    """The body as the Hub's page would see it: its tokens, flat."""
    tokens = MarkdownIt("commonmark").enable("table").enable("strikethrough").parse(card.split("---\n", 2)[2])
    return [inner for token in tokens for inner in (token, *(token.children or ()))]


def test_text_from_outside_is_inert_wherever_it_stands(folder):
    nasty = " ".join(NASTY)
    folder.facts["status"] = nasty
    folder.facts["machine"] = nasty
    folder.facts["model"] = {"source": nasty, "precision": nasty}
    folder.facts["eval"]["source"] = nasty
    folder.facts["eval"]["before"]["topics"] = {text: {"n": 4, "correct": 1} for text in NASTY}
    folder.facts["data"]["train"] |= {"source": nasty, "quarantined": 2}
    folder.facts["data"]["train"]["sources"] = [{"source": t, "licence": t, "revision": t, "rows": 1} for t in NASTY]
    finding = {"id": "contamination_confirmed", "severity": "red", "count": 1, "rows": [], "says": nasty, "fix": ""}
    folder.facts["data"]["doctor"] = {
        "verdict": "red",
        "findings": [finding, {**finding, "id": "over_length"}, {**finding, "id": nasty}],
    }
    proof = {"prompts": 1, "reader": nasty, "threshold": {nasty: nasty}, "passed": True}
    folder.facts["exports"] = {nasty: {"base": nasty, "proof": proof}}
    folder.write_facts()
    folder.run.recipe.write_text(yaml.safe_dump({"name": nasty, "prompt": {"style": nasty}}), encoding="utf-8")
    folder.write("data/quarantine.jsonl", [{"row_number": 1, "reason": nasty, "row": {}}])
    folder.write("samples/after.jsonl", [make_sample("ask", "a0", prompt=nasty)])
    card = render_card(folder.run)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", card)
    tokens = render(card)
    html = {token.content.strip() for token in tokens if token.type in ("html_block", "html_inline")}
    assert html <= ALLOWED_HTML, html
    links = {
        token.attrs.get("href") or token.attrs.get("src") for token in tokens if token.type in ("link_open", "image")
    }
    assert not links
    assert not {token.type for token in tokens} & {"hr", "s_open"}
    outside_code = "\n".join(t.content for t in tokens if t.type == "text")
    assert "{{ 7" in outside_code, "a template's words are words"
    source = "\n".join(re.sub(r"(?ms)^(`{3,}).*?^\1$", "", card).splitlines())
    source = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", source)
    assert "://evil" not in source and "www.evil" not in source and "@evil" not in source
    titles = [tokens[n + 1].content for n, t in enumerate(tokens) if t.type == "heading_open" and t.tag == "h1"]
    assert len(titles) == 1
    assert set(head(card)) <= {"base_model", "base_model_relation", "library_name", "pipeline_tag", "tags"}
    for block in re.findall(r"```python\n(.*?)\n```", card, re.S):
        ast.parse(block)


@pytest.mark.parametrize("text", NASTY)
def test_one_value_in_a_sentence_stays_words(text):
    tokens = MarkdownIt("commonmark").enable("table").parseInline(f"a {escape_markdown(text)} z")[0].children
    assert {token.type for token in tokens} <= {"text", "text_special"}
    assert escape_markdown(text).isprintable()


def test_a_table_is_still_a_table_with_bars_and_breaks_in_its_cells(folder):
    folder.facts["data"]["train"]["sources"] = [{"source": "a|b\nc", "licence": "x|y", "rows": 3}]
    folder.write_facts()
    tokens = render(render_card(folder.run))
    heads = [t.content for t in tokens if t.type == "inline" and "a|b c" in t.content]
    assert heads == ["a\\|b c"] or heads == ["a|b c"]


@pytest.mark.parametrize(
    ("source", "licence", "prefix"),
    [
        ("deepseek-ai/DeepSeek-R1-Distill-Llama-8B", "llama3.1", "Llama"),
        ("unsloth/DeepSeek-R1-Distill-Llama-8B-unsloth-bnb-4bit", "llama3.1", "Llama"),
        ("/data/models/DeepSeek-R1-Distill-Llama-8B/", "llama3.1", "Llama"),
        ("C:\\models\\DeepSeek-R1-Distill-Llama-8B-Q4_K_M.gguf", "llama3.1", "Llama"),
        ("deepseek-ai/DeepSeek-R1-Distill-Llama-70B", "llama3.3", "Llama"),
        ("meta-llama/Llama-3.3-70B-Instruct", "llama3.3", "Llama"),
        ("meta-llama/Meta-Llama-3.1-8B", "llama3.1", "Llama"),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", "mit", None),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-32B", "mit", None),
        ("Qwen/Qwen3-8B", "apache-2.0", None),
        ("Qwen/Qwen2.5-7B-Instruct", "apache-2.0", None),
        ("embedded", "apache-2.0", None),
    ],
)
def test_terms_of_bases_are_known_by_name(source, licence, prefix):
    terms = find_terms(source)
    assert terms.licence == licence
    assert (terms.duty.prefix if terms.duty else None) == prefix
    assert write_notice(terms).strip()


@pytest.mark.parametrize(
    "source", ["Qwen/Qwen2.5-3B", "Qwen/Qwen2.5-72B-Instruct", "someone/Qwen3-8B", "/home/x/Qwen3-8B", "x/y", "", None]
)
def test_no_permission_is_guessed(source):
    assert find_terms(source) is None


def test_every_llama_asks_for_notice_name_and_display():
    for pattern, terms in TERMS.items():
        assert ("llama" in pattern) == (terms.duty is not None)
        if terms.duty:
            assert terms.licence.startswith("llama3.") and terms.duty.display == "Built with Llama"
            assert any("Meta Platforms" in notice for notice in terms.notices)
    duty = find_terms("meta-llama/Llama-3.1-8B").duty
    assert duty.allows("Llama-x") and duty.allows("llama-x") and not duty.allows("my-Llama")
    assert duty.is_in("x LLAMA 3.1 COMMUNITY\n LICENSE AGREEMENT") and not duty.is_in(
        "Llama 3.3 Community License Agreement"
    )


def test_a_licence_is_stated_where_base_and_all_data_allow_it(folder):
    terms = find_terms("deepseek-ai/DeepSeek-R1-Distill-Llama-8B")
    assert choose_licence(terms, ["apache-2.0", "mit, cc0-1.0"]) == "llama3.1"
    assert choose_licence(terms, ["apache-2.0", "cc-by-nc-4.0"]) is None
    assert choose_licence(terms, ["apache-2.0", None]) is None and choose_licence(terms, []) is None
    assert choose_licence(None, ["mit"]) is None
    folder.facts["model"]["source"] = "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"
    folder.facts["data"]["train"]["sources"] = [
        {"source": "FreedomIntelligence/medical-o1-reasoning-SFT[:500]", "licence": "apache-2.0", "rows": 5}
    ]
    folder.write_facts()
    card = render_card(folder.run)
    assert head(card)["license"] == "llama3.1" and "All training data came under permissive licences" in card
    assert head(card)["datasets"] == ["FreedomIntelligence/medical-o1-reasoning-SFT"]


def test_a_llama_shows_what_it_is_built_with_and_is_called_so(folder):
    folder.facts["model"]["source"] = "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"
    folder.write_facts()
    card = render_card(folder.run)
    assert "# Llama default\n\n**Built with Llama**" in card
    assert "derives from Llama-3.1-8B" in card and "https://www.llama.com/llama3_1/license/" in card
    assert "# Llama-mine\n" in render_card(folder.run, repo="me/Llama-mine")


def test_proofs_of_this_repository_stand_on_its_card(folder):
    proof = {
        "prompts": 50, "positions": 4200, "kl_mean": 0.00042, "kl_max": 0.031, "top1": 0.9931, "answers_changed": 2,
        "answers": 50, "threshold": {"kl_mean": 0.02, "top1": 0.97}, "reader": "llama.cpp 0.3.36", "passed": True,
    }  # fmt: skip
    folder.facts["exports"] = {
        "gguf:q8_0": {"base": "merged into x in bf16", "proof": proof},
        "adapter": {"base": "none", "proof": {**proof, "passed": False}},
        "merged-16bit": {"base": "y"},
    }
    folder.write_facts()
    card = render_card(folder.run, ("gguf:q8_0",), repo="me/x", files=("x.gguf",))
    line = next(line for line in card.splitlines() if line.startswith("| gguf:q8"))
    for part in ("llama.cpp 0.3.36", "50 (4,200)", "0.00042 (0.031)", "99.31", "2 of 50", "mean KL ≤ 0.02", "passed"):
        assert part in line, part
    assert "top-1 ≥ 97.00" in line and "| adapter |" not in card and "merged into x in bf16" in card
    whole = render_card(folder.run)
    assert "FAILED" in whole and "not proven" in whole


def test_energy_is_an_estimate_only_where_the_gpu_is_known():
    facts = {"machine": "NVIDIA H200 (140 GiB); AMD, 16 cores", "train": {"seconds": 1800.0, "processes": 2}}
    said = say_energy(facts)
    assert said.startswith("not measured.") and "700 Wh" in said and "2 × " in said and "NVIDIA's data sheet" in said
    assert say_energy({"machine": "AMD EPYC, 2 cores; Linux", "train": {"seconds": 60.0}}) == "not measured"
    assert say_energy({"machine": {"cores": 2}, "train": {}}) == "not measured"


@pytest.mark.parametrize("base", ["some/base", "embedded", "weights.gguf"])
@pytest.mark.parametrize("kinds", [("adapter",), ("merged-16bit",), ("merged-4bit",), ("gguf:q8_0", "gguf:q4_k_m")])
@pytest.mark.parametrize("repo", [None, "me/model"])
def test_every_artefact_says_how_to_use_it_in_five_tools(base, kinds, repo):
    uses = list_uses(Artefact(kinds, repo, base, 16, ("it's.gguf",)))
    tools = " ".join(use.tool for use in uses)
    for tool in ("transformers", "vLLM", "SGLang", "llama.cpp", "Ollama"):
        assert tool in tools
    for use in uses:
        if use.language == "python":
            ast.parse(use.code)
        else:
            for line in use.code.replace("\\\n", " ").splitlines():
                assert shlex.split(line)
    assert all("owner/name" not in use.code for use in uses) or repo is None
    assert repo is None or any(repo in use.code for use in uses)


def test_each_kind_has_its_own_head(folder):
    expected = {
        "adapter": ("peft", "adapter", "lora"),
        "merged-16bit": ("transformers", "finetune", "merged"),
        "merged-4bit": ("transformers", "quantized", "4-bit"),
        "gguf:q8_0": ("gguf", "quantized", "gguf"),
    }
    for kind, (library, relation, tag) in expected.items():
        found = head(render_card(folder.run, (kind,), repo="me/x"))
        assert (found["library_name"], found["base_model_relation"]) == (library, relation) and tag in found["tags"]


def test_the_rank_that_vllm_takes_is_a_power_of_two():
    (code,) = [u.code for u in list_uses(Artefact(("adapter",), "me/x", "some/base", 24)) if u.tool == "vLLM"]
    assert "--max-lora-rank 32" in code


def test_truncation_and_leaks_are_told_once(folder):
    says = {"contamination_confirmed": "3 of 40 rows ask a benchmark's questions.", "over_length": "2 rows are over."}
    findings = [
        {"id": name, "severity": "yellow", "count": 1, "rows": [], "says": text, "fix": ""}
        for name, text in says.items()
    ]
    (folder.run.data / "report.json").write_text(json.dumps({"verdict": "yellow", "findings": findings}))
    card = render_card(folder.run)
    for text in says.values():
        assert card.count(text) == 1
    assert "- Rows set aside: 2: empty 'Response' (2)" in card
