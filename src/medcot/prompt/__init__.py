"""Where text becomes tokens for the model, and tokens become text again; no other module tokenises.

Training on chains of thought fails silently in this place: R1's own chat template deletes the reasoning from assistant
turns, rendered templates get a second BOS, masking by pad id hides EOS where pad is EOS, and a prompt that tokenises
differently alone than inside its training row asks the tuned model something it never saw. Usual practice is to format
one string, tokenise it whole and search the tags afterwards. Here a row is built from parts, so these cannot happen:

    prompt     one string, tokenised as a whole; ends with an opened ``<think>`` block; serving uses exactly these ids
    reasoning  tokenised by itself, with the newlines around it
    </think>   always the same ids
    response   tokenised by itself, with the newlines before it
    EOS        the id, not its text

The prompt is then a token prefix of its row, and every span is known by counting. For the R1 distills the ids equal
those of tokenising the joined text at once, because their tags are single added tokens (tested).

A style is a *frame*: the text before and after the question. For ``chat`` the frame is what the model's own template
renders around a marker, so the assistant turn never passes through the template, and nothing in a question can steer
the template. Control tokens belong to the frame alone: user text that would tokenise to one, or that holds a thinking
tag, is refused (the check is on ids, so no spelling or normalisation slips by), as is text that the tokenizer would
drop or change: SmolLM2's, for one, has no token for six control characters and loses them without a word.

Sources: the tutorial's prompt to the letter; deepseek-ai/DeepSeek-R1-Distill-* chat_template (both revisions; the newer
ends the generation prompt with ``<think>`` and a newline); incremental decoding as in text-generation-inference.
"""

from medcot.prompt.closing import answer_ids, closing_ids, count_torn
from medcot.prompt.decode import (
    SpanKind,
    SpanText,
    StreamPiece,
    StreamSplitter,
    TokenText,
    decode,
    decode_spans,
    decode_tokens,
    split_completion,
)
from medcot.prompt.encode import (
    ELLIPSIS,
    count_shortest_think,
    encode_prompt,
    encode_row,
    normalise,
    render_prompt,
    truncate_think,
)
from medcot.prompt.frames import (
    THINK_CLOSE,
    THINK_OPEN,
    TUTORIAL_QUESTION,
    TUTORIAL_TEMPLATE,
    Style,
    count_most_bytes,
    find_markers,
)

__all__ = [
    "ELLIPSIS",
    "THINK_CLOSE",
    "THINK_OPEN",
    "TUTORIAL_QUESTION",
    "TUTORIAL_TEMPLATE",
    "SpanKind",
    "SpanText",
    "StreamPiece",
    "StreamSplitter",
    "Style",
    "TokenText",
    "answer_ids",
    "closing_ids",
    "count_most_bytes",
    "count_shortest_think",
    "count_torn",
    "decode",
    "decode_spans",
    "decode_tokens",
    "encode_prompt",
    "encode_row",
    "find_markers",
    "normalise",
    "render_prompt",
    "split_completion",
    "truncate_think",
]
