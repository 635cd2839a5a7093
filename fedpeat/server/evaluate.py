"""How good is a model on held-out tokens?"""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from fedpeat.core import DataError, Evaluation
from fedpeat.data import Rows


@torch.no_grad()
def evaluate(model: nn.Module, rows: Rows, *, batch_size: int, threads: int, device: str = "cpu") -> Evaluation:
    """Score next-token prediction of `model` on `rows`.

    Sums are kept in fp64 and batches are taken in order, so that the same rows, threads and machine give the same bits.

    Args:
        model: A causal language model; `model(input_ids).logits` is `(batch, tokens, vocabulary)`.
        rows: `input_ids` and `labels`, `(rows, tokens)`; labels of -100 are not scored.
        batch_size: Rows a forward pass.
        threads: Torch threads (their number changes float sums).
        device: Where the model is.

    Raises:
        DataError: If there is no token to score.
    """
    loss, correct, tokens = 0.0, 0, 0
    with at_rest(model, threads):
        for logits, labels in next_logits(model, rows, batch_size=batch_size, device=device):
            flat = nn.functional.cross_entropy(
                logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none"
            )
            loss += float(flat.double().sum())
            correct += int(((logits.argmax(-1) == labels) & (labels != -100)).sum())
            tokens += int((labels != -100).sum())
    if tokens == 0:
        raise DataError("cannot evaluate without held-out tokens", f"{len(rows)} rows", "raise data.test_share")
    return Evaluation(loss=loss / tokens, accuracy=correct / tokens, tokens=tokens)


@contextlib.contextmanager
def at_rest(model: nn.Module, threads: int) -> Iterator[None]:
    """Evaluate `model` on so many torch threads; afterwards both are as they were."""
    before, training = torch.get_num_threads(), model.training
    torch.set_num_threads(threads)
    model.eval()
    try:
        yield
    finally:
        model.train(training)
        torch.set_num_threads(before)


def next_logits(
    model: nn.Module, rows: Rows, *, batch_size: int, device: str, trim: bool = False
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the logits of all tokens but the first, `(batch, tokens - 1, vocabulary)`, and their labels, in order.

    Args:
        model: A causal language model.
        rows: What it reads.
        batch_size: Rows a forward pass.
        device: Where the model is.
        trim: Whether to leave out columns that are padding in every row of a batch.
    """
    for start in range(0, len(rows), batch_size):
        batch = rows.batch(torch.arange(start, min(start + batch_size, len(rows))))
        if trim and rows.attention_mask is not None:
            longest = int(batch["attention_mask"].sum(1).max())
            batch = {name: tensor[:, :longest] for name, tensor in batch.items()}
        inputs = {name: tensor.to(device) for name, tensor in batch.items() if name != "labels"}
        labels = batch["labels"][:, 1:].to(device)  # (batch, tokens - 1)
        # Input prompts stand before the tokens: count from the end.
        yield model(**inputs, use_cache=False).logits[:, -labels.shape[1] - 1 : -1].float(), labels
