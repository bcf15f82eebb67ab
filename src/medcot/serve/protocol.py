"""What a request may hold, and what is sent back: the part of OpenAI's chat and completions that has a meaning here.

Fields that OpenAI knows and that would change the answer in ways this server cannot (tools, a response format, log
probabilities, pictures) are refused rather than passed over: an answer that is not what was asked for looks like one
that is. Fields that nobody knows are passed over, as clients send many.

Beyond OpenAI: ``thinking_budget`` or ``reasoning: {"max_tokens": …}``, the most tokens of thinking, as Qwen's servers
and OpenRouter call it; ``reasoning_content``, as DeepSeek's API has it.

Sources: https://platform.openai.com/docs/api-reference/chat, https://api-docs.deepseek.com/guides/reasoning_model,
https://openrouter.ai/docs/use-cases/reasoning-tokens.
"""

from __future__ import annotations

import time
import uuid
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

MOST_ANSWERS, MOST_STOPS, LONGEST_STOP = 8, 4, 200
# Fields that would be passed over in silence, and the values with which they mean nothing.
_REFUSED: dict[str, tuple[object, ...]] = {
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "response_format": (None, {"type": "text"}),
    "logprobs": (None, False, 0),
    "top_logprobs": (None, 0),
    "echo": (None, False),
    "best_of": (None, 1),
    "suffix": (None, ""),
    "logit_bias": (None, {}),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "audio": (None,),
    "prompt_logprobs": (None, 0),
}


class StreamOptions(BaseModel):
    """What a stream ends with."""

    include_usage: bool = False


class _Request(BaseModel):
    model_config = ConfigDict(extra="ignore")

    model: str | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    max_tokens: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    n: int | None = Field(None, ge=1, le=MOST_ANSWERS)
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _has_a_meaning_here(cls, values: Any) -> Any:
        if isinstance(values, dict):
            for name, harmless in _REFUSED.items():
                if not any(values.get(name) == value for value in harmless):
                    raise ValueError(f"'{name}' is not supported by this server; leave it out")
        return values

    @field_validator("stop")
    @classmethod
    def _stops_are_few_and_short(cls, stop: str | list[str] | None) -> str | list[str] | None:
        texts = [stop] if isinstance(stop, str) else stop or []
        if len(texts) > MOST_STOPS or any(not text or len(text) > LONGEST_STOP for text in texts):
            raise ValueError(f"at most {MOST_STOPS} texts of 1 to {LONGEST_STOP} characters")
        return stop

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end the answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the counts."""
        return self.stream_options is not None and self.stream_options.include_usage


class Part(BaseModel):
    """A piece of a message's content."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[Part] | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _is_text(cls, content: Any) -> Any:
        """Say in words what pydantic says of each kind that it tried."""
        parts = content if isinstance(content, list) else []
        if not (content is None or isinstance(content, str | list)):
            raise ValueError("a text, or a list of parts of type 'text'")
        if not all(isinstance(part, dict) and part.get("type") == "text" for part in parts):
            raise ValueError("every part must be of type 'text': this model reads nothing else")
        return content

    @property
    def text(self) -> str:
        """What it says."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or ())


class Reasoning(BaseModel):
    """Limits of the thinking."""

    max_tokens: int | None = Field(None, ge=0)


class ChatRequest(_Request):
    """``POST /v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    thinking_budget: int | None = Field(None, ge=0)
    reasoning: Reasoning | None = None

    @property
    def budget(self) -> int | None:
        """The most tokens of thinking, under either of its names."""
        of_reasoning = None if self.reasoning is None else self.reasoning.max_tokens
        return of_reasoning if self.thinking_budget is None else self.thinking_budget

    @property
    def most_tokens(self) -> int | None:
        """The limit, under either of its names."""
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(_Request):
    """``POST /v1/completions``: the prompt goes to the model as it is."""

    prompt: str = Field(min_length=1)

    @property
    def most_tokens(self) -> int | None:
        """The limit."""
        return self.max_tokens


class BadRequest(Exception):
    """What a client did wrong, in words for it.

    Args:
        message: what was met, and what is taken.
        status: HTTP's number.
        param: the field.
    """

    def __init__(self, message: str, status: int = 400, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param = status, param


def new_id(kind: str) -> str:
    """Return an id for an answer."""
    return f"{kind}-{uuid.uuid4().hex}"


def now() -> int:
    """Seconds since 1970."""
    return int(time.time())


def error_body(message: str, kind: str = "invalid_request_error", param: str | None = None) -> dict[str, Any]:
    """Return an error as OpenAI's clients read it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": None}}
