"""Opening lanes: one base in memory, PEFT's adapters side by side on it, and a lane for each, and for none.

A lane binds the adapter that is switched on while it is opened and keeps it, so adapters are switched here and never
while answers are written. The base's lane has them switched off: exact, as long as no adapter has trained biases, which
PEFT would leave in place; such an adapter is refused, since "base" would be answered by something that is not.

Where the engine does not know a model, transformers writes one answer at a time, with the adapter switched before each.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medcot import engine
from medcot.errors import ModelError
from medcot.model import load_adapter, read_adapter_config
from medcot.quiet import quiet_libraries
from medcot.serve.lanes import EngineLane, Lane, PlainLane
from medcot.weights import first_line

if TYPE_CHECKING:
    from medcot.model import LoadedModel

_FIRST = "default"  # PEFT's name for the adapter that a model is wrapped with


class Opener:
    """Opens the lanes of one base.

    Args:
        loaded: the base; wrapped in place where there are adapters.
        adapters: folders by name, in the order in which the models are told.
        base: the plain base's name.
        accelerate: whether the engine writes, where it can.

    Raises:
        ModelError: an adapter does not fit, or has trained biases.
    """

    def __init__(self, loaded: LoadedModel, adapters: Mapping[str, Path], base: str, *, accelerate: bool) -> None:
        self.names = (*adapters, base)
        self._tokenizer = loaded.tokenizer
        self._switches: dict[str, str | None] = {base: None}
        self._model: Any = loaded.model
        for number, (name, folder) in enumerate(adapters.items()):
            _refuse_biases(name, folder)
            self._switches[name] = name if number else _FIRST
            if number == 0:
                self._model = load_adapter(loaded, folder)
            else:
                _add_adapter(self._model, name, folder)
        self.reason = "it was asked not to" if not accelerate else self._accelerate()

    def _accelerate(self) -> str | None:
        """Why the engine does not write; ``None`` where it does."""
        for name in self.names:
            with self._switched(name):
                explanation = engine.accelerate(self._model)
                if not explanation.fast:
                    engine.release(self._model)
                    return explanation.reason or "it does not know the model"
        return None

    def open(self, name: str, num_slots: int, row_tokens: int) -> Lane:
        """Return a new lane with that adapter, all of its slots free."""
        if self.reason is not None:
            return PlainLane(self._model, self._tokenizer, lambda: self._switched(name))
        with self._switched(name):
            return EngineLane(self._model, num_slots, row_tokens)

    def fit(self, num_slots: int, row_tokens: int) -> int:
        """How many slots each lane can have: fewer on a GPU that has no room for them."""
        fast = engine.engine_of(self._model)
        if fast is None:
            return 1
        from medcot.engine.decoding import fit_slots

        num_lanes = len(self.names)
        return max(1, fit_slots(fast, num_slots * num_lanes, row_tokens, [row_tokens]) // num_lanes)

    @contextlib.contextmanager
    def _switched(self, name: str) -> Iterator[None]:
        adapter = self._switches[name]
        if len(self._switches) == 1:
            yield
        elif adapter is None:
            with self._model.disable_adapter():
                yield
        else:
            self._model.set_adapter(adapter, inference_mode=True)
            yield


def _add_adapter(model: Any, name: str, folder: Path) -> None:
    try:
        with quiet_libraries():
            model.load_adapter(str(folder), adapter_name=name, is_trainable=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"the adapter '{folder}' cannot be applied beside the others: {first_line(error)}",
            "All adapters of a server are of the same base",
            "Serve it by a server of its own",
        ) from None


def _refuse_biases(name: str, folder: Path) -> None:
    config = read_adapter_config(folder)
    if (bias := str(config.get("bias") or "none")) != "none":
        raise ModelError(
            f"the adapter '{name}' has trained biases (bias={bias})",
            "PEFT leaves trained biases in the model when an adapter is switched off or changed",
            "Merge it (medcot export RUN --to merged-16bit) and serve the merged model",
        )
