"""One question, answered aloud: text as it is written, a budget for the thinking, and somebody who may say stop.

``medcot ask`` and the pages both speak through this. What is written is decided by ``TokenBackend`` (``local.py``), as
in an evaluation: the frame, the forced close at the thinking cap, the one line of a forced answer. Only the ``Writer``
under it is another one: it tells each token to a listener, and stops when it is told to. The usual way, a streaming
loop of the page's own, closes the thinking in its own words, and shows an answer that no evaluation would have graded.

The base and the tuned model are one model with its adapter switched off or on, so both fit where one does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medcot import engine, generate, prompt
from medcot.errors import DataError, ModelError
from medcot.evaluate.backends import Answer, Draws, Ending, Limits, Request
from medcot.evaluate.local import TokenBackend
from medcot.generate import OnWritten, Sampling, row_seed
from medcot.model import load_adapter, read_adapter_config
from medcot.records import Completion, Finish

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from medcot.model import LoadedModel

OnText = Callable[[str, bool], None]  # a piece of text, and whether it is thinking


@dataclass(frozen=True, slots=True)
class Spoken:
    """What came of a question.

    Attributes:
        completion: all of it, as an evaluation would read it.
        forced: whether the thinking was closed for the model.
        stopped: whether the listener had enough.
        seconds: from the question to the last token.
    """

    completion: Completion
    forced: bool
    stopped: bool
    seconds: float


class Speaker:
    """A model that answers one question at a time.

    Args:
        loaded: the base, which is wrapped in place.
        style: the prompt's style.
        adapter: folder of its adapter, or none.
        accelerate: whether the engine writes, where it can.

    Raises:
        ModelError: there is no adapter in the folder, or it does not fit.
    """

    def __init__(
        self, loaded: LoadedModel, style: prompt.Style, *, adapter: Path | None = None, accelerate: bool = True
    ) -> None:
        self.tokenizer, self.style, self.has_adapter = loaded.tokenizer, style, adapter is not None
        self._adapter = adapter
        self._model: Any = loaded.model if adapter is None else load_adapter(loaded, adapter)
        if accelerate:
            engine.accelerate(self._model)

    def say(
        self,
        question: str,
        limits: Limits,
        *,
        sampling: Sampling,
        seed: int,
        base: bool = False,
        on_text: OnText = lambda piece, in_think: None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> Spoken:
        """Answer a question.

        Args:
            question: the question alone; the style's frame is put around it.
            limits: how long it may be; with ``Ending.FORCED`` the thinking is closed at its cap.
            sampling: how tokens are drawn.
            seed: of the draws; base and tuned model draw the same numbers.
            base: switch the adapter off.
            on_text: called with each piece as it comes; joined, the pieces are the completion's parts.
            stopped: asked after each token whether to stop.

        Raises:
            DataError: the question would steer the model, or the tokenizer loses characters of it.
            ModelError: the base was asked for, and the adapter cannot be switched off.
        """
        num_prompt = len(prompt.encode_prompt(question, self.style, self.tokenizer))
        start = time.monotonic()
        writer = _Aloud(self._model, self.tokenizer, num_prompt, seed, on_text, stopped)
        request = Request("asked", question, sampling, seed, limits)
        answers: list[Answer] = []
        if base and self.has_adapter:
            self._check_switch()
            with self._model.disable_adapter():
                self._answer(writer, request, answers)
        else:
            self._answer(writer, request, answers)
        writer.finish()
        seconds = time.monotonic() - start
        if answers:
            completion = answers[0].completion
            assert completion is not None, "a question that could be encoded was answered"
            return Spoken(completion, answers[0].forced, False, seconds)
        return Spoken(writer.completion(), writer.forced, True, seconds)

    def check_room(self, question: str, limits: Limits) -> None:
        """Refuse what is longer than the model was made for: beyond it, text decays without a word.

        Raises:
            DataError: prompt, thinking and answer could come to more tokens than that, or there is no such prompt.
        """
        longest = self._model.config.get_text_config().to_dict().get("max_position_embeddings")
        num_prompt = len(prompt.encode_prompt(question, self.style, self.tokenizer))
        most = num_prompt + limits.think_tokens + limits.answer_tokens
        if longest is not None and most > longest:
            raise DataError(
                f"{num_prompt:,} tokens of prompt, {limits.think_tokens:,} of thinking and {limits.answer_tokens:,} of"
                f" answer come to {most:,}",
                f"This model was made for {longest:,}",
                "Lower the thinking budget or the longest answer",
            )

    def _answer(self, writer: _Aloud, request: Request, answers: list[Answer]) -> None:
        """Let the back end answer; where the listener stopped it, there is no answer."""
        backend = TokenBackend(writer, self.tokenizer, self.style, batch_size=1)
        try:
            backend.answer([request], answers.append)
        except _Stopped:
            return

    def _check_switch(self) -> None:
        assert self._adapter is not None
        bias = str(read_adapter_config(self._adapter).get("bias") or "none")
        if bias != "none":
            raise ModelError(
                f"the adapter has trained biases (bias={bias})",
                "PEFT leaves trained biases in the model when an adapter is switched off, so what is left is no base",
                "Ask the base by itself: 'medcot ask --base', or 'medcot ui --model' without the adapter",
            )


class _Stopped(Exception):
    """The listener had enough."""


class _LineEnded(Exception):
    """A forced answer has come to the end of its line."""


class _Aloud:
    """``local.Writer`` for one row: tells its text, and knows that what a prompt has grown by was put there."""

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        num_prompt: int,
        seed: int,
        on_text: OnText,
        stopped: Callable[[], bool],
    ) -> None:
        self._model, self._tokenizer, self._num_prompt, self._seed = model, tokenizer, num_prompt, seed
        self._on_text, self._stopped = on_text, stopped
        self._splitter = prompt.StreamSplitter(tokenizer)
        self._shown = {True: "", False: ""}
        self._written: list[int] = []  # behind the prompt, whoever wrote it
        self._num_goes = 0
        self.forced = False

    def write(
        self,
        prompts: Sequence[Sequence[int]],
        rooms: Sequence[int],
        sampling: Draws,
        seeds: Sequence[int],
        on_written: OnWritten,
        *,
        batch_size: int,
    ) -> None:
        """Continue the prompt, telling each token; the draws follow from the seed that was asked for."""
        (ids,) = prompts
        behind = list(ids[self._num_prompt :])
        forced = behind != self._written
        if forced:
            self.forced = True
            self._catch_up(behind)
        new: list[int] = []

        def on_token(_: int, token: int) -> None:
            new.append(token)
            self._written.append(token)
            self._emit(self._splitter.feed(token))
            if self._stopped():
                raise _Stopped
            if forced and "\n" in prompt.decode(new, self._tokenizer).lstrip():
                raise _LineEnded

        try:
            [written] = generate.generate(
                self._model,
                self._tokenizer,
                [list(ids)],
                max_new_tokens=list(rooms),
                sampling=Sampling(sampling.temperature, sampling.top_p),
                seed=[row_seed(self._seed, self._num_goes)],
                batch_size=1,
                on_token=on_token,
            )
        except _LineEnded:
            written = new, Finish.EOS
        self._num_goes += 1
        on_written(0, written)

    def score(self, prompts: Sequence[Sequence[int]], candidates: Sequence[Sequence[int]]) -> list[list[float]]:
        """Choices are not compared aloud."""
        raise NotImplementedError("Ending.LIKELIHOOD is no way to speak")

    def _catch_up(self, behind: list[int]) -> None:
        """Go on behind other tokens than were told: a tag that the cap tore is gone, the close has been put there."""
        self._splitter, self._written = prompt.StreamSplitter(self._tokenizer), behind
        pieces = [piece for token in behind for piece in self._splitter.feed(token)]
        for in_think in (True, False):
            text = "".join(piece.text for piece in pieces if piece.in_think == in_think)
            new = text[len(self._shown[in_think]) :]
            if new:
                self._emit([prompt.StreamPiece(new, in_think)])

    def _emit(self, pieces: Sequence[prompt.StreamPiece]) -> None:
        for piece in pieces:
            self._shown[piece.in_think] += piece.text
            self._on_text(piece.text, piece.in_think)

    def finish(self) -> None:
        """Tell what was held back."""
        self._emit(self._splitter.finish())

    def completion(self) -> Completion:
        """What was written when it was stopped."""
        return prompt.split_completion(
            self._written, self._tokenizer, num_prompt_tokens=self._num_prompt, finish=Finish.LENGTH
        )


def choose_limits(think_tokens: int, answer_tokens: int) -> Limits:
    """Return the limits of a page's two settings: the thinking is closed at its cap, and the answer asked for."""
    return Limits(think_tokens, answer_tokens, Ending.FORCED)
