"""A guard outside medicine: sums and reading comprehension that our code makes, so that forgetting shows.

Fine-tuning on one field costs others, and the loss of a run on medical rows cannot say so. The usual guard is a public
benchmark (GSM8K, MMLU), which has to be downloaded and stands in the training data of every base model. These 200
problems need no network, have certain answers, and are easy on purpose: a model that could do them before and cannot
after has forgotten something. Half are word problems with a number to write, half are short passages with four options
to choose from, so that both ways of answering are watched.

Nothing in them is about health. Each family words its problems in one way: variety would measure something else.
"""

from __future__ import annotations

import hashlib
import itertools
import string
from collections.abc import Callable
from random import Random
from typing import NamedTuple

from medcot.data.choices import format_question
from medcot.records import AnswerKind, Example

SOURCE = "builtin:general"
NUM_ITEMS = 200
SEED = 3407

_NAMES = ("Anna", "Bruno", "Carla", "David", "Elena", "Felix", "Greta", "Henry", "Irene", "Jonas", "Karin", "Louis")
_TOWNS = ("Aston", "Barlow", "Carrick", "Denby", "Eldon", "Fenwick", "Garth", "Halton")
_JOBS = ("a baker", "a carpenter", "a gardener", "a librarian", "a painter", "a pilot", "a printer", "a tailor")
_THINGS = ("the red lamp", "the blue key", "the old map", "the brass bell", "the green book", "the silver coin")
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_GOODS = (("notebook", "notebooks"), ("pencil", "pencils"), ("ruler", "rulers"), ("stapler", "staplers"))


class _Written(NamedTuple):
    """A problem as written: ``wrong`` are the other options, where there are any."""

    question: str
    answer: str
    wrong: tuple[str, ...] = ()


def _shop(rng: Random) -> _Written:
    (one, many), (other_one, other_many) = rng.sample(_GOODS, 2)
    price, other_price, count, other_count = (rng.randint(2, 9) for _ in range(4))
    total = price * count + other_price * other_count
    paid = (total // 20 + 1) * 20
    return _Written(
        f"A {one} costs {price} dollars and a {other_one} costs {other_price} dollars. {rng.choice(_NAMES)} buys "
        f"{count} {many} and {other_count} {other_many} and pays with {paid} dollars. How many dollars are given back?",
        str(paid - total),
    )


def _journey(rng: Random) -> _Written:
    speed, hours, rest = rng.randrange(40, 95, 5), rng.randint(2, 6), rng.randint(11, 99)
    first, last = rng.sample(_TOWNS, 2)
    return _Written(
        f"The road from {first} to {last} is {speed * hours + rest} km long. A bus leaves {first} and drives towards "
        f"{last} at {speed} km an hour. How many km are left after {hours} hours?",
        str(rest),
    )


def _boxes(rng: Random) -> _Written:
    size, full = rng.randint(6, 15), rng.randint(7, 19)
    over = rng.randint(1, size - 1)
    return _Written(
        f"{size * full + over} apples are packed into boxes of {size}. Each box is filled before the next one "
        "is begun. How many apples are in the last box, which is not full?",
        str(over),
    )


def _mean(rng: Random) -> _Written:
    mean = rng.randint(20, 60)
    first, second = rng.randint(1, 9), rng.randint(10, 18)
    values = [mean - first, mean + second, mean + first, mean - second]
    rng.shuffle(values)
    return _Written(
        f"On four days a shop sold {values[0]}, {values[1]}, {values[2]} and {values[3]} loaves. "
        "How many loaves is that a day on average?",
        str(mean),
    )


def _clock(rng: Random) -> _Written:
    start, length = rng.randrange(8 * 60, 20 * 60), rng.randint(45, 170)
    end = start + length
    return _Written(
        f"A film begins at {start // 60}:{start % 60:02d} and ends at {end // 60}:{end % 60:02d}. "
        "How many minutes does it last?",
        str(length),
    )


def _order(rng: Random) -> _Written:
    people = rng.sample(_NAMES, 5)
    said = [f"{taller} is taller than {shorter}." for taller, shorter in itertools.pairwise(people)]
    rng.shuffle(said)
    place = rng.randrange(1, 4)
    word = ("tallest", "second tallest", "third tallest", "fourth tallest")[place]
    others = [name for number, name in enumerate(people) if number != place]
    return _Written(f"{' '.join(said)} Who is the {word} of the five?", people[place], tuple(rng.sample(others, 3)))


def _handed_on(rng: Random) -> _Written:
    people = rng.sample(_NAMES, 4)
    thing, other = rng.sample(_THINGS, 2)
    way = [people[0]]
    while len(way) < 4:
        way.append(rng.choice([name for name in people if name != way[-1]]))
    told = [f"{giver} gives {thing} to {taker}." for giver, taker in itertools.pairwise(way)]
    told.insert(rng.randrange(1, 3), f"{rng.choice(people)} finds {other}.")
    return _Written(
        f"At first {way[0]} has {thing}. {' '.join(told)} Who has {thing} in the end?",
        way[-1],
        tuple(name for name in people if name != way[-1]),
    )


def _who(rng: Random) -> _Written:
    people, towns, jobs = rng.sample(_NAMES, 4), rng.sample(_TOWNS, 4), rng.sample(_JOBS, 4)
    told = [f"{name} is {job} and lives in {town}." for name, town, job in zip(people, towns, jobs, strict=True)]
    asked = rng.randrange(4)
    right = f"in {towns[asked]}"
    return _Written(
        f"{' '.join(told)} Where does the one live who is {jobs[asked]}?",
        right,
        tuple(f"in {town}" for town in towns if town != towns[asked]),
    )


def _weekday(rng: Random) -> _Written:
    start, later, before = rng.randrange(7), rng.randint(2, 6), rng.randint(1, 3)
    right = _DAYS[(start + later - before) % 7]
    others = [day for day in _DAYS if day != right]
    return _Written(
        f"{rng.choice(_NAMES)} orders a chair on a {_DAYS[start]}. It comes {later} days later. The bill came "
        f"{before} {'day' if before == 1 else 'days'} before the chair. On which day did the bill come?",
        right,
        tuple(rng.sample(others, 3)),
    )


def _rule(rng: Random) -> _Written:
    people, limit, least = rng.sample(_NAMES, 4), rng.randint(3, 6), rng.randint(12, 18)
    old, few = rng.randint(least, 40), rng.randint(0, limit - 1)
    cases = [
        (old, few, "has a card"),
        (rng.randint(7, least - 1), rng.randint(0, limit - 1), "has a card"),
        (rng.randint(least, 40), rng.randint(limit, 9), "has a card"),
        (rng.randint(least, 40), rng.randint(0, limit - 1), "has no card"),
    ]
    told = [
        f"{name} is {age}, {card} and holds {held} {'film' if held == 1 else 'films'}."
        for name, (age, held, card) in zip(people, cases, strict=True)
    ]
    rng.shuffle(told)
    return _Written(
        f"A library lends a film to anyone who is at least {least} years old, has a card and holds fewer than {limit} "
        f"films already. {' '.join(told)} Who may borrow a film today?",
        people[0],
        tuple(people[1:]),
    )


# Numbers and letters in turn.
FAMILIES: dict[str, Callable[[Random], _Written]] = {
    "shop": _shop,
    "order": _order,
    "journey": _journey,
    "handed_on": _handed_on,
    "boxes": _boxes,
    "who": _who,
    "mean": _mean,
    "weekday": _weekday,
    "clock": _clock,
    "rule": _rule,
}


def make_general(count: int = NUM_ITEMS, *, seed: int = SEED) -> list[Example]:
    """Return ``count`` problems, one family after the other in turn; those of a longer list begin with the same.

    Args:
        count: how many.
        seed: decides all of it, the same in every process.
    """
    generators = {name: Random(f"{seed}:{name}") for name in FAMILIES}
    names = list(FAMILIES)
    examples: list[Example] = []
    seen: set[str] = set()
    while len(examples) < count:
        name = names[len(examples) % len(names)]
        written = FAMILIES[name](generators[name])
        if written.question not in seen:
            seen.add(written.question)
            examples.append(_build(name, written, generators[name]))
    return examples


def _build(name: str, written: _Written, rng: Random) -> Example:
    digest = hashlib.blake2b(written.question.encode(), digest_size=8).hexdigest()
    number = Example(
        id=f"{name}-{digest}",
        question=written.question,
        source=SOURCE,
        gold=written.answer,
        answer_kind=AnswerKind.NUMBER,
        topic=name,
    )
    if not written.wrong:
        return number
    texts = rng.sample([written.answer, *written.wrong], 1 + len(written.wrong))
    options = dict(zip(string.ascii_uppercase, texts, strict=False))
    return Example(
        id=number.id,
        question=format_question(written.question, options),
        source=SOURCE,
        options=options,
        gold=string.ascii_uppercase[texts.index(written.answer)],
        answer_kind=AnswerKind.LETTER,
        topic=name,
    )
