"""The full model run on public text: what enters and leaves each block, and its loss without some of them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fedpeat.core import ConfigError, DataError, ModelError, Tensors
from fedpeat.emulators.blocks import Blocks, BuildContext
from fedpeat.emulators.selection.rules import uniform_positions
from fedpeat.models import find_blocks

UNSCORED = -100

See = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], None]
"""Told of a block in a batch: its index; the states that enter it and those that leave it, `(rows, tokens, width)`;
which of these tokens are no padding, `(rows, tokens)`. It must not keep more of them than it needs."""


def check_rows(count: int, *, least: int = 1) -> None:
    """Check that `count` public rows are enough to score blocks on.

    Raises:
        ConfigError: If they are fewer than `least`.
    """
    if count < least:
        found = f"this builder needs {least} or more"
        raise ConfigError(f"cannot score blocks on {count} public rows", found, f"set emulator.rows >= {least}")


def public_rows(blocks: Blocks, builder: str, count: int) -> dict[str, torch.Tensor]:
    """Return `count` of the server's public rows at even distances (all of them if there are fewer), `(rows, tokens)`.

    Raises:
        ConfigError: If there are none.
    """
    rows = blocks.needed_rows(builder)
    there = len(rows["input_ids"])
    chosen = torch.tensor(uniform_positions(there, min(count, there)))
    return {name: tensor[chosen.to(tensor.device)] for name, tensor in rows.items()}


def batches(context: BuildContext, rows: Tensors) -> Iterator[dict[str, torch.Tensor]]:
    """Yield `rows` in order, `context.batch_size` at a time, on the model's device."""
    for start in range(0, len(rows["input_ids"]), context.batch_size):
        part = slice(start, start + context.batch_size)
        yield {name: tensor[part].to(context.model.device) for name, tensor in rows.items()}


def counted(batch: Tensors) -> torch.Tensor:
    """Return which tokens are no padding, `(rows, tokens)`."""
    if "attention_mask" in batch:
        return batch["attention_mask"] != 0
    return torch.ones_like(batch["input_ids"], dtype=torch.bool)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put `model` in eval mode, and each of its modules back in its own mode afterwards."""
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training


@torch.no_grad()
def see_states(context: BuildContext, rows: Tensors, indices: Sequence[int], see: See, *, telling: str) -> None:
    """Run the full model on `rows`, and show `see` each of the blocks `indices` in each batch, in order of computation.

    Nothing is kept here: a batch's states are gone once the model no longer needs them.

    Args:
        context: Whose model; it is left as it was.
        rows: Keywords for the model, `(rows, tokens)` each; `labels` are not needed.
        indices: Blocks of the full model.
        see: What looks at the states; it must not change them.
        telling: What is being done, for `context.tell`.

    Raises:
        ModelError: If the model does not hand states of shape `(rows, tokens, width)` from block to block.
    """
    stack = find_blocks(context.model).of(context.model)
    mask = torch.empty(0)

    def watch(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            entering, leaving = _entering(module, args, kwargs), _leaving(output)
            for states in (entering, leaving):
                if states.shape[:2] != mask.shape:
                    found = f"they are {tuple(states.shape)} for {tuple(mask.shape)} tokens"
                    remedy = "choose an emulator that needs no public text"
                    raise ModelError(f"cannot read the states of a {type(module).__name__}", found, remedy)
            see(index, entering, leaving, mask)

        return hook

    one_more = progress(context, telling, batch_count(context, rows))
    with evaluating(context.model), _hooks([(stack[index], watch(index)) for index in indices]):
        for batch in batches(context, rows):
            mask = counted(batch)
            context.model(**_inputs(batch), use_cache=False)
            one_more()


@contextmanager
def skipping(context: BuildContext, indices: Sequence[int]) -> Iterator[None]:
    """Let the full model's blocks `indices` hand on what they receive.

    They still compute, since only a block itself knows what it returns besides the states; that is thrown away.
    """
    stack = find_blocks(context.model).of(context.model)

    def hand_on(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        entering = _entering(module, args, kwargs)
        return (entering, *output[1:]) if isinstance(output, tuple) else entering

    with _hooks([(stack[index], hand_on) for index in indices]):
        yield


def loss_sum(context: BuildContext, batch: Tensors) -> torch.Tensor:
    """Return the full model's loss on a batch in nats, summed over the scored tokens: a scalar in fp64."""
    logits = context.model(**_inputs(batch), use_cache=False).logits[:, :-1].float()
    labels = _labels(batch)
    losses = nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=UNSCORED, reduction="none"
    )
    return losses.double().sum()


def scored_tokens(rows: Tensors) -> int:
    """Return how many tokens of `rows` the loss counts: those with a label that are, and follow, no padding.

    Raises:
        DataError: If there are none.
    """
    tokens = int((_labels(rows) != UNSCORED).sum())
    if tokens == 0:
        found = f"none of {len(rows['labels'])} public rows has a label to predict"
        raise DataError("cannot score blocks without tokens", found, "give the server longer text")
    return tokens


def progress(context: BuildContext, telling: str, passes: int) -> Callable[[], None]:
    """Return what is to be called after each of `passes` forward passes, so that the context is told how far it is."""
    done = 0

    def one_more() -> None:
        nonlocal done
        done += 1
        context.tell(telling, done / passes)

    context.tell(telling, 0.0)
    return one_more


def batch_count(context: BuildContext, rows: Tensors) -> int:
    """Return how many batches `batches` yields."""
    return -(-len(rows["input_ids"]) // context.batch_size)


def _labels(batch: Tensors) -> torch.Tensor:
    real = counted(batch)
    return batch["labels"][:, 1:].masked_fill(~(real[:, 1:] & real[:, :-1]), UNSCORED)  # (rows, tokens - 1)


@contextmanager
def _hooks(wanted: Sequence[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook, with_kwargs=True) for module, hook in wanted]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _inputs(batch: Tensors) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in batch.items() if name != "labels"}


def _entering(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    if not args and "hidden_states" not in kwargs:
        raise ModelError(
            f"cannot read what enters a {type(block).__name__}",
            f"it is called with {', '.join(kwargs) or 'nothing'}",
            "let the model call its blocks with the hidden states first",
        )
    return args[0] if args else kwargs["hidden_states"]


def _leaving(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output
