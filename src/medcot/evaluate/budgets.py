"""Accuracy against the budget for thinking, and the budget to serve with.

Each budget asks the same questions with budget forcing (thinking is closed at the cap, and the answer asked for), so
a curve shows what longer thinking is worth on them (Muennighoff et al. 2025, arXiv:2501.19393). What is recommended is
the smallest budget that is *not seen to lose*: at most a point under the best on these questions, and not significantly
worse than it by the paired test. The sentence says how large a loss the questions could have hidden, since with few of
them nearly any budget is "not seen to lose". Taking the best budget itself would pay for the luck of the draw.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from medcot.evaluate.lines import Line, drop_control
from medcot.evaluate.power import ALPHA
from medcot.evaluate.scores import compare, score

MOST_LOST = 0.01


@dataclass(frozen=True, slots=True)
class BudgetPoint:
    """One budget's result; accuracy and its interval are fractions, and differences are this budget minus the best."""

    think_tokens: int
    n: int
    accuracy: float
    ci95: tuple[float, float]
    forced_share: float  # of the answers, how many were still thinking at the cap
    mean_think_tokens: float | None
    delta: float
    delta_ci95: tuple[float, float]
    p_value: float


@dataclass(frozen=True, slots=True)
class Curve:
    """All budgets of one task, smallest first, and which to serve with."""

    points: tuple[BudgetPoint, ...]
    best: int
    recommended: int
    sentence: str


def build_curve(by_budget: Mapping[int, Sequence[Line]]) -> Curve:
    """Return the curve of one model on one task.

    Args:
        by_budget: tokens of thinking to the lines of the task answered with them, the same questions each time.

    Raises:
        DataError: a budget without lines, or budgets without a common question.
    """
    plain = {budget: drop_control(by_budget[budget]) for budget in sorted(by_budget)}
    scores = {budget: score(lines) for budget, lines in plain.items()}
    best = max(scores, key=lambda budget: (scores[budget]["accuracy"], -budget))  # the cheapest of equals
    points = tuple(_point(budget, found, plain[budget], plain[best]) for budget, found in scores.items())
    chosen = next(p for p in points if p.think_tokens == best or (p.delta >= -MOST_LOST and p.p_value > ALPHA))
    return Curve(points, best, chosen.think_tokens, _say(chosen, best, is_smallest=chosen == points[0]))


def _point(budget: int, found: Mapping[str, Any], lines: Sequence[Line], best: Sequence[Line]) -> BudgetPoint:
    change = compare({"budget": best}, {"budget": lines})["tasks"][0]
    return BudgetPoint(
        think_tokens=budget,
        n=found["n"],
        accuracy=found["accuracy"],
        ci95=(found["ci95"][0], found["ci95"][1]),
        forced_share=found["forced"] / found["answers"],
        mean_think_tokens=found["mean_think_tokens"],
        delta=change["delta"],
        delta_ci95=(change["interval"]["low"], change["interval"]["high"]),
        p_value=change["p_value"],
    )


def _say(chosen: BudgetPoint, best: int, *, is_smallest: bool) -> str:
    head = f"Serve with {chosen.think_tokens:,} tokens for thinking: {chosen.accuracy:.1%} of {chosen.n:,} questions"
    if chosen.accuracy == 0:
        return f"No budget got any of {chosen.n:,} questions right, so none can be recommended."
    if chosen.think_tokens == best:
        smaller = "" if is_smallest else "; every smaller one lost more than a point, or significantly"
        return f"{head}, the best of the budgets tried{smaller}."
    loss = max(0.0, -chosen.delta_ci95[0])
    return (
        f"{head}, {chosen.delta * 100:+.1f} points against the best ({best:,} tokens)."
        f" With this many questions a loss of up to {loss * 100:.1f} points could not be told from none."
    )
