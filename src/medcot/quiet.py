"""The one place where the libraries' chatter is turned down: progress bars, advice, deprecation notices.

transformers, PEFT, bitsandbytes and huggingface_hub each print in their own way: a bar on standard error, a Python
warning, a logger with a handler of its own. What medcot has to say it says itself, once, so their voices are turned
down around the calls and restored afterwards. The usual way, environment variables such as
``HF_HUB_DISABLE_PROGRESS_BARS``, would change the host process for good and works only before the first import; this
uses the libraries' own switches.
Errors still come through, and what a silenced warning would have told (weights missing from a checkpoint, say) is
checked by the caller and raised as an error.

The switches belong to the process, not to a thread; nesting is fine. Nothing here is imported until it is used.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# Loggers that advise below the level of an error; transformers has its own switch.
_LOGGERS = ("bitsandbytes", "huggingface_hub", "accelerate", "peft", "trl", "httpx")
# Python warnings raised from inside these packages; those raised from the user's own files stay.
_PACKAGES = r"(transformers|peft|bitsandbytes|huggingface_hub|accelerate|trl|torch)(\.|$)"


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence the libraries' progress bars, warnings and advice inside the ``with`` block."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging as transformers_logging

    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    verbosity = transformers_logging.get_verbosity()
    bars_shown = transformers_logging.is_progress_bar_enabled()
    hub_bars_shown = not are_progress_bars_disabled()
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()  # switches the Hub's bars off as well
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=_PACKAGES)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        transformers_logging.set_verbosity(verbosity)
        if bars_shown:
            transformers_logging.enable_progress_bar()
        if hub_bars_shown:
            enable_progress_bars()
        else:
            disable_progress_bars()
