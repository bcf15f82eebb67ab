"""The job of ``medcot push``: which files of a run go, under which names, to which repository, and what was sent when.

The run's records say what is there: exports with the checksum of each file, as ``medcot export`` proved them. What is
pushed must still be those bytes, since the card quotes the proof. To the files of the artefact come the tokenizer, the
card, and what the base's licence asks to go along. Two things are changed on the way. The folder's own README gives
place to the card of the whole run. And paths of this machine in the configuration, which name the base for loaders,
become the base's name on the Hub: elsewhere they lead nowhere, and they tell who trained it where.

A dry run makes the same plan and stops: it needs no token and no network, and shows what would go, byte for byte.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medcot import folder as folders
from medcot.errors import OutputError, RecipeError
from medcot.hub import Delivery, Kind, Parcel, Verify, deliver, pack
from medcot.hub.parcels import CARD, TOKENIZER_FILES, check_no_secrets, is_wanted
from medcot.records import Run
from medcot.report import render_card
from medcot.report.folder import read_folder
from medcot.report.lineage import public_name
from medcot.report.terms import EMBEDDED_ID, Terms, find_terms, write_notice

ADAPTER = "adapter"
_KINDS = {"adapter": Kind.ADAPTER, "merged": Kind.MODEL, "gguf": Kind.GGUF, "ollama": Kind.GGUF}  # by first word
_NAMING = ("base_model_name_or_path", "_name_or_path", "name_or_path")  # keys of configurations that name the base


@dataclass(frozen=True, slots=True)
class Plan:
    """What a push would do.

    Attributes:
        repo: ``owner/name``.
        kinds: what goes, as ``run.json`` names exports.
        kind: what that makes of the repository.
        private: the visibility that is asked for.
        parcels: every file, in the order of their names.
        notes: what the user should know before it goes.
    """

    repo: str
    kinds: tuple[str, ...]
    kind: Kind
    private: bool
    parcels: tuple[Parcel, ...]
    notes: tuple[str, ...]

    @property
    def num_bytes(self) -> int:
        """All of it."""
        return sum(parcel.num_bytes for parcel in self.parcels)


def plan_push(run: Run, repo: str, what: Sequence[str] = (ADAPTER,), *, public: bool = False) -> Plan:
    """Return what a push would send; nothing is sent and no network is asked.

    Args:
        run: a finished run.
        repo: ``owner/name``.
        what: kinds of exports, as ``medcot export`` calls them.
        public: whether everybody shall see it.

    Raises:
        ModelError: a kind that there is not.
        RecipeError: kinds that share no repository.
        OutputError: the run has no such export, a file changed since it was proven, or a licence forbids it so.
    """
    _check_repo(repo)
    facts = read_folder(run).facts
    exports: Mapping[str, Any] = facts.get("exports") or {}
    kinds = _read_kinds(what)
    kind = _kind_of(kinds[0])
    notes: list[str] = []
    parcels: dict[str, Parcel] = {}
    for name in kinds:
        for parcel in _pack_export(run, name, exports.get(name), kind, notes):
            if parcels.get(parcel.name, parcel).sha256 != parcel.sha256:
                raise RecipeError(
                    f"{' and '.join(kinds)} each have a '{parcel.name}'",
                    "A repository has one file of a name",
                    "Push them to a repository each",
                )
            parcels[parcel.name] = parcel
    parcels |= {parcel.name: parcel for parcel in _pack_tokenizer(run) if parcel.name not in parcels}
    parcels = {name: _without_paths(parcel, facts) for name, parcel in parcels.items()}
    parcels |= {parcel.name: parcel for parcel in _pack_papers(run, facts, repo, public, notes)}
    # A repository of GGUF files grows push by push; its card is of all of them.
    known = str((facts.get("hub") or {}).get(repo, {}).get("kind") or "").split(", ") if kind is Kind.GGUF else []
    all_kinds = tuple(dict.fromkeys([*kinds, *sorted(name for name in known if name in exports)]))
    files = [name for name in parcels if name.endswith(".gguf")]
    card = render_card(run, all_kinds, repo=repo, files=files)
    parcels[CARD] = pack(CARD, card.encode("utf-8", errors="xmlcharrefreplace"))
    ordered = tuple(parcels[name] for name in sorted(parcels))
    check_no_secrets(ordered)
    return Plan(repo, kinds, kind, not public, ordered, tuple(notes))


def push(
    run: Run,
    repo: str,
    what: Sequence[str] = (ADAPTER,),
    *,
    public: bool = False,
    verify: Verify = Verify.SMALL,
    token: str | None = None,
    endpoint: str | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> Delivery:
    """Send an artefact of a run to a repository and note in ``run.json`` what arrived.

    Args:
        run: a finished run.
        repo: ``owner/name``, created if need be.
        what: kinds of exports, as in ``plan_push``.
        public: whether everybody shall see it.
        verify: what is downloaded again after the push.
        token: a write token; ``None`` looks where ``secrets`` looks.
        endpoint: the Hub's address, for a Hub of one's own.
        tell: is called with a sentence where the user should know something.

    Raises:
        MedcotError: as ``plan_push`` and ``deliver`` say.
    """
    with folders.held(run):
        plan = plan_push(run, repo, what, public=public)
        for note in plan.notes:
            tell(note)
        found = send(plan, verify=verify, token=token, endpoint=endpoint, tell=tell)
        facts = json.loads(run.facts.read_text(encoding="utf-8"))
        note_delivery(facts, plan, found)
        folders.write_json(run.facts, facts)
    return found


def send(
    plan: Plan,
    *,
    verify: Verify = Verify.SMALL,
    token: str | None = None,
    endpoint: str | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> Delivery:
    """Send what was planned; ``push`` without the note in ``run.json``, for whoever keeps that file."""
    from medcot.secrets import SecretName, find_secret

    secret = None if token else find_secret(SecretName.HUGGING_FACE)
    return deliver(
        plan.parcels,
        plan.kind,
        plan.repo,
        private=plan.private,
        token=token or (secret.value if secret else None),
        endpoint=endpoint,
        verify=verify,
        tell=tell,
    )


def note_delivery(facts: dict[str, Any], plan: Plan, found: Delivery) -> None:
    """Put into the facts of a run what arrived where; an earlier push to the same repository gives its kinds."""
    known = facts.setdefault("hub", {})
    earlier = str(known.get(plan.repo, {}).get("kind") or "") if plan.kind is Kind.GGUF else ""
    kinds = dict.fromkeys([*filter(None, earlier.split(", ")), *plan.kinds])
    known[plan.repo] = {
        "kind": ", ".join(kinds),
        "url": found.url,
        "commit": found.commit,
        "files": {parcel.name: {"bytes": parcel.num_bytes, "sha256": parcel.sha256} for parcel in plan.parcels},
        "private": found.private,
        "made": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _check_repo(repo: str) -> None:
    """Refuse what is no repository id before anything is read; the Hub's client has the rule."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
        said = "" if repo.count("/") == 1 else "there is no owner in it"
    except HFValidationError as error:
        said = str(error).splitlines()[0]
    if said:
        raise OutputError(f"'{repo}' is no repository id: {said}", "It is owner/name", "Correct it")


def _kind_of(name: str) -> Kind:
    return _KINDS[re.split("[-:]", name)[0]]


def _read_kinds(what: Sequence[str]) -> tuple[str, ...]:
    """Return the kinds asked for, in the words of ``medcot export``; all of one repository."""
    from medcot.export.kinds import parse_kinds

    kinds = tuple(parse_kinds(",".join(what)))
    groups = {"gguf" if _kind_of(kind) is Kind.GGUF else kind for kind in kinds}
    if len(groups) > 1:
        raise RecipeError(
            f"--what {','.join(what)}",
            "An adapter, merged weights and GGUF files go to a repository each: a loader would take the wrong ones",
            "Push them one after another, with a --repo of its own each",
        )
    return kinds


def _pack_export(run: Run, name: str, export: Mapping[str, Any] | None, kind: Kind, notes: list[str]) -> list[Parcel]:
    """Return the files of an export, which must be as they were proven; of an older run, of its adapter or merged."""
    if export is None:
        folder = {ADAPTER: run.adapter, "merged-16bit": run.merged}.get(name)
        if folder is None or not folder.is_dir():
            raise OutputError(
                f"'{run.folder}' holds no {name}",
                "A push sends what an export made",
                f"Make it with 'medcot export {run.folder} --to {name}'",
            )
        notes.append(
            f"{name} has no proof of export; 'medcot export {run.folder} --to {name}' would put one on the card"
        )
        names = sorted(path.name for path in folder.iterdir() if path.is_file())
        return [pack(found, folder / found) for found in names if is_wanted(found, kind)]
    proof = export.get("proof") or {}
    if proof.get("passed") is False:
        raise OutputError(
            f"the {name} of '{run.folder}' failed its proof of export",
            "What is pushed answers as the model that was measured",
            "Look at what differs with 'medcot verify', and export it again",
        )
    folder = run.folder / str(export.get("folder") or "")
    files = export.get("files") or {}
    parcels = [pack(found, folder / found) for found in sorted(files) if is_wanted(found, kind)]
    for parcel in parcels:
        if parcel.sha256 != files[parcel.name].get("sha256"):
            raise OutputError(
                f"'{folder / parcel.name}' has changed since it was exported",
                "The proof on the card is of the bytes that were exported",
                f"Make it again with 'medcot export {run.folder} --to {name}'",
            )
    return parcels


def _pack_tokenizer(run: Run) -> list[Parcel]:
    """Return the tokenizer that was saved with the adapter."""
    return [pack(name, run.adapter / name) for name in TOKENIZER_FILES if (run.adapter / name).is_file()]


def _pack_papers(run: Run, facts: Mapping[str, Any], repo: str, public: bool, notes: list[str]) -> list[Parcel]:
    """Return what licences ask to go along, and say or refuse what is missing.

    Duties of distribution begin where others can see it: a public push must fulfil them, a private one is told.
    """
    licences = [path for path in sorted(run.folder.glob("LICENSE*")) if path.is_file()]
    parcels = [pack(path.name, path) for path in licences]
    terms = find_terms((facts.get("model") or {}).get("source"))
    if terms is None:
        return parcels
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in licences]
    for value, remedy in _find_missing(terms, repo, texts, run):
        rule = f"Clause {terms.duty.clause} of the {terms.duty.agreement} asks for it" if terms.duty else ""
        if public:
            raise OutputError(value, rule, remedy)
        notes.append(f"{value}. {rule} before others can see it. {remedy}")
    return [*parcels, pack("NOTICE", write_notice(terms).encode())]


def _find_missing(terms: Terms, repo: str, texts: Sequence[str], run: Run) -> list[tuple[str, str]]:
    """Return which duties of the base's licence this push would not fulfil: what is met, and what to do."""
    duty, name = terms.duty, repo.rpartition("/")[2]
    if duty is None:
        return []
    missing = []
    if not duty.allows(name):
        owner = repo.rpartition("/")[0]
        missing.append(
            (f"the name '{name}' does not begin with \"{duty.prefix}\"", f"Push to {owner}/{duty.prefix}-{name}")
        )
    if not any(duty.is_in(text) for text in texts):
        missing.append(
            (
                f"no copy of the {duty.agreement} goes along",
                f"Save {duty.address} as text in '{run.folder / 'LICENSE'}', and it is sent with the rest",
            )
        )
    return missing


def _without_paths(parcel: Parcel, facts: Mapping[str, Any]) -> Parcel:
    """Return a configuration in which the base is called by its public name, not by a path of this machine."""
    if not parcel.name.endswith("config.json") or isinstance(parcel.source, bytes):
        return parcel
    try:
        values = json.loads(parcel.source.read_text(encoding="utf-8"))
    except ValueError as error:
        raise OutputError(
            f"'{parcel.source}' is not JSON: {error}", "Loaders read it first", "Export the run again"
        ) from None
    paths = [key for key in _NAMING if Path(str(values.get(key) or "")).is_absolute()]
    if not paths:
        return parcel
    source = (facts.get("model") or {}).get("source")
    # Of the embedded model the nearest that anybody can load; the card says that it is not quite what was trained on.
    name = EMBEDDED_ID if source == "embedded" else public_name(source or values[paths[0]])
    changed = json.dumps({**values, **dict.fromkeys(paths, name)}, indent=2, ensure_ascii=False) + "\n"
    return pack(parcel.name, changed.encode())
