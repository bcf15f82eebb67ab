"""The few constructs of Go's text/template that our Modelfile uses, written down independently of what writes it.

``range $i, $_ :=``, ``if``/``else if``/``else``/``end``, assignment, quoted strings, fields, and the functions ``eq``,
``and``, ``not``, ``len``, ``slice``; anything else is an error. Source: https://pkg.go.dev/text/template.
"""

from __future__ import annotations

import json
import re
from typing import Any

_TOKENS = re.compile(r'\s*("(?:[^"\\]|\\.)*"|[()]|[^\s()]+)')


def render(template: str, data: dict[str, Any]) -> str:
    """Execute a template."""
    parts = re.split(r"\{\{ (.*?) \}\}", template, flags=re.DOTALL)  # no trimming: a "{{-" would not match
    assert "{{" not in "".join(parts[::2])
    nodes = [("text" if number % 2 == 0 else "do", part) for number, part in enumerate(parts)]
    out, stop = _run(nodes, 0, data, data, {"$": data})
    assert stop == len(nodes)
    return out


def _run(nodes: list[Any], at: int, dot: Any, root: Any, names: dict[str, Any]) -> tuple[str, int]:
    out = ""
    while at < len(nodes):
        kind, text = nodes[at]
        word = text.split()[0] if kind == "do" else ""
        if kind == "text":
            out += text
        elif word in ("end", "else"):
            return out, at
        elif word == "if":
            taken, at = _branch(nodes, at, dot, root, names)
            out += taken
        elif word == "range":
            index, item, source = re.fullmatch(r"range (\$\w+), (\$\w+) := (\S+)", text).groups()  # type: ignore[union-attr]
            begin = at + 1
            for number, value in enumerate(_value(source, dot, names)):
                written, at = _run(nodes, begin, value, root, {**names, index: number, item: value})
                out += written
        elif ":=" in text:
            name, _, expression = text.partition(" := ")
            names[name] = _evaluate(expression, dot, names)
        else:
            out += str(_evaluate(text, dot, names))
        at += 1
    return out, at


def _branch(nodes: list[Any], at: int, dot: Any, root: Any, names: dict[str, Any]) -> tuple[str, int]:
    out, done = "", False
    while nodes[at][1] != "end":
        condition = re.sub(r"^(else )?(if )?|^else$", "", nodes[at][1])
        holds = not done and (condition == "" or bool(_evaluate(condition, dot, names)))
        written, at = _run(nodes, at + 1, dot, root, dict(names))
        out += written if holds else ""
        done = done or holds
    return out, at


def _evaluate(text: str, dot: Any, names: dict[str, Any]) -> Any:
    tokens = _TOKENS.findall(text)
    value, rest = _call(tokens, dot, names)
    assert not rest, text
    return value


def _call(tokens: list[str], dot: Any, names: dict[str, Any]) -> tuple[Any, list[str]]:
    function, values, rest = tokens[0], [], tokens[1:]
    known = {"eq", "and", "not", "len", "slice"}
    if function not in known:
        rest = tokens
    while rest and rest[0] != ")":
        if rest[0] == "(":
            value, rest = _call(rest[1:], dot, names)
            assert rest[0] == ")"
            rest = rest[1:]
        else:
            value, rest = _value(rest[0], dot, names), rest[1:]
        values.append(value)
    if function not in known:
        assert len(values) == 1, tokens
        return values[0], rest
    if function == "eq":
        return values[0] == values[1], rest
    if function == "and":
        return next((value for value in values if not value), values[-1]), rest
    if function == "not":
        return not values[0], rest
    return (len(values[0]) if function == "len" else values[0][values[1] :]), rest


def _value(text: str, dot: Any, names: dict[str, Any]) -> Any:
    if text.startswith('"'):
        return json.loads(text)
    if text.isdigit():
        return int(text)
    head, *fields = text.split(".")
    value = dot if head == "" else names[head]
    for field in fields:
        value = value[field]
    return value
