"""A recipe: everything one run needs, in one YAML file, checked before anything is loaded.

Each stage of the job has its own small frozen model; there is no flat bag of two hundred fields. Recipes are strict: an
unknown key is an error that names the nearest key, because a misspelt ``learning_rte`` that silently trains with the
default is the commonest way to waste a night. The resolved recipe, defaults and overrides included, is saved with the
run, so a run can be repeated from its folder alone. Recipes stop at the verb: ``pipeline.py`` unpacks them and every
function below takes plain arguments.

Shorthands, so that ``medcot run data=my.jsonl`` reads as it is meant, are the stages' own (``stages.py``). Keys that
exclude each other give way to the one that is given last: ``data=my.jsonl`` on the command line takes the place of a
recipe's ``data.sources``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError, field_validator, model_validator

from medcot.errors import RecipeError, did_you_mean
from medcot.stages import (
    AskStage,
    Checkpointing,
    DataStage,
    Duplicates,
    EvaluateStage,
    Identifiers,
    LoraStage,
    ModelStage,
    Origin,
    OverLength,
    Precision,
    PromptStage,
    PushStage,
    SaveStage,
    SourceStage,
    Stage,
    TrackingStage,
    TrainStage,
    ValidationStage,
)

__all__ = [
    "AskStage",
    "Checkpointing",
    "DataStage",
    "Duplicates",
    "EvaluateStage",
    "Identifiers",
    "LoraStage",
    "ModelStage",
    "Origin",
    "OverLength",
    "Precision",
    "PromptStage",
    "PushStage",
    "Recipe",
    "SaveStage",
    "SourceStage",
    "Stage",
    "TrackingStage",
    "TrainStage",
    "ValidationStage",
    "build_recipe",
    "dump_recipe",
    "list_recipes",
    "load_recipe",
]

_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")
# Keys of which one is set: giving the first takes the others' place.
_RIVALS = (
    ("train.max_steps", ("train.epochs",)),
    ("train.epochs", ("train.max_steps",)),
    ("data.source", ("data.sources", "data.repeat")),
    ("data.sources", ("data.source", "data.config", "data.split", "data.revision", "data.columns")),
    ("data.validation.source", ("data.validation.fraction",)),
    ("data.validation.fraction", ("data.validation.source",)),
)


class Recipe(Stage):
    """Everything one run needs."""

    name: str = "default"
    description: str = ""
    model: ModelStage = ModelStage()
    prompt: PromptStage = PromptStage()
    data: DataStage = DataStage()
    lora: LoraStage = LoraStage()
    train: TrainStage = TrainStage()
    ask: AskStage = AskStage()
    evaluate: EvaluateStage = EvaluateStage()
    tracking: TrackingStage = TrackingStage()
    save: SaveStage = SaveStage()
    push: PushStage = PushStage()

    @field_validator("name")
    @classmethod
    def _name_is_a_folder_name(cls, name: str) -> str:
        if not name or any(c in name for c in "/\\\0") or name.startswith("."):
            raise ValueError(f"'{name}' names the run folder, so it may not be empty, start with a dot or hold a slash")
        return name

    @model_validator(mode="after")
    def _merged_is_saved_when_pushed(self) -> Recipe:
        if self.push.merged is not None and not self.save.merged:
            raise ValueError("push.merged names a repository but save.merged is false; set save.merged=true")
        return self


def list_recipes() -> dict[str, str]:
    """Return the shipped recipes: name to one-line description, in reading order."""
    found = {}
    for entry in resources.files("medcot.recipes").iterdir():
        if entry.name.endswith(".yaml"):
            values = yaml.safe_load(entry.read_text(encoding="utf-8"))
            found[entry.name.removesuffix(".yaml")] = values.get("description", "")
    order = ["default", *sorted(name for name in found if name != "default")]
    return {name: found[name] for name in order if name in found}


def load_recipe(
    source: str | Path | Recipe = "default", overrides: Iterable[str] = (), stages: Mapping[str, Any] | None = None
) -> Recipe:
    """Read a recipe file or a shipped recipe by name, apply overrides, and check the whole.

    Args:
        source: path of a YAML file, the name of a shipped recipe, or a recipe to start from.
        overrides: ``"key.sub=value"`` strings; values are read as YAML.
        stages: values by dotted key, applied before the overrides; a mapping is merged into its stage.

    Raises:
        RecipeError: unreadable file, unknown key, or a value that breaks its rule.
    """
    values = source.model_dump(mode="json") if isinstance(source, Recipe) else _read_recipe(source)
    given = dict(_spell_out({**dict(_flatten(stages or {})), **_parse_overrides(overrides)}))
    for one, others in _RIVALS:
        if given.get(one) not in (None, []):
            for other in others:
                _drop_dotted(values, other)
    for key, value in given.items():
        _set_dotted(values, key, value)
    return build_recipe(values, where="the recipe" if isinstance(source, Recipe) else str(source))


def build_recipe(values: Mapping[str, Any], *, where: str = "recipe") -> Recipe:
    """Check a mapping and return the recipe; ``where`` names it in errors.

    Raises:
        RecipeError: unknown key, or a value that breaks its rule.
    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise _explain(error, where) from None


def dump_recipe(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML, every default written out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def _read_recipe(source: str | Path) -> dict[str, Any]:
    path = Path(source)
    if path.suffix in {".yaml", ".yml"} or path.exists():
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise RecipeError(
                f"recipe file '{source}' cannot be read: {reason}",
                "A recipe is a readable YAML file or the name of a shipped recipe",
                "Check the path, or list the shipped recipes with 'medcot recipes'",
            ) from None
        default_name = path.stem
    else:
        shipped = list_recipes()
        if source not in shipped:
            raise RecipeError(
                f"no recipe is named '{source}'",
                "A recipe is a path ending in .yaml or the name of a shipped recipe",
                f"{did_you_mean(str(source), shipped)} 'medcot recipes' lists them",
            )
        text = (resources.files("medcot.recipes") / f"{source}.yaml").read_text(encoding="utf-8")
        default_name = str(source)
    try:
        values = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise RecipeError(f"recipe '{source}' is not YAML: {error}", "A recipe is a YAML mapping", "Mend it") from None
    if not isinstance(values, dict):
        raise RecipeError(
            f"recipe '{source}' holds a {type(values).__name__}",
            "A recipe is a YAML mapping of stages",
            "Start from 'medcot run NAME --dry-run', which prints a whole recipe",
        )
    return {"name": default_name, **values}


def _flatten(stages: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in stages.items():
        if isinstance(value, Mapping) and key != "columns":
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value) if isinstance(value, Path) else value


def _spell_out(given: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Replace a stage's shorthand by the key that it stands for, so that the rest of the stage stays."""
    for key, value in given.items():
        model = _stage_model(Recipe, key)
        expanded = model.expand(value) if model is not None else None
        if isinstance(value, dict) or not isinstance(expanded, dict) or not expanded:
            yield key, value
        else:
            yield from ((f"{key}.{part}", inner) for part, inner in expanded.items())


def _parse_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    parsed = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise RecipeError(
                f"override '{override}' has no '='",
                "An override is written key.sub=value",
                "For example: train.learning_rate=1e-4",
            )
        try:
            parsed[key] = _yaml_value(value)
        except yaml.YAMLError:
            # Not YAML ("[a" is not, nor is "a: b: c"): then the user meant the text itself.
            parsed[key] = value
    return parsed


def _yaml_value(text: str) -> Any:
    # YAML 1.1 reads 1e-4 as text, because it has no dot.
    return float(text) if _EXPONENT.fullmatch(text) else yaml.safe_load(text)


def _set_dotted(values: dict[str, Any], key: str, value: Any) -> None:
    *stages, last = key.split(".")
    model: type[Stage] | None = Recipe
    for stage in stages:
        model = _stage_model(model, stage) if model is not None else None
        inner = values.get(stage)
        if not isinstance(inner, dict):
            # A shorthand set earlier, as in "data: my.jsonl" then data.config=en, keeps its meaning.
            inner = model.expand(inner) if model is not None else {}
            values[stage] = inner = inner if isinstance(inner, dict) else {}
        values = inner
    values[last] = value


def _drop_dotted(values: dict[str, Any], key: str) -> None:
    *stages, last = key.split(".")
    _set_dotted(values, key, None)  # spells out the shorthands on the way
    for stage in stages:
        values = values[stage]
    del values[last]


def _stage_model(parent: type[Stage], name: str) -> type[Stage] | None:
    """Return the model of a stage, or of the items of a list of them; ``None`` where ``name`` is neither."""
    field = parent.model_fields.get(name)
    kinds = (field.annotation, *get_args(field.annotation)) if field else ()
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Stage)), None)


def _explain(error: ValidationError, where: str) -> RecipeError:
    """Turn pydantic's first complaint into value, rule, remedy; the rest are counted."""
    problems = error.errors()
    first = problems[0]
    path = ".".join(str(part) for part in first["loc"])
    more = f" ({len(problems) - 1} more problem(s) after this one)" if len(problems) > 1 else ""
    if first["type"] == "extra_forbidden":
        known = _known_keys([str(part) for part in first["loc"][:-1]])
        return RecipeError(
            f"'{path}' in {where} is not a recipe key{more}",
            "Recipes are strict: a key that nothing reads would be silently ignored",
            did_you_mean(str(first["loc"][-1]), known),
        )
    rule = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return RecipeError(
            f"{path or where}: {rule}{more}", "The recipe contradicts itself", "Change one of the values"
        )
    return RecipeError(
        f"'{path}' in {where} is {first['input']!r}{more}", rule, f"Set {path} to a value that fits, or leave it out"
    )


def _known_keys(stages: list[str]) -> list[str]:
    model: type[Stage] = Recipe
    for stage in stages:
        if stage.isdigit():  # a place in a list
            continue
        inner = _stage_model(model, stage)
        if inner is None:
            return []
        model = inner
    return list(model.model_fields)
