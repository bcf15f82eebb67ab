"""What is said to the user of the tutorial's names: each sentence once, and what is not covered as an error.

A notebook's cell is run again and again, and a warning at every call is read by nobody. So a sentence is printed the
first time that it is true, as plainly as the rest of the console.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from medcot.errors import MedcotError, did_you_mean
from medcot.train.progress import RunConsole


class NotCoveredError(MedcotError, NotImplementedError):
    """A call of the tutorial's libraries that has no counterpart here."""


class ArgumentError(MedcotError, TypeError):
    """An argument by a name that nothing knows, or of a kind that nothing can use."""


@functools.cache
def say_once(sentence: str) -> None:
    """Print a sentence, unless this process has printed it before."""
    RunConsole().note(sentence)


def pass_over(given: Mapping[str, Any], idle: Mapping[str, str], where: str, known: Collection[str]) -> None:
    """Accept arguments that have no meaning here, saying why once; refuse those that nobody has heard of.

    Args:
        given: what came beyond the arguments that are read.
        idle: name to why it is not needed.
        where: the call, for messages.
        known: names that are read; a misspelt one is told the nearest.

    Raises:
        ArgumentError: an unknown name.
    """
    for name, value in given.items():
        if name not in idle:
            raise ArgumentError(
                f"{where} was given {name}={value!r}",
                "An argument that nothing reads would be silently ignored",
                did_you_mean(name, [*known, *idle]),
            )
        if value is not None and value is not False:
            say_once(f"{where}: {name} {idle[name]}")


def join_words(words: Iterable[str]) -> str:
    """Return names as a list in words."""
    return ", ".join(sorted(words))
