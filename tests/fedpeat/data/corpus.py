"""A corpus that can be traced: document i is one word of its own, repeated, and a word is a token."""

import gzip
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fedpeat.data import FederatedData, open_rows

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
WORDS = 600


def make_tokenizer(*, begins: bool = False, words: int = WORDS) -> PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *(f"d{i}" for i in range(words))])}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if begins:
        plain.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def documents(count: int, *, clients: int = 4, words: int = 5) -> list[dict[str, Any]]:
    """Unique documents of `words` + 1 tokens, dealt out in turn to `who`, with labels `kind` and `age`."""
    return [
        {"text": " ".join([f"d{i}"] * words), "who": f"c{i % clients}", "kind": i % 3, "age": i / count}
        for i in range(count)
    ]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode(), mtime=0))
    else:
        path.write_text(text)
    return path


def sources_of(ids: torch.Tensor) -> set[int]:
    """The documents that rows of `documents` came from."""
    return {token - len(SPECIAL) for token in ids.unique().tolist() if token >= len(SPECIAL)}


def held_by(data: FederatedData, client: str, part: str) -> set[int]:
    return sources_of(open_rows(data.folder, client, part).input_ids)
