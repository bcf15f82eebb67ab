"""What a notebook has settled so far, kept with its model: the recipe that its calls amount to.

The tutorial spreads one job over a dozen calls, each with a handful of settings. Here every call writes its settings
into a ``Recipe``, and the work is done by the functions that ``medcot run`` gives its recipe to. So the two cannot
drift apart, values are checked by the same rules, and ``session_of(model).recipe`` says what the notebook has asked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from medcot.compat.notes import ArgumentError
from medcot.recipe import Recipe, build_recipe

if TYPE_CHECKING:
    from medcot.model import LoadedModel

_SESSION = "_medcot_session"


@dataclass
class Session:
    """A model of a notebook.

    Attributes:
        recipe: the settings so far.
        loaded: the base, as ``model.load`` returned it.
    """

    recipe: Recipe
    loaded: LoadedModel

    def settle(self, stage: str, where: str, **values: Any) -> None:
        """Write settings into a stage of the recipe; ``where`` names the call in an error."""
        settled = self.recipe.model_dump(mode="json")
        settled[stage] |= values
        self.recipe = build_recipe(settled, where=where)

    def __reduce__(self) -> tuple[Any, ...]:
        return Session, (self.recipe, self.loaded)


def open_session(model: Any, session: Session) -> None:
    """Put a session on a model."""
    setattr(model, _SESSION, session)


def session_of(model: Any, where: str) -> Session:
    """Return a model's session.

    Raises:
        ArgumentError: the model did not come from ``FastLanguageModel.from_pretrained``.
    """
    session = vars(model).get(_SESSION) if hasattr(model, "__dict__") else None
    if session is None:
        raise ArgumentError(
            f"{where} was given a {type(model).__name__} that medcot did not load",
            "The model comes from FastLanguageModel.from_pretrained, and has its adapter from get_peft_model",
            "Load it with FastLanguageModel.from_pretrained(model_name=...)",
        )
    assert isinstance(session, Session)
    return session
