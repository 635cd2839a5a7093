"""From docstrings to a tokenizer and rows of tokens: the data half of pretraining."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fedpeat.core import DataError, seed_for
from fedpeat.data.docstrings import CLIENT_LIBRARIES, PRETRAIN_LIBRARIES, held_out, read_docstrings
from simulations.corpus import cache_folder

END = "<|endoftext|>"
"""Ends every docstring; also the token of beginning and padding, so that no fourth one is needed."""


def train_tokenizer(texts: Iterable[str], *, vocabulary: int, context: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer: any text can be encoded, and decodes to itself.

    Args:
        texts: The corpus; the same texts in the same order give the same tokenizer.
        vocabulary: Number of tokens; 256 bytes and the end token are among them.
        context: Longest sequence of the model, in tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def pack(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], *, row_tokens: int) -> torch.Tensor:
    """Return the texts as rows `(rows, row_tokens)` of int32 tokens, each text ended, the last part row dropped.

    Texts too short for one row give none.
    """
    end = tokenizer.eos_token_id
    encoded = tokenizer.backend_tokenizer.encode_batch(list(texts), add_special_tokens=False)
    flat = np.concatenate([np.zeros(0, dtype=np.int32), *(np.asarray([*part.ids, end], np.int32) for part in encoded)])
    count = len(flat) // row_tokens
    return torch.from_numpy(flat[: count * row_tokens].reshape(count, row_tokens))


def read_corpora(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Read the texts of pretraining and of evaluation.

    Returns:
        `train`: the training texts in a seeded order; `held_out`: texts of held-out modules by pretraining library;
        `clients`: the same by client library, without texts that are also in `train`; `tuning`: texts of the client
        libraries' other modules, in a seeded order; `libraries`: training characters by library.

    Raises:
        DataError: If a library is missing, or is both trained on and a client.
    """
    libraries = list(settings["libraries"] or PRETRAIN_LIBRARIES)
    clients = list(CLIENT_LIBRARIES if settings["client_libraries"] is None else settings["client_libraries"])
    if both := set(libraries) & set(clients):
        raise DataError(f"cannot pretrain on {sorted(both)}", "they are clients too", "take them from one of the lists")
    cache = cache_folder(settings) / "data"
    rows = read_docstrings(libraries, cache=cache)
    train = _shuffled((row for row in rows if not held_out(row)), seed=settings["seed"])
    seen = {row["text"] for row in train}
    others = [row for row in read_docstrings(clients, cache=cache) if row["text"] not in seen]
    return {
        "train": [row["text"] for row in train],
        "held_out": _by_library(row for row in rows if held_out(row)),
        "clients": _by_library(row for row in others if held_out(row)),
        "tuning": [
            row["text"] for row in _shuffled((row for row in others if not held_out(row)), seed=settings["seed"])
        ],
        "libraries": {name: sum(map(len, texts)) for name, texts in _by_library(train).items()},
    }


def _shuffled(rows: Iterable[dict[str, str]], *, seed: int) -> list[dict[str, str]]:
    every = list(rows)
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed_for(seed, "corpus")))
    return [every[index] for index in order.tolist()]


def _by_library(rows: Iterable[Mapping[str, str]]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for row in rows:
        groups.setdefault(row["library"], []).append(row["text"])
    return groups


def unigram_loss(train: torch.Tensor, rows: torch.Tensor, *, vocabulary: int) -> float:
    """Return the mean negative log-likelihood of `rows` under the token frequencies of `train`, in nats a token.

    One is added to every count, and a row's first token is not scored, as no model predicts it.

    >>> round(unigram_loss(torch.tensor([[0, 1]]), torch.tensor([[0, 1]]), vocabulary=2), 3)  # ln 2
    0.693
    """
    counts = torch.bincount(train.flatten().long(), minlength=vocabulary).double() + 1
    return -(counts / counts.sum()).log()[rows[:, 1:].long()].mean().item()
