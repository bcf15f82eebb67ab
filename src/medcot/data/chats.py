"""Rows that are chats: ShareGPT's ``from``/``value``, OpenAI's ``role``/``content``, TRL's prompt and completion.

An example is one question and its answer. So a chat of several turns is set aside, with that reason and counted: to
train on its last turn alone, the earlier turns would have to be written into the question, where they look like what
the user said; and to drop them would leave answers to questions that nobody asked.

Reasoning models are run without a system prompt (DeepSeek-R1's card asks for that), so a system message that all rows
share is left out; one that differs from row to row carries content, and is put before the question. Either is counted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from medcot.data.formats import RawRow
from medcot.data.reading import (
    Change,
    Fields,
    Given,
    Part,
    Thought,
    UnusableRow,
    check_tags,
    check_text,
    split_answer,
    unwrap,
)
from medcot.records import Problem

CHAT_COLUMNS = ("messages", "conversations", "conversation")
_ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "chatgpt", "bot"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}
_FIELDS = {"user": "question", "assistant": "response", "system": "question"}  # what a message becomes
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # OpenAI-compatible servers, vLLM, TRL


def read_messages(row: RawRow, given: Given) -> Fields:
    """Read a chat from the one column that holds it."""
    column = given.columns["chat"]
    return _read_chat(_as_list(row.get(column), Part("chat", f"'{column}'")), row, given, column)


def read_prompt_and_completion(row: RawRow, given: Given) -> Fields:
    """Read a prompt and a completion, both texts or both lists of messages."""
    prompt, completion = _parse(row.get("prompt")), _parse(row.get("completion"))
    if isinstance(prompt, list) or isinstance(completion, list):
        messages = [*_as_list(prompt, Part("chat", "'prompt'")), *_as_list(completion, Part("chat", "'completion'"))]
        return _read_chat(messages, row, given, "completion")
    asked, what = Part("question", "the question ('prompt')"), Part("response", "the answer ('completion')")
    question = _check_filled(prompt, asked)
    check_tags(question, asked)
    return _join(question, split_answer(_check_filled(completion, what), what), (), row, given)


def read_instruction(row: RawRow, given: Given) -> Fields:
    """Read Alpaca's instruction, with its input below where there is one, and the output."""
    question = _check_filled(row.get("instruction"), Part("question", "the question ('instruction')"))
    more = row.get("input")
    if more is not None and check_text(more, Part("question", "the input ('input')")).strip():
        question = f"{question}\n\n{more}"
    check_tags(question, Part("question", "the question ('instruction' and 'input')"))
    what = Part("response", "the answer ('output')")
    return _join(question, split_answer(_check_filled(row.get("output"), what), what), (), row, given)


def find_system(rows: Sequence[RawRow]) -> str | None:
    """Return the system message that at least two rows have, and all that have one share; else ``None``."""
    found = [text for row in rows if (text := _first_system(row)) is not None]
    return found[0] if len(found) > 1 and len(set(found)) == 1 else None


def holds_messages(value: object, keys: tuple[str, str]) -> bool:
    """Whether a value is a list of messages with these two keys."""
    messages = _parse(value)
    return isinstance(messages, list) and any(
        isinstance(message, Mapping) and all(key in message for key in keys) for message in messages
    )


def _first_system(row: RawRow) -> str | None:
    value = row.get("system")
    if isinstance(value, str) and value.strip():
        return value
    for column in (*CHAT_COLUMNS, "prompt"):
        messages = _parse(row.get(column))
        if isinstance(messages, list) and messages and isinstance(messages[0], Mapping):
            role, text = _role_and_content(messages[0])
            if _ROLES.get(str(role).lower()) == "system" and isinstance(text, str):
                return text
    return None


def _parse(value: object) -> object:
    """Return the list that a text cell of CSV holds as JSON; anything else as it is."""
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _as_list(value: object, what: Part) -> list[object]:
    messages = _parse(value)
    if not isinstance(messages, list):
        raise what.refuse(f"is no list of messages but {type(value).__name__}", Problem.TYPE)
    if not messages:
        raise what.refuse("is an empty list", Problem.EMPTY)
    return messages


def _role_and_content(message: Mapping[str, object]) -> tuple[object, object]:
    if "role" in message:
        return message["role"], message.get("content")
    return message.get("from"), message.get("value")


def _read_chat(messages: Sequence[object], row: RawRow, given: Given, column: str) -> Fields:
    roles: list[str] = []
    texts: list[str] = []
    last: Mapping[str, object] = {}
    for message in messages:
        if not isinstance(message, Mapping):
            says = f"a message in '{column}' is no object but {type(message).__name__}"
            raise UnusableRow(says, "chat", Problem.TYPE)
        name, content = _role_and_content(message)
        role = _ROLES.get(name.lower()) if isinstance(name, str) else None
        if role is None:
            known = isinstance(name, str) and len(name) < 40
            by = repr(name) if known else "nobody known"
            raise UnusableRow(f"a message in '{column}' is by {by}", "chat", Problem.FORM)
        roles.append(role)
        texts.append(_flatten(content, _say_whose(role, column)))
        last = message
    systems = tuple(text for role, text in zip(roles, texts, strict=True) if role == "system" and text.strip())
    _check_turns([role for role in roles if role != "system"], column)
    if roles[-1] != "assistant":
        raise UnusableRow(f"a system message in '{column}' follows the answer", "chat", Problem.FORM)
    asked = _say_whose("user", column)
    question = _check_filled(texts[roles.index("user")], asked)
    check_tags(question, asked)
    return _join(question, _read_answer(last, texts[-1], column), systems, row, given)


def _say_whose(role: str, column: str) -> Part:
    return Part(_FIELDS[role], f"the {role}'s message in '{column}'")


def _check_turns(roles: Sequence[str], column: str) -> None:
    if not roles:
        raise UnusableRow(f"nobody but the system speaks in '{column}'", "chat", Problem.FORM)
    if roles == ["user", "assistant"]:
        return
    if roles[-1] == "user":
        says = f"the last message in '{column}' is the user's, so there is no answer"
        raise UnusableRow(says, "response", Problem.MISSING)
    if roles.count("assistant") > 1:
        says = "it is a chat of several turns, and an example is one question and its answer"
        raise UnusableRow(says, "chat", Problem.FORM)
    says = f"the messages in '{column}' are not one of the user and then one of the assistant"
    raise UnusableRow(says, "chat", Problem.FORM)


def _flatten(content: object, what: Part) -> str:
    """Return a message's text; OpenAI's list of parts is joined where all of them are texts."""
    if not isinstance(content, list):
        return check_text("" if content is None else content, what)
    parts: list[str] = []
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text":
            raise what.refuse("holds a part that is no text", Problem.TYPE)
        parts.append(check_text(part.get("text"), what))
    return "".join(parts)


def _read_answer(message: Mapping[str, object], text: str, column: str) -> Thought:
    """Read the assistant's reasoning from a key of its own, else from its content."""
    what = _say_whose("assistant", column)
    answer = _check_filled(text, what)
    parts = {key: Part("reasoning", f"'{key}' in '{column}'") for key in _THOUGHTS}
    keys = [key for key, part in parts.items() if check_text(message.get(key) or "", part).strip()]
    if not keys:
        return split_answer(answer, what)
    if len(keys) > 1 or "</think>" in answer:
        others = f"'{keys[1]}'" if len(keys) > 1 else "its content"
        says = f"{what} has a reasoning in '{keys[0]}' and another in {others}"
        raise UnusableRow(says, "reasoning", Problem.CONFLICT)
    check_tags(answer, what)
    thinking = Part("reasoning", f"the reasoning ('{keys[0]}') in '{column}'")
    thought = unwrap(check_text(message[keys[0]], thinking), thinking)
    return Thought(thought.reasoning, answer, thought.lacks, thought.changes)


def _check_filled(value: object, what: Part) -> str:
    if value is None:
        raise what.refuse("is missing or null", Problem.MISSING)
    text = check_text(value, what)
    if not text or text.isspace():
        raise what.refuse("is empty", Problem.EMPTY)
    return text


def _join(question: str, thought: Thought, systems: Sequence[str], row: RawRow, given: Given) -> Fields:
    """Put the parts together, and say what became of system messages."""
    system = row.get("system")
    if system is not None and check_text(system, Part("question", "the system message ('system')")).strip():
        systems = (*systems, str(system))
    changes = thought.changes
    own = [text for text in systems if text != given.system]
    if own:
        for text in own:
            check_tags(text, Part("question", "the system message"))
        question = "\n\n".join([*own, question])
        changes = (*changes, Change.SYSTEM_KEPT)
    if len(own) < len(systems):
        changes = (*changes, Change.SYSTEM_LEFT_OUT)
    return Fields(question, thought.reasoning, thought.answer, lacks=thought.lacks, changes=changes)
