"""A folder that ``ollama create`` takes: the GGUF file and a Modelfile that keeps the thinking.

Ollama puts its own template around a question and forgets the one in the GGUF file, repeats at a penalty that R1's
authors advise against, and reads 4,096 tokens of context unless told. The Modelfile says all of it: the run's prompt
style to the token (``turns.py``), the sampling of DeepSeek's model card (temperature 0.6, top-p 0.95, no penalty, no
top-k), where an answer ends, and how long a context the run was trained for.

Sources: https://docs.ollama.com/modelfile and /template; ``InferTags`` in ollama's thinking/template.go, which finds
the tags of the thinking by looking for ``.Thinking`` in the template.
"""

from __future__ import annotations

from pathlib import Path

from medcot.export.turns import Turns, build_go

INTENDED_USE = "For research and education; not for diagnosis or treatment."
FEWEST_CONTEXT = 4096  # room for R1's thinking, where a run was trained on shorter rows


def build_modelfile(
    gguf: str, turns: Turns, *, temperature: float, top_p: float, context: int, stops: tuple[str, ...], title: str
) -> str:
    """Return the text of a Modelfile.

    Args:
        gguf: the file's name, in the same folder.
        turns: the run's prompt style.
        temperature: of the sampling.
        top_p: of the sampling.
        context: longest context in tokens.
        stops: texts of the tokens that end an answer.
        title: what the model is, one line.
    """
    template = build_go(turns)
    assert '"""' not in template
    lines = [
        f"# {title}",
        f"# {INTENDED_USE}",
        "# Needs Ollama 0.9 or later. Build and ask:",
        "#   ollama create tuned -f Modelfile",
        '#   ollama run tuned "…"          (--think=false answers without thinking)',
        f"FROM ./{gguf}",
        f'TEMPLATE """{template}"""',
        *(f'PARAMETER stop "{stop}"' for stop in dict.fromkeys(stops)),
        f"PARAMETER temperature {temperature}",
        f"PARAMETER top_p {top_p}",
        "PARAMETER top_k 0",
        "PARAMETER repeat_penalty 1",
        f"PARAMETER num_ctx {context}",
    ]
    return "\n".join(lines) + "\n"


def read_template(modelfile: Path) -> str | None:
    """Return the TEMPLATE of a Modelfile, ``None`` where it has none."""
    _, found, rest = modelfile.read_text(encoding="utf-8").partition('\nTEMPLATE """')
    return rest.partition('"""')[0] if found else None
