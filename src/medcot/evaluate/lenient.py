r"""Lenient grading: the most plausible answer of a text, for a score that is printed beside the strict one.

Many published extractors work like this one: they look for something like an answer until they find it. Its score tells
how much of a low strict score is form (the model knows, and does not say it on the last line) and how much is
knowledge; it is no measure by itself, because every rule below can pick a letter that the model only discussed.

What is strictly right is right here too, so this score is never the lower one; and a letter or a yes that the last line
states stands. Else the text behind the last ``</think>`` is read, or the thinking where nothing stands behind it, after
markdown, LaTeX commands and Unicode's other forms of a character are taken off:

1. Cues, the last first: ``\boxed{X}``, ``answer is X``, ``Answer: X`` and the like in ten languages. A cue with a
   negation in it ("the answer cannot be") is none. What follows the cue, or the line below where nothing follows, is
   read by the kind:
   - LETTER: the first thing is a capital letter of an option (a small one if it stands alone; Cyrillic and Greek
     letters of the same shape too), and not the article A; or an option's text.
   - YESNO: the first word is yes, no or maybe.
   - NUMBER: the first numbers behind the last ``=``, as many as gold has; right if they are gold's, or within the
     limits. The unit is not judged.
   - TEXT: gold or an alias stands in it as whole words, and no negation shortly before.
2. LETTER: else the last line, if it begins with a letter as in 1; else the last letter of an option that stands alone
   anywhere, and is not said to be wrong; else the one option whose text is there.
   YESNO: else the word that the last line, then the whole text, begins with, if a comma, stop or nothing follows.
   NUMBER: else the last numbers of the last line that has as many as gold has. TEXT: else the last line, as in 1.

Only the last 10,000 characters are read, so that no text can make it slow. Where nothing is found the strict outcome
stays.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal

from medcot.evaluate.answers import Read, check_gradable, read_letter, read_limits, read_word
from medcot.evaluate.grading import INVISIBLE, grade
from medcot.evaluate.phrases import normalise_phrase
from medcot.records import Allowance, AnswerKind, Completion, Example, Grade, Outcome

_WRAPPER = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathbb|bf|rm)\s*\{([^{}\n]*)\}")
_BOX = re.compile(r"\\f?boxed\s*\{([^{}\n]*)\}")
_MARKUP = re.compile(r"\\[()\[\],;!]|[$*`|#]|__|^[ \t]*(?:>|[-+•][ \t])", re.MULTILINE)
_NEGATION = (
    r"(?:not|never|cannot|can't|isn't|n't|no|without|unlike|unlikely|exclud\w+|rul\w+ out|eliminat\w+|than|except)"
)
_CUE = re.compile(
    r"(?:\b(?:answer|antwort|respuesta|réponse|risposta|resposta|ответ)\b|答案|答え|정답|\b답\b)"
    r"(?:(?P<between>(?:(?!\banswer\b)[^\n.:=?]){0,40}?)(?P<link>[:=]|\b(?:is|be|ist|lautet|es|est|è|é)\b|[是为])|)"
    r"[ \t]*:?[ \t]*"
    r"(?=(?P<content>[^\n]{0,200}))",
    re.IGNORECASE,
)
_NEGATED = re.compile(rf"\b{_NEGATION}\b|n't\b", re.IGNORECASE)
_JUST_NEGATED = re.compile(rf"\b{_NEGATION}(?:\W+\w+){{0,2}}\W*$", re.IGNORECASE)
_SAID_WRONG = re.compile(
    r"\W*(?:is|are|was|were|would be|seems?)?\W*(?:\w+ly )?"
    r"(?:wrong|incorrect|false|unlikely|not|ruled|excluded|eliminated|less|out|a distractor)\b",
    re.IGNORECASE,
)
_FIRST_LETTER = re.compile(r"\W*(?:(?:option|choice|letter|opción|opção)\W*)?(?P<letter>[A-Za-z])(?![\w'’])", re.I)
_LONE_LETTER = re.compile(r"(?<![\w'’.-])[A-Z](?![\w'’]|-\w|\.\w)")
_REASON = r"(?:because|since|as|is|and|or|for|due|which|given|with|in|by|but)\b"
_ARTICLE = re.compile(rf"[ \t]+(?!{_REASON})[a-z]")
_WORD = re.compile(r"\W*(?P<word>yes|no|maybe)\b(?![-'’])", re.IGNORECASE)
_WORD_ALONE = re.compile(r"\W*(?P<word>yes|no|maybe)[ \t]*(?:[.,;:!()–—-]|$)", re.IGNORECASE)
_NUMBER = re.compile(
    r"(?<![\w^/.,])[+-]?(?:\d{1,3}(?:,\d{3})+(?![\d])(?:\.\d+)?|\d+,\d{1,2}(?!\d)|\d+(?:\.\d+)?|\.\d+)"
)
_THOUSANDS = re.compile(r",(?=\d{3})")
_LOOKALIKES = str.maketrans("АВСЕАΒΕ", "ABCEABE")  # Cyrillic, then Greek

_MOST_READ = 10_000  # characters

Reader = Callable[[str], Read | None]


def lenient(example: Example, completion: Completion | None) -> Grade:
    """Return the verdict on the most plausible answer, by the rules above.

    Args:
        example: the problem; it must carry ``gold`` and ``answer_kind``.
        completion: what the model wrote, or ``None`` when generation itself broke.

    Raises:
        DataError: the example cannot be graded.
    """
    strict = grade(example, completion)
    stated = strict.outcome is Outcome.WRONG and example.answer_kind in (AnswerKind.LETTER, AnswerKind.YESNO)
    if completion is None or strict.outcome is Outcome.CORRECT or stated:
        return strict
    text = _strip_markup(completion.answer)
    if not text.strip():
        text = _strip_markup(completion.text.replace("<think>", "\n").replace("</think>", "\n"))
    read = _find(text, example)
    if read is None:
        return strict
    return Grade(Outcome.CORRECT if read.right else Outcome.WRONG, parsed=read.parsed)


def _strip_markup(text: str) -> str:
    plain = INVISIBLE.sub("", unicodedata.normalize("NFKC", text[-_MOST_READ:])).replace("\N{MINUS SIGN}", "-")
    for _ in range(3):  # commands inside one another
        plain = _WRAPPER.sub(r"\1", plain)
    plain = _BOX.sub(r"\nanswer: \1\n", plain)
    return _MARKUP.sub(" ", plain.replace(r"\%", "%"))


def _find(text: str, example: Example) -> Read | None:
    gold, kind = check_gradable(example)
    allowance = example.allowance or Allowance()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return None
    if kind is AnswerKind.LETTER:
        return _find_letter(text, lines, read_letter(gold, example.options), example.options)
    if kind is AnswerKind.YESNO:
        return _find_word(text, lines, read_word(gold))
    if kind is AnswerKind.NUMBER:
        return _find_number(text, lines, gold, allowance)
    golds = [normalise_phrase(each) for each in (gold, *allowance.aliases)]

    def read(content: str) -> Read | None:
        return Read(content, _holds(normalise_phrase(content), golds)) if content.strip(" .") else None

    found = _read_cues(text, read, linked=True)
    empty_cue = any(cue["link"] for cue in _CUE.finditer(lines[-1]))
    return found if found or empty_cue else read(lines[-1])


def _read_cues(text: str, read: Reader, *, linked: bool) -> Read | None:
    """Read what follows the cues, the last first; ``linked`` leaves out those without "is" or a colon."""
    for cue in reversed(list(_CUE.finditer(text))):
        if _NEGATED.search(cue["between"] or "") or (linked and not cue["link"]):
            continue
        content = cue["content"].strip() or next(_following_lines(text, cue.end("content")), "")
        found = read(content)
        if found:
            return found
    return None


def _following_lines(text: str, start: int) -> Iterator[str]:
    return (line.strip() for line in text[start : start + 500].splitlines() if line.strip())


def _holds(folded: str, golds: list[str]) -> bool:
    """Return whether one of the golds stands in a folded text as whole words, and no negation shortly before it."""
    for gold in golds:
        for match in re.finditer(rf"(?<!\w){re.escape(gold)}(?!\w)", folded):
            if not _JUST_NEGATED.search(folded[: match.start()][-60:]):
                return True
    return False


# Letters -------------------------------------------------------------------------------------------------------------


def _find_letter(text: str, lines: list[str], gold: str | None, options: Mapping[str, str] | None) -> Read | None:
    def read(content: str) -> Read | None:
        letter = _read_letter(content, options)
        return Read(letter, letter == gold) if letter else None

    found = _read_cues(text, read, linked=False)
    if found is None and re.match(r"\W*(?:option )?\(?[A-Za-z](?:\W|$)", lines[-1], re.IGNORECASE):
        found = read(lines[-1])
    letter = None if found else _find_lone_letter(text, options) or _find_option(normalise_phrase(text), options)
    return Read(letter, letter == gold) if letter else found


def _read_letter(content: str, options: Mapping[str, str] | None) -> str | None:
    """Return the letter that a text begins with, or whose option's text it begins with."""
    plain = content.translate(_LOOKALIKES)
    option = _find_leading_option(normalise_phrase(plain), options)
    if option:
        return option
    match = _FIRST_LETTER.match(plain)
    if match is None:
        return None
    letter, after = match["letter"], plain[match.end() :]
    alone = not after.strip(" .)]}:!")
    if not (letter.isupper() or alone) or (letter == "A" and _ARTICLE.match(after)) or _SAID_WRONG.match(after):
        return None
    return letter.upper() if _is_option(letter.upper(), options) else None


def _find_leading_option(folded: str, options: Mapping[str, str] | None) -> str | None:
    found = [
        (len(phrase), letter)
        for letter, text in (options or {}).items()
        if len(phrase := normalise_phrase(text)) > 1 and re.match(rf"{re.escape(phrase)}(?!\w)", folded)
    ]
    return max(found)[1] if found else None


def _find_lone_letter(text: str, options: Mapping[str, str] | None) -> str | None:
    for match in reversed(list(_LONE_LETTER.finditer(text))):
        before, after = text[max(0, match.start() - 60) : match.start()], text[match.end() : match.end() + 40]
        is_word = match[0] in "AI" and re.match(r"[ \t]+[a-z]", after) and not re.match(rf"[ \t]+{_REASON}", after)
        if not _is_option(match[0], options) or is_word:
            continue
        if not _SAID_WRONG.match(after) and not re.search(rf"\b{_NEGATION}\W+(?:option\W+)?$", before, re.IGNORECASE):
            return match[0]
    return None


def _find_option(folded: str, options: Mapping[str, str] | None) -> str | None:
    found = [letter for letter, text in (options or {}).items() if _holds(folded, [normalise_phrase(text)])]
    return found[0] if len(found) == 1 else None


def _is_option(letter: str, options: Mapping[str, str] | None) -> bool:
    return letter in (options or "ABCDEFGHIJ")


# Words and numbers ---------------------------------------------------------------------------------------------------


def _find_word(text: str, lines: list[str], gold: str | None) -> Read | None:
    def read(content: str) -> Read | None:
        match = _WORD.match(content)
        return Read(match["word"].lower(), match["word"].lower() == gold) if match else None

    found = _read_cues(text, read, linked=False)
    if found is None:
        match = _WORD_ALONE.match(lines[-1]) or _WORD_ALONE.match(lines[0])
        return read(match[0]) if match else None
    return found


def _find_number(text: str, lines: list[str], gold: str, allowance: Allowance) -> Read | None:
    wanted, limits = _list_numbers(gold), read_limits(allowance)

    def compare(given: list[Decimal], content: str) -> Read:
        if limits is not None and len(wanted) == 1:
            return Read(content, limits[0] <= given[0] <= limits[1])
        return Read(content, given == wanted)

    def read(content: str) -> Read | None:
        given = _list_numbers(re.split(r"[=≈]", content)[-1])[: len(wanted)]
        return compare(given, content) if len(given) == len(wanted) else None

    found = _read_cues(text, read, linked=True)
    if found is not None:
        return found
    for line in reversed(lines):
        given = _list_numbers(line)[-len(wanted) :]
        if len(given) == len(wanted):
            return compare(given, line)
    return None


def _list_numbers(text: str) -> list[Decimal]:
    plain = text.replace("\N{MINUS SIGN}", "-")
    return [Decimal(_THOUSANDS.sub("", match[0]).replace(",", ".")) for match in _NUMBER.finditer(plain)]
