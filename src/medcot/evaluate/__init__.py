"""Whether the fine-tune helped: strict grading, the statistics of a paired before and after, and measures of style.

``grading`` reads one answer, ``stats`` holds the two formulas that turn counts into evidence, ``run`` adds up a whole
evaluation, ``style`` measures how the writing changed. None of them imports torch: they work on text and counts, so a
finished run can be graded and reported again on any machine.
"""

from __future__ import annotations

from medcot.evaluate.grading import grade, parse_final_answer
from medcot.evaluate.run import compare, summarise
from medcot.evaluate.stats import mcnemar_exact, wilson
from medcot.evaluate.style import measure_style

__all__ = ["compare", "grade", "mcnemar_exact", "measure_style", "parse_final_answer", "summarise", "wilson"]
