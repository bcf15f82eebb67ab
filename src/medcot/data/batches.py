"""A batch cut back into its rows, whoever made it, with what would let a row see or train what is not its own.

Trainers say in four ways where the rows of a batch begin, and a batch may use several at once: ``lengths`` (ours; the
engine's attention reads it), ``cu_seqlens`` (flash attention; transformers' flattening collator), ``position_ids`` that
start again at 0 (plain models; TRL's packing) and ``attention_mask`` (the padded rectangle). Where two say different
things, one model path sees other rows than another; so they are held against each other.

Padding is known by the mask where there is one, else as the pad tokens at a row's end. Where pad and EOS are one token,
the first of them is EOS and belongs to the row.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from medcot.prompt.decode import IGNORED_LABEL

Batch = Mapping[str, Any]  # the keyword arguments of a model: tensors, arrays or lists

_CUMULATIVE = ("cu_seqlens", "cu_seq_lens_q")


@dataclass(frozen=True, slots=True)
class Segment:
    """What a batch holds of one row, padding taken off.

    Attributes:
        input_ids: its tokens.
        labels: as many.
        touches: how it is not kept apart from its neighbours; empty where it is.
        num_padding_trained: tokens of padding behind or before it that carry loss.
    """

    input_ids: list[int]
    labels: list[int]
    touches: str = ""
    num_padding_trained: int = 0


def cut_batch(batch: Batch, pad_id: int | None, eos_id: int | None) -> list[Segment]:
    """Cut a batch into rows.

    Args:
        batch: ``input_ids`` and ``labels`` of shape (B, T) or (T,); what says where rows begin, if anything does.
        pad_id: the padding token; ``None`` where there is none.
        eos_id: the token that ends a row.
    """
    lines = {name: _nest(batch[name]) for name in ("input_ids", "labels")}
    masks, positions = (_nest(batch[name]) if name in batch else None for name in ("attention_mask", "position_ids"))
    lengths = _read_lengths(batch)
    segments: list[Segment] = []
    for number, ids in enumerate(lines["input_ids"]):
        line = _Line(
            ids,
            lines["labels"][number],
            masks[number] if masks else None,
            positions[number] if positions else None,
            lengths if len(lines["input_ids"]) == 1 else None,
        )
        segments += line.cut(pad_id, eos_id)
    return segments


@dataclass(slots=True)
class _Line:
    """One sequence of a batch."""

    ids: list[int]
    labels: list[int]
    mask: list[int] | None
    positions: list[int] | None
    lengths: list[int] | None

    def cut(self, pad_id: int | None, eos_id: int | None) -> list[Segment]:
        """Return the rows in it; trained padding that has a beginning of its own counts for the row before it."""
        spans = list(self._spans())
        segments: list[Segment] = []
        for start, stop in spans:
            keep = [i for i in range(start, stop) if self.mask is None or self.mask[i]]
            if self.mask is None:
                keep = keep[: _count_unpadded(self.ids[start:stop], pad_id, eos_id)]
            ids, labels = [self.ids[i] for i in keep], [self.labels[i] for i in keep]
            is_padding = not ids or (len(spans) > 1 and set(ids) == {pad_id})
            padding = sum(
                self.labels[i] != IGNORED_LABEL for i in set(range(start, stop)) - set(() if is_padding else keep)
            )
            if not is_padding:
                segments.append(Segment(ids, labels, self._touches(keep, is_first=not segments), padding))
            elif padding and segments:
                segments[-1] = replace(segments[-1], num_padding_trained=segments[-1].num_padding_trained + padding)
        return segments

    def _spans(self) -> Iterator[tuple[int, int]]:
        """Where rows lie, by lengths, else by the positions that start again."""
        if self.lengths is not None:
            edges = [0, *(min(edge, len(self.ids)) for edge in itertools.accumulate(self.lengths))]
        elif self.positions is not None and self.mask is None:  # given a mask, transformers does not look at positions
            edges = [i for i, position in enumerate(self.positions) if position == 0 or i == 0]
        else:
            edges = [0]
        if edges[-1] < len(self.ids):
            edges.append(len(self.ids))
        yield from itertools.pairwise(edges)

    def _touches(self, keep: list[int], *, is_first: bool) -> str:
        """Say how the row of these places is not apart from its neighbours; "" where it is."""
        if self.lengths is not None and sum(self.lengths) > len(self.ids):
            return f"the lengths add up to {sum(self.lengths):,} tokens, and the batch has {len(self.ids):,}"
        if self.positions is not None:
            for wanted, place in enumerate(keep):
                if self.positions[place] != wanted:
                    return f"the position of its token {wanted} is {self.positions[place]}"
        if not is_first and self.labels[keep[0]] != IGNORED_LABEL:
            return "its first token carries loss, and would be predicted from the row before it"
        return ""


def _nest(value: Any) -> list[list[int]]:
    """Return a tensor, array or list of one or two axes as lists of lists."""
    plain = value if isinstance(value, list) else value.tolist()
    return plain if plain and isinstance(plain[0], list) else [plain]


def _read_lengths(batch: Batch) -> list[int] | None:
    if "lengths" in batch:
        return _nest(batch["lengths"])[0]
    for name in _CUMULATIVE:
        if name in batch:
            return [stop - start for start, stop in itertools.pairwise(_nest(batch[name])[0])]
    return None


def _count_unpadded(ids: list[int], pad_id: int | None, eos_id: int | None) -> int:
    """Return how many tokens of a row are left when the padding behind it is taken off."""
    kept = len(ids)
    while kept and ids[kept - 1] == pad_id:
        kept -= 1
    return kept + (kept < len(ids) and pad_id == eos_id)
