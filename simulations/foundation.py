"""The embedded model's shape, its blocks for a while left out, and how good it is on held-out text."""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedpeat.core import seed_for
from simulations.corpora import pack, unigram_loss


def build_model(settings: Mapping[str, Any]) -> LlamaForCausalLM:
    """Return the untrained model, its weights decided by the seed."""
    torch.manual_seed(seed_for(settings["seed"], "weights"))
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    return LlamaForCausalLM(LlamaConfig(vocab_size=settings["vocabulary"], **ends, **settings["shape"]))


@contextmanager
def only_blocks(model: LlamaForCausalLM, kept: Sequence[int]) -> Iterator[None]:
    """Let the model consist of these blocks for a while; the others get no gradient."""
    every = model.model.layers
    model.model.layers = nn.ModuleList(every[index] for index in kept)
    model.config.num_hidden_layers = len(kept)
    try:
        yield
    finally:
        model.model.layers = every
        model.config.num_hidden_layers = len(every)


def uniform_blocks(settings: Mapping[str, Any], kept: int) -> list[int]:
    """Return the blocks of the model when `kept` of those that training may skip stay, evenly spaced.

    >>> uniform_blocks({"skip": {"first": 2, "last": 9}, "shape": {"num_hidden_layers": 12}}, 3)
    [0, 1, 2, 6, 9, 10, 11]
    """
    middle, depth = _middle(settings), settings["shape"]["num_hidden_layers"]
    last = len(middle) - 1
    places = [last // 2] if kept == 1 else [round(place * last / (kept - 1)) for place in range(kept)]
    return sorted(set(range(depth)) - set(middle) | {middle[place] for place in places})


def _middle(settings: Mapping[str, Any]) -> range:
    return range(settings["skip"]["first"], settings["skip"]["last"] + 1)


@torch.no_grad()
def mean_loss(model: LlamaForCausalLM, rows: torch.Tensor, *, batch_size: int) -> float:
    """Return the mean next-token loss over `rows` `(rows, tokens)`, in nats a token."""
    model.eval()
    total = 0.0
    for batch in rows.long().split(batch_size):
        total += model(input_ids=batch, labels=batch, use_cache=False).loss.item() * len(batch)
    return total / len(rows)


def evaluate(
    settings: Mapping[str, Any],
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    *,
    train: torch.Tensor,
    corpora: Mapping[str, Any],
) -> dict[str, Any]:
    """Compare the model with what knows less, and its emulators with it, on held-out modules.

    Args:
        settings: The recipe.
        model: The trained model.
        tokenizer: Its tokenizer.
        train: Training rows `(rows, tokens)`, for the unigram baseline.
        corpora: What `simulations.corpora.read_corpora` returns.

    Returns:
        For `held_out` and `clients`: losses and perplexities by library (`libraries`), over all rows those of `model`,
        of the `untrained` and `unigram` baselines, and of emulators as they are (`emulators`, by kept blocks).
        For `clients` also those of tuned emulators (`tuned`). A group without a row of text is left out.
    """
    result: dict[str, Any] = {}
    for group in ("held_out", "clients"):
        rows = {name: some_rows(settings, tokenizer, texts) for name, texts in corpora[group].items()}
        pooled = torch.cat([train[:0], *rows.values()])
        if not len(pooled):
            continue
        result[group] = _compare(settings, model, train=train, rows=rows)
        if group == "clients":
            ours = pack(tokenizer, corpora["tuning"], row_tokens=settings["evaluation"]["tuning"]["row_tokens"])
            result[group]["tuned"] = {
                str(kept): tuned_losses(settings, model, kept=kept, train=ours, test=pooled)
                for kept in settings["evaluation"]["tuning"]["kept_blocks"]
                if len(ours)
            }
    return result


def _compare(
    settings: Mapping[str, Any], model: LlamaForCausalLM, *, train: torch.Tensor, rows: Mapping[str, torch.Tensor]
) -> dict[str, Any]:
    pooled, size = torch.cat(list(rows.values())), settings["evaluation"]["batch_size"]
    losses = {name: mean_loss(model, part, batch_size=size) for name, part in rows.items() if len(part)}
    emulators = {}
    for kept in settings["evaluation"]["kept_blocks"]:
        with only_blocks(model, uniform_blocks(settings, kept)):
            emulators[str(kept)] = _told(mean_loss(model, pooled, batch_size=size))
    return {
        "rows": len(pooled),
        "libraries": {name: _told(loss) for name, loss in losses.items()},
        "model": _told(sum(loss * len(rows[name]) for name, loss in losses.items()) / len(pooled)),
        "untrained": _told(mean_loss(build_model(settings), pooled, batch_size=size)),
        "unigram": _told(unigram_loss(train, pooled, vocabulary=settings["vocabulary"])),
        "emulators": emulators,
    }


def tuned_losses(
    settings: Mapping[str, Any], model: LlamaForCausalLM, *, kept: int, train: torch.Tensor, test: torch.Tensor
) -> dict[str, dict[str, float]]:
    """Tune the adapter's own weights around an emulator of `kept` blocks, and plug them into the whole model.

    Returns:
        Loss and perplexity on `test` of the emulated model before (`emulator`) and after (`emulated`) tuning, and of
        the whole model with the tuned adapter (`plug_in`). `model` itself is left as it was.
    """
    tuning, size = settings["evaluation"]["tuning"], settings["evaluation"]["batch_size"]
    model, blocks = copy.deepcopy(model), uniform_blocks(settings, kept)
    adapter = set(range(settings["shape"]["num_hidden_layers"])) - set(_middle(settings))
    layers = [model.model.layers[index] for index in sorted(adapter)]
    parameters = [parameter for layer in layers for parameter in layer.parameters()]
    model.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=tuning["learning_rate"])
    with only_blocks(model, blocks):
        before = mean_loss(model, test, batch_size=size)
        for step in range(tuning["steps"]):
            start = step * tuning["batch_size"] % len(train)
            batch = train[start : start + tuning["batch_size"]].long()
            model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        after = mean_loss(model, test, batch_size=size)
    plugged = mean_loss(model, test, batch_size=size)
    return {"emulator": _told(before), "emulated": _told(after), "plug_in": _told(plugged)}


def some_rows(settings: Mapping[str, Any], tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> torch.Tensor:
    """Return at most `evaluation.rows` rows of the texts, spread over all of them; none if the texts are too short."""
    length, most = settings["row_tokens"], settings["evaluation"]["rows"]
    rows = pack(tokenizer, texts, row_tokens=length)
    return rows[torch.linspace(0, len(rows) - 1, min(most, len(rows))).long()]


def _told(loss: float) -> dict[str, float]:
    return {"loss": loss, "perplexity": math.exp(loss)}
