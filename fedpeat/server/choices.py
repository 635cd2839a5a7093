"""How often is the right answer the likeliest?"""

from dataclasses import dataclass

import torch
from torch import nn

from fedpeat.core import ConfigError, nearest
from fedpeat.data import Choices
from fedpeat.data.rows import UNSCORED
from fedpeat.server.evaluate import at_rest, next_logits

NORMALISE = ("none", "tokens")


@dataclass(frozen=True)
class ChoiceResult:
    """How a model answers.

    Attributes:
        accuracy: Share of documents whose right answer was the likeliest, 0 to 1.
        correct: How many.
        documents: Of how many.
    """

    accuracy: float
    correct: int
    documents: int


def choose(
    model: nn.Module,
    choices: Choices,
    *,
    batch_size: int,
    threads: int,
    device: str = "cpu",
    normalise: str = "none",
) -> ChoiceResult:
    """Let `model` choose the likeliest answer for each document; of equally likely ones it is the first.

    Source: Brown et al. 2020, arXiv:2005.14165, section 2.4: ranking completions by their likelihood. `none` and
        `tokens` are what lm-evaluation-harness (Gao et al.) calls acc and, by bytes instead of tokens, acc_norm.

    Departures: an answer's end is scored with it. So what is compared are the probabilities of whole answers, which
        add up to at most 1 over all texts, and a model tuned on the task's own pairs chooses best by them: hence
        `none` is the default. A model that was never tuned finds every long answer unlikely; where answers differ much
        in length, `tokens` is the fairer measure of it.

    Args:
        model: A causal language model.
        choices: Documents, each with every answer.
        batch_size: Rows (a document with an answer each) a forward pass.
        threads: Torch threads.
        device: Where the model is.
        normalise: `none` compares sums of log-likelihoods, `tokens` their means over an answer's tokens.

    Raises:
        ConfigError: If `normalise` is something else.
    """
    check_normalise(normalise)
    found = score(model, choices, batch_size=batch_size, threads=threads, device=device)  # (documents, choices)
    if normalise == "tokens":
        found = found / (choices.rows.labels[:, 1:] != UNSCORED).sum(1).reshape(found.shape)
    best, picked = found.max(dim=1).values, found.argmax(dim=1)
    # What is not finite is no answer: argmax would pick it.
    correct = int(((picked == choices.right) & best.isfinite()).sum())
    return ChoiceResult(correct / max(len(choices), 1), correct, len(choices))


def check_normalise(name: str) -> str:
    """Return the name of a way to compare answers of unequal length, if there is one of it.

    Raises:
        ConfigError: If there is none.
    """
    if name not in NORMALISE:
        raise ConfigError(f"evaluation.normalise={name}", "no such way to compare", nearest(str(name), NORMALISE))
    return name


@torch.no_grad()
def score(model: nn.Module, choices: Choices, *, batch_size: int, threads: int, device: str = "cpu") -> torch.Tensor:
    """Return the log-likelihood of each answer to each document, `(documents, choices)` fp64, nats.

    Args:
        model: A causal language model; `model(input_ids).logits` is `(batch, tokens, vocabulary)`.
        choices: Documents, each with every answer.
        batch_size: Rows a forward pass.
        threads: Torch threads.
        device: Where the model is.
    """
    sums = []
    with at_rest(model, threads):
        for logits, labels in next_logits(model, choices.rows, batch_size=batch_size, device=device, trim=True):
            scored = labels != UNSCORED  # (batch, tokens - 1)
            likely = logits[scored].double().log_softmax(-1).gather(-1, labels[scored][:, None])[:, 0]
            # Summed in their own rows: index_add_ on a GPU adds in any order.
            table = torch.zeros(labels.shape, dtype=torch.float64, device=device)
            table[scored] = likely
            sums.append(table.sum(1).cpu())
    return torch.cat(sums).reshape(len(choices), len(choices.names))
