"""The tables of the site that the code knows better than any writer: what fits which card, and how exact exports are.

A table of "what fits where" that somebody typed is wrong after the next change to the engine. These are written by
``python docs/make_tables.py`` between two marks in their pages, from the planner that ``medcot run --dry-run`` asks and
the limits that ``medcot export`` goes by, and ``tests/test_docs_site.py`` compares the pages with what both say now.

What has to be assumed, since no card is here: a card sold with N GB has N·10⁹ bytes, the least that the word allows,
and CUDA itself takes half a GiB of them; flash attention and Triton's kernels run, so the card is of compute capability
8.0 or later; rows are as long as those of the tutorial's dataset in the tutorial's template (198 rows measured: mean
790 tokens, deviation 136).
"""

from __future__ import annotations

import re
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from medcot import planning
from medcot.engine.memory import GB, Keep, Memory, predict_peak_gb, small_pieces, weight_gb
from medcot.export.equality import Limit, limit_of
from medcot.export.kinds import QUANTS
from medcot.recipe import Recipe, list_recipes, load_recipe
from medcot.shapes import DISTILLS

DOCS = Path(__file__).parent
MARKED = re.compile(r"(<!-- docs/make_tables\.py: (\w+) -->)\n.*?(<!-- /made -->)", re.DOTALL)
CARDS_GB = (6, 8, 12, 16, 24, 40, 80, 141)
CUDA_GB = 0.5  # GiB of the context and the libraries' own buffers
ROW_TOKENS = statistics.NormalDist(790, 136)
NUM_ROWS = 198


@dataclass(frozen=True)
class Fit:
    """How a recipe runs on a card: rows in a forward, what a step keeps, and the peak in GiB."""

    rows: int
    memory: Memory
    peak_gb: float


def free_gb(card_gb: int) -> float:
    """GiB that a run may use of a card sold with so many GB."""
    return card_gb * 1e9 / GB - CUDA_GB


def fit(recipe: Recipe, card_gb: int) -> Fit | None:
    """Return how a recipe would run on a card, ``None`` where the planner finds no setting that fits."""
    shape, precision = DISTILLS[recipe.model.source], recipe.model.precision.value
    lengths = [round(ROW_TOKENS.inv_cdf((n + 0.5) / NUM_ROWS)) for n in range(NUM_ROWS)]

    def predict(rows: int, memory: Memory) -> float:
        tokens = planning.estimate_tokens(lengths, rows)
        return predict_peak_gb(shape, precision, tokens=tokens, rank=recipe.lora.r, memory=memory)

    budget_gb = free_gb(card_gb) * planning.MEMORY_SHARE
    rows, memory = planning.choose_split(
        recipe.train, predict, statistics.fmean(lengths), budget_gb, precision=precision, fast=True
    )
    if memory.keep is Keep.HOST:
        memory = small_pieces(planning.estimate_tokens(lengths, rows))
    peak_gb = predict(rows, memory)
    return Fit(rows, memory, peak_gb) if peak_gb <= budget_gb else None


def describe(memory: Memory) -> str:
    """What a step keeps, in the words of the page's legend."""
    if memory.unpacked:
        return "everything, weights unpacked"
    return {
        Keep.ALL: "everything",
        Keep.LEAN: "norms made again",
        Keep.INPUT: "layers computed again",
        Keep.HOST: "inputs on the host",
    }[memory.keep]


def make_overview(fits: dict[int, dict[str, Fit]], recipes: dict[str, Recipe]) -> list[str]:
    """One line a card: the largest model that fits, and all recipes that do."""
    lines = ["| card | largest model | command |", "|---|---|---|"]
    for card_gb, fitting in fits.items():
        # Of recipes for one model the shortest name is the plain one, not the tutorial's.
        name = max(fitting, key=lambda name: (DISTILLS[recipes[name].model.source].num_params, -len(name)))
        lines.append(f"| [{card_gb} GB](#{card_gb}-gb) | {_model(recipes[name])} | `medcot run {name}` |")
    return lines


def make_cards(fits: dict[int, dict[str, Fit]], recipes: dict[str, Recipe]) -> list[str]:
    """A heading and a table for each card."""
    lines = []
    for card_gb, fitting in fits.items():
        missing = [name for name in recipes if name not in fitting]
        lines += ["", f"### {card_gb} GB", "", "| recipe | rows a forward | a step keeps | peak |", "|---|--:|---|--:|"]
        for name, found in fitting.items():
            rows = f"{found.rows} of {recipes[name].train.batch_size}"
            lines.append(f"| `{name}` | {rows} | {describe(found.memory)} | {found.peak_gb:.1f} GiB |")
        if missing:
            lines += ["", f"Too large: {', '.join(f'`{name}`' for name in missing)}."]
    return lines


def make_sizes(recipes: dict[str, Recipe]) -> list[str]:
    """The models: parameters, weights in 4 bit and in 16 bit."""
    lines = ["| model | parameters | frozen weights, NF4 | 16 bit | FP8 |", "|---|--:|--:|--:|--:|"]
    for source in dict.fromkeys(recipe.model.source for recipe in recipes.values()):
        shape = DISTILLS[source]
        sizes = " | ".join(f"{weight_gb(shape, precision):.1f} GiB" for precision in ("nf4", "bf16", "fp8"))
        lines.append(f"| {source.rpartition('/')[2]} | {shape.num_params / 1e9:.1f} B | {sizes} |")
    return lines


def _model(recipe: Recipe) -> str:
    return recipe.model.source.rpartition("/")[2].removeprefix("DeepSeek-")


def fit_all() -> tuple[dict[int, dict[str, Fit]], dict[str, Recipe]]:
    """Return what fits each card, and the shipped recipes for the distills, smallest model first."""
    named = {name: load_recipe(name) for name in list_recipes()}
    recipes = {name: recipe for name, recipe in named.items() if recipe.model.source in DISTILLS}
    recipes = dict(sorted(recipes.items(), key=lambda item: DISTILLS[item[1].model.source].num_params))
    every = {card_gb: {name: fit(recipe, card_gb) for name, recipe in recipes.items()} for card_gb in CARDS_GB}
    return {card_gb: {name: one for name, one in found.items() if one} for card_gb, found in every.items()}, recipes


def make_limits() -> list[str]:
    """Return the table of how far an artefact may be from the tuned model, for a base that training held in 16 bit."""
    kinds = ("adapter", "merged-32bit", "merged-16bit", "merged-4bit", *(f"gguf:{quant}" for quant in QUANTS))
    by_limit: dict[Limit, list[str]] = {}
    for kind in kinds:
        by_limit.setdefault(limit_of(kind, "bf16"), []).append(f"`{kind}`")
    lines = ["| kind | KL at most | top-1 at least | why |", "|---|--:|--:|---|"]
    for limit, names in sorted(by_limit.items(), key=lambda item: item[0].kl_mean):
        lines.append(f"| {', '.join(names)} | {limit.kl_mean:g} | {100 * limit.top1:.4g} % | {limit.reason} |")
    return lines


def make_tables() -> dict[str, list[str]]:
    """Return all tables by the names that their marks have."""
    fits, recipes = fit_all()
    return {
        "overview": make_overview(fits, recipes),
        "models": make_sizes(recipes),
        "cards": make_cards(fits, recipes),
        "limits": make_limits(),
    }


def replace(page: str, tables: dict[str, list[str]]) -> str:
    """Return a page's text with the tables of now between its marks."""

    def put(match: re.Match[str]) -> str:
        begin, name, end = match.groups()
        return "\n\n".join([begin, "\n".join(tables[name]).strip(), end])

    return MARKED.sub(put, page)


if __name__ == "__main__":
    made = make_tables()
    for path in sorted(DOCS.glob("*.md")):
        text = path.read_text(encoding="utf-8")
        if MARKED.search(text):
            path.write_text(replace(text, made), encoding="utf-8")
            sys.stdout.write(f"{path.name}: written\n")
