"""One delta to the step that the global state takes."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from fedpeat.core import Tensors


class ServerStep(NamedTuple):
    """A step from delta to delta with state passed in and out, as named tensors, so that it can be checkpointed.

    Attributes:
        start: Returns the state, given the global travelling tensors.
        update: Returns `(delta, state)`, given `(delta, state)`; neither argument is changed.
    """

    start: Callable[[Tensors], dict[str, torch.Tensor]]
    update: Callable[[Tensors, Tensors], tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]


def chain(*steps: ServerStep) -> ServerStep:
    """Return the steps one after the other; of nothing, the identity.

    State of step `i` is kept under names that begin with `i/`.
    """

    def start(tensors: Tensors) -> dict[str, torch.Tensor]:
        return {f"{i}/{name}": value for i, step in enumerate(steps) for name, value in step.start(tensors).items()}

    def update(delta: Tensors, state: Tensors) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        after: dict[str, torch.Tensor] = {}
        for i, step in enumerate(steps):
            own = {name.removeprefix(f"{i}/"): value for name, value in state.items() if name.startswith(f"{i}/")}
            delta, own = step.update(delta, own)
            after.update({f"{i}/{name}": value for name, value in own.items()})
        return dict(delta), after

    return ServerStep(start, update)


def scale(factor: float) -> ServerStep:
    """Return a step that multiplies the delta: the server's learning rate.

    >>> step, _ = scale(0.5).update({"w": torch.tensor([2.0])}, {})
    >>> step
    {'w': tensor([1.])}
    """
    return ServerStep(
        start=lambda _: {},
        update=lambda delta, _: ({name: tensor * factor for name, tensor in delta.items()}, {}),
    )
