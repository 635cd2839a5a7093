"""How good is a model on held-out tokens?"""

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
    before, training = torch.get_num_threads(), model.training
    torch.set_num_threads(threads)
    model.eval()
    loss, correct, tokens = 0.0, 0, 0
    try:
        for start in range(0, len(rows), batch_size):
            batch = rows.batch(torch.arange(start, min(start + batch_size, len(rows))))
            inputs = {name: tensor.to(device) for name, tensor in batch.items() if name != "labels"}
            labels = batch["labels"][:, 1:].to(device)  # (batch, tokens - 1)
            # Input prompts stand before the tokens: count from the end.
            logits = model(**inputs, use_cache=False).logits[:, -labels.shape[1] - 1 : -1].float()
            flat = nn.functional.cross_entropy(
                logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none"
            )
            loss += float(flat.double().sum())
            correct += int(((logits.argmax(-1) == labels) & (labels != -100)).sum())
            tokens += int((labels != -100).sum())
    finally:
        model.train(training)
        torch.set_num_threads(before)
    if tokens == 0:
        raise DataError("cannot evaluate without held-out tokens", f"{len(rows)} rows", "raise data.test_share")
    return Evaluation(loss=loss / tokens, accuracy=correct / tokens, tokens=tokens)
