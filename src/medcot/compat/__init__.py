"""The tutorial's notebook, unchanged: the names that it imports from Unsloth and TRL, on medcot's engine.

    from medcot.compat import FastLanguageModel, SFTTrainer, is_bfloat16_supported

Besides that line, a notebook changes where it installs, its secrets and Hub names, and on a CPU ``.to("cuda")``, which
becomes ``.to(model.device)``. Everything else keeps its meaning: each call settles its part of a recipe
(``session.py``), and the work is done by the functions behind ``medcot run`` (``loading``, ``trainer``, ``saving``,
``pushing``, ``answers``). Arguments that have no meaning here are accepted and said once; one that would silently give
another result is refused, with what to do instead.

An alternative would be to import Unsloth's names into TRL's classes and patch these, as Unsloth does. Then two
trainers, two losses and two ways to merge would have to agree for ever. Here there is one of each.

Source of the calls: the tutorial ("Fine-Tuning DeepSeek R1", DataCamp and Kaggle), Unsloth's documentation and its
2026.10 release; nothing is taken from their code.
"""

from medcot.compat.chat import get_chat_template
from medcot.compat.loading import FastLanguageModel, is_bfloat16_supported
from medcot.compat.notes import ArgumentError, NotCoveredError
from medcot.compat.trainer import SFTTrainer, train_on_responses_only

is_bf16_supported = is_bfloat16_supported  # Unsloth's other name for it

__all__ = [
    "ArgumentError",
    "FastLanguageModel",
    "NotCoveredError",
    "SFTTrainer",
    "get_chat_template",
    "is_bf16_supported",
    "is_bfloat16_supported",
    "train_on_responses_only",
]
