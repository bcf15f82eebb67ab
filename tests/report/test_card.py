import ast
import re

import pytest
import yaml
from report_folder import make_sample

from medcot.report import render_card


def head(card):
    return yaml.safe_load(card.split("---\n")[1])


def code(card):
    return re.search(r"```python\n(.*?)\n```", card, re.S)[1]


def test_the_default_run_names_its_base_model_and_licence(folder):
    card = render_card(folder.run)
    assert head(card) == {
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
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


def test_a_run_with_nothing_in_it_still_has_a_card(folder):
    folder.facts = {}
    folder.write_facts()
    for path in (folder.run.samples / "before.jsonl", folder.run.samples / "after.jsonl", folder.run.recipe):
        path.unlink()
    card = render_card(folder.run)
    assert "No graded evaluation" in card
    assert "\n\n\n" not in card
