"""The stages of a recipe: what each part of a job needs, as small frozen models.

There is no flat bag of two hundred fields, and no field that nothing reads: a key that is unknown, or that another one
makes idle, is an error. A key that stands for the absence of something is ``null`` (or nothing, or an empty list), and
a stage may have a shorthand: a plain string stands for its first key, a list of data sources for ``data.sources``, a
number given for ``data.validation`` for its fraction. ``recipe.py`` reads and saves them.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator


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


class Identifiers(StrEnum):
    """What happens to spans of text that may identify a person."""

    REPORT = "report"
    MASK = "mask"
    REFUSE = "refuse"


class Duplicates(StrEnum):
    """Which copies of a row are left out of training, all but the first."""

    EXACT = "exact"
    NEAR = "near"  # exact ones too
    NONE = "none"


DEFAULT_SOURCE = "builtin:clinic"

PositiveInt = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Stage(BaseModel):
    """Base of the stage models: frozen and strict, with a shorthand."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def expand(cls, value: Any) -> Any:
        """Return what a shorthand stands for: nothing for all defaults, a lone string for the first key."""
        if isinstance(value, str | Path):
            return {next(iter(cls.model_fields)): str(value)}
        return {} if value is None else value

    @model_validator(mode="before")
    @classmethod
    def _expand_shorthand(cls, value: Any) -> Any:
        return cls.expand(value)


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


class Origin(Stage):
    """Where rows come from."""

    source: str | None = None  # Hub id, file, folder or "builtin:clinic"; "[:500]" behind it takes the first 500
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    columns: dict[Literal["question", "reasoning", "response"], str] = Field(default_factory=dict)

    @field_validator("source", mode="before")
    @classmethod
    def _path_is_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, Path) else value

    @property
    def details(self) -> list[str]:
        """What is said of it beside its source, as ``key=value``."""
        blank = Origin()
        values = [(key, getattr(self, key)) for key in Origin.model_fields if key != "source"]
        return [f"{key}={value}" for key, value in values if value != getattr(blank, key)]


class SourceStage(Origin):
    """One of several sources of training rows."""

    source: str
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None  # share of the rows, against the others'


class ValidationStage(Origin):
    """Rows that are never trained on, whose loss is watched: a share of the training questions, or a source."""

    fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0  # of the questions; 0 for none

    @classmethod
    def expand(cls, value: Any) -> Any:
        """Take a lone number as the fraction."""
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return {"fraction": value} if is_number else super().expand(value)

    @model_validator(mode="after")
    def _one_way(self) -> ValidationStage:
        if self.source is not None and self.fraction:
            raise ValueError(f"fraction={self.fraction} and source={self.source} are both set; set one to null or 0")
        if self.source is None and self.details:
            raise ValueError(f"{', '.join(self.details)} without a source; name it, or leave them out")
        return self


class DataStage(Origin):
    """The training rows: of one ``source``, or of several ``sources``."""

    sources: tuple[SourceStage, ...] = ()
    repeat: bool = False  # with weights: small sources are gone through again, instead of much of the large left out
    validation: ValidationStage = ValidationStage()
    seed: int = 3407  # of the held-out questions and of the mixture
    accept: tuple[str, ...] = ()  # ids of red findings that do not stop the run
    identifiers: Identifiers = Identifiers.REPORT
    against: tuple[str, ...] | None = None  # benchmarks looked for in the rows; null: those that evaluate uses
    remove_contaminated: bool = True
    remove_duplicates: Duplicates = Duplicates.EXACT
    over_length: OverLength = OverLength.DROP
    num_proc: PositiveInt = 2

    @property
    def origins(self) -> tuple[Origin, ...]:
        """The training sources, in order."""
        return self.sources or (self,)

    @property
    def named(self) -> str:
        """The training sources in words."""
        return " + ".join(str(origin.source) for origin in self.origins)

    @classmethod
    def expand(cls, value: Any) -> Any:
        """Take a list as the sources."""
        return {"sources": value} if isinstance(value, list | tuple) else super().expand(value)

    @model_validator(mode="before")
    @classmethod
    def _name_a_source(cls, value: Any) -> Any:
        value = cls.expand(value)
        if isinstance(value, dict) and "source" not in value and not value.get("sources"):
            return {**value, "source": DEFAULT_SOURCE}
        return value

    @field_validator("sources", "accept", "against", mode="before")
    @classmethod
    def _list(cls, value: Any, info: ValidationInfo) -> Any:
        """Take a lone value for a list of one."""
        if value is None and info.field_name != "against":
            return ()
        return (value,) if isinstance(value, str | Path | dict) else value

    @model_validator(mode="after")
    def _one_way(self) -> DataStage:
        if not self.sources:
            if self.source is None:
                raise ValueError("source=null and no sources; name one, or leave both out for the built-in problems")
            if self.repeat:
                raise ValueError("repeat=true goes with data.sources that have weights; set it to false")
            return self
        if self.source is not None:
            raise ValueError(
                f"source={self.source} and sources (of {len(self.sources)}) are both set; put it among the sources,"
                " or set one of them to null"
            )
        if self.details:
            raise ValueError(f"{', '.join(self.details)} beside sources; each source has its own, so put them there")
        weights = [source.weight for source in self.sources]
        if None in weights and any(weights):
            raise ValueError(
                f"sources have the weights {', '.join('null' if w is None else f'{w:g}' for w in weights)};"
                " give all of them one, or none of them, which takes every row"
            )
        if self.repeat and None in weights:
            raise ValueError("repeat=true, but the sources have no weights; give them, or set repeat=false")
        return self


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
    validate_steps: PositiveInt | None = None  # None: some ten times a run; at its start and end either way
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
    """The graded questions asked before and after."""

    source: str | None = "builtin:clinic:100"  # tasks and suites ("medcot tasks" lists them); null: none
    ask_form: bool = True  # ask for the last line "Final answer: X"; false where training teaches it
    max_new_tokens: PositiveInt = 200
    temperature: Annotated[float, Field(ge=0)] = 0.0  # 0 is greedy
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seeds: PositiveInt = 1  # answers a question
    seed: int = 3407  # of the first of them
    batch_size: PositiveInt = 100
    reuse: bool = True  # answers that the same model gave to the same questions before, in any run or evaluation

    @model_validator(mode="after")
    def _draw_to_differ(self) -> EvaluateStage:
        if self.seeds > 1 and self.temperature == 0:
            raise ValueError(f"seeds={self.seeds} with temperature=0; greedy answers are all alike, so raise it to 0.6")
        return self


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
