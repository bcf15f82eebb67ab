"""The whole job, in the order it happens; every other module is one of its verbs.

    import the libraries -> read the rows -> check them -> load the model -> make tokens -> ask -> attach LoRA and
    make it fast -> train -> save the adapter -> ask again -> merge -> report -> push

Each stage leaves its result in the run folder before the next begins, and ``--resume`` takes up where the folder says
the job was: answers that were given stay given, training goes on from the last whole checkpoint, a saved adapter is
loaded. The adapter is proved off before and on after: before, the model has none; after, switching it off must give
the first probe's logits back, and switching it on must not.

Started by ``torchrun`` or ``accelerate launch``, the first process does all this, and the others read the same rows,
load the same model and take their share of each training step (``ranks.py``).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medcot import folder as folders
from medcot import ranks
from medcot.errors import DataError, ModelError
from medcot.job import Job, open_job
from medcot.recipe import Recipe, load_recipe
from medcot.records import Run
from medcot.shapes import compute_shape
from medcot.sharing import attach_fresh, build_share, check_shares, help_train, load_base
from medcot.train.progress import RunConsole

if TYPE_CHECKING:
    from peft import PeftModel
    from rich.console import Console

    from medcot.evaluate.tasks import Task
    from medcot.model import LoadedModel
    from medcot.planning import TrainingData


def run(
    recipe: str | Path | Recipe = "default",
    *,
    overrides: Sequence[str] = (),
    out: str | Path | None = None,
    resume: bool = False,
    console: Console | None = None,
    **stages: Any,
) -> dict[str, Any]:
    """Do the whole job and return the facts that run.json holds, with ``folder`` added.

    Of several processes the first one returns them; the others help to train, and return nothing.

    Args:
        recipe: a shipped recipe's name, a YAML file, or a ``Recipe``.
        overrides: ``"key.sub=value"`` strings.
        out: run folder; ``runs/<recipe>-<time>`` if ``None``.
        resume: go on with ``out``, else with ``runs/latest``; the saved recipe is used.
        console: where to draw.
        **stages: whole stages by name, as in ``run("tutorial-8b", data="my.jsonl", train={"max_steps": 10})``.

    Raises:
        MedcotError: a mistake in recipe, data, model or folder; the message says what to do.
    """
    with ranks.joined() as here:
        if not here.is_first:
            help_train()
            return {}
        job = open_job(recipe, [*overrides], stages, Path(out) if out is not None else None, resume, console)
        with folders.held(job.run), job:
            check_shares(job.recipe, here.size)
            ranks.share((job.recipe.model_dump(mode="json"), job.run.folder))
            _do(job)
        return {**json.loads(job.run.facts.read_text(encoding="utf-8")), "folder": str(job.run.folder)}


def _do(job: Job) -> None:
    """The paragraph at the head of this file."""
    from medcot.startup import Startup

    recipe = job.recipe
    with job.stage("import libraries"):
        startup = Startup(recipe.model.source)
        job.open_tracker()
        startup.wait()
        job.describe_machine()
    from medcot import asking, planning
    from medcot.admission import Admission
    from medcot.export.adapter import save_adapter
    from medcot.proof import probe, prove_adapter

    with job.stage("read data") as line:
        raw = planning.read_examples(recipe)
        _check_unchanged(job, "sha256", raw.sha256)
        tasks = planning.load_tasks(recipe.evaluate)
        line.detail = f"{len(raw.examples):,} examples from {recipe.data.named}"
    with job.stage("check data") as line:
        admission = Admission.of(job, raw, planning.list_problems(tasks))
        line.detail = admission.diagnosis.headline
    with job.stage("load model") as line:
        loaded = _load(job)
        line.detail = f"{loaded.source}, {loaded.num_params / 1e6:,.0f} M parameters, {loaded.precision}"
    with job.stage("make tokens") as line:
        data = planning.encode_examples(admission.raw, recipe, loaded.tokenizer)
        _check_unchanged(job, "rows_sha256", data.digest)
        _keep_data(job, data, tasks)
        admission.pass_gate(job, data, loaded.tokenizer)
        job.is_under_way = True
        line.detail = f"{len(data.rows):,} rows, {data.facts()['tokens']:,} tokens"
    style = recipe.prompt.style
    with job.stage("ask before"):
        before_probe = probe(loaded.model, loaded.tokenizer, style)
        before = _answers(job, "before", loaded.model, loaded, tasks)
    with job.stage("attach adapter"):
        model = _attach(job, loaded)
    if job.run.adapter.is_dir():
        job.console.note("training was complete; its adapter is loaded")
        ranks.share(None)  # nothing is left to help with
        ranks.part()
    else:
        with job.stage("train"):
            _train(job, model, loaded, data)
        with job.stage("save adapter"):
            save_adapter(model, loaded.tokenizer, job.run.adapter, init=recipe.lora.init)
    job.facts["artifacts"]["adapter"] = job.run.adapter.name
    base_is_kept = recipe.lora.init == "default"
    with job.stage("ask after"):
        job.record(proof=prove_adapter(model, loaded.tokenizer, style, before_probe, base_is_kept=base_is_kept))
        after = _answers(job, "after", model, loaded, tasks)
    _compare(job, tasks, before, after)
    job.tracker.log_table("before and after", *asking.tabulate(before, after))
    if recipe.save.merged:
        with job.stage("save merged") as line:
            line.detail = _merge(job, loaded)
    job.record(status="complete")
    with job.stage("report"):
        _report(job)
    _push(job)


def ask(
    question: str,
    folder: Path,
    *,
    base: bool = False,
    max_new_tokens: int = 1200,
    seed: int = 3407,
    on_text: Callable[[str, bool], None] = lambda piece, in_think: None,
) -> str:
    """Ask a run's model one question; return the whole text written.

    Args:
        question: the question alone; the run's prompt style is put around it.
        folder: the run folder.
        base: ask the model without its adapter.
        max_new_tokens: limit, thinking included.
        seed: of the sampling.
        on_text: called with each piece of text as it comes, and whether it is thinking.

    Raises:
        MedcotError: no adapter in the folder, or the base model cannot be loaded.
    """
    from medcot import asking, prompt
    from medcot.evaluate.backends import Limits
    from medcot.evaluate.speaking import Speaker

    saved = Run(folder)
    recipe = load_recipe(saved.recipe)
    loaded = load_base(recipe)
    sampling = asking.choose_sampling(loaded.model, recipe.ask)
    style, adapter = prompt.Style(recipe.prompt.style), None if base else saved.adapter
    speaker = Speaker(loaded, style, adapter=adapter, accelerate=recipe.train.accelerate)
    pieces: list[str] = []

    def emit(piece: str, in_think: bool) -> None:
        pieces.append(piece)
        on_text(piece, in_think)

    speaker.say(question, Limits(max_new_tokens, 0), sampling=sampling, seed=seed, on_text=emit)
    return "".join(pieces)


def plan(
    recipe: str | Path | Recipe = "default", overrides: Sequence[str] = (), console: Console | None = None
) -> None:
    """Print what a run would do, and one row as the model will see it; nothing is trained or written.

    Raises:
        MedcotError: as ``run`` would.
    """
    from medcot.preview import print_plan

    print_plan(load_recipe(recipe, overrides), RunConsole(console))


def _load(job: Job) -> LoadedModel:
    from medcot import engine, planning

    loaded = load_base(job.recipe)
    for note in loaded.notes:
        job.console.note(note)
    _check_same_base(job, loaded)
    shape = compute_shape(loaded.model.config, trust_remote_code=job.recipe.model.trust_remote_code)
    folders.check_disk(job.run.folder, planning.estimate_disk_bytes(job.recipe, shape))
    if job.recipe.train.accelerate:
        engine.accelerate(loaded.model)
    job.record(
        model={
            "source": loaded.source,
            "resolved": loaded.resolved,
            "revision": loaded.revision,
            "params": loaded.num_params,
            "precision": loaded.precision,
            "device": str(loaded.device),
        }
    )
    return loaded


def _check_same_base(job: Job, loaded: LoadedModel) -> None:
    """Refuse to go on with another base than the run was started with: a Hub branch may have moved, or the machine."""
    known = job.facts["model"]
    for what, now in (("revision", loaded.revision), ("precision", loaded.precision)):
        if known.get(what, now) != now:
            raise ModelError(
                f"the base model's {what} is '{now}', and the run was started with '{known[what]}'",
                "A resumed run goes on with the base it was started with, else its two halves would not be one run",
                "Go on where it was started, or start a new run",
            )


def _check_unchanged(job: Job, what: str, digest: str) -> None:
    """Refuse to go on with other data than the run was started with: the source, or the rows made of it."""
    if job.facts["data"].get("train", {}).get(what, digest) != digest:
        raise DataError(
            f"'{job.recipe.data.named}' has changed since the run was started",
            "A resumed run trains on the rows it was started with, else its two halves would not be one run",
            "Bring the old file back (and the benchmarks of data.against), or start a new run",
        )


def _keep_data(job: Job, data: TrainingData, tasks: Sequence[Task]) -> None:
    from medcot import asking
    from medcot.data.checks import save_quarantine

    for sentence in data.sentences:
        job.console.note(sentence)
    quarantine = job.run.data / "quarantine.jsonl"
    save_quarantine(quarantine, data.quarantined)
    if data.quarantined:
        first = data.quarantined[0]
        job.console.warn(
            f"{len(data.quarantined)} rows set aside, listed in {quarantine}; row {first.row_number}: {first.reason}"
        )
    for planned in asking.plan_comparison(tasks, seeds=job.recipe.evaluate.seeds):
        job.console.note(f"{planned['task']}: {planned['sentence']}")
    evaluated = {"source": job.recipe.evaluate.source, "rows": sum(len(task.items) for task in tasks)}
    held_out = {"validation": data.validation_facts()} if data.validation else {}
    job.record(data={**job.facts["data"], "train": data.facts(), **held_out, "eval": evaluated})


def _answers(job: Job, when: str, model: Any, loaded: LoadedModel, tasks: Sequence[Task]) -> list[dict[str, Any]]:
    """Ask, or read the answers that an interrupted run already has."""
    from medcot import asking

    path = job.run.samples / f"{when}.jsonl"
    if path.exists():
        job.console.note(f"already answered: {path}")
        return folders.read_lines(path)
    adapter = job.run.adapter if when == "after" else None
    lines = asking.ask_questions(model, loaded.tokenizer, job.recipe, job.console)
    if tasks:
        batch_size = _graded_batch(job, loaded, tasks)
        graded, num_found = asking.grade_recipe_tasks(
            model,
            loaded,
            job.recipe,
            tasks,
            adapter,
            job.console,
            batch_size=batch_size,
            own_store=job.run.samples / f"{when}.answers.jsonl",
        )
        lines += graded
        job.record(answers_found={**job.facts.get("answers_found", {}), when: num_found})
        if num_found:
            job.console.note(f"{num_found:,} of {len(graded):,} graded answers were there from before")
    folders.write_lines(path, lines)
    return lines


def _graded_batch(job: Job, loaded: LoadedModel, tasks: Sequence[Task]) -> int:
    """Graded questions that fit the memory together; settled once, so that before and after are asked alike."""
    from medcot import asking, planning, prompt

    stage = job.recipe.evaluate
    if "graded_batch" not in job.facts:
        longest = asking.count_prompt_tokens(tasks, prompt.Style(job.recipe.prompt.style), loaded.tokenizer)
        shape = compute_shape(loaded.model.config, trust_remote_code=job.recipe.model.trust_remote_code)
        fitting = planning.fit_answers(
            stage.batch_size, shape, loaded.precision, longest + stage.max_new_tokens, loaded.device
        )
        if fitting < min(stage.batch_size, sum(len(task.items) for task in tasks)):
            job.console.note(f"graded questions are answered {fitting} at a time, for want of memory")
        job.record(graded_batch=fitting)
    return int(job.facts["graded_batch"])


def _attach(job: Job, loaded: LoadedModel) -> PeftModel:
    """Put the adapter on: the saved one where training is complete, else a fresh one."""
    from medcot import engine
    from medcot.model import load_adapter

    if job.run.adapter.is_dir():
        engine.release(loaded.model)
        model = load_adapter(loaded, job.run.adapter)
        if job.recipe.train.accelerate:
            engine.accelerate(model)
    else:
        model = attach_fresh(job.recipe, loaded)
    explanation = engine.explain(model)
    if job.recipe.train.accelerate and not explanation.fast:
        job.console.warn(f"training takes the plain path, which is slower: {explanation.reason}")
    return model


def _train(job: Job, model: PeftModel, loaded: LoadedModel, data: TrainingData) -> None:
    from medcot import engine
    from medcot.train import sft

    fast = engine.engine_of(model) is not None
    plan, predicted_gb = build_share(job.recipe, data.rows, loaded, fast=fast)
    checkpoints = sft.list_checkpoints(job.run.checkpoints)
    resume_from = checkpoints[-1] if checkpoints else None
    past = _keep_metrics(job.run, resume_from)
    ranks.share((plan, resume_from, data.digest))
    if resume_from is not None:
        job.console.note(f"going on from {resume_from.name}")
    with job.console.training(plan.num_steps) as bar, job.run.metrics.open("a", encoding="utf-8") as log:

        def on_step(step: int, metrics: Any) -> None:
            if metrics is None:
                bar.update(step)
                return
            line = {key: value + past.get(key, 0) for key, value in dataclasses.asdict(metrics).items()}
            log.write(folders.to_json(line) + "\n")
            log.flush()
            job.tracker.log({key: value for key, value in line.items() if key != "step"}, step)
            bar.update(
                step,
                loss=metrics.loss,
                learning_rate=metrics.learning_rate,
                tokens_per_s=metrics.tokens_per_s,
                trained_tokens_per_s=metrics.trained_tokens_per_s,
                memory_gb=metrics.memory_gb,
            )

        def on_validation(validated: Any) -> None:
            log.write(folders.to_json(dataclasses.asdict(validated)) + "\n")
            log.flush()
            job.tracker.log({"validation_loss": validated.validation_loss}, validated.step)
            bar.validated(validated.step, validated.validation_loss)

        result = sft.train(
            model,
            loaded.tokenizer,
            data.rows,
            plan,
            job.run.checkpoints,
            validation=data.validation,
            resume_from=resume_from,
            on_step=on_step,
            on_validation=on_validation,
            announce=job.console.warn,
        )
    facts = dataclasses.asdict(result)
    lines = folders.read_lines(job.run.metrics)  # this process may have seen only the steps after a checkpoint
    logged = [line for line in lines if "loss" in line]
    first, last = logged[0], logged[-1]
    facts["loss_first"], facts["loss_last"], facts["seconds"] = first["loss"], last["loss"], last["elapsed_s"]
    facts["tokens_per_s"] = last["tokens"] / last["elapsed_s"]
    facts["trained_tokens_per_s"] = last["trained_tokens"] / last["elapsed_s"]
    if held_out := [line for line in lines if "validation_loss" in line]:
        facts["validation_loss_first"] = held_out[0]["validation_loss"]
        facts["validation_loss_last"] = held_out[-1]["validation_loss"]
        facts["validation_s"] = sum(line["validation_s"] for line in held_out)
    facts["predicted_memory_gb"] = round(predicted_gb, 2)
    facts["path"] = "engine" if fast else "plain"
    facts["processes"] = ranks.current().size
    ranks.part()  # what follows is for one
    job.record(train=facts)


def _keep_metrics(run: Run, resume_from: Path | None) -> dict[str, Any]:
    """Drop the lines of steps that will be done again; return the sums so far, which this process goes on from."""
    if not run.metrics.exists():
        return {}
    done = int(resume_from.name.rpartition("-")[2]) if resume_from is not None else -1
    kept = [line for line in folders.read_lines(run.metrics) if line["step"] <= done]
    folders.write_lines(run.metrics, kept)
    sums = [{key: line[key] for key in ("tokens", "trained_tokens", "elapsed_s")} for line in kept if "loss" in line]
    return sums[-1] if sums else {}


def _compare(job: Job, tasks: Sequence[Task], before: list[dict[str, Any]], after: list[dict[str, Any]]) -> None:
    from medcot import asking

    found = asking.summarise_samples(tasks, before, after)
    if found:
        found["adapter_sha256"] = asking.hash_adapter(job.run.adapter)
    job.record(eval={"source": job.recipe.evaluate.source, **found})


def _merge(job: Job, loaded: LoadedModel) -> str:
    from medcot.export.merged import save_merged

    stage = job.recipe.model
    merged = save_merged(
        loaded,
        job.run.adapter,
        job.run.merged,
        device=str(loaded.device),
        allow_pickle=stage.allow_pickle,
        trust_remote_code=stage.trust_remote_code,
    )
    job.facts["artifacts"]["merged"] = job.run.merged.name
    return str(merged.base)


def _report(job: Job) -> None:
    from medcot.report import render_report
    from medcot.report.card import render_card

    job.facts["artifacts"]["report"] = job.run.report.name
    job.record()
    render_report(job.run)
    folders.write_text(job.run.card, render_card(job.run))
    job.tracker.log_file(job.run.report)


def _push(job: Job) -> None:
    from medcot import publishing

    push = job.recipe.push
    for kind, repository in (("adapter", push.adapter), ("merged-16bit", push.merged)):
        if repository is None:
            continue
        with job.stage(f"push {kind}") as line:
            plan = publishing.plan_push(job.run, repository, [kind], public=not push.private)
            for note in plan.notes:
                job.console.warn(note)
            delivery = publishing.send(plan, tell=job.console.warn)
            publishing.note_delivery(job.facts, plan, delivery)
            job.record()
            line.detail = delivery.url
