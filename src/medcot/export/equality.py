"""Proof that an artefact is the model that was measured: read back by the library that will use it, and compared.

A file that opens is no proof. Rows in another order, a template with another newline, an adapter applied twice and a
wrong base all load without a word and answer fluently. So each artefact is read back by plain transformers, PEFT or
llama.cpp, without medcot's engine, and put the evaluation's questions. The tuned model answers each greedily; the
artefact reads question and answer, and at every position of the answer its prediction is compared with the tuned
model's:

- **KL divergence**, tuned model to artefact, in nats: how much more surprised somebody would be who believed the
  artefact; mean and largest over positions;
- **top-1 agreement**: the share of positions at which both would write the same token;
- **answers changed**: an answer in which every top-1 agrees is, token for token, what the artefact would have written
  by itself, so this is counted without writing anything again.

The tuned model is the run's base, held as training held it, with the run's adapter; 16-bit weights compute in float32
here, where memory has room, so that what is compared are weights and not the roundings of two programs. Only its
predictions stay in memory while artefacts are read (0.5 GB for 1,024 positions of Llama's vocabulary), never two
models, so no second process is needed; llama.cpp has one of its own for another reason (``llama_cpp.py``).

``LIMITS`` says how far a kind may be from the tuned model. A limit is what rounding explains, several times over
(measured figures beside each), and far below what a mistake does: one altered matrix, a missed permutation or a second
adapter move the mean KL by 0.1 to 10 nats.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import psutil
import torch
from torch import Tensor

from medcot.export import llama_cpp
from medcot.export.kinds import quant_of
from medcot.generate import Sampling, eos_token_ids, generate
from medcot.precision import DTYPES
from medcot.quiet import quiet_libraries
from medcot.weights import load_gguf

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from medcot.model import LoadedModel

GREEDY = Sampling(temperature=0.0, top_p=1.0)


@dataclass(frozen=True, slots=True)
class Limit:
    """How far an artefact may be from the tuned model: KL in nats at most, share of equal top-1 at least."""

    kl_mean: float
    top1: float
    reason: str


# What a kind may differ by, and why. Behind each the largest mean KL and smallest share of equal top-1 met in a correct
# export, of the embedded model (tuned by `medcot run`, 16 questions of 24 tokens) and of tiny random models.
LIMITS = {
    "exact": Limit(1e-6, 0.999, "the same weights; sums in another order"),  # 5.5e-8, 100 %
    "16bit": Limit(1e-3, 0.97, "each merged weight is rounded once, to 8 or 11 bits"),  # 2.9e-5, 100 %
    "q8_0": Limit(1e-2, 0.93, "8 bits a weight, and 8 of what llama.cpp multiplies with it"),  # 1.6e-3, 95 %
    "q6": Limit(3e-2, 0.90, "6.6 bits a weight"),  # 3.3e-3, 96 %
    "q5": Limit(1e-1, 0.85, "5.5 to 5.7 bits a weight"),  # 0.022, 78 % of a model without clear favourites
    "q4": Limit(3e-1, 0.75, "4.1 to 4.9 bits a weight"),  # 0.15, of NF4; 67 % of such a model
    "q3": Limit(6e-1, 0.65, "4 bits a weight"),  # 0.049, 72 %
    "q2": Limit(1.5, 0.50, "3.4 bits a weight"),  # 0.045, 72 %
}
_LIMIT_OF = {
    "adapter": "exact",
    "merged-32bit": "exact",
    "merged-16bit": "16bit",
    "merged-4bit": "q4",
    "f32": "16bit",  # llama.cpp keeps its cache of keys and values in F16
    "f16": "16bit",
    "bf16": "16bit",
    "q8_0": "q8_0",
    "q6_k": "q6",
    "q5_0": "q5",
    "q5_k_m": "q5",
    "q5_k_s": "q5",
    "q4_0": "q4",
    "q4_k_m": "q4",
    "q4_k_s": "q4",
    "q3_k_m": "q3",
    "q2_k": "q2",
}
_LADDER = list(LIMITS)


@dataclass(frozen=True, slots=True)
class Reference:
    """The tuned model's greedy answers and its predictions along them.

    Attributes:
        rows: token ids of prompt and answer.
        firsts: for each row the position whose prediction is the answer's first token.
        log_probs: for each row (positions, vocabulary) in float32 on the CPU.
        prompts: the prompts' token ids.
        texts: the prompts as text, control tokens written out and without a BOS that tokenizers add.
        adds_bos: whether tokenizers put BOS before ``texts``.
        held: how the tuned model held its weights and computed, in words.
        dtype: in which it computed.
        precision: in which it held its weights.
    """

    rows: list[list[int]]
    firsts: list[int]
    log_probs: list[Tensor]
    prompts: list[list[int]]
    texts: list[str]
    adds_bos: bool
    held: str
    dtype: torch.dtype
    precision: str


@dataclass(frozen=True, slots=True)
class Proof:
    """What the comparison came to; ``facts`` is the ``proof`` part of run.json."""

    prompts: int
    positions: int
    kl_mean: float
    kl_max: float
    top1: float
    answers: int
    answers_changed: int
    threshold: dict[str, Any]
    reader: str
    tuned: str
    passed: bool
    failures: list[str]  # what differs, one sentence each

    def facts(self) -> dict[str, Any]:
        """Return it for run.json."""
        return asdict(self)


@torch.no_grad()
def build_reference(
    model: Any,
    loaded: LoadedModel,
    prompts: Sequence[list[int]],
    texts: Sequence[str],
    *,
    adds_bos: bool,
    num_tokens: int,
    batch_size: int = 8,
) -> Reference:
    """Let the tuned model answer, and keep its predictions along each answer.

    Args:
        model: base and adapter, not accelerated; weights in 16 bit are widened to float32 where memory has room.
        loaded: its base.
        prompts: token ids of each prompt.
        texts: the same as text.
        adds_bos: whether tokenizers put BOS before them.
        num_tokens: of each answer at most.
        batch_size: answers written together.
    """
    dtype = choose_compute(loaded.precision, loaded.dtype, loaded.num_params, loaded.device)
    if loaded.precision in DTYPES:
        model.to(dtype)
    written = generate(
        model,
        loaded.tokenizer,
        prompts,
        max_new_tokens=num_tokens,
        sampling=GREEDY,
        seed=0,
        batch_size=batch_size,
    )
    rows = [[*prompt, *answer] for prompt, (answer, _) in zip(prompts, written, strict=True)]
    firsts = [len(prompt) - 1 for prompt in prompts]
    log_probs = [values.log_softmax(-1) for values in read_logits(model, rows, firsts)]
    name = next(known for known, value in DTYPES.items() if value == dtype)
    held = f"base in {loaded.precision} with its adapter, computed in {name} by plain transformers and PEFT"
    return Reference(rows, firsts, log_probs, list(prompts), list(texts), adds_bos, held, dtype, loaded.precision)


def choose_compute(precision: str, dtype: torch.dtype, num_params: int, device: torch.device) -> torch.dtype:
    """Return float32 where weights are in 16 or 32 bit and memory has room for them, else the dtype of activations."""
    if precision not in DTYPES:
        return dtype
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return torch.float32 if num_params * 4 * 1.2 < free else dtype


@torch.no_grad()
def read_logits(model: Any, rows: Sequence[Sequence[int]], firsts: Sequence[int]) -> list[Tensor]:
    """Return a transformers model's logits (positions, vocabulary) for each row, one forward a row."""
    found = []
    for row, first in zip(rows, firsts, strict=True):
        ids = torch.tensor([row[:-1]], device=model.device)
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=len(row) - 1 - first).logits
        found.append(logits[0].float().cpu())
    return found


def limit_of(kind: str, precision: str) -> Limit:
    """Return a kind's limit, next to a run whose base was held in ``precision``.

    Where training held the base in 8 or 4 bit and the artefact holds other weights, the two differ by the rounding of
    that precision at least: by what one rounding of as many bits may differ, and two where the artefact rounds too.
    """
    name = _LIMIT_OF[quant_of(kind) if kind.startswith(("gguf", "ollama")) else kind]
    if kind == "adapter" or precision in DTYPES:
        return LIMITS[name]
    trained = {"int8": "q6", "fp8": "q6"}.get(precision, "q4")
    wider = LIMITS[max(name, trained, key=_LADDER.index)]
    reason = f"{LIMITS[name].reason}; training held the base in {precision}"
    return Limit(wider.kl_mean * 2, 2 * wider.top1 - 1 if name in ("q4", "q3", "q2") else wider.top1, reason)


def compare(reference: Reference, logits: Sequence[Tensor], kind: str, reader: str, faults: Sequence[str]) -> Proof:
    """Judge an artefact's logits against the tuned model's predictions.

    Args:
        reference: the tuned model's.
        logits: the artefact's, for each row (positions, vocabulary); padded vocabularies may differ in size.
        kind: says what may differ.
        reader: the library that read the artefact, and its version.
        faults: what was found wrong before; any fails the proof.
    """
    divergences, equal = [], []
    for log_probs, values in zip(reference.log_probs, logits, strict=True):
        vocabulary = min(log_probs.shape[-1], values.shape[-1])
        own = values[:, :vocabulary].log_softmax(-1)
        tuned = log_probs[:, :vocabulary]
        divergences.append((tuned.exp() * (tuned - own)).sum(-1).clamp(min=0))
        equal.append(tuned.argmax(-1) == own.argmax(-1))
    kl, same = torch.cat(divergences), torch.cat(equal)
    limit = limit_of(kind, reference.precision)
    kl_mean, top1 = float(kl.mean()), float(same.float().mean())
    failures = list(faults)
    if not kl_mean <= limit.kl_mean:  # so that a NaN fails
        failures.append(f"its predictions are {kl_mean:.3g} nats from the tuned model's, of at most {limit.kl_mean:g}")
    if not top1 >= limit.top1:
        failures.append(
            f"{100 * top1:.1f} % of its likeliest tokens are the tuned model's, of at least {limit.top1:.0%}"
        )
    return Proof(
        prompts=len(reference.rows),
        positions=len(kl),
        kl_mean=kl_mean,
        kl_max=float(kl.max()),
        top1=top1,
        answers=len(equal),
        answers_changed=sum(not bool(row.all()) for row in equal),
        threshold={"kl_mean": limit.kl_mean, "top1": limit.top1},
        reader=reader,
        tuned=reference.held,
        passed=not failures,
        failures=failures,
    )


# Reading back ---------------------------------------------------------------------------------------------------------


def read_adapter(folder: Path, base: Path, reference: Reference, loaded: LoadedModel) -> tuple[list[Tensor], str]:
    """Return the logits of plain transformers and PEFT: base from its own files, adapter on it.

    Args:
        folder: the adapter.
        base: the base's folder, or its GGUF file.
        reference: gives the rows, and how the base is held.
        loaded: how the run held it; its model is not touched.
    """
    from peft import PeftModel

    with quiet_libraries():
        model: Any = PeftModel.from_pretrained(_load_plain(base, loaded), folder)
    if loaded.precision in DTYPES:
        model.to(reference.dtype)
    return read_logits(
        model.eval(), reference.rows, reference.firsts
    ), f"{_version('transformers')}, {_version('peft')}"


def read_merged(folder: Path, reference: Reference, device: torch.device) -> tuple[list[Tensor], str]:
    """Return the logits of plain transformers, which also finds out how the weights are packed."""
    from transformers import AutoModelForCausalLM

    with quiet_libraries():
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=reference.dtype, device_map={"": device})
    packed = "quantization_config" in model.config.to_dict()
    reader = _version("transformers") + (f", {_version('bitsandbytes')}" if packed else "")
    return read_logits(model.eval(), reference.rows, reference.firsts), reader


def read_gguf(path: Path, reference: Reference, config: PreTrainedConfig) -> tuple[list[Tensor], str, list[str]]:
    """Return the logits of llama.cpp, else of transformers' own reader of GGUF files; the reader; and what is wrong.

    llama.cpp also says which tokens it makes of each prompt, and these must be medcot's. transformers' reader overlooks
    some of the metadata (Llama 3's rotary frequencies, the size of Qwen3's heads), so it is given the base's
    configuration and proves the weights alone.
    """
    if not llama_cpp.is_installed():
        model = load_gguf(path, torch.float32, config=_twin(config))
        words = f"{_version('transformers')}, its own GGUF reader: weights alone (llama-cpp-python is not installed)"
        return read_logits(model.eval(), reference.rows, reference.firsts), words, []
    arrays, tokens = llama_cpp.read_logits(path, reference.rows, reference.firsts, reference.texts)
    wrong = sum(found != prompt for found, prompt in zip(tokens, reference.prompts, strict=True))
    faults = [f"llama.cpp makes other tokens of {wrong} of {len(tokens)} prompts"] if wrong else []
    return [torch.from_numpy(array) for array in arrays], llama_cpp.describe_reader(), faults


def _twin(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return a copy of a configuration as GGUF has it: weights not packed, and Mistral's layers as Llama's."""
    from transformers import LlamaConfig

    if config.model_type != "mistral":
        twin = copy.deepcopy(config)
        vars(twin).pop("quantization_config", None)
        return twin
    values = config.to_dict()
    values.pop("quantization_config", None)
    return LlamaConfig.from_dict({key: values[key] for key in values if key not in ("model_type", "architectures")})


def _load_plain(base: Path, loaded: LoadedModel) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if base.is_file():
        return load_gguf(base, loaded.dtype, device=loaded.device)
    packing: Any = None
    if loaded.precision == "nf4":
        packing = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=loaded.dtype,
        )
    elif loaded.precision == "int8":
        packing = BitsAndBytesConfig(load_in_8bit=True)
    settings: dict[str, Any] = {} if packing is None else {"quantization_config": packing}
    with quiet_libraries():
        model = AutoModelForCausalLM.from_pretrained(
            base, dtype=loaded.dtype, device_map={"": loaded.device}, **settings
        )
    return cast("PreTrainedModel", model)


def _version(package: str) -> str:
    from importlib import metadata

    return f"{package} {metadata.version(package)}"


def check_tokens(tokenizer: PreTrainedTokenizerBase, reference: Reference) -> list[str]:
    """Say where an artefact's tokenizer makes other tokens of the prompts."""
    made = [
        tokenizer(text, add_special_tokens=reference.adds_bos, verbose=False)["input_ids"] for text in reference.texts
    ]
    wrong = sum(ids[: len(prompt)] != prompt for ids, prompt in zip(made, reference.prompts, strict=True))
    return [f"its tokenizer makes other tokens of {wrong} of {len(made)} prompts"] if wrong else []


def find_stops(model: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Return the texts of the tokens that end an answer."""
    return tuple(str(tokenizer.convert_ids_to_tokens(index)) for index in sorted(eos_token_ids(model, tokenizer)))
