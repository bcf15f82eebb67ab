"""Which languages a text is in, from its script and its function words.

Within the Latin script the commonest function words of eleven languages vote; other scripts speak for themselves.
Trained detectors are larger than this package (lingua, fastText) or no longer kept (pycld2, langdetect), cost ten times
as much, and stumble over drug names. What this one cannot tell (terse notes, a few words, a language that it has no
words of) it does not name: silence is no verdict. A text may have several: Chinese in the middle of English reasoning
is what some reasoning models write.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

_FUNCTION_WORDS = {  # one that serves several languages speaks for each of them
    "en": "the of and to is with that for this was are his her which it in a be as by at from has not",
    "es": "el los las que una con por para del se su como más pero en y la de un al está es lo no",
    "fr": "le les des une est et dans pour que qui du avec sur pas au ce la de en un il elle sont plus",
    "de": "der die das und ist nicht ein eine mit den von zu auf für sich im dem bei es wird sind auch",
    "pt": "o os uma não do da em com para que é dos ao são a de um no na por mais se as",
    "it": "il di che è la per un una con del della non sono gli in le dei alla si da e nel",
    "nl": "de het een van en niet dat met voor zijn op in is te bij ook aan door wordt",
    "pl": "nie się jest na w z do że i o to przez dla oraz po lub są",
    "tr": "ve bir bu için ile olan olarak da de daha gibi ise çok",
    "vi": "là của và có không cho được các một trong với này người bệnh",
    "id": "dan yang di dengan untuk ini pada adalah dari tidak atau ke dalam akan",
}
_SPEAKS_FOR: dict[str, tuple[str, ...]] = {
    word: tuple(code for code, others in _FUNCTION_WORDS.items() if word in others.split())
    for words in _FUNCTION_WORDS.values()
    for word in words.split()
}
_MOST_READ = 8_000  # characters in which other scripts are looked for
_MOST_HEARD = 500  # characters whose words vote
_FEWEST_VOTES = 5
_LEAST_SHARE = 0.1  # of the words; running English has 0.3 to 0.5
_LEAST_LEAD = 1.4  # over the next language; Spanish and Portuguese share half of their words above
_OTHER_SCRIPT = re.compile("[\u0370-\u1cff\u2e80-\u2fdf\u3005-\ud7ff\uf900-\ufaff]{2,}")  # two: α and β are no Greek
_FEWEST_OTHER = 8  # characters of another script that make a language
_SCRIPTS = (  # first and last code point
    ("zh", 0x2E80, 0x2FDF),
    ("ja", 0x3040, 0x30FF),
    ("zh", 0x3400, 0x9FFF),
    ("zh", 0xF900, 0xFAFF),
    ("ko", 0xAC00, 0xD7AF),
    ("ko", 0x1100, 0x11FF),
    ("Greek script", 0x370, 0x3FF),
    ("Cyrillic script", 0x400, 0x52F),
    ("Hebrew script", 0x590, 0x5FF),
    ("Arabic script", 0x600, 0x77F),
    ("Devanagari script", 0x900, 0x97F),
    ("Thai script", 0xE00, 0xE7F),
)


def find_languages(texts: Iterable[str]) -> tuple[str, ...]:
    """Return the languages found in the texts, sorted: ``"en"`` and the like, or ``"Cyrillic script"``."""
    found: set[str] = set()
    for text in texts:
        if not text.isascii():
            found.update(_read_scripts(text[:_MOST_READ]))
        spoken = _count_votes(text)
        if spoken:
            found.add(spoken)
    if "ja" in found:
        found.discard("zh")  # Japanese is written with Chinese characters too
    return tuple(sorted(found))


def _count_votes(text: str) -> str:
    """Return the language whose function words lead clearly among the first words; empty where none does."""
    words = text[:_MOST_HEARD].lower().split()
    votes: dict[str, int] = {}
    for codes in filter(None, map(_SPEAKS_FOR.get, words)):
        for code in codes:
            votes[code] = votes.get(code, 0) + 1
    leader = max(votes, key=votes.__getitem__, default="")
    most = votes.pop(leader, 0)
    next_most = max(votes.values(), default=0)
    clear = most >= _FEWEST_VOTES and most >= _LEAST_LEAD * next_most and most >= _LEAST_SHARE * len(words)
    return leader if clear else ""


def _read_scripts(text: str) -> set[str]:
    """Return what scripts other than Latin tell, where at least a few words are written in them."""
    if len(text) - len(text.encode("ascii", "ignore")) < _FEWEST_OTHER:
        return set()
    letters = "".join(_OTHER_SCRIPT.findall(text))
    if len(letters) < _FEWEST_OTHER:
        return set()
    counts = Counter(_name_script(ord(letter)) for letter in letters[:400])
    return {name for name, count in counts.items() if count >= _FEWEST_OTHER}


def _name_script(code: int) -> str:
    return next((name for name, first, last in _SCRIPTS if first <= code <= last), "another script")
