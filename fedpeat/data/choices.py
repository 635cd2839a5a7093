"""A labelled task for a language model: which of these answers is likeliest after a held-out document's prompt?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedpeat.core import DataError, shorten
from fedpeat.data.packing import cut_prompt
from fedpeat.data.rows import UNSCORED, Rows, open_federated, opened
from fedpeat.data.shards import Shard
from fedpeat.data.spec import DataSpec
from fedpeat.data.text import Documents, TokenisedDocuments, Tokens, tokenise

CHOICES_FILE = "choices.safetensors"
MOST = 64
"""Most distinct answers that `data.choices=auto` takes for choices: each is a row for every held-out document."""


@dataclass(frozen=True)
class Choices:
    """Held-out documents, each with every possible answer.

    Attributes:
        rows: `(documents * choices, tokens)`: a document's rows stand together, in the order of `names`, and share one
            prompt; only answers and their end have labels.
        right: `(documents,)` int64: which choice is right.
        names: The possible answers.
    """

    rows: Rows
    right: torch.Tensor
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.right)


@dataclass(frozen=True)
class MadeChoices:
    """What `open_choices` makes rows of: each prompt and each answer once.

    Attributes:
        tensors: `prompts`, `(documents, room)`, padded; `prompt_lengths`; `answers`, `(choices, longest + 1)`, padded;
            `answer_lengths`; and `right`, `(documents,)`.
        report: `names`, and counts: `documents`, `cut` prompts, and the share of the `most_frequent` answer.
    """

    tensors: Mapping[str, np.ndarray] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)


def make_choices(
    documents: Documents, tokens: TokenisedDocuments, chosen: np.ndarray, spec: DataSpec, *, tokenizer: Any
) -> MadeChoices:
    """Return the documents at the indices `chosen`, ready to be scored with each possible answer.

    Answers are tokenised as those of pairs are for training. A prompt loses its beginning so far that the longest
    answer fits: all answers to it are judged after the same words.

    Raises:
        DataError: If there are too many or too few answers, one fills a whole row, a chosen document has another one,
            or there is no document.
    """
    asked = tokens.prompts
    if asked is None or not len(chosen):
        raise DataError("data.choices are for held-out pairs", "there are none", "raise data.test_share")
    written = _answers(documents, spec)
    names = tuple(written)
    right = _right([documents.texts[index] for index in chosen], names)
    answers = tokenise(Documents(list(written.values()), [""] * len(names)), tokenizer=tokenizer).texts
    lengths = answers.lengths(np.arange(len(names)))
    longest = int(lengths.max())
    if longest >= spec.block_size:
        found = f"{names[int(lengths.argmax())]!r} has {longest} tokens, data.block_size={spec.block_size}"
        raise DataError("an answer must fit into a row, after a prompt", found, "raise data.block_size")
    room = spec.block_size - longest
    prompts = [cut_prompt(asked.of(index), room, begins=tokens.begins) for index in chosen]
    tensors = {
        "prompts": _padded(prompts, room, tokens.fill),
        "prompt_lengths": np.array([len(prompt) for prompt in prompts]),
        "answers": _padded(_list(answers), longest + 1, tokens.fill),
        "answer_lengths": lengths,
        "right": right,
    }
    report = {
        "names": list(names),
        "documents": len(chosen),
        "cut": int((asked.lengths(chosen) > room).sum()),
        "most_frequent": max(Counter(right.tolist()).values()) / len(chosen),
    }
    return MadeChoices(tensors, report)


def held_out_documents(server: Shard, shards: Sequence[Shard], spec: DataSpec) -> np.ndarray:
    """Return the indices of the pairs that are the server's `test` rows, one a row, in their order."""
    if not spec.test_blocks or len(server.documents["test"]) == len(server.packed["test"]):
        return server.documents["test"]
    # Of pairs a client's last rows are its last documents, which its shard counts as documents for training.
    parts = [(shard.documents["test"], shard.documents["train"][len(shard.packed["train"]) :]) for shard in shards]
    return np.concatenate([server.documents["test"][:0], *(part for pair in parts for part in pair)])


def _spaced(text: str) -> str:
    return " ".join(text.split())


def _answers(documents: Documents, spec: DataSpec) -> dict[str, str]:
    """Return the possible answers and how each is written where the data first has it."""
    written: dict[str, str] = {}
    for text in documents.texts:
        written.setdefault(_spaced(text), text)
    if spec.choices != "auto":
        return {_spaced(name): written.get(_spaced(name), name) for name in spec.choices or ()}
    if len(written) > MOST or len(written) < 2:
        found = f"data.answer_field={spec.answer_field} has {len(written)} distinct answers: {shorten(written, 5)}"
        remedy = "name a field of few values as data.answer_field, or list those meant in data.choices"
        raise DataError(f"data.choices=auto is for 2 to {MOST} answers", found, remedy)
    return {name: written[name] for name in sorted(written)}


def _right(answers: Sequence[str], names: Sequence[str]) -> np.ndarray:
    numbers = {name: number for number, name in enumerate(names)}
    right = np.array([numbers.get(_spaced(answer), -1) for answer in answers], dtype=np.int64)
    if (right < 0).any():
        others = Counter(_spaced(answer) for answer, number in zip(answers, right, strict=True) if number < 0)
        found = f"{others.total()} of {len(answers)} held-out documents have others: {shorten(map(repr, others), 5)}"
        raise DataError(f"data.choices={shorten(names, 5)}", found, "list them too, or set data.choices=auto")
    return right


def _list(tokens: Tokens) -> list[np.ndarray]:
    return [tokens.of(index) for index in range(len(tokens.ends) - 1)]


def _padded(ids: Sequence[np.ndarray], width: int, fill: int) -> np.ndarray:
    padded = np.full((len(ids), width), fill, dtype=np.int32)
    for row, one in enumerate(ids):
        padded[row, : len(one)] = one
    return padded


def open_choices(folder: str | Path, pick: Callable[[int], torch.Tensor] | None = None) -> Choices | None:
    """Read the held-out documents with every possible answer; None where the data has no choices.

    Args:
        folder: `FederatedData.folder`.
        pick: Returns the numbers, `(documents,)`, of the documents wanted, given how many there are; None for all.

    Raises:
        StorageError: If the file is missing or truncated.
    """
    data = open_federated(folder)
    if "choices" not in data.report:
        return None
    with opened(Path(folder) / CHOICES_FILE) as file:
        stored = {name: file.get_tensor(name).long() for name in file.keys()}  # noqa: SIM118
    if pick is not None:
        wanted = pick(len(stored["right"]))
        stored |= {name: stored[name][wanted] for name in ("prompts", "prompt_lengths", "right")}
    return Choices(_rows(stored, data.block_size), stored["right"], tuple(data.report["choices"]["names"]))


def _rows(stored: Mapping[str, torch.Tensor], block_size: int) -> Rows:
    """Write every answer after every prompt."""
    documents, choices = len(stored["prompts"]), len(stored["answers"])
    position = torch.arange(block_size)
    starts = stored["prompt_lengths"].repeat_interleave(choices)[:, None]  # (rows, 1)
    ends = starts + stored["answer_lengths"].repeat(documents)[:, None]
    # The last column of answers is padding, and stands for all that comes after an answer.
    since = (position - starts).clamp(0, stored["answers"].shape[1] - 1)
    ids = stored["answers"].repeat(documents, 1).gather(1, since)  # (rows, block_size)
    room = stored["prompts"].shape[1]
    prompts = stored["prompts"].repeat_interleave(choices, 0)
    ids[:, :room] = torch.where(position[:room] < starts, prompts, ids[:, :room])
    labels = ids.masked_fill((position < starts) | (position >= ends), UNSCORED)
    padded = bool((ends < block_size).any())
    return Rows(ids, labels, (position < ends).long() if padded else None)
