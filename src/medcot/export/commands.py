"""How an artefact is served elsewhere: a command for vLLM and SGLang, for llama.cpp's server and for Ollama.

Each is complete: the parser that sets thinking apart from the answer (``deepseek_r1`` takes text without an opening
tag as thinking, which is what a prompt that ends with ``<think>`` gives), the run's prompt style as a chat template,
and for an adapter a rank that vLLM accepts.

Sources: https://docs.vllm.ai/en/latest/features/lora.html and /reasoning_outputs.html;
https://docs.sglang.ai/advanced_features/lora.html and /separate_reasoning.html. (Neither program is part of medcot's
tests; both need a GPU.)
"""

from __future__ import annotations

import shlex

from medcot.export.ollama import INTENDED_USE

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM accepts as --max-lora-rank
TEMPLATE_FILE = "chat_template.jinja"


def build_commands(
    kind: str, where: str, *, base: str, rank: int, context: int, template: str, file: str | None = None
) -> dict[str, str]:
    """Return the commands that serve an artefact, by program; ``tuned`` is the model's name in all of them.

    Args:
        kind: adapter, merged-16bit, merged-32bit, merged-4bit, gguf:… or ollama….
        where: its folder or Hub repository.
        base: Hub id or folder of the base.
        rank: of the adapter.
        context: longest context in tokens.
        template: path of the chat template.
        file: of a GGUF kind, the file in ``where``.
    """
    family = kind.partition(":")[0]
    if family == "ollama":
        return {"Ollama": f"ollama create tuned -f {shlex.quote(where)}/Modelfile && ollama run tuned"}
    if family == "gguf":
        path = shlex.quote(f"{where}/{file}")
        template_file = shlex.quote(template)
        return {
            "llama.cpp": f"llama-server -m {path} --alias tuned --jinja --chat-template-file {template_file}"
            f" --reasoning-format deepseek -c {context}"
        }
    served = [where, "--served-model-name", "tuned"]
    lora: dict[str, list[str]] = {"vLLM": [], "SGLang": []}
    if family == "adapter":
        served = [base]
        fitting = next((known for known in RANKS if known >= rank), rank)
        lora["vLLM"] = ["--enable-lora", "--lora-modules", f"tuned={where}", "--max-lora-rank", str(fitting)]
        lora["SGLang"] = ["--enable-lora", "--lora-paths", f"tuned={where}", "--max-lora-rank", str(rank)]
    vllm = ["vllm", "serve", *served, *lora["vLLM"], "--reasoning-parser", "deepseek_r1"]
    vllm += ["--chat-template", template, "--max-model-len", str(context)]
    sglang = ["python", "-m", "sglang.launch_server", "--model-path", *served, *lora["SGLang"]]
    sglang += ["--reasoning-parser", "deepseek-r1", "--chat-template", template, "--context-length", str(context)]
    return {"vLLM": shlex.join(vllm), "SGLang": shlex.join(sglang)}


def build_page(commands: dict[str, dict[str, str]]) -> str:
    """Return ``serve.md``: for each kind its commands."""
    lines = ["# Serving this model", "", INTENDED_USE, ""]
    lines += [
        "Run these in this folder. The model thinks first: ask with temperature 0.6 and top-p 0.95, without a system"
        " message. vLLM, SGLang and llama.cpp answer at `/v1/chat/completions`; thinking comes as `reasoning_content`.",
        "",
    ]
    for kind, programs in commands.items():
        lines += [f"## {kind}", ""]
        for program, command in programs.items():
            lines += [f"{program}:", "", "```bash", command, "```", ""]
    return "\n".join(lines)
