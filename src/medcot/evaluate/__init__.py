"""Whether the fine-tune helped: what is asked, who answers, how answers are graded, and how sure one can be.

In the order of an evaluation: ``tasks`` (with ``general`` and ``controls``) makes requests; a back end answers them
(``backends`` is the interface; ``local``, ``vllm_writer`` and ``endpoint`` are three) through ``store``, which never
pays twice; ``grading`` reads an answer strictly (``answers``, ``phrases``, ``units``) and ``lenient`` guesses beside
it; ``lines`` is one graded answer; ``scores``, ``letters``, ``votes``, ``style`` and ``budgets`` add lines up;
``stats``, ``resampling``, ``power`` and ``verdicts`` say how sure; ``results`` is a whole evaluation, and ``lm_eval``
the same for another program's readers. None but ``local`` and ``vllm_writer`` imports torch: a finished evaluation can
be graded, compared and reported again on any machine.
"""

from __future__ import annotations

from medcot.evaluate.grade_file import grade_file
from medcot.evaluate.grading import grade, instruction, parse_final_answer
from medcot.evaluate.stats import mcnemar_exact, wilson
from medcot.evaluate.style import measure_style
from medcot.evaluate.tasks import load_task

__all__ = [
    "grade",
    "grade_file",
    "instruction",
    "load_task",
    "mcnemar_exact",
    "measure_style",
    "parse_final_answer",
    "wilson",
]
