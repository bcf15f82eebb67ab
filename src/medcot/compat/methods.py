"""The methods that Unsloth's models have beyond transformers' and PEFT's, on the very model of the notebook.

Unsloth replaces methods of the classes, for every model of the process. Setting bound methods on the instance would
tie the model to itself, so that deleting it frees nothing before the garbage collector comes by. Here the instance is
given a subclass of its own class, of the same name, made for it: methods are methods, ``isinstance`` still holds,
copies and pickles come out right, and no other model is touched. The tokenizer has one method so, since its own
``push_to_hub`` is public where nothing else is said.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from medcot.compat import pushing, saving
from medcot.compat.answers import answer
from medcot.compat.notes import say_once
from medcot.compat.session import session_of


class Extended:
    """An object whose class was extended in place."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Copy and pickle by the class that others know."""
        methods, plain = type(self).__bases__
        reduced: Any = super().__reduce_ex__(2)
        return (_rebuild, (methods, plain), *reduced[2:])


class ModelMethods(Extended):
    """What a model of a notebook can do beyond its class; see ``saving`` and ``pushing`` for the arguments."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Continue prompts: transformers' arguments, and its result."""
        tokenizer = session_of(self, "model.generate").loaded.tokenizer
        written, reason = answer(self, tokenizer, args, kwargs)
        if written is not None:
            return written
        if reason is not None:
            say_once(f"model.generate takes transformers' own path, which is slower: {reason}")
        return super().generate(*args, **kwargs)  # type: ignore[misc]

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Save the adapter, beside merged weights in a folder of its own."""
        if not saving.is_tuned(self) or "state_dict" in kwargs:  # a trainer's checkpoint is PEFT's business
            super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        else:
            saving.save_adapter(self, Path(save_directory), *args, **kwargs)

    def push_to_hub(self, repo_id: str, *args: Any, **kwargs: Any) -> str:
        """Push the adapter, privately unless told otherwise."""
        return pushing.push_adapter(self, repo_id, *args, **kwargs)

    def save_pretrained_merged(self, save_directory: str | Path, tokenizer: Any = None, *args: Any, **kw: Any) -> None:
        """Save merged weights."""
        saving.save_merged(self, Path(save_directory), tokenizer, *args, **kw)

    def push_to_hub_merged(self, repo_id: str, tokenizer: Any = None, *args: Any, **kwargs: Any) -> str:
        """Push merged weights, privately unless told otherwise."""
        return pushing.push_merged(self, repo_id, tokenizer, *args, **kwargs)

    def save_pretrained_gguf(self, save_directory: str | Path, tokenizer: Any = None, *args: Any, **kw: Any) -> None:
        """Save merged weights as GGUF files."""
        saving.save_gguf(self, Path(save_directory), tokenizer, *args, **kw)

    def push_to_hub_gguf(self, repo_id: str, tokenizer: Any = None, *args: Any, **kwargs: Any) -> str:
        """Push merged weights as GGUF files, privately unless told otherwise."""
        return pushing.push_gguf(self, repo_id, tokenizer, *args, **kwargs)


class TokenizerMethods(Extended):
    """What a tokenizer of a notebook does otherwise than its class."""

    def push_to_hub(self, repo_id: str, *args: Any, **kwargs: Any) -> str:
        """Push the tokenizer, privately unless told otherwise."""
        return pushing.push_tokenizer(self, repo_id, *args, **kwargs)


def extend(thing: Any, methods: Any) -> None:
    """Give a model or a tokenizer the notebook's methods, in place."""
    if not isinstance(thing, methods):
        plain: Any = type(thing)
        thing.__class__ = _subclass(methods, plain)


@functools.cache
def _subclass(methods: Any, plain: Any) -> Any:
    """The class with the methods; it goes by the same name, which configurations and cards record."""
    names = {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "__doc__": plain.__doc__}
    return type(plain.__name__, (methods, plain), names)


def _rebuild(methods: type, plain: type) -> Any:
    """Return an empty object of the extended class, for copies and pickles to fill."""
    made = _subclass(methods, plain)
    return made.__new__(made)
