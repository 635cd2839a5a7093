"""From tokenised documents to rows of equal length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedpeat.data.text import TokenisedDocuments, Tokens


@dataclass(frozen=True)
class Packed:
    """Rows of equal length, padded on the right where a document leaves room.

    Attributes:
        ids: `(rows, block_size)`.
        scored_from: `(rows,)`: the first position with a label (after the prompt of a pair; else 0).
        lengths: `(rows,)`: positions before the padding.
        dropped_tokens: Tokens in no row.
        truncated: Pairs that were cut to fit.
    """

    ids: np.ndarray
    scored_from: np.ndarray
    lengths: np.ndarray
    dropped_tokens: int = 0
    truncated: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def tokens(self) -> int:
        """Tokens in all rows, padding not counted."""
        return int(self.lengths.sum())

    def rows(self, rows: slice) -> Packed:
        """Return some of the rows."""
        return Packed(self.ids[rows], self.scored_from[rows], self.lengths[rows])


def pack(documents: TokenisedDocuments, chosen: np.ndarray, *, block_size: int, tail: str) -> Packed:
    """Make rows of `block_size` tokens from the documents at the indices `chosen`, in that order.

    Whole documents are laid end to end and cut, without overlap; what is left at the end is dropped (`tail="drop"`) or
    padded to a last row (`"pad"`). A pair is one row; one that is too long loses the beginning of its prompt first,
    down to half a row, and then the end of its answer.
    """
    if documents.prompts is None:
        return _pack_stream(documents, chosen, block_size, tail)
    return _pack_pairs(documents, documents.prompts, chosen, block_size)


def join(parts: Sequence[Packed], *, block_size: int) -> Packed:
    """Return the rows of `parts`, one part after the other."""
    if not parts:
        nothing = np.zeros(0, dtype=np.int32)
        return Packed(np.zeros((0, block_size), dtype=np.int32), nothing, nothing)
    return Packed(
        np.concatenate([part.ids for part in parts]),
        np.concatenate([part.scored_from for part in parts]),
        np.concatenate([part.lengths for part in parts]),
        sum(part.dropped_tokens for part in parts),
        sum(part.truncated for part in parts),
    )


def _pack_stream(documents: TokenisedDocuments, chosen: np.ndarray, block_size: int, tail: str) -> Packed:
    pieces = [documents.texts.of(index) for index in chosen]
    stream = np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int32)
    rest = len(stream) % block_size
    lengths = np.full(len(stream) // block_size, block_size, dtype=np.int32)
    if rest and tail == "pad":
        stream = np.concatenate([stream, np.full(block_size - rest, documents.fill, dtype=np.int32)])
        lengths = np.append(lengths, np.int32(rest))
        rest = 0
    ids = stream[: len(stream) - rest].reshape(-1, block_size)  # (rows, block_size)
    return Packed(ids, np.zeros_like(lengths), lengths, dropped_tokens=rest)


def _pack_pairs(documents: TokenisedDocuments, prompts: Tokens, chosen: np.ndarray, block_size: int) -> Packed:
    ids = np.full((len(chosen), block_size), documents.fill, dtype=np.int32)
    scored_from, lengths = np.zeros(len(chosen), dtype=np.int32), np.zeros(len(chosen), dtype=np.int32)
    dropped = truncated = 0
    for row, index in enumerate(chosen):
        prompt, answer = prompts.of(index), documents.texts.of(index)
        excess = len(prompt) + len(answer) - block_size
        if excess > 0:
            truncated, dropped = truncated + 1, dropped + excess
            prompt, answer = _cut(prompt, answer, block_size, begins=documents.begins)
        scored_from[row], lengths[row] = len(prompt), len(prompt) + len(answer)
        ids[row, : lengths[row]] = np.concatenate([prompt, answer])
    return Packed(ids, scored_from, lengths, dropped, truncated)


def _cut(prompt: np.ndarray, answer: np.ndarray, block_size: int, *, begins: bool) -> tuple[np.ndarray, np.ndarray]:
    kept = min(len(prompt), max(block_size - len(answer), block_size // 2))
    return cut_prompt(prompt, kept, begins=begins), answer[: block_size - kept]


def cut_prompt(prompt: np.ndarray, room: int, *, begins: bool) -> np.ndarray:
    """Return the end of a prompt that has at most `room` tokens (1 or more), and, if it `begins` so, its first token.

    >>> cut_prompt(np.arange(6), 3, begins=True).tolist(), cut_prompt(np.arange(6), 3, begins=False).tolist()
    ([0, 4, 5], [3, 4, 5])
    """
    if len(prompt) <= room:
        return prompt
    first = prompt[: int(begins)]
    return np.concatenate([first, prompt[len(prompt) - room + len(first) :]])
