"""What a full model shows of its blocks on public text: how far each turns the states, and what is lost without it."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from fedpeat.core import Tensors
from fedpeat.emulators.blocks import BuildContext
from fedpeat.emulators.selection.activations import (
    batch_count,
    batches,
    counted,
    evaluating,
    loss_sum,
    progress,
    scored_tokens,
    see_states,
    skipping,
)
from fedpeat.emulators.selection.rules import between_adapters
from fedpeat.models import find_blocks

Scores = dict[int, float]
Measure = Callable[[BuildContext, Tensors, Sequence[int], str], Scores]
"""Scores blocks of the full model, by index, on public rows; the text is what to tell meanwhile."""

Gradients = dict[int, list[torch.Tensor]]


def block_influences(context: BuildContext, rows: Tensors, places: Sequence[int], telling: str) -> Scores:
    """Return `1 - mean over tokens of cos(what enters, what leaves)` of each block; padding does not count."""
    device = context.model.device
    sums = {place: torch.zeros((), dtype=torch.float64, device=device) for place in places}

    def see(index: int, entering: torch.Tensor, leaving: torch.Tensor, real: torch.Tensor) -> None:
        # Not masked by a product: states of padding may be NaN.
        sums[index] += cosine(entering, leaving).where(real, 0.0).sum()

    see_states(context, rows, places, see, telling=telling)
    tokens = int(counted(rows).sum())
    return {place: 1 - float(total) / max(tokens, 1) for place, total in sums.items()}


def run_distances(runs: Sequence[Sequence[int]], *, every_token: bool) -> Measure:
    """Return a measure of runs of blocks: their mean angular distance, by the index of each run's first block.

    Args:
        runs: Indices of neighbouring blocks, ascending; blocks of the adapter may stand in between, then the distances
            of the parts are added.
        every_token: Whether all tokens count that are no padding, instead of the last such of each row.
    """

    def measure(context: BuildContext, rows: Tensors, places: Sequence[int], telling: str) -> Scores:
        parts = {run[0]: between_adapters(run, context.split.adapter) for run in runs}
        spans = {(part[0], part[-1]) for of_run in parts.values() for part in of_run}
        sums = {span: torch.zeros((), dtype=torch.float64, device=context.model.device) for span in spans}
        needed_until = {first: max(end for start, end in spans if start == first) for first, _ in spans}
        entered: dict[int, torch.Tensor] = {}

        def see(index: int, entering: torch.Tensor, leaving: torch.Tensor, real: torch.Tensor) -> None:
            if index in needed_until:
                entered[index] = entering if every_token else at_last(entering, real)
            after = leaving if every_token else at_last(leaving, real)
            for span in spans:
                if span[1] == index:
                    angles = cosine(entered[span[0]], after).clamp(-1, 1).arccos() / math.pi
                    sums[span] += angles.where(real if every_token else real.any(1), 0.0).sum()
            for first in [one for one in entered if needed_until[one] <= index]:
                del entered[first]

        see_states(context, rows, places, see, telling=telling)
        real = counted(rows)
        count = max(int(real.sum() if every_token else real.any(1).sum()), 1)
        return {first: sum(float(sums[part[0], part[-1]]) for part in of) / count for first, of in parts.items()}

    return measure


def loss_increases(context: BuildContext, rows: Tensors, places: Sequence[int], telling: str) -> Scores:
    """Return by how much the loss rises, in nats a token, when each block alone is skipped."""
    tokens = scored_tokens(rows)
    one_more = progress(context, telling, (1 + len(places)) * batch_count(context, rows))

    def loss(skipped: Sequence[int]) -> float:
        total = torch.zeros((), dtype=torch.float64, device=context.model.device)
        with torch.no_grad(), skipping(context, skipped):
            for batch in batches(context, rows):
                total += loss_sum(context, batch)
                one_more()
        return float(total) / tokens

    with evaluating(context.model):
        whole = loss([])
        return {place: loss([place]) - whole for place in places}


def gradient_changes(context: BuildContext, rows: Tensors, places: Sequence[int], telling: str) -> Scores:
    """Return `1 - mean over the adapter's blocks of cos(gradient, gradient without the block)` of each block.

    Memory: twice the adapter in fp32, and what a backward pass takes.
    """
    scored_tokens(rows)
    one_more = progress(context, telling, (1 + len(places)) * batch_count(context, rows))
    with evaluating(context.model), _only_adapter_trains(context) as adapter:

        def gradients(skipped: Sequence[int]) -> Gradients:
            with torch.enable_grad(), skipping(context, skipped):
                return _summed_gradients(context, rows, adapter, one_more)

        whole = gradients([])
        return {place: 1 - mean_cosine(whole, gradients([place])) for place in places}


def _summed_gradients(
    context: BuildContext, rows: Tensors, adapter: Mapping[int, list[nn.Parameter]], one_more: Callable[[], None]
) -> Gradients:
    sums = {index: [torch.zeros_like(one, dtype=torch.float32) for one in own] for index, own in adapter.items()}
    totals = [total for own in sums.values() for total in own]
    parameters = [parameter for own in adapter.values() for parameter in own]
    for batch in batches(context, rows):
        found = torch.autograd.grad(loss_sum(context, batch), parameters, allow_unused=True)
        for total, one in zip(totals, found, strict=True):
            if one is not None:  # an expert that no token was sent to
                total.add_(one)
        one_more()
    return sums


@contextmanager
def _only_adapter_trains(context: BuildContext) -> Iterator[dict[int, list[nn.Parameter]]]:
    """Let gradients flow to the adapter's parameters alone, given by block; afterwards all flags are what they were."""
    stack = find_blocks(context.model).of(context.model)
    adapter = {
        index: [one for one in stack[index].parameters() if one.is_floating_point()] for index in context.split.adapter
    }
    before = {parameter: parameter.requires_grad for parameter in context.model.parameters()}
    try:
        context.model.requires_grad_(False)
        for own in adapter.values():
            for parameter in own:
                parameter.requires_grad_(True)
        yield adapter
    finally:
        for parameter, flag in before.items():
            parameter.requires_grad_(flag)


def mean_cosine(one: Gradients, other: Gradients) -> float:
    """Return the cosine of two gradients of a block, all its parameters taken as one vector; the mean over blocks.

    >>> mean_cosine({0: [torch.ones(2)], 3: [torch.ones(2)]}, {0: [torch.ones(2)], 3: [torch.tensor([1.0, -1.0])]})
    0.5
    """
    cosines = []
    for index, own in one.items():
        products = torch.zeros(3, dtype=torch.float64, device=own[0].device)
        for ours, theirs in zip(own, other[index], strict=True):
            a, b = ours.double().flatten(), theirs.double().flatten()
            products += torch.stack([a @ b, a @ a, b @ b])
        dot, first, second = products.tolist()
        # Two gradients of zero agree; one of them alone has no direction in common with the other.
        cosines.append(dot / math.sqrt(first * second) if first and second else float(first == second))
    return sum(cosines) / len(cosines)


def cosine(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return cosines along the last dimension in fp64 (in fp32, arccos loses half of the digits near 1); 0 for zeros.

    >>> cosine(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([[6.0, 8.0], [1.0, 0.0]])).tolist()
    [1.0, 0.0]
    """
    one, other = one.double(), other.double()
    lengths = (one.square().sum(-1) * other.square().sum(-1)).sqrt()  # of one with itself, the cosine is exactly 1
    return (one * other).sum(-1) / lengths.where(lengths != 0, 1.0)


def at_last(states: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Return the state of each row's last token that is real; of a row without one, that of its first token.

    Args:
        states: `(rows, tokens, width)`.
        real: Which tokens are no padding, `(rows, tokens)`.

    >>> at_last(torch.tensor([[[1.0], [2.0], [3.0]]]), torch.tensor([[True, True, False]])).tolist()
    [[2.0]]
    """
    places = torch.arange(real.shape[1], device=real.device) * real
    return states[torch.arange(len(states), device=states.device), places.argmax(1)]
