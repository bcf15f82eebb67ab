"""The model card: ``README.md`` of a run, and of each repository it is pushed to, in the form the Hub reads.

The YAML head names only what the Hub can resolve (a base model or data set that is a Hub id; a local folder is not),
and a licence only where the base's terms are known (``terms.py``) and all data came under a permissive licence; a guess
would be a false statement about someone's rights. A repository of adapters, of merged weights and of GGUF files differ
in the head and in how to use them; what was trained, measured and proven is the same run's in all of them.

Whatever came from data, a model or a file name is escaped, so that no HTML, link, image, think tag or terminal code in
it works: neither in the Hub's page nor in a terminal that prints the file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from medcot.records import Run
from medcot.report import words
from medcot.report.card_facts import leave_told, list_checks, list_proofs, say_energy
from medcot.report.card_use import Artefact, list_uses, say_endpoint
from medcot.report.eval_views import build_pooled_topics, view_run
from medcot.report.evidence import make_visible
from medcot.report.findings import build_findings
from medcot.report.folder import Folder, read_folder
from medcot.report.lineage import build_lineage, public_name
from medcot.report.page import INTENDED_USE, make_environment
from medcot.report.terms import EMBEDDED_ID, Terms, choose_licence, find_terms

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_PROMPT_HERE = "\0prompt\0"
_EVAL_ROWS: list[tuple[str, str, Callable[[Any], str]]] = [
    ("Questions", "n", words.count),
    ("Accuracy", "accuracy", words.percent),
    ("95\u202f% interval", "ci95", words.interval),
    ("No readable final answer", "unparsed", words.count),
    ("Thinking never closed", "unfinished", words.count),
    ("Cut at the token limit", "cut", words.count),
    ("Mean thinking tokens", "mean_think_tokens", words.count),
    ("Mean answer tokens", "mean_answer_tokens", words.count),
]
_NOT_FOR = (
    "Not for patients or relatives who seek advice, for emergencies, for coding or billing, or for anything that"
    " reaches a patient without a qualified person who checks it.",
    "Not a source of medical facts: it was tuned to reason in a format, on the data below, and knows what its base"
    " knew.",
    "Not a medical device, and not assessed as one anywhere.",
)
# library_name, base_model_relation, tags. "merge" is the Hub's word for several models made one, which this is not.
_FAMILIES = {
    "adapter": ("peft", "adapter", ["lora"], "A LoRA adapter for"),
    "merged-16bit": ("transformers", "finetune", ["merged"], "Merged weights of"),
    "merged-4bit": ("transformers", "quantized", ["bitsandbytes", "4-bit"], "Merged 4-bit (NF4) weights of"),
    "gguf": ("gguf", "quantized", ["gguf", "llama-cpp", "ollama"], "GGUF files (llama.cpp, Ollama) of"),
}


def render_card(
    run: Run, kinds: Sequence[str] = ("adapter",), *, repo: str | None = None, files: Sequence[str] = ()
) -> str:
    """Return the model card of a run as Markdown with a YAML head; it writes nothing.

    Args:
        run: the folder that is read.
        kinds: what the card is of, as ``run.json`` names exports.
        repo: the repository it is for, ``owner/name``; the run's own folder where ``None``.
        files: names of the GGUF files.

    Raises:
        DataError: the folder has no readable ``run.json``.
    """
    folder = read_folder(run)
    # On one line: a fence of backticks in a name would end the block of code that it stands in.
    source = _one_line(public_name((folder.facts.get("model") or {}).get("source") or "an unnamed model"))
    rank = (folder.recipe.get("lora") or {}).get("r")
    artefact = Artefact(tuple(kinds), repo, source, rank if isinstance(rank, int) else 16, tuple(map(_one_line, files)))
    prompt = next((sample.prompt for sample in [*folder.after, *folder.before] if sample.prompt), "").rstrip("\n")
    prompt = make_visible(prompt)
    environment = make_environment(autoescape=False)
    environment.filters.update(md=escape_markdown, code=_as_code)
    card: str = environment.get_template("card.md.j2").render(
        **_describe(folder, artefact, run.folder.name),
        **_measure(folder),
        uses=list_uses(artefact),
        endpoint_words=say_endpoint(str((folder.recipe.get("prompt") or {}).get("style") or ""), artefact),
        prompt=prompt,
        prompt_here=_PROMPT_HERE,
        fence="`" * max(3, 1 + max(map(len, re.findall(r"`+", prompt)), default=0)),
    )
    # Blank lines left by absent parts are closed up before the prompt goes in: the prompt is kept to the letter.
    return (re.sub(r"\n{3,}", "\n\n", card).rstrip() + "\n").replace(_PROMPT_HERE, prompt)


def _describe(folder: Folder, artefact: Artefact, folder_name: str) -> dict[str, Any]:
    """Return what the card says of the artefact: name, terms, training, data and proofs."""
    source = (folder.facts.get("model") or {}).get("source")
    terms = find_terms(source)
    exports = folder.facts.get("exports")
    return {
        "front_matter": yaml.safe_dump(build_front_matter(folder, artefact), sort_keys=False, allow_unicode=True),
        "title": _title(folder, artefact, folder_name, terms),
        "duty": terms.duty if terms else None,
        "lead": _FAMILIES[artefact.family][3],
        "base_words": _as_code(artefact.base) + (f" ({EMBEDDED_ID} in 4-bit GGUF)" if source == "embedded" else ""),
        "intended_use": INTENDED_USE,
        "not_for": _NOT_FOR,
        "trained": _trained(folder),
        "data_verdict": words.judge_data(folder.doctor) if folder.doctor else None,
        "checks": list_checks(folder),
        "findings": leave_told(build_findings(folder.doctor)),
        "lineage": build_lineage(folder.sources),
        "proofs": list_proofs(
            exports if isinstance(exports, Mapping) else {}, artefact.kinds if artefact.repo else None
        ),
        "terms": terms,
        "licence_words": _licence_words(folder, terms),
    }


def _measure(folder: Folder) -> dict[str, Any]:
    """Return what the card says of accuracy before and after."""
    evaluation = folder.facts.get("eval") or {}
    sides = {name: evaluation[name] for name in ("before", "after") if evaluation.get(name)}
    rows = [row for row in _EVAL_ROWS if row[1] != "cut" or any(side.get("cut") is not None for side in sides.values())]
    return {
        "verdict": words.judge(folder.facts),
        "sides": sides,
        "eval_source": evaluation.get("source"),
        "eval_rows": [(text, [form(side.get(key)) for side in sides.values()]) for text, key, form in rows],
        "test_words": _test_words(evaluation) if len(sides) == 2 else "",
        "view": view_run(evaluation),
        "topics": build_pooled_topics(list(sides.items()))[1],
    }


def build_front_matter(folder: Folder, artefact: Artefact) -> dict[str, Any]:
    """Return the YAML head: what the Hub indexes, and nothing it could not resolve."""
    facts = folder.facts
    base = _hub_id((facts.get("model") or {}).get("source"))
    library, relation, tags, _ = _FAMILIES[artefact.family]
    names = [str(source.get("source") or "") for source in folder.sources] or [_train_source(facts)]
    datasets = dict.fromkeys(filter(None, (_hub_id(name.partition("[")[0]) for name in names)))
    head: dict[str, Any] = {
        "base_model": base,
        "base_model_relation": relation if base else None,
        "library_name": library,
        "pipeline_tag": "text-generation",
        "license": _licence(folder),
        "datasets": list(datasets),
        "tags": ["medcot", "medical", "reasoning", "chain-of-thought", *tags, "sft"],
    }
    return {key: value for key, value in head.items() if value}


def _title(folder: Folder, artefact: Artefact, folder_name: str, terms: Terms | None) -> str:
    """Return the model's name; one that must begin with a word begins with it."""
    name = artefact.repo.rpartition("/")[2] if artefact.repo else str(folder.recipe.get("name") or folder_name)
    duty = terms.duty if terms else None
    return name if duty is None or duty.allows(name) else f"{duty.prefix} {name}"


def escape_markdown(value: Any) -> str:
    """Return text that Markdown and HTML leave as it is, on one line: it may come from a file name or an error."""
    text = _one_line(value)
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*_~$\[\]|])", r"\\\1", text)
    # Bare addresses become links too, unless a letter of what makes them one is written as a reference.
    return re.sub(r"(?i)\bwww\.", "www&#46;", text.replace("://", "&#58;//").replace("@", "&#64;"))


def _one_line(value: Any) -> str:
    return " ".join(make_visible(str(value)).split())


def _as_code(value: Any) -> str:
    text = _one_line(value)
    tick = "`" * (1 + max(map(len, re.findall(r"`+", text)), default=0))
    return f"{tick}{text}{tick}" if len(tick) == 1 else f"{tick} {text} {tick}"


def _train_source(facts: Mapping[str, Any]) -> str:
    return str(((facts.get("data") or {}).get("train") or {}).get("source") or "")


def _hub_id(source: Any) -> str | None:
    if source == "embedded":
        return EMBEDDED_ID
    text = str(source or "")
    return text if _HUB_ID.fullmatch(text) and not Path(text).exists() and Path(text).suffix != ".gguf" else None


def _is_ours(facts: Mapping[str, Any]) -> bool:
    return (facts.get("model") or {}).get("source") == "embedded" and _train_source(facts).startswith("builtin:")


def _licence(folder: Folder) -> str | None:
    if _is_ours(folder.facts):
        return "apache-2.0"
    return choose_licence(
        find_terms((folder.facts.get("model") or {}).get("source")),
        [source.get("licence") or source.get("license") for source in folder.sources],
    )


def _licence_words(folder: Folder, terms: Terms | None) -> str:
    if _is_ours(folder.facts):
        return "Apache-2.0: the base weights are published under it, and the training problems were made by medcot."
    if _licence(folder) is not None:
        return "All training data came under permissive licences (see the table of sources), which ask to be named."
    stated = any(line.licence for line in build_lineage(folder.sources).lines)
    known = [
        *([] if terms else ["of the base model it knows no terms"]),
        "of the data it knows what the table of sources quotes" if stated else "of the data it knows no licence",
    ]
    return (
        "A tuned model inherits the terms of its base model and of its training data. medcot guesses at none:"
        f" {' and '.join(known)}. Read both, and set `license` in the head of this file, before publishing."
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
        ("LoRA", f"rank {lora['r']}, alpha {lora['alpha']}" if {"r", "alpha"} <= lora.keys() else None),
        ("Optimizer steps", _unless_missing(train.get("steps"), words.count)),
        ("Batch size", settings.get("batch_size")),
        ("Learning rate", _unless_missing(settings.get("learning_rate"), words.number)),
        ("Prompt style", (folder.recipe.get("prompt") or {}).get("style")),
        ("Base weights held in", (facts.get("model") or {}).get("precision")),
        ("Training time", _unless_missing(train.get("seconds"), words.seconds)),
        ("Machine", facts.get("machine") if isinstance(facts.get("machine"), str) else None),
        ("Energy", say_energy(facts)),
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
