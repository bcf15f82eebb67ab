"""``FastLanguageModel``: the tutorial's way to load a model and to give it an adapter.

Both calls return what transformers and PEFT would, ``LlamaForCausalLM`` and ``PeftModelForCausalLM``, accelerated, with
a few methods more (``methods.py``). Choices that are ours:

- ``load_in_4bit=True`` is NF4 on a GPU. No other checkpoint is fetched in its place: a 16-bit one is quantised as it
  arrives, so that merging finds the 16-bit weights again. On a CPU it is ``model.precision=auto``, 16 bit where the
  processor has it: NF4 saves a GPU's memory, costs accuracy (``precision.py``) and is slower than 16 bit there, since
  the engine has no 4-bit products for a CPU. Who wants it all the same writes it into a recipe.
- ``use_gradient_checkpointing="unsloth"`` asks for less memory at little cost in time. What a step keeps is planned
  from the memory that is free (``train.gradient_checkpointing=auto``); the gradient is the same in any case.
- ``loftq_config=None`` is no LoftQ. A configuration, or ``init_lora_weights="loftq"``, is ``lora.init=loftq``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from medcot import engine
from medcot.answering import find_adapter
from medcot.compat.methods import ModelMethods, TokenizerMethods, extend
from medcot.compat.notes import ArgumentError, NotCoveredError, pass_over, say_once
from medcot.compat.saving import is_tuned
from medcot.compat.session import Session, open_session, session_of
from medcot.errors import ModelError
from medcot.model import SEVEN_PROJECTIONS, load_adapter, read_adapter_config
from medcot.precision import DTYPES, choose_device
from medcot.recipe import Recipe, load_recipe
from medcot.secrets import SecretName, take_secret
from medcot.sharing import attach_fresh, load_base
from medcot.stages import Checkpointing

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase


LOAD = "FastLanguageModel.from_pretrained"
ATTACH = "FastLanguageModel.get_peft_model"
_ONE_DEVICE = "is not needed: a model is loaded onto one device, the current GPU or else the CPU"
_DECODING = "is not needed: medcot's own decoding answers"
IDLE_LOADING = {
    "device_map": _ONE_DEVICE,
    "fast_inference": _DECODING,
    "gpu_memory_utilization": _DECODING,
    "float8_kv_cache": _DECODING,
    "disable_log_stats": _DECODING,
    "max_lora_rank": _DECODING,
    "fix_tokenizer": "is not needed: a tokenizer without pad token pads with EOS, and labels are masked by position",
    "use_gradient_checkpointing": "is taken from get_peft_model",
    "attn_implementation": "is not needed: medcot's own attention is used",
    "use_exact_model_name": "is not needed: the model is loaded by exactly the name given",
    "local_files_only": "is not needed: a folder needs no network, and HF_HUB_OFFLINE=1 keeps to the cache",
    "random_state": "is not needed: loading draws nothing",
    "offload_embedding": "is not needed: what a step keeps is planned from the memory that is free",
}
IDLE_ATTACHING = {
    "max_seq_length": "is taken from from_pretrained",
    "temporary_location": "is not needed: nothing is offloaded to disk",
    "task_type": "is not needed: it is CAUSAL_LM",
}
FOREIGN = {  # to do nothing would give another model than was asked for
    "full_finetuning": "medcot trains adapters; call get_peft_model, with a larger r for more weights",
    "rope_scaling": "Set it in the model's config.json",
    "resize_model_vocab": "Use the model's own vocabulary",
    "modules_to_save": "Leave it out; raise r for more weights to train",
    "layers_to_transform": "Leave it out: every layer gets an adapter",
    "layers_pattern": "Leave it out: every layer gets an adapter",
    "rank_pattern": "Leave it out: every adapter has rank r",
    "alpha_pattern": "Leave it out: every adapter has lora_alpha",
}


def is_bfloat16_supported() -> bool:
    """Whether the current GPU computes in bf16; false without one, where ``fp16``/``bf16`` mean nothing."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


class FastLanguageModel:
    """The tutorial's entry points; all are static, as there."""

    @staticmethod
    def from_pretrained(
        model_name: str = "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
        max_seq_length: int = 2048,
        dtype: torch.dtype | str | None = None,
        load_in_4bit: bool = True,
        load_in_8bit: bool = False,
        token: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        **others: Any,
    ) -> tuple[Any, PreTrainedTokenizerBase]:
        """Load a model, frozen and accelerated, and its tokenizer.

        Args:
            model_name: Hub id, folder, GGUF file, ``"embedded"``, or a folder or Hub id of an adapter, whose base is
                loaded then and to which it is applied, ready to be trained on.
            max_seq_length: longest row in tokens.
            dtype: of activations, and of weights that are not quantised; ``None`` is bf16, or what the device has.
            load_in_4bit: hold the weights in NF4.
            load_in_8bit: hold them in 8 bit.
            token: a Hub token, kept for this process's later pushes too; ``None`` finds what ``medcot doctor`` shows.
            revision: branch, tag or commit of a Hub repository.
            trust_remote_code: accept a repository's own Python files.
            **others: accepted where they have no meaning here, and said once.

        Raises:
            MedcotError: the model cannot be loaded, or an argument asks for what medcot does not do.
        """
        _refuse_foreign(others, LOAD)
        pass_over(others, IDLE_LOADING, LOAD, _names(FastLanguageModel.from_pretrained))
        if token is not None:
            take_secret(SecretName.HUGGING_FACE, token, f"token= of {LOAD}")
        model_name = str(model_name)
        adapter = _adapter_of(model_name)
        source = str(read_adapter_config(adapter)["base_model_name_or_path"]) if adapter else model_name
        stage = {
            "source": source,
            "precision": _precision(dtype, load_in_4bit=load_in_4bit, load_in_8bit=load_in_8bit),
            "max_seq_length": max_seq_length,
            "revision": None if adapter else revision,
            "trust_remote_code": trust_remote_code,
        }
        recipe = _tutorial_recipe(stage)
        loaded = load_base(recipe)
        for note in loaded.notes:
            say_once(note)
        session = Session(recipe, loaded)
        model = loaded.model if adapter is None else _apply(adapter, session)
        _make_fast(model, session)
        return model, loaded.tokenizer

    @staticmethod
    def get_peft_model(
        model: Any,
        r: int = 16,
        target_modules: list[str] | str = "all-linear",
        lora_alpha: int = 16,
        lora_dropout: float = 0.0,
        bias: str = "none",
        use_gradient_checkpointing: bool | str = "unsloth",
        random_state: int = 3407,
        use_rslora: bool = False,
        use_dora: bool = False,
        loftq_config: Any = None,
        init_lora_weights: bool | str = True,
        **others: Any,
    ) -> PeftModel:
        """Give a model its adapter, to be trained; a model that has one keeps it.

        Args:
            model: what ``from_pretrained`` returned.
            r: rank.
            target_modules: names of linear layers, or ``"all-linear"`` for the seven projections.
            lora_alpha: the adapter's output is scaled by lora_alpha / r.
            lora_dropout: on the adapter's input.
            bias: none, all or lora_only.
            use_gradient_checkpointing: ``"unsloth"`` plans from the free memory, true computes layers again, false
                keeps everything.
            random_state: of the random start.
            use_rslora: scale by lora_alpha / sqrt(r).
            use_dora: DoRA; it trains on the plain path.
            loftq_config: PEFT's LoftQ configuration; ``None`` or empty for none.
            init_lora_weights: true, ``"pissa"`` or ``"loftq"``.
            **others: accepted where they have no meaning here, and said once.

        Raises:
            MedcotError: a target that the model lacks, or an argument that asks for what medcot does not do.
        """
        _refuse_foreign(others, ATTACH)
        pass_over(others, IDLE_ATTACHING, ATTACH, _names(FastLanguageModel.get_peft_model))
        session = session_of(model, ATTACH)
        stage: dict[str, Any] = {
            "r": r,
            "alpha": lora_alpha,
            "dropout": lora_dropout,
            "bias": bias,
            "rslora": use_rslora,
            "dora": use_dora,
            "init": _initialisation(init_lora_weights, loftq_config),
            "seed": random_state,
        }
        named = [target_modules] if isinstance(target_modules, str) else list(target_modules)
        stage["targets"] = list(SEVEN_PROJECTIONS) if named == ["all-linear"] else named
        if is_tuned(model):
            return _keep_adapter(model, stage)
        session.settle("lora", ATTACH, **stage)
        session.settle("train", ATTACH, gradient_checkpointing=_checkpointing(use_gradient_checkpointing).value)
        tuned = attach_fresh(session.recipe, session.loaded)
        _make_fast(tuned, session)
        return tuned

    @staticmethod
    def for_inference(model: Any) -> Any:
        """Switch dropout off; answers are fast either way, and training may go on afterwards."""
        session_of(model, "FastLanguageModel.for_inference")
        return model.eval()

    @staticmethod
    def for_training(model: Any, use_gradient_checkpointing: bool | str | None = None) -> Any:
        """Switch dropout on; ``SFTTrainer.train`` does so by itself."""
        session = session_of(model, "FastLanguageModel.for_training")
        if use_gradient_checkpointing is not None:
            word = _checkpointing(use_gradient_checkpointing).value
            session.settle("train", "FastLanguageModel.for_training", gradient_checkpointing=word)
        return model.train()


def _tutorial_recipe(model_stage: dict[str, Any]) -> Recipe:
    """The tutorial's recipe around another model; what later calls say replaces the rest."""
    return load_recipe("tutorial-8b", stages={"name": "notebook", "model": model_stage})


def _make_fast(model: Any, session: Session) -> None:
    explanation = engine.accelerate(model)
    if not explanation.fast:
        say_once(f"this model takes the plain path, which is slower: {explanation.reason}")
    extend(model, ModelMethods)
    extend(session.loaded.tokenizer, TokenizerMethods)
    open_session(model, session)


def _precision(dtype: torch.dtype | str | None, *, load_in_4bit: bool, load_in_8bit: bool) -> str:
    if load_in_4bit and load_in_8bit:
        raise ArgumentError(
            "load_in_4bit=True and load_in_8bit=True", "Weights are held in one precision", "Set one of them to False"
        )
    if (load_in_4bit or load_in_8bit) and choose_device().type != "cpu":
        return "nf4" if load_in_4bit else "int8"
    if load_in_4bit or load_in_8bit:
        say_once("load_in_4bit and load_in_8bit are for GPUs; a CPU is faster, and more exact, in 16 or 32 bit")
    if dtype is None:
        return "auto"
    name = str(dtype).removeprefix("torch.")
    for short, known in DTYPES.items():
        if name in (short, str(known).removeprefix("torch.")):
            return short
    raise ArgumentError(
        f"dtype={dtype!r}",
        "Weights are held in float16, bfloat16 or float32",
        "Set dtype=None to choose by the device",
    )


def _initialisation(init: bool | str, loftq_config: Any) -> str:
    if loftq_config or init == "loftq":
        return "loftq"
    if init is True:
        return "default"
    if init == "pissa":
        return "pissa"
    raise NotCoveredError(
        f"init_lora_weights={init!r}",
        "An adapter starts at random (True), from PiSSA or from LoftQ",
        "Leave it out, or set 'pissa' or 'loftq'",
    )


def _checkpointing(word: bool | str) -> Checkpointing:
    if word == "unsloth":
        return Checkpointing.AUTO
    if isinstance(word, bool):
        return Checkpointing.ON if word else Checkpointing.OFF
    if word in list(Checkpointing):
        return Checkpointing(word)
    raise ArgumentError(
        f"use_gradient_checkpointing={word!r}",
        "It says whether activations are kept or computed again",
        "Use 'unsloth', True or False",
    )


def _refuse_foreign(others: dict[str, Any], where: str) -> None:
    for name, remedy in FOREIGN.items():
        if others.pop(name, None):
            raise NotCoveredError(
                f"{where} was given {name}", "It would give another model than medcot can train", remedy
            )


def _names(function: Any) -> list[str]:
    code = function.__code__
    return list(code.co_varnames[: code.co_argcount])


# Adapters that are there already --------------------------------------------------------------------------------------


def _adapter_of(name: str) -> Path | None:
    """The folder of an adapter that was saved before; ``None`` where the name is a model's."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return _adapter_on_hub(name) if name.count("/") == 1 and not folder.exists() else None
    if not (folder / "adapter_config.json").is_file():
        return None
    if (folder / "config.json").is_file():
        raise ModelError(
            f"'{name}' holds a model and an adapter",
            "Which of the two was meant is not to be seen, and transformers would apply the one to the other",
            "Move the adapter into a folder of its own, and name the folder that is meant",
        )
    return find_adapter(name)


def _adapter_on_hub(name: str) -> Path | None:
    """An adapter's files from the Hub; ``None`` where the repository has none, or cannot be asked."""
    from httpx import HTTPError
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.utils import HfHubHTTPError, OfflineModeIsEnabled

    from medcot.weights import hub_token

    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return None
    from huggingface_hub import HfApi

    try:
        names = set(HfApi().list_repo_files(name, token=hub_token()))
    except (HfHubHTTPError, OfflineModeIsEnabled, HTTPError, ValueError):
        return None  # loading the model says what is wrong
    is_adapter = "adapter_config.json" in names and "config.json" not in names
    return find_adapter(name) if is_adapter else None


def _apply(adapter: Path, session: Session) -> PeftModel:
    """Put a saved adapter on the base, its weights ready to be trained on."""
    config = read_adapter_config(adapter)
    targets = config["target_modules"]
    session.settle(
        "lora",
        LOAD,
        r=config["r"],
        alpha=config["lora_alpha"],
        rslora=bool(config.get("use_rslora")),
        targets=[targets] if isinstance(targets, str) else sorted(targets),
    )
    tuned = load_adapter(session.loaded, adapter)
    tuned.peft_config["default"].inference_mode = False
    for name, parameter in tuned.named_parameters():
        if ".lora_" in name:
            parameter.requires_grad_(True)
    return tuned


def _keep_adapter(model: PeftModel, stage: dict[str, Any]) -> PeftModel:
    """Return a model that has an adapter as it is, where the call asks for one of its kind."""
    config: Any = model.peft_config["default"]
    if (config.r, config.lora_alpha) != (stage["r"], stage["alpha"]):
        raise NotCoveredError(
            f"{ATTACH} with r={stage['r']}, lora_alpha={stage['alpha']} for a model that has an adapter of"
            f" r={config.r}, lora_alpha={config.lora_alpha}",
            "A model has one adapter",
            "Load the base again for another, or leave the call out to train on with the one that is there",
        )
    say_once(f"{ATTACH}: the model has its adapter already, and keeps it")
    return model
