"""What is wrong with a text by itself: loops, placeholders and refusals, broken characters, mark-up, mangled dates.

*Loops*: a text is probed at eight even places; a stretch of 40 characters that stands there three times makes it a
suspect, and it is convicted when a tenth of all its stretches are repeats (in 198 real rows 1.4 % at most).
So a loop that fills a seventh of the text is always probed, at a few microseconds a row; a compression ratio costs ten
times that and cannot show what repeats.

Every rule first asks a question that costs a microsecond (does the text hold a "<" at all?) and runs its
pattern only on yes; every pattern is bounded, so that a row of 10 MB costs no more a character than a short one.

Sources: ftfy's notes on mojibake (https://ftfy.readthedocs.io); Ziemann, Eren, El-Osta, "Gene name errors are
widespread in the scientific literature", Genome Biology 2016, for what spreadsheets do to MARCH3 and SEPT2.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_EXCERPT = 160  # characters shown
_PROBE = 40  # characters
_WINDOW = 20_000  # characters on either side of a probe whose stretches are counted
_LEAST_REPEATED = 0.1

_CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffd\ufffe\uffff]")
_BROKEN_BEYOND = "\ufffd\ufffe\uffff"
# UTF-8 read as Windows-1252 or Latin-1: a lead byte, then continuation bytes, each as the character that it became
# there. Two-byte leads are held to those that "é »" and other good French cannot form.
_TAIL_CHARACTER = "[\x80-\xbf€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ]"
_MOJIBAKE = re.compile(
    f"[ÂÃ](?!\xa0?[»”’]){_TAIL_CHARACTER}|[ÎÏ][\x80-\x9f±-¿€‚ƒ„…†‡ˆ‰Š‹Œ]|[âïð]{_TAIL_CHARACTER}{{2}}"
)
_LEADS = "ÂÃÎÏâïð"
_SOUND = bytes(code for code in range(256) if not _CONTROLS.match(chr(code)) and chr(code) not in _LEADS)
_TAGS = "p|br|hr|div|span|b|i|u|em|strong|sub|sup|table|thead|tbody|tr|td|th|ul|ol|li|a|img|font|script|style|html|body"
_MARKUP = re.compile(
    rf"</?(?:{_TAGS}|h[1-6])(?:\s+[\w:-]{{1,40}}\s?=\s?[^<>\n]{{1,300}})?\s{{0,3}}/?>|<!--|<!doctype\s"
    r"|&(?:nbsp|amp|lt|gt|quot|apos|deg|micro|mu|alpha|beta|gamma|delta|le|ge|plusmn|times|ndash|mdash|hellip"
    r"|[lr][sd]quo|[aeiou](?:acute|grave|uml|circ)|ccedil|ntilde|#\d{1,6}|#x[0-9a-f]{1,6});",
    re.IGNORECASE,
)
_MONTH = "(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)"
_MANGLED = re.compile(rf"-(?:{_MONTH}|\d\d)(?![\w-])")  # begins with one character, which is quick to look for
_DAY_BEFORE = re.compile(r"(?<![\w-])\d{1,2}\Z")
_MONTH_BEFORE = re.compile(rf"(?<![\w-]){_MONTH}\Z")
_MIDNIGHT = re.compile(r"\s*\d{4}-\d\d-\d\d 00:00:00\s*")

# Anywhere in a text, in small letters with straight apostrophes, where the key is in it too.
_PHRASES = {
    "n ai ": ("as an ai language model", "as an ai model", "as an ai assistant", "i'm just an ai "),
    "language model": ("as a large language model", "as a language model"),
    "cannot ": ("i cannot provide", "i cannot assist", "i cannot help with"),
    "can't ": ("i can't provide", "i can't assist", "i can't help with"),
    "able to provide": ("i'm unable to p", "i am unable to p", "i'm not able to p", "i am not able to p"),
    "unable to assist": ("i'm unable to assist", "i am unable to assist"),
    ", but i can": ("i'm sorry, but i can", "i am sorry, but i can", "i apologize, but i can"),
    "[": ("[insert", "[your ", "[placeholder", "[todo"),
    "<insert": ("<insert",),
    "{{": ("{{",),
    "todo:": ("todo:",),
    "your answer here": ("your answer here",),
    "lorem ipsum": ("lorem ipsum",),
    "人工智能": ("作为一个人工智能", "作为人工智能"),
    "我无法": ("我无法提供", "抱歉，我无法"),
}
# Every phrase holds one of these, and few texts do.
_RARE = ("[", "{", "<", "n ai ", "language model", "i can", "able to ", "todo:", "your answer h", "lorem i")
_RARE_BEYOND = ("人工智能", "我无法")
# All there is of a text; "Na" is sodium, and "None" an answer.
_WHOLE = {"N/A", "n/a", "NA", "NaN", "nan", "NULL", "null", "undefined", "TODO", "todo", "TBD", "tbd", "XXX", "xxx"}


def find_flaws(text: str) -> Iterator[tuple[str, int]]:
    """Yield the faults that one text has by itself, each with where it was seen."""
    place = find_loop(text)
    if place is not None:
        yield "loops", place
    place = _find_placeholder(text)
    if place is not None:
        yield "placeholder", place
    if _may_be_broken(text):
        broken = _CONTROLS.search(text) or _MOJIBAKE.search(text)
        if broken:
            yield "broken_text", broken.start()
    if "<" in text or "&" in text:
        markup = _MARKUP.search(text)
        if markup:
            yield "markup", markup.start()
    if "-" in text:
        mangled = _find_mangled(text)
        if mangled is not None:
            yield "mangled_dates", mangled


def _may_be_broken(text: str) -> bool:
    """Return whether a text has any character with which something broken could begin; most have none."""
    if text.encode("latin-1", "ignore").translate(None, _SOUND):
        return True
    return not text.isascii() and any(char in text for char in _BROKEN_BEYOND)


def _find_placeholder(text: str) -> int | None:
    if len(text) <= 12 and text.strip() in _WHOLE:
        return 0
    if not _may_hold_phrase(text):
        return None
    lower = text.lower().replace("’", "'")
    for common, phrases in _PHRASES.items():
        if common in lower:
            for phrase in phrases:
                at = lower.find(phrase)
                if at >= 0:
                    return at
    return None


def _may_hold_phrase(text: str) -> bool:
    if text.isascii():
        lower = text.lower()
    elif any(rare in text for rare in _RARE_BEYOND):
        return True
    else:
        lower = text.replace("’", "'").encode("ascii", "replace").lower().decode()  # three times as fast as a str
    for rare in _RARE:  # noqa: SIM110 any() over a generator takes three times as long
        if rare in lower:
            return True
    return False


def _find_mangled(text: str) -> int | None:
    """Return where a short date without a year stands: a day and a month, or a month and two digits."""
    if len(text) < 60 and _MIDNIGHT.fullmatch(text):
        return 0
    for match in _MANGLED.finditer(text):
        before = _MONTH_BEFORE if match[0][1].isdigit() else _DAY_BEFORE
        whole = before.search(text[max(0, match.start() - 5) : match.start()])
        if whole:
            return match.start() - len(whole[0])
    return None


def find_loop(text: str) -> int | None:
    """Return a place where a text says the same over and over, if it does; see the head of this file."""
    if len(text) < 4 * _PROBE:
        return None
    last, count = len(text) - _PROBE, text.count
    for part in range(8):
        at = last * part // 7
        probe = text[at : at + _PROBE]
        if count(probe) >= 3 and sum(map(str.isalpha, probe)) >= 8:
            first = max(0, at - _WINDOW)
            if _compute_repeats(text[first : at + _WINDOW]) >= _LEAST_REPEATED:
                return at
    return None


def _compute_repeats(text: str) -> float:
    """Return the share of stretches, one from each character on, that stood earlier in the text."""
    stretches = [text[at : at + _PROBE] for at in range(len(text) - _PROBE + 1)]
    return 1 - len(set(stretches)) / len(stretches) if stretches else 0.0


def shorten(text: str, end: int = 1) -> str:
    """Return the first characters of a text, or with ``end=-1`` the last, on one line and all of them visible."""
    cut = text if len(text) <= _EXCERPT else text[:_EXCERPT] + "…" if end > 0 else "…" + text[-_EXCERPT:]
    return "".join(char if char.isprintable() else " " if char in "\n\r\t" else f"\\u{ord(char):04x}" for char in cut)


def show_around(text: str, at: int) -> str:
    """Return a text on one line from a little before a place."""
    return shorten(text[max(0, at - 40) :] if at > 40 else text)
