"""``get_chat_template``: a tokenizer with the chat template that is asked for, as far as one is there.

Unsloth brings templates by model family. medcot brings none: the tokenizer that comes with a model has the template it
was trained with, and another one tells the model what it never saw. So a template is the model's own, or Jinja text.
"""

from __future__ import annotations

from typing import Any

from medcot.compat.notes import NotCoveredError


def get_chat_template(tokenizer: Any, chat_template: str | None = None, **others: Any) -> Any:
    """Return the tokenizer, with a template given as Jinja text put on it.

    Args:
        tokenizer: the model's.
        chat_template: Jinja text; ``None`` keeps the tokenizer's own.
        **others: none is covered.

    Raises:
        NotCoveredError: a template by name, a mapping of roles, or a tokenizer without a template.
    """
    if any(others.values()):
        raise NotCoveredError(
            f"get_chat_template with {', '.join(others)}",
            "A template is used as it is",
            "Rename the roles in the data with dataset.map",
        )
    if chat_template is None and tokenizer.chat_template:
        return tokenizer
    if chat_template is None or "{" not in chat_template:
        raise NotCoveredError(
            f"the chat template {chat_template!r}",
            "medcot uses the template that comes with a model, or one given as Jinja text",
            "Leave chat_template out, or pass the text of a template",
        )
    tokenizer.chat_template = chat_template
    return tokenizer
