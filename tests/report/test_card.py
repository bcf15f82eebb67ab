import ast
import json
import re

import pytest
import yaml
from data_reports import MAIL, make_report
from report_folder import make_sample
from test_page import evaluate

from medcot.report import render_card


def head(card):
    return yaml.safe_load(card.split("---\n")[1])


def code(card):
    return re.search(r"```python\n(.*?)\n```", card, re.S)[1]


def test_the_default_run_names_its_base_model_and_licence(folder):
    card = render_card(folder.run)
    assert head(card) == {
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "tags": ["medcot", "medical", "reasoning", "chain-of-thought", "lora", "sft"],
    }
    assert "| Accuracy | 25.0\u202f% | 50.0\u202f% |" in card
    assert "- Tokens that carry loss: 214,880" in card
    assert "- LoRA: rank 16, alpha 32" in card
    assert "Not for diagnosis" in card
    assert "GgufConfig(dequantize=True)" in code(card)
    ast.parse(code(card))


def test_hub_ids_are_named_and_no_licence_is_guessed(folder):
    folder.facts["model"]["source"] = "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"
    folder.facts["data"]["train"]["source"] = "FreedomIntelligence/medical-o1-reasoning-SFT[:500]"
    folder.write_facts()
    card = render_card(folder.run)
    assert head(card)["base_model"] == "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"
    assert head(card)["datasets"] == ["FreedomIntelligence/medical-o1-reasoning-SFT"]
    assert "license" not in head(card)
    assert "set `license`" in card
    assert "from_pretrained('deepseek-ai/DeepSeek-R1-Distill-Llama-8B'" in code(card)


@pytest.mark.parametrize("name", ["my model", "it's", 'quote"and\\slash', "weights.gguf"])
def test_local_weights_are_no_hub_id_and_their_path_stays_private(folder, name):
    folder.facts["model"]["source"] = f"/home/someone/secret/{name}"
    folder.facts["data"]["train"]["source"] = "/home/someone/secret/rows.jsonl"
    folder.write_facts()
    card = render_card(folder.run)
    assert "base_model" not in head(card) and "datasets" not in head(card)
    assert "/home/someone" not in card
    ast.parse(code(card))


def test_text_cannot_break_out_of_the_card(folder):
    folder.facts["status"] = "</details><script>x</script> | **bold**"
    folder.facts["eval"].pop("after")
    folder.facts["eval"]["before"]["topics"] = {"a|b <b>": {"n": 4, "correct": 1}}
    folder.write_facts()
    folder.write("samples/after.jsonl", [make_sample("ask", "a0", prompt="```\nevil\n````\n\n\n\n# Title")])
    card = render_card(folder.run)
    assert "<script>" not in card and "<b>" not in card
    assert "A\\|b &lt;b&gt;" in card
    assert "`````text\n```\nevil\n````\n\n\n\n# Title\n`````" in card  # a longer fence, and every blank line kept


def test_lineage_and_the_doctors_verdict_are_on_the_card(folder):
    folder.facts["model"]["source"] = "some/model"
    folder.write_facts()
    report = make_report()
    report["sources"][0] |= {"licence": "cc|by", "revision": "main"}
    report["findings"][0]["says"] += f" First: '<b>{MAIL}</b> \x1b [x](y)'"
    (folder.run.data / "report.json").write_text(json.dumps(report))
    card = render_card(folder.run)
    assert "**Red: this data stops a run.** 4 findings stop a run" in card
    assert "- red: **No reasoning**. 1 of 6 rows" in card and "- red, accepted: **Forged tags**." in card
    assert "- info: **Lengths**. 40 rows counted: 1,375 tokens on average" in card
    assert "| rows.jsonl (split train) | main | cc\\|by | 9 | 1 |" in card
    assert f"- sha256 of rows.jsonl: `{'ab' * 32}`\n" in card
    assert MAIL not in card and "<b>" not in card and "\x1b" not in card and "[x](y)" not in card
    assert "/srv/someone" not in card
    assert "of the data it knows what the table of sources quotes" in card
    assert "\n\n\n" not in card.partition("### The prompt")[0]


def test_a_verdict_kept_in_run_json_alone_is_enough(folder):
    report = make_report()
    folder.facts["data"]["doctor"] = {"verdict": "clean", "findings": report["findings"][-1:]}
    folder.facts["data"]["train"]["sources"] = report["sources"]
    folder.write_facts()
    card = render_card(folder.run)
    assert "**Clean: no check found fault.**" in card
    assert "| rows.jsonl (split train) | – |" in card and "| not stated |" in card


def test_each_task_stands_on_the_card_with_its_verdict(folder):
    evaluate(folder)
    card = render_card(folder.run)
    head = "| Task | n | Before | After | Change, points | Verdict |\n|---|---:|---:|---:|---:|---|\n"
    assert f"{head}| medqa | 30 |" in card
    assert "**Better on 2 of 2 tasks.**" in card and "exact McNemar, two-sided, p < 0.0001" in card
    evaluate(folder, names=["medqa"])
    assert "| Task |" not in render_card(folder.run)


def test_a_run_with_nothing_in_it_still_has_a_card(folder):
    folder.facts = {}
    folder.write_facts()
    for path in (folder.run.samples / "before.jsonl", folder.run.samples / "after.jsonl", folder.run.recipe):
        path.unlink()
    card = render_card(folder.run)
    assert "No graded evaluation" in card
    assert "- Benchmark questions in the data: not looked for\n" in card and "- Energy: not measured" in card
    assert "\n\n\n" not in card
