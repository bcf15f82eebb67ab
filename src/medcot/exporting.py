"""The job of ``medcot export`` and ``medcot verify``: a run's artefacts made, proven, put in place and written down.

A kind goes through the same five steps whatever it is: room on the disk (looked at for all kinds before the first is
begun), written into a scratch folder, read back and compared with the tuned model (``export/equality.py``), moved to
its place, recorded in ``run.json``. An artefact that fails its proof is moved to ``NAME.failed``, where it can be
looked at and nobody takes it for good, and what stood in its place stays. The other kinds are still made; the exit code
is 1.

The tuned model answers once, for all kinds, before anything is written, and is then let go of: one model is in memory
at a time. The run's adapter must be the one that was measured, by the checksum that ``medcot run`` wrote beside its
scores.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medcot import folder as folders
from medcot.answering import Choice, choose_run
from medcot.asking import hash_adapter
from medcot.errors import DataError, OutputError, UnequalError
from medcot.recipe import load_recipe
from medcot.records import Run
from medcot.train.progress import RunConsole

if TYPE_CHECKING:
    from rich.console import Console

    from medcot.export.equality import Proof
    from medcot.export.making import Tuned
    from medcot.export.turns import Turns
    from medcot.model import LoadedModel

NUM_PROMPTS, NUM_TOKENS = 16, 64
FEW_POSITIONS = 100  # of which three that differ by chance are more than 16 bit may
FAILED = ".failed"
SERVE_PAGE, SERVE_TEMPLATE = "serve.md", "chat_template.jinja"
_SEED = 3407
_WORDS_ONLY = ".md"  # cards are written anew at every push


def export(
    folder: Path,
    kinds: Sequence[str],
    *,
    out: Path | None = None,
    original: str | None = None,
    num_prompts: int = NUM_PROMPTS,
    num_tokens: int = NUM_TOKENS,
    console: Console | None = None,
) -> dict[str, Any]:
    """Make artefacts of a finished run, prove each, and record them in its ``run.json`` and card.

    Args:
        folder: the run folder.
        kinds: as ``export.kinds.parse_kinds`` returns them.
        out: where artefacts go, each in a folder of its own; the run folder when ``None``.
        original: a 16-bit base to merge into, for a run whose base exists in 4 bit only.
        num_prompts: questions that the proof asks.
        num_tokens: of each answer that is compared.
        console: where to show progress.

    Returns:
        The ``exports`` part of run.json, of these kinds.

    Raises:
        UnequalError: at least one artefact is not the tuned model; the others are in place.
        OutputError: the disk has no room, or the run is in use.
        ModelError, MissingExtraError: a kind that cannot be made of this model, or here.
    """
    screen = RunConsole(console)
    run = Run(folder.resolve())
    choice = choose_run(run.folder)
    place = run.folder if out is None else out.absolute()
    made: dict[str, Any] = {}
    failed: list[UnequalError] = []
    with folders.held(run):
        _check_beforehand(run, kinds, place)
        tuned = open_tuned(run, choice, original, num_prompts, num_tokens, screen)
        for kind in kinds:
            try:
                with screen.stage(kind) as line:
                    made[kind] = _export_one(tuned, kind, run, place)
                    line.detail = _describe(made[kind])
            except UnequalError as error:
                screen.warn(error.value)
                failed.append(error)
                continue
            screen.note(made[kind]["base"])
            _record(run, kind, made[kind])
        if made:
            _write_serving(tuned, run, place)
            _draw_card(run)
            screen.note(f"how to serve them: {place / SERVE_PAGE}")
    if failed:
        raise failed[0] if len(failed) == 1 else _join(failed)
    return made


def verify(
    path: Path,
    folder: Path,
    *,
    num_prompts: int = NUM_PROMPTS,
    num_tokens: int = NUM_TOKENS,
    console: Console | None = None,
) -> Proof:
    """Prove again that an artefact, wherever it is, is the tuned model of a run.

    Its files are also compared with the checksums in the run's ``run.json``, where that knows an export of this kind.

    Raises:
        UnequalError: it is not, or its files are not those that were exported.
        ModelError: there is no artefact at the path.
    """
    from medcot.export.kinds import detect_kind
    from medcot.export.making import prove

    screen = RunConsole(console)
    run = Run(folder.resolve())
    choice = choose_run(run.folder)
    kind = detect_kind(path)
    files, name = (path, None) if path.is_dir() else (path.parent, path.name)
    _check_adapter(run)
    tuned = open_tuned(run, choice, None, num_prompts, num_tokens, screen)
    with screen.stage(f"{kind}") as line:
        known, wrong = _compare_files(_read_facts(run), kind, files, name)
        proof = prove(tuned, kind, files, name)
        line.detail = f"{_figures(proof)}, {known}"
        if wrong or not proof.passed:
            raise _unequal(f"'{path}'", [*wrong, *proof.failures], proof, "Export it again, and copy or pull it whole")
    return proof


# Before ---------------------------------------------------------------------------------------------------------------


def _check_beforehand(run: Run, kinds: Sequence[str], place: Path) -> None:
    """Refuse what cannot work before the tuned model is asked anything: room, programs, the wrong adapter."""
    from medcot.export import llama_cpp
    from medcot.export.kinds import MADE_BY_LLAMA_CPP, estimate_bytes, folder_of, quant_of
    from medcot.export.places import check_free_space

    _check_adapter(run)
    for kind in kinds:
        if kind.startswith(("gguf", "ollama")) and quant_of(kind) in MADE_BY_LLAMA_CPP:
            llama_cpp.check_can_quantise(quant_of(kind))
        target = folder_of(kind, place)
        meets = "config.json" if kind == "adapter" else "adapter_config.json"
        if (target / meets).exists():
            raise OutputError(
                f"'{target}' holds {'a model' if kind == 'adapter' else 'an adapter'}",
                "An adapter beside merged weights is applied to them a second time by whoever loads the folder",
                "Move it away, or name another folder with --out",
            )
    own = sum(path.stat().st_size for path in run.adapter.iterdir()) if place != run.folder else 0
    params = _read_facts(run)["model"]["params"]
    check_free_space(place, sum(estimate_bytes(kind, params, own) for kind in kinds))


def _check_adapter(run: Run) -> None:
    """Refuse an adapter that is not the one whose answers the run has scores of."""
    measured = (_read_facts(run).get("eval") or {}).get("adapter_sha256")
    if measured is not None and measured != hash_adapter(run.adapter):
        raise UnequalError(
            f"the adapter in '{run.adapter}' is not the one that was measured",
            "Its checksum stands in run.json beside the scores of its answers",
            "Bring the run's own adapter back, or train again",
        )


def open_tuned(
    run: Run, choice: Choice, original: str | None, num_prompts: int, num_tokens: int, screen: RunConsole
) -> Tuned:
    """Load a run's model as training held it, let it answer, and keep all of it but its weights.

    Args:
        run: the run.
        choice: its model, from ``choose_run``.
        original: a 16-bit base to merge into instead of the run's.
        num_prompts: questions to answer.
        num_tokens: of each answer at most.
        screen: shows that it is under way.
    """
    import torch

    from medcot.asking import choose_sampling
    from medcot.export import equality
    from medcot.export.making import Tuned, let_go
    from medcot.export.merged import Base
    from medcot.export.turns import build_turns
    from medcot.model import load, load_adapter

    recipe = load_recipe(run.recipe)
    with screen.stage("tuned model answers") as line:
        # FP8 is how the engine computes with 16-bit weights; plain libraries hold those.
        precision = "auto" if choice.precision == "fp8" else choice.precision
        allowed: dict[str, Any] = {"allow_pickle": choice.allow_pickle, "trust_remote_code": choice.trust_remote_code}
        held = load(choice.source, precision=precision, revision=choice.revision, max_seq_length=1, **allowed)
        base = dataclasses.replace(Base.of(held, **allowed), precision=choice.precision)
        read = base.find_weights()
        turns = build_turns(choice.style, held.tokenizer)
        prompts, texts = _choose_prompts(run, choice, held, turns, num_prompts, num_tokens)
        sampling, stops = choose_sampling(held.model, recipe.ask), equality.find_stops(held.model, held.tokenizer)
        reference = equality.build_reference(
            load_adapter(held, run.adapter), held, prompts, texts, adds_bos=turns.added, num_tokens=num_tokens
        )
        line.detail = f"{len(prompts)} questions, {sum(map(len, reference.log_probs)):,} tokens, greedily"
    with torch.device("meta"):
        shell = type(held.model)(held.model.config)
    held = dataclasses.replace(held, model=shell)
    let_go()
    return Tuned(
        name=_name_files(run, recipe.name),
        title=f"{recipe.model.source}, tuned with medcot ({recipe.name})",
        adapter=run.adapter,
        base=dataclasses.replace(base, original=original),
        base_files=read.folder / read.gguf if read.gguf is not None else read.folder,
        base_name=choice.source,
        held=held,
        turns=turns,
        stops=stops,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        max_tokens=recipe.model.max_seq_length,
        reference=reference,
    )


def _choose_prompts(
    run: Run, choice: Choice, held: LoadedModel, turns: Turns, wanted: int, num_tokens: int
) -> tuple[list[list[int]], list[str]]:
    """Return prompts, as tokens and as text, of questions spread over all that the run asked.

    Clinical problems fill up where it asked fewer than wanted.
    """
    from medcot import clinic
    from medcot.prompt import encode_prompt

    path = run.samples / "before.jsonl"
    lines = folders.read_lines(path) if path.is_file() else []
    asked = list(dict.fromkeys(str(line["question"]) for line in lines))
    step = max(1.0, len(asked) / wanted)
    spread = [asked[int(number * step)] for number in range(min(wanted, len(asked)))]
    spread += [made.question for made in clinic.generate(wanted, split="test", seed=_SEED)]
    longest = getattr(held.model.config, "max_position_embeddings", None)
    found: dict[str, list[int]] = {}
    for question in spread:
        try:
            ids = encode_prompt(question, choice.style, held.tokenizer)
        except DataError:  # it failed in the run too, and is counted there
            continue
        if len(found) < wanted and (longest is None or len(ids) + num_tokens <= longest):
            found[turns.put(question)] = ids
    return list(found.values()), list(found)


def _name_files(run: Run, recipe: str) -> str:
    """Return a name for files: the run folder's, with what a shell would trip over taken out."""
    name = "".join(letter if letter.isalnum() or letter in "-._" else "-" for letter in run.folder.name).strip("-.")
    return name if name not in ("", "run") else recipe


# One kind -------------------------------------------------------------------------------------------------------------


def _export_one(tuned: Tuned, kind: str, run: Run, place: Path) -> dict[str, Any]:
    """Write, prove, move; return what run.json records."""
    from medcot.export.kinds import estimate_bytes, folder_of
    from medcot.export.making import make, prove
    from medcot.export.places import put_in_place, scratch_beside

    target = folder_of(kind, place)
    if target == run.adapter:
        proof = prove(tuned, kind, target)
        if not proof.passed:
            raise _unequal(f"'{target}'", proof.failures, proof, "Bring the run's own adapter back, or train again")
        return _facts(run, target, f"for {tuned.base_name}", proof)
    failed = target.with_name(target.name + FAILED)
    with scratch_beside(target, estimate_bytes(kind, tuned.base.num_params, 0)) as work:
        words = make(tuned, kind, work)
        try:
            proof = prove(tuned, kind, work)
        except UnequalError:
            _set_aside(work, failed)
            raise
        if not proof.passed:
            _set_aside(work, failed)
            few = proof.positions < FEW_POSITIONS
            more = "Compare more, with larger --prompts and --tokens: so few may differ by chance"
            raise _unequal(kind, proof.failures, proof, more if few else f"Look at it in '{failed}', and report it")
        put_in_place(work, target)
    shutil.rmtree(failed, ignore_errors=True)  # of an earlier attempt
    return _facts(run, target, words, proof)


def _set_aside(work: Path, failed: Path) -> None:
    shutil.rmtree(failed, ignore_errors=True)
    os.replace(work, failed)


def _unequal(what: str, failures: Sequence[str], proof: Proof, remedy: str) -> UnequalError:
    return UnequalError(
        f"{what} is not the tuned model: {'; '.join(failures)}",
        f"Compared on {proof.answers} answers, {proof.positions:,} tokens, read by {proof.reader}",
        remedy,
    )


def _join(failed: Sequence[UnequalError]) -> UnequalError:
    return UnequalError(
        f"{len(failed)} kinds are not the tuned model; the first: {failed[0].value}", failed[0].rule, failed[0].remedy
    )


# Afterwards -----------------------------------------------------------------------------------------------------------


def _facts(run: Run, target: Path, words: str, proof: Proof) -> dict[str, Any]:
    inside = target.is_relative_to(run.folder)
    return {
        "folder": str(target.relative_to(run.folder)) if inside else str(target),
        "files": {path.name: hash_file(path) for path in sorted(target.iterdir()) if path.suffix != _WORDS_ONLY},
        "base": words,
        "made": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "proof": proof.facts(),
    }


def hash_file(path: Path) -> dict[str, Any]:
    """Return a file's ``bytes`` and ``sha256``."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _compare_files(facts: dict[str, Any], kind: str, files: Path, name: str | None) -> tuple[str, list[str]]:
    """Compare files with the checksums of the export, and of what was pushed; return words, and what differs.

    A push changes some configurations on the way (a path of this machine becomes a name), and writes down what it sent.
    """
    recorded = (facts.get("exports") or {}).get(kind, {}).get("files")
    if recorded is None:
        return "no checksums of such an export in run.json", []
    pushed = [push.get("files") or {} for push in (facts.get("hub") or {}).values()]
    names = [known for known in recorded if name in (None, known)]
    wrong = []
    for known in names:
        sums = {recorded[known]["sha256"]} | {_sum_of(sent[known]) for sent in pushed if known in sent}
        path = files / known
        if not path.is_file():
            wrong.append(f"{known} is missing")
        elif hash_file(path)["sha256"] not in sums:
            wrong.append(f"{known} is not the file that was exported")
    return f"checksums of {', '.join(names) if len(names) == 1 else f'{len(names)} files'}", wrong


def _sum_of(sent: Any) -> str:
    return str(sent.get("sha256")) if isinstance(sent, dict) else str(sent)


def _read_facts(run: Run) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(run.facts.read_text(encoding="utf-8"))
    return facts


def _record(run: Run, kind: str, made: dict[str, Any]) -> None:
    facts = _read_facts(run)
    facts["exports"] = {**(facts.get("exports") or {}), kind: made}
    if kind == "merged-16bit" and made["folder"] == run.merged.name:
        facts["artifacts"] = {**facts["artifacts"], "merged": run.merged.name}
    folders.write_json(run.facts, facts)


def _describe(made: dict[str, Any]) -> str:
    from medcot.export.equality import Proof

    size = sum(entry["bytes"] for entry in made["files"].values())
    return f"{_size(size)}, {_figures(Proof(**made['proof']))}  {made['folder']}/"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.1f} MB"


def _figures(proof: Proof) -> str:
    return (
        f"KL {proof.kl_mean:.2g} (at most {proof.threshold['kl_mean']:g}), top-1 {100 * proof.top1:.1f} %,"
        f" {proof.answers_changed} of {proof.answers} answers changed"
    )


def _write_serving(tuned: Tuned, run: Run, place: Path) -> None:
    """Write the page of commands and the chat template that they name, for all artefacts below ``place``."""
    from medcot.export.commands import build_commands, build_page
    from medcot.export.kinds import folder_of
    from medcot.export.turns import build_jinja
    from medcot.model import read_adapter_config

    rank = int(read_adapter_config(run.adapter)["r"])
    commands = {}
    for kind, made in (_read_facts(run).get("exports") or {}).items():
        target = folder_of(kind, place)
        if not target.is_dir():
            continue
        file = next((name for name in made["files"] if name.endswith(".gguf")), None)
        commands[kind] = build_commands(
            kind,
            f"./{target.relative_to(place)}",
            base=str(tuned.held.name),
            rank=rank,
            context=tuned.context,
            template=f"./{SERVE_TEMPLATE}",
            file=file,
        )
    folders.write_text(place / SERVE_TEMPLATE, build_jinja(tuned.turns))
    folders.write_text(place / SERVE_PAGE, build_page(commands))


def _draw_card(run: Run) -> None:
    from medcot.report.card import render_card

    folders.write_text(run.card, render_card(run))
