"""A recipe: everything one run needs, in one YAML file, checked before anything is loaded.

Each stage of the job has its own small frozen model; there is no flat bag of two hundred fields. Recipes are strict: an
unknown key is an error that names the nearest key, because a misspelt ``learning_rte`` that silently trains with the
default is the commonest way to waste a night. The resolved recipe, defaults and overrides included, is saved with the
run, so a run can be repeated from its folder alone. Recipes stop at the verb: ``pipeline.py`` unpacks them and every
function below takes plain arguments.

Shorthands, so that ``medcot run data=my.jsonl`` reads as it is meant: a plain string given for ``model``, ``data``,
``evaluate`` or ``tracking`` stands for that stage's first key (``source`` or ``tracker``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from enum import StrEnum
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from medcot.errors import RecipeError, did_you_mean


class Precision(StrEnum):
    """How the frozen base weights are held."""

    AUTO = "auto"
    NF4 = "nf4"
    INT8 = "int8"
    FP8 = "fp8"
    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"


class OverLength(StrEnum):
    """What happens to a row longer than ``model.max_seq_length``; none of them ever cuts the answer or EOS."""

    DROP = "drop"
    ERROR = "error"
    TRUNCATE_THINK = "truncate_think"


class Checkpointing(StrEnum):
    """Whether activations are kept, recomputed, or kept in host memory."""

    ON = "on"
    OFF = "off"
    OFFLOAD = "offload"
    AUTO = "auto"


_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")

PositiveInt = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Stage(BaseModel):
    """Base of the stage models: frozen and strict; a lone string stands for the stage's first key."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _expand_shorthand(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {next(iter(cls.model_fields)): value}
        return {} if value is None else value


class ModelStage(Stage):
    """Where the weights come from and how they are held."""

    source: str = "embedded"  # Hub id, folder, GGUF file, or "embedded"
    revision: str | None = None
    precision: Precision = Precision.AUTO
    max_seq_length: PositiveInt = 2048
    trust_remote_code: bool = False
    allow_pickle: bool = False


class PromptStage(Stage):
    """How a question becomes text."""

    style: Literal["tutorial", "chat", "short"] = "tutorial"


class DataStage(Stage):
    """The training rows."""

    source: str = "builtin:clinic"  # Hub id, file, folder or "builtin:clinic"; "[:500]" behind it takes the first 500
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    columns: dict[Literal["question", "reasoning", "response"], str] = Field(default_factory=dict)
    over_length: OverLength = OverLength.DROP
    num_proc: PositiveInt = 2


class LoraStage(Stage):
    """The low-rank adapter."""

    r: PositiveInt = 16
    alpha: PositiveInt = 16
    dropout: Fraction = 0.0
    bias: Literal["none", "all", "lora_only"] = "none"
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    rslora: bool = False
    dora: bool = False
    init: Literal["default", "loftq", "pissa"] = "default"
    seed: int = 3407


class TrainStage(Stage):
    """The optimizer steps."""

    batch_size: PositiveInt = 8  # sequences an optimizer step
    micro_batch_size: PositiveInt | None = None  # sequences a forward; None: the whole step in one where memory allows
    max_steps: PositiveInt | None = None
    epochs: Annotated[float, Field(gt=0)] | None = None
    warmup: Annotated[float, Field(ge=0)] = 5  # steps; below 1, a share of all steps
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = "linear"
    optimizer: Literal["auto", "adamw_8bit", "adamw_torch"] = "auto"
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    train_on_prompt: bool = False
    gradient_checkpointing: Checkpointing = Checkpointing.AUTO
    accelerate: bool = True  # the engine's fast path; false runs the plain libraries
    logging_steps: PositiveInt = 10
    save_steps: PositiveInt | None = None  # None: no checkpoints; the adapter is saved at the end
    keep_checkpoints: PositiveInt = 2
    seed: int = 3407

    @field_validator("gradient_checkpointing", mode="before")
    @classmethod
    def _on_is_a_word(cls, value: Any) -> Any:
        """YAML 1.1 reads a bare ``on`` or ``off`` as a boolean."""
        return ("on" if value else "off") if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _one_length(self) -> TrainStage:
        if self.max_steps is not None and self.epochs is not None:
            raise ValueError(f"max_steps={self.max_steps} and epochs={self.epochs} are both set; set one to null")
        if self.micro_batch_size is not None and self.micro_batch_size > self.batch_size:
            raise ValueError(f"micro_batch_size={self.micro_batch_size} is larger than batch_size={self.batch_size}")
        return self


class AskStage(Stage):
    """The questions asked before and after; the tutorial's question is always among them."""

    questions: tuple[str, ...] = ()
    max_new_tokens: PositiveInt = 1200
    temperature: Annotated[float, Field(ge=0)] | None = None  # None: the model's generation_config, else 0.6
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None  # None: the model's generation_config, else 0.95
    seed: int = 3407
    ignore_eos: bool = False  # write each answer to its limit, to measure speed


class EvaluateStage(Stage):
    """The graded questions asked before and after, greedily."""

    source: str | None = "builtin:clinic[:100]"  # null: no graded evaluation
    instruction: str | None = None  # put behind each graded question, for models not trained on the answer's form
    max_new_tokens: PositiveInt = 200
    batch_size: PositiveInt = 100


class TrackingStage(Stage):
    """Where metrics go besides the run folder."""

    tracker: Literal["auto", "none", "trackio", "wandb", "tensorboard"] = "auto"
    project: str = "medcot"
    job_type: str = "training"
    run_name: str | None = None
    anonymous: Literal["allow", "must", "never"] | None = None


class SaveStage(Stage):
    """What is kept at the end, besides the adapter, which always is."""

    merged: bool = False  # 16-bit safetensors with the adapter merged in


class PushStage(Stage):
    """What goes to the Hub; nothing unless a repository is named."""

    adapter: str | None = None  # repository id, e.g. "me/my-adapter"
    merged: str | None = None  # a repository of its own: an adapter beside merged weights would be applied twice
    private: bool = True

    @model_validator(mode="after")
    def _two_repositories(self) -> PushStage:
        if self.adapter is not None and self.adapter == self.merged:
            raise ValueError(
                f"adapter and merged both go to '{self.adapter}'; loaders would apply the adapter a second time to the"
                " merged weights; name two repositories"
            )
        return self


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
    given = {**dict(_flatten(stages or {})), **_parse_overrides(overrides)}
    for key, value in given.items():
        _set_dotted(values, key, value)
    for one, other in (("train.max_steps", "train.epochs"), ("train.epochs", "train.max_steps")):
        if given.get(one) is not None and other not in given:
            _set_dotted(values, other, None)  # a length that is given takes the place of the recipe's own
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
        if isinstance(value, Mapping) and not (prefix == "data." and key == "columns"):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value) if isinstance(value, Path) else value


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
    for stage in stages:
        inner = values.get(stage)
        if not isinstance(inner, dict):
            # A shorthand string set earlier, as in "data: my.jsonl" then data.config=en, keeps its meaning.
            first = _first_key(stage)
            inner = {first: inner} if first and inner is not None else {}
            values[stage] = inner
        values = inner
    first = _first_key(last) if not stages and isinstance(value, str) and isinstance(values.get(last), dict) else None
    if first:
        values[last][first] = value
    else:
        values[last] = value


def _first_key(stage: str) -> str | None:
    """The key that a lone string stands for; ``None`` where ``stage`` is no stage of a recipe."""
    model = _stage_model(Recipe, stage)
    return next(iter(model.model_fields)) if model else None


def _stage_model(parent: type[Stage], name: str) -> type[Stage] | None:
    field = parent.model_fields.get(name)
    annotation = field.annotation if field else None
    return annotation if isinstance(annotation, type) and issubclass(annotation, Stage) else None


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
        inner = _stage_model(model, stage)
        if inner is None:
            return []
        model = inner
    return list(model.model_fields)
