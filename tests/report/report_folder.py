"""A small finished run, written by hand, that each test may spoil in its own way."""

import json

from medcot.evaluate.lines import group_by_task
from medcot.evaluate.scores import compare, score
from medcot.records import Run


def make_sample(kind, name, outcome=None, **changes):
    sample = {
        "kind": kind,
        "id": name,
        "topic": "anion_gap" if kind == "eval" else None,
        "question": f"Question {name}?",
        "gold": "12 mmol/L" if kind == "eval" else None,
        "prompt": f"### Question:\nQuestion {name}?\n\n\n\n### Response:\n<think>\n",
        "text": "I think so.</think>It is so.",
        "think": f"Thinking about {name}.",
        "answer": "It is so.\nFinal answer: 12 mmol/L",
        "closed": True,
        "finish": "eos",
        "outcome": outcome,
        "parsed": "12 mmol/L" if outcome == "correct" else None,
        "num_prompt_tokens": 20,
        "num_think_tokens": 40,
        "num_answer_tokens": 9,
    }
    return sample | changes


def make_side(correct, n=4):
    return {
        "n": n,
        "correct": correct,
        "accuracy": correct / n,
        "ci95": [max(0.0, correct / n - 0.2), min(1.0, correct / n + 0.2)],
        "unparsed": 1,
        "unfinished": 0,
        "failed": 0,
        "mean_think_tokens": 40.0,
        "mean_answer_tokens": 9.0,
        "topics": {"anion_gap": {"n": n, "correct": correct}},
    }


FACTS = {
    "recipe": "default",
    "status": "finished",
    "model": {"source": "embedded", "params": 134515008, "precision": "bf16"},
    "data": {
        "train": {
            "source": "builtin:clinic[:3200]",
            "rows": 3197,
            "tokens": 391204,
            "trained_tokens": 214880,
            "sha256": "ab" * 32,
            "quarantined": 2,
        }
    },
    "train": {"steps": 60, "loss_first": 2.5, "loss_last": 0.31, "seconds": 125.0, "tokens_per_s": 1490.0},
    "eval": {
        "source": "builtin:clinic[:4]",
        "before": make_side(1),
        "after": make_side(2),
        "delta": 0.25,
        "p_value": 0.5,
        "gained": 2,
        "lost": 1,
    },
    "artifacts": {"adapter": "adapter", "merged": None, "report": "report.html"},
    "timing": {"train": 125.0, "evaluate_before": 20.0, "total": 160.0},
    "versions": {"torch": "2.13.0"},
    "machine": {"cores": 2},
}


class RunFolder:
    """A run folder and the means to change it."""

    def __init__(self, folder):
        self.run = Run(folder)
        self.facts = json.loads(json.dumps(FACTS))
        for sub in (self.run.samples, self.run.data):
            sub.mkdir()
        self.write_facts()
        self.write("metrics.jsonl", [self.metric(step) for step in range(10, 70, 10)])
        moves = [("wrong", "correct"), ("unparsed", "correct"), ("correct", "wrong"), ("wrong", "wrong")]
        for side, name in enumerate(("before", "after")):
            graded = [make_sample("eval", f"q{i}", move[side]) for i, move in enumerate(moves)]
            self.write(f"samples/{name}.jsonl", [make_sample("ask", "a0"), *graded])
        self.write(
            "data/quarantine.jsonl", [{"row_number": n, "reason": "empty 'Response'", "row": {}} for n in (3, 9)]
        )
        self.run.recipe.write_text(
            "name: default\nlora: {r: 16, alpha: 32}\ntrain: {batch_size: 8}\n", encoding="utf-8"
        )

    @staticmethod
    def metric(step):
        return {
            "step": step,
            "loss": 2.5 - step / 30,
            "learning_rate": 2e-4,
            "grad_norm": 1.0,
            "tokens_per_s": 1500.0,
            "trained_tokens_per_s": 800.0,
            "memory_gb": 2.3,
        }

    def write_facts(self):
        self.run.facts.write_text(json.dumps(self.facts), encoding="utf-8")

    def write(self, name, lines):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (self.run.folder / name).write_text(text, encoding="utf-8")

    def evaluate(self, before, after):
        """Put two respondents in place of what was graded, as a run records them."""
        sides = {"before": before, "after": after}
        was, now = ({task: found[None] for task, found in group_by_task(it.lines).items()} for it in sides.values())
        change = compare(was, now)
        by_task = {found["task"]: found for found in change["tasks"]}
        self.facts["eval"] = {
            "source": ",".join(was),
            **change["pooled"],
            **{name: score(list(it.lines)) for name, it in sides.items()},
            "tasks": {
                task: {
                    **before.tasks[task],
                    "before": score(was[task]),
                    "after": score(now[task]),
                    "change": by_task[task],
                }
                for task in was
            },
        }
        self.write_facts()
        for name, it in sides.items():
            self.write(f"samples/{name}.jsonl", [make_sample("ask", "a0"), *it.lines])
