"""From a source's rows to clean, tokenised documents."""

from __future__ import annotations

import string
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from fedpeat.core import DataError, nearest, shorten
from fedpeat.data.spec import DataSpec

if TYPE_CHECKING:
    from datasets import Dataset

_CHUNK = 1000


@dataclass(frozen=True)
class Documents:
    """What is to be learnt, one entry a document.

    Attributes:
        texts: Whole documents, or the answers of pairs.
        prompts: The prompts of pairs; None for whole documents.
    """

    texts: list[str]
    prompts: list[str] | None

    def __len__(self) -> int:
        return len(self.texts)

    def keys(self) -> list[str]:
        """What makes a document the same as another: its words, whatever the white space."""
        parts = [self.texts] if self.prompts is None else [self.prompts, self.texts]
        return ["\0".join(" ".join(text.split()) for text in document) for document in zip(*parts, strict=True)]

    def select(self, kept: Iterable[int]) -> Documents:
        """Return the documents at the indices `kept`."""
        kept = list(kept)
        prompts = None if self.prompts is None else [self.prompts[index] for index in kept]
        return Documents([self.texts[index] for index in kept], prompts)


def read_documents(dataset: Dataset, spec: DataSpec) -> Documents:
    """Take the text, or the prompts and answers, out of a source's rows.

    Raises:
        DataError: If a field is not in the data or holds no text.
    """
    if not spec.is_paired:
        return Documents(_column(dataset, spec.text_field, "data.text_field"), None)
    answers = _column(dataset, str(spec.answer_field), "data.answer_field", numbered=spec.choices is not None)
    template = "{prompt}\n" if spec.prompt_template is None else spec.prompt_template
    columns: dict[str, list[str]] = {}
    if spec.prompt_field is not None:
        columns["prompt"] = _column(dataset, spec.prompt_field, "data.prompt_field")
    for name in _template_fields(template):
        if name not in columns:
            columns[name] = _column(dataset, name, "data.prompt_template")
    prompts = [template.format_map({name: values[i] for name, values in columns.items()}) for i in range(len(answers))]
    return Documents(answers, prompts)


def check_field(dataset: Dataset, name: str, setting: str) -> None:
    """Check that the data has a field.

    Raises:
        DataError: With the fields there are.
    """
    if name not in dataset.column_names:
        fields = dataset.column_names
        found = f"its fields: {shorten(fields, 20)}"
        raise DataError(f"{setting}={name!r} is not in the data", found, nearest(name, fields))


def _column(dataset: Dataset, name: str, setting: str, *, numbered: bool = False) -> list[str]:
    """Return a field's texts; those of numbered labels are the numbers, written out."""
    check_field(dataset, name, setting)
    values: list[Any] = dataset[name][:]
    if numbered:
        values = [str(value) if isinstance(value, int) and not isinstance(value, bool) else value for value in values]
    wrong = next((value for value in values if value is not None and not isinstance(value, str)), None)
    if wrong is not None:
        raise DataError(f"{setting}={name!r} must hold text", f"it holds {wrong!r}", f"set {setting} to another field")
    return ["" if value is None else value for value in values]


def _template_fields(template: str) -> list[str]:
    try:
        return list(dict.fromkeys(name for _, name, _, _ in string.Formatter().parse(template) if name is not None))
    except ValueError as error:
        remedy = "write {field} for a field and {{ for a brace"
        raise DataError(f"data.prompt_template={template!r} cannot be read", str(error), remedy) from error


def first_occurrences(documents: Documents, *, seen: set[str]) -> tuple[list[int], int, int]:
    """Return the indices of documents that are neither empty nor a repetition, and how many are which.

    `seen` holds the keys met before, and is added to.

    >>> first_occurrences(Documents(["a", " ", "b c", "b  c"], None), seen={"a"})
    ([2], 1, 2)
    """
    kept, empty = [], 0
    for index, (text, key) in enumerate(zip(documents.texts, documents.keys(), strict=True)):
        if not text.strip():
            empty += 1
        elif key not in seen:
            seen.add(key)
            kept.append(index)
    return kept, empty, len(documents) - empty - len(kept)


@dataclass(frozen=True)
class Tokens:
    """Token ids of many texts, end to end.

    Attributes:
        ids: `(tokens,)`.
        ends: `(texts + 1,)`; text i is `ids[ends[i]:ends[i + 1]]`.
    """

    ids: np.ndarray
    ends: np.ndarray

    def of(self, index: int) -> np.ndarray:
        """Return the ids of one text."""
        return self.ids[self.ends[index] : self.ends[index + 1]]

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        """Return how many tokens each of some texts has."""
        return self.ends[indices + 1] - self.ends[indices]


@dataclass(frozen=True)
class TokenisedDocuments:
    """Documents as tokens.

    Attributes:
        texts: Whole documents with what separates them, or answers with their end.
        prompts: The prompts of pairs; None for whole documents.
        fill: The id that padding is written with.
        begins: Whether a document or prompt begins with a token of its own.
    """

    texts: Tokens
    prompts: Tokens | None
    fill: int
    begins: bool

    def __len__(self) -> int:
        return len(self.texts.ends) - 1


def tokenise(documents: Documents, *, tokenizer: Any, separator: str = "eos") -> TokenisedDocuments:
    """Turn documents into tokens.

    Args:
        documents: Whole documents or pairs.
        tokenizer: Of the model.
        separator: What parts whole documents. `eos`: each ends with the end-of-sequence token, and begins with the
            beginning-of-sequence token if the tokenizer begins a text so. `bos`: each begins with the latter, and no
            more. `none`: nothing. Pairs are always as with `eos`.

    Raises:
        DataError: If the tokenizer has no such token.
    """
    begin, end = _separators(tokenizer, "eos" if documents.prompts is not None else separator)
    fill = next((token for token in (tokenizer.pad_token_id, *end, *begin) if token is not None), 0)
    if documents.prompts is None:
        return TokenisedDocuments(_encode(documents.texts, tokenizer, begin, end), None, fill, bool(begin))
    texts = _encode(documents.texts, tokenizer, [], end)
    return TokenisedDocuments(texts, _encode(documents.prompts, tokenizer, begin, []), fill, bool(begin))


def _separators(tokenizer: Any, separator: str) -> tuple[list[int], list[int]]:
    """Return the tokens before and after each document."""
    if separator == "none":
        return [], []
    start, remedy = tokenizer.bos_token_id, "set data.separator, or give the tokenizer one"
    if separator == "bos":
        if start is None:
            raise DataError("data.separator=bos", "the tokenizer has no beginning-of-sequence token", remedy)
        return [start], []
    end = next((token for token in (tokenizer.eos_token_id, tokenizer.sep_token_id) if token is not None), None)
    if end is None:
        raise DataError("documents must end with a token", "the tokenizer has no end-of-sequence token", remedy)
    begin = [start] if start is not None and tokenizer("a")["input_ids"][:1] == [start] else []
    return begin, [end]


def _encode(texts: list[str], tokenizer: Any, begin: list[int], end: list[int]) -> Tokens:
    arrays, lengths = [], [0]
    for first in range(0, len(texts), _CHUNK):
        encoded = tokenizer(
            texts[first : first + _CHUNK], add_special_tokens=False, return_attention_mask=False, verbose=False
        )["input_ids"]
        pieces = list(chain.from_iterable((begin, ids, end) for ids in encoded))
        arrays.append(np.fromiter(chain.from_iterable(pieces), dtype=np.int32))
        lengths += [len(ids) + len(begin) + len(end) for ids in encoded]
    flat = np.concatenate(arrays) if arrays else np.zeros(0, dtype=np.int32)
    return Tokens(flat, np.cumsum(lengths))
