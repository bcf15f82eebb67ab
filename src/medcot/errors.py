"""Every error a user can cause, as one small tree.

A message always has three parts: the *value* that was met, the *rule* it broke and the *remedy*. Constructors ask for
the three separately, so that a message with a part missing cannot be written. Each class also inherits from the
standard exception a Python programmer would have caught (``ValueError``, ``OSError``, ...), so that library users need
not know this module. The command line prints the message without a traceback and exits with the error's ``exit_code``:
2, or 1 for what can be read and must not be used: data that is unfit, an artefact that is not the tuned model.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MedcotError(Exception):
    """Base of all errors that medcot raises on purpose.

    Args:
        value: what was met, with enough of it quoted to find the place.
        rule: what it should have been.
        remedy: what the reader can do now, as an imperative sentence.
    """

    exit_code = 2  # of the command line; Click's own for a wrong call

    def __init__(self, value: str, rule: str, remedy: str) -> None:
        self.value, self.rule, self.remedy = value, rule, remedy
        super().__init__(" ".join(_as_sentence(part) for part in (value, rule, remedy)))

    def __reduce__(self) -> tuple[type[MedcotError], tuple[str, str, str]]:
        """Pickle by the three parts, so that a worker process can hand its error to the parent."""
        return type(self), (self.value, self.rule, self.remedy)


class RecipeError(MedcotError, ValueError):
    """A recipe key or value that cannot be accepted."""


class DataError(MedcotError, ValueError):
    """A data source, column or row that cannot be used."""


class UnfitDataError(DataError):
    """Rows that can be read, and that must not be trained on as they are."""

    exit_code = 1


class ModelError(MedcotError, ValueError):
    """A model, tokenizer or LoRA setting that cannot be used."""


class UnequalError(ModelError):
    """An exported artefact that is not the tuned model it should be."""

    exit_code = 1


class UnsafeWeightsError(ModelError):
    """Pickled weights or remote code, refused unless the recipe allows them."""


class NetworkError(MedcotError, ConnectionError):
    """Something must be fetched and the network does not answer."""


class OutputError(MedcotError, OSError):
    """A folder or disk that cannot take what the run writes."""


class MissingExtraError(MedcotError, ImportError):
    """An optional library that the request needs is not installed."""


def _as_sentence(part: str) -> str:
    part = part.strip()
    return part if part.endswith((".", "?", "!")) else f"{part}."


def one_of(word: str, choices: Iterable[str]) -> tuple[str, str]:
    """Return rule and remedy for a word that should have been one of a few."""
    known = [str(choice) for choice in choices]
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"It is one of {', '.join(known)}", f"Did you mean '{near[0]}'?" if near else "Write one of them"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``"did you mean 'x'? "`` for the nearest known word, or the list of all when none is near."""
    choices = sorted(known)
    near = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f"Did you mean '{near[0]}'?" if near else f"Known: {', '.join(choices)}"
