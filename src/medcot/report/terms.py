"""Under whose terms a tuned model goes out: what is known of the base models' licences, as one table.

A tuned model is a work derived from its base, so the base's licence binds whoever publishes it. Most say "keep this
notice". The Llama licences say more, and hardly anybody does it: clause 1.b.i of the Llama 3.1 and 3.3 Community
License Agreements asks whoever distributes derived models for a copy of the agreement, for "Built with Llama" where
people see it, and for a name that begins with "Llama"; clause 1.b.iii for a notice file. DeepSeek publishes its
distills under MIT, and says of DeepSeek-R1-Distill-Llama-8B that it derives from Llama-3.1-8B-Base, of the 70B that it
derives from Llama-3.3-70B-Instruct, each "originally licensed" under that licence; of the Qwen ones, that they derive
from Qwen2.5, which is Apache-2.0 (https://github.com/deepseek-ai/DeepSeek-R1, section License). Both are kept here.
This is reading, not legal advice, and the card says so.

Of a base that is not in the table nothing is said. Duties follow a name wherever it is found, since a mirror or a copy
on disk is still the same model; a permission follows only the owner who gave it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

EMBEDDED_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"  # the embedded weights are a 4-bit GGUF of this model

_MIT = (
    "MIT License\n\nCopyright (c) 2023 DeepSeek\n\nPermission is hereby granted, free of charge, to any "
    'person obtaining a copy of this software and associated documentation files (the "Software"), to '
    "deal in the Software without restriction, including without limitation the rights to use, copy, "
    "modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit "
    "persons to whom the Software is furnished to do so, subject to the following conditions:\n\nThe above "
    "copyright notice and this permission notice shall be included in all copies or substantial portions "
    'of the Software.\n\nTHE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR '
    "IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR "
    "PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY "
    "CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING "
    "FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE."
)
_APACHE = "Licensed under the Apache License, Version 2.0: https://www.apache.org/licenses/LICENSE-2.0"


@dataclass(frozen=True, slots=True)
class Duty:
    """What an agreement asks of whoever distributes a derived model.

    Attributes:
        agreement: its title, which a copy of it carries.
        address: where to read it.
        prefix: how the model's name begins.
        display: what is shown prominently.
        clause: where the agreement says so.
    """

    agreement: str
    address: str
    prefix: str
    display: str
    clause: str

    def allows(self, name: str) -> bool:
        """Whether a model may be called so."""
        return name.lower().startswith(self.prefix.lower())

    def is_in(self, text: str) -> bool:
        """Whether a text is a copy of the agreement, by its title."""
        return self.agreement.lower() in " ".join(text.split()).lower()


@dataclass(frozen=True, slots=True)
class Terms:
    """The terms of a base model.

    Attributes:
        licence: the Hub's identifier, of the strictest where there are several.
        says: where the model comes from and under what, a sentence or two.
        notices: what goes along in a NOTICE file.
        duty: what else is asked, or ``None``.
    """

    licence: str
    says: str
    notices: tuple[str, ...]
    duty: Duty | None = None


def _llama(version: str) -> tuple[Duty, str]:
    agreement = f"Llama {version} Community License"
    address = f"https://www.llama.com/llama{version.replace('.', '_')}/license/"
    notice = f"Llama {version} is licensed under the {agreement}, Copyright © Meta Platforms, Inc. All Rights Reserved."
    return Duty(f"{agreement} Agreement", address, "Llama", "Built with Llama", "1.b.i"), notice


_LLAMA_31, _NOTICE_31 = _llama("3.1")
_LLAMA_32, _NOTICE_32 = _llama("3.2")
_LLAMA_33, _NOTICE_33 = _llama("3.3")
_DISTILLED = "DeepSeek distilled it from DeepSeek-R1 and publishes it under MIT; it derives from"

# Hub id, or the last part of a path behind a slash, in lower case: the whole of it must match.
TERMS: dict[str, Terms] = {
    r".*/deepseek-r1-distill-llama-8b(-.+)?": Terms(
        "llama3.1", f"{_DISTILLED} Llama-3.1-8B, under the Llama 3.1 Community License.", (_NOTICE_31, _MIT), _LLAMA_31
    ),
    r".*/deepseek-r1-distill-llama-70b(-.+)?": Terms(
        "llama3.3",
        f"{_DISTILLED} Llama-3.3-70B-Instruct, under the Llama 3.3 Community License.",
        (_NOTICE_33, _MIT),
        _LLAMA_33,
    ),
    r"(deepseek-ai|unsloth)/deepseek-r1-distill-qwen-(1\.5b|7b|14b|32b)(-.+)?": Terms(
        "mit", f"{_DISTILLED} the Qwen2.5 series, under Apache-2.0.", (_MIT, f"Qwen2.5: {_APACHE}")
    ),
    r"(deepseek-ai|unsloth)/deepseek-r1-0528-qwen3-8b(-.+)?": Terms(
        "mit",
        "DeepSeek publishes it under MIT; it derives from Qwen3-8B, under Apache-2.0.",
        (_MIT, f"Qwen3: {_APACHE}"),
    ),
    r".*/(meta-)?llama-3\.1-.+": Terms("llama3.1", "Llama 3.1 Community License.", (_NOTICE_31,), _LLAMA_31),
    r".*/(meta-)?llama-3\.2-.+": Terms("llama3.2", "Llama 3.2 Community License.", (_NOTICE_32,), _LLAMA_32),
    r".*/(meta-)?llama-3\.3-.+": Terms("llama3.3", "Llama 3.3 Community License.", (_NOTICE_33,), _LLAMA_33),
    # Of Qwen2.5, 3B and 72B have licences of their own.
    r"(qwen|unsloth)/qwen2\.5-(math-)?(0\.5b|1\.5b|7b|14b|32b)(-.+)?": Terms(
        "apache-2.0", "Apache-2.0.", (f"Qwen2.5: {_APACHE}",)
    ),
    r"(qwen|unsloth)/qwen3-(0\.6b|1\.7b|4b|8b|14b|32b)(-.+)?": Terms(
        "apache-2.0", "Apache-2.0.", (f"Qwen3: {_APACHE}",)
    ),
    r"huggingfacetb/smollm2-(135m|360m|1\.7b)(-.+)?": Terms("apache-2.0", "Apache-2.0.", (f"SmolLM2: {_APACHE}",)),
}
# Data under these leaves the base's terms as they are; any other licence, and none, is the publisher's to judge.
_PERMISSIVE = frozenset({"apache-2.0", "mit", "cc0-1.0", "cc-by-4.0", "bsd-3-clause", "odc-by", "pddl", "unlicense"})


def find_terms(source: Any) -> Terms | None:
    """Return the terms of a base model by what a run calls it: "embedded", a Hub id or a path."""
    text = EMBEDDED_ID if source == "embedded" else str(source or "").replace("\\", "/").rstrip("/")
    is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", text) is not None
    name = (text if is_hub_id else f"/{text.rsplit('/', 1)[-1].removesuffix('.gguf')}").lower()
    return next((terms for pattern, terms in TERMS.items() if re.fullmatch(pattern, name)), None)


def choose_licence(terms: Terms | None, data: Sequence[str | None]) -> str | None:
    """Return the licence that a card may state: the base's, where all data came under a permissive one."""
    stated = [part.strip().lower() for licence in data for part in (licence or "not stated").split(",")]
    return terms.licence if terms is not None and stated and set(stated) <= _PERMISSIVE else None


def write_notice(terms: Terms) -> str:
    """Return the text of a NOTICE file."""
    return "\n\n---\n\n".join(terms.notices) + "\n"
