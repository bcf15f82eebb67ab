"""A language model in memory: its precision, its tokenizer, and the low-rank adapter that is trained on it.

``load`` brings any accepted source (weights.py, embedded.py) into memory in the precision asked for (precision.py) with
its parameters frozen; ``attach_lora`` adds what is trained. Choices that are ours:

- NF4 is bitsandbytes' with double quantisation, as in QLoRA (https://arxiv.org/abs/2305.14314). A checkpoint that is
  already quantised, such as the unsloth copies ending in ``-bnb-4bit``, is taken as it is.
- PEFT's ``prepare_model_for_kbit_training`` is not called. It would raise every norm, the embedding and the output head
  to fp32: 2 GB more for Llama 8B, and slower. Frozen weights need no fp32 copy; the LoRA weights, which are trained,
  are kept in fp32 always.
- A missing pad token becomes the EOS token, as in the distills. That is safe only because labels are masked by
  position and never by id: masking by id would hide every EOS and the model would never learn to stop.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
)

from medcot.embedded import convert_embedded, fetch_embedded
from medcot.engine import check_fp8, hold_in_fp8
from medcot.errors import MissingExtraError, ModelError, did_you_mean, one_of
from medcot.precision import DTYPES, choose_device, choose_precision, quantised_precision
from medcot.quiet import quiet_libraries
from medcot.shapes import DISTILLS, Shape
from medcot.weights import (
    EMBEDDED,
    Weights,
    check_complete,
    find_weights,
    first_line,
    load_gguf,
    load_gguf_tokenizer,
    model_shape,
    read_config,
)

with quiet_libraries():  # PEFT imports bitsandbytes, which on a CPU advises at import to install a library of kernels
    from peft import LoftQConfig, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "DISTILLS",
    "LoadedModel",
    "Shape",
    "attach_lora",
    "choose_device",
    "choose_precision",
    "fetch_embedded",
    "initial_pissa_weights",
    "load",
    "load_adapter",
    "load_tokenizer",
    "model_shape",
    "read_adapter_config",
]

INITS = ("default", "pissa", "loftq")  # ways to begin an adapter
SEVEN_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# PiSSA takes the strongest directions out of the base weights. An adapter for the unmodified base can be written only
# by someone who still has the initial A and B; they live as long as the model does.
_INITIAL_PISSA: WeakKeyDictionary[torch.nn.Module, dict[str, torch.Tensor]] = WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A frozen base model, ready to generate or to be tuned."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: str  # as the caller wrote it
    resolved: str  # exactly what was read: "id@commit" or a path
    precision: str  # nf4, int8, bf16, fp16, fp32, or the method of an already quantised checkpoint
    dtype: torch.dtype  # of activations
    num_params: int  # logical: a packed 4-bit weight counts as the weights it stands for
    device: torch.device
    name: str  # by which plain libraries find the base: Hub id or absolute path
    revision: str | None  # the Hub commit
    notes: tuple[str, ...] = ()  # what the user should know about the choices made, one sentence each


def load(
    source: str,
    *,
    precision: str = "auto",
    revision: str | None = None,
    max_seq_length: int = 2048,
    device: str = "auto",
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load a base model and its tokenizer, frozen and in evaluation mode.

    Args:
        source: Hub id, folder, GGUF file or ``"embedded"``.
        precision: auto, nf4, int8, fp8, bf16, fp16 or fp32.
        revision: branch, tag or commit of a Hub repository.
        max_seq_length: longest row in tokens that will be used.
        device: ``"auto"`` (the current CUDA device, else the CPU) or a torch device.
        allow_pickle: accept pickled weights where there are no others.
        trust_remote_code: accept a repository's own Python files.

    Raises:
        UnsafeWeightsError: pickled weights or remote code that were not allowed.
        ModelError: the source, precision or length cannot be used.
        NetworkError: something must be fetched and cannot be.
        MissingExtraError: bitsandbytes is needed and absent.
    """
    target = choose_device(device)
    chosen, dtype, note = choose_precision(precision, target)
    if source == EMBEDDED:
        weights = Weights(folder=(folder := convert_embedded(dtype)), name=str(folder))
    else:
        weights = find_weights(
            source, revision=revision, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code
        )
    config = read_config(weights, trust_remote_code=trust_remote_code)
    _check_config(config, weights, max_seq_length, trust_remote_code)
    chosen, notes = _settle_precision(config, weights, chosen, precision, dtype, [note] if note else [])
    if chosen == "fp8":
        check_fp8(config.model_type, target)
    tokenizer = _load_tokenizer(weights, trust_remote_code)
    model = _load_weights(config, weights, chosen, dtype, target, trust_remote_code)
    model.requires_grad_(False).eval()
    num_params = model.num_parameters()
    if chosen == "fp8":
        hold_in_fp8(model)
    # PEFT writes this name into every adapter; a snapshot folder inside the Hub's cache would help nobody.
    model.name_or_path = model.config._name_or_path = weights.name
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        source=source,
        resolved=weights.resolved,
        precision=chosen,
        dtype=dtype,
        num_params=num_params,
        device=target,
        name=weights.name,
        revision=weights.commit,
        notes=tuple(notes),
    )


def load_tokenizer(
    source: str,
    *,
    precision: str = "auto",
    revision: str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> PreTrainedTokenizerBase:
    """Load a source's tokenizer without its weights, for plans; arguments and errors as for ``load``."""
    if source == EMBEDDED:
        _, dtype, _ = choose_precision(precision, choose_device())
        weights = Weights(folder=(folder := convert_embedded(dtype)), name=str(folder))
    else:
        weights = find_weights(
            source,
            revision=revision,
            allow_pickle=allow_pickle,
            trust_remote_code=trust_remote_code,
            config_only=True,
        )
    return _load_tokenizer(weights, trust_remote_code)


def _check_config(config: PreTrainedConfig, weights: Weights, max_seq_length: int, trust_remote_code: bool) -> None:
    kind = config.model_type
    known = kind in CONFIG_MAPPING and CONFIG_MAPPING[kind] in MODEL_FOR_CAUSAL_LM_MAPPING
    if not known and not (trust_remote_code and "auto_map" in weights.config):
        raise ModelError(
            f"'{weights.name}' has architecture '{kind}', which is no text decoder that transformers knows",
            "The model must predict the next token of a text",
            "Choose a Llama or Qwen2 model, such as the six DeepSeek-R1 distills",
        )
    longest = config.get_text_config().to_dict().get("max_position_embeddings")
    if longest is not None and max_seq_length > longest:
        raise ModelError(
            f"max_seq_length is {max_seq_length}",
            f"'{weights.name}' was made for at most {longest} tokens",
            f"Set model.max_seq_length={longest} or less",
        )


def _settle_precision(
    config: PreTrainedConfig, weights: Weights, chosen: str, asked: str, dtype: torch.dtype, notes: list[str]
) -> tuple[str, list[str]]:
    """Return the precision that will really be held; an already quantised checkpoint keeps its own."""
    quantised = weights.config.get("quantization_config")
    if quantised is not None:
        held = quantised_precision(quantised)
        if (asked, held) == ("fp8", "nf4"):
            notes.append("the checkpoint is in NF4; its weights are rounded once more, to FP8")
            chosen = "fp8"
        elif asked not in ("auto", held):
            notes.append(f"the checkpoint is already quantised ({held}); precision {asked} cannot be made from it")
        # The checkpoint names the dtype of its maker's GPU; a T4 cannot compute in bf16.
        if "bnb_4bit_compute_dtype" in quantised:
            config.quantization_config = {**quantised, "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch.")}
        chosen = chosen if (asked, held) == ("fp8", "nf4") else held
        notes = [n for n in notes if not n.startswith("precision auto")]
    elif chosen in ("nf4", "int8") and weights.gguf is not None:
        raise ModelError(
            f"precision {chosen} with the GGUF file '{weights.name}'",
            "A GGUF file's weights are already rounded, and are unpacked to 16 or 32 bit",
            "Set model.precision=auto, or name the original model's folder or Hub id",
        )
    if chosen in ("nf4", "int8") and importlib.util.find_spec("bitsandbytes") is None:
        raise MissingExtraError(
            f"precision {chosen} without bitsandbytes",
            "4-bit and 8-bit weights are held by bitsandbytes",
            "Run 'pip install bitsandbytes', or set model.precision=auto",
        )
    return chosen, notes


def _load_tokenizer(weights: Weights, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    try:
        if weights.gguf is not None:
            tokenizer = load_gguf_tokenizer(weights.folder / weights.gguf)
        else:
            with quiet_libraries():
                tokenizer = AutoTokenizer.from_pretrained(weights.folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(
            f"'{weights.name}' has no tokenizer that can be read: {first_line(error)}",
            "A model comes with its tokenizer (tokenizer.json, or tokenizer.model and its configuration)",
            "Copy the tokenizer files of the original model into the folder",
        ) from None
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer of '{weights.name}' has no EOS token",
            "Training ends each answer with EOS, or the model would never learn to stop",
            "Set eos_token in its tokenizer_config.json",
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _load_weights(
    config: PreTrainedConfig,
    weights: Weights,
    precision: str,
    dtype: torch.dtype,
    device: torch.device,
    trust_remote_code: bool,
) -> PreTrainedModel:
    """Read the weights onto the device, quantising each as it arrives where nf4 or int8 is asked for."""
    read: Any = AutoModelForCausalLM.from_pretrained
    try:
        if weights.gguf is not None:
            return load_gguf(weights.folder / weights.gguf, dtype, device=device, config=config)
        with quiet_libraries():
            model, info = read(
                weights.folder,
                config=config,
                dtype=dtype,
                quantization_config=None if "quantization_config" in weights.config else _packing(precision, dtype),
                device_map={"": device},
                attn_implementation="sdpa",
                use_safetensors=not weights.pickled,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
            )
    except torch.OutOfMemoryError:
        raise ModelError(
            f"'{weights.name}' in {precision} does not fit into the memory of {device}",
            "The weights alone need about 2 bytes a parameter in 16 bit and 0.6 in nf4",
            "Set model.precision=nf4, or choose a smaller model",
        ) from None
    except ModelError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise ModelError(
            f"the weights of '{weights.name}' cannot be read: {first_line(error)}",
            "They must fit the architecture in config.json and be whole",
            "Download them again, or check that the folder belongs to one model",
        ) from None
    check_complete(info, weights.name)
    return cast("PreTrainedModel", model)


def _packing(precision: str, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    if precision == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    if precision != "nf4":
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def attach_lora(
    loaded: LoadedModel,
    *,
    r: int = 16,
    alpha: int = 16,
    dropout: float = 0.0,
    bias: str = "none",
    targets: Sequence[str] = SEVEN_PROJECTIONS,
    rslora: bool = False,
    dora: bool = False,
    init: str = "default",
    seed: int = 3407,
) -> PeftModel:
    """Wrap the model with a trainable low-rank adapter named ``default``, its weights in fp32.

    The random start depends on ``seed`` alone, and the process's own random state is left as it was. The base model is
    changed in place (its linear layers are wrapped; PiSSA and LoftQ also change its weights).

    Args:
        loaded: what ``load`` returned.
        r: rank.
        alpha: the adapter's output is scaled by alpha / r, or alpha / sqrt(r) with rsLoRA.
        dropout: on the adapter's input, while training.
        bias: none, all or lora_only.
        targets: names of the linear layers that get an adapter.
        rslora: https://arxiv.org/abs/2312.03732
        dora: https://arxiv.org/abs/2402.09353
        init: default (A random, B zero), pissa (https://arxiv.org/abs/2404.02948) or loftq
            (https://arxiv.org/abs/2310.08659).
        seed: of the random start.

    Raises:
        ModelError: a target that the model lacks, or an initialisation that its precision or DoRA rules out.
    """
    _check_targets(loaded, targets)
    _check_init(loaded, init, dora)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        bias=cast("Any", bias),
        target_modules=list(targets),
        use_rslora=rslora,
        use_dora=dora,
        init_lora_weights=cast("Any", True if init == "default" else init),
        loftq_config=cast("Any", LoftQConfig(loftq_bits=4, loftq_iter=1) if init == "loftq" else {}),
        revision=loaded.revision,
    )
    devices = [loaded.device] if loaded.device.type == "cuda" else []
    with quiet_libraries(), torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        model = get_peft_model(loaded.model, config, autocast_adapter_dtype=True)
    if init == "pissa":
        _INITIAL_PISSA[model] = {
            name: tensor.detach().to("cpu", torch.float32, copy=True)
            for name, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items()
        }
    return cast("PeftModel", model)


def initial_pissa_weights(model: PeftModel) -> dict[str, torch.Tensor]:
    """Return the A and B with which ``attach_lora(init="pissa")`` started, fp32 on the CPU, by their saved names."""
    assert model in _INITIAL_PISSA, "the model was not made by attach_lora(init='pissa') in this process"
    return _INITIAL_PISSA[model]


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Return a saved adapter's configuration.

    Raises:
        ModelError: the folder holds no adapter.
    """
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise ModelError(
            f"'{folder}' has no adapter_config.json",
            "An adapter folder is one that PEFT or medcot saved",
            "Check the path; a run keeps its adapter in its folder adapter/",
        )
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values


def load_adapter(loaded: LoadedModel, folder: Path) -> PeftModel:
    """Apply a saved adapter to a base model, for generation; the base is wrapped in place.

    Raises:
        ModelError: the folder holds no adapter, or one that does not fit.
    """
    if read_adapter_config(folder).get("init_lora_weights") == "loftq":
        _check_init(loaded, "loftq", dora=False)  # PEFT rounds the base again when it loads the adapter
    try:
        with quiet_libraries():
            model = PeftModel.from_pretrained(loaded.model, folder, is_trainable=False)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"the adapter '{folder}' cannot be applied to '{loaded.source}': {first_line(error)}",
            "adapter_config.json and adapter_model.safetensors must be whole and made for the same base",
            "Check the folder and the base model named in its adapter_config.json",
        ) from None
    return cast("PeftModel", model.eval())


def _check_targets(loaded: LoadedModel, targets: Sequence[str]) -> None:
    layers = [name for name, module in loaded.model.named_modules() if isinstance(module, torch.nn.Linear)]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in layers):
            raise ModelError(
                f"lora.targets names '{target}', which '{loaded.source}' lacks",
                "A target is the name of a linear layer of the model",
                did_you_mean(target, {name.rpartition(".")[2] for name in layers}),
            )


def _check_init(loaded: LoadedModel, init: str, dora: bool) -> None:
    if init not in INITS:
        raise ModelError(f"lora.init '{init}'", *one_of(init, INITS))
    if init == "default":
        return
    if init == "loftq" and loaded.device.type != "cuda":
        raise ModelError(
            f"lora.init=loftq on {loaded.device.type}",
            "PEFT computes LoftQ's 4-bit rounding on a GPU",
            "Run on a CUDA device, or set lora.init=pissa or default",
        )
    if loaded.precision not in DTYPES:
        reason = (
            "LoftQ itself quantises the 16-bit weights and starts the adapter at what that loses; weights that are"
            " already quantised have lost it"
            if init == "loftq"
            else "PiSSA moves the strongest directions of the weights into the adapter and needs them in 16 or 32 bit"
        )
        raise ModelError(
            f"lora.init={init} with a base in {loaded.precision}",
            reason,
            "Set model.precision=auto, or lora.init=default",
        )
    if init == "pissa" and dora:
        raise ModelError(
            "lora.init=pissa with lora.dora=true",
            "A PiSSA adapter is saved converted to the unmodified base, and DoRA's norms cannot be converted",
            "Choose one of the two",
        )
