"""One delta to the step that the global state takes."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from fedpeat.core import Tensors, with_prefix, zeros_like

_MOMENTUM, _SECOND = "momentum/", "second/"


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


def momentum(learning_rate: float = 1.0, beta: float = 0.9, *, nesterov: bool = False) -> ServerStep:
    """Return `v <- beta v + delta; step = learning_rate * v`.

    State: v under `momentum/<name>`, fp32, zeros at first. What the delta does not name keeps its state.

    Args:
        learning_rate: The server's.
        beta: How much of v is kept, 0 to under 1.
        nesterov: Look ahead: the step is `learning_rate * (delta + beta v)`.

    >>> step = momentum(beta=0.5)
    >>> _, state = step.update({"w": torch.tensor([2.0])}, step.start({"w": torch.zeros(1)}))
    >>> step.update({"w": torch.tensor([2.0])}, state)[0]
    {'w': tensor([3.])}
    """

    def update(delta: Tensors, state: Tensors) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        taken: dict[str, torch.Tensor] = {}
        after = dict(state)
        for name, tensor in delta.items():
            new = tensor.double()
            velocity = beta * state[_MOMENTUM + name].double() + new
            taken[name] = (learning_rate * (new + beta * velocity if nesterov else velocity)).float()
            after[_MOMENTUM + name] = velocity.float()
        return taken, after

    return ServerStep(lambda tensors: with_prefix(_MOMENTUM, zeros_like(tensors, torch.float32)), update)


def adaptive(
    second_moment: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    *,
    learning_rate: float,
    beta1: float,
    tau: float,
) -> ServerStep:
    """Return `m <- beta1 m + (1 - beta1) delta; step = learning_rate * m / (sqrt(v) + tau)`.

    State: m under `momentum/<name>`, zeros at first, and v under `second/<name>`, tau^2 at first; fp32. What the delta
    does not name keeps its state.

    Args:
        second_moment: The next v from the last one and `delta * delta`.
        learning_rate: The server's.
        beta1: How much of m is kept, 0 to under 1.
        tau: Adaptivity, more than 0: entries of the delta far below it are not scaled up.
    """

    def start(tensors: Tensors) -> dict[str, torch.Tensor]:
        zeros = zeros_like(tensors, torch.float32)
        seconds = {name: torch.full_like(zero, tau * tau) for name, zero in zeros.items()}
        return {**with_prefix(_MOMENTUM, zeros), **with_prefix(_SECOND, seconds)}

    def update(delta: Tensors, state: Tensors) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        taken: dict[str, torch.Tensor] = {}
        after = dict(state)
        for name, tensor in delta.items():
            new = tensor.double()
            first = beta1 * state[_MOMENTUM + name].double() + (1 - beta1) * new
            second = second_moment(state[_SECOND + name].double(), new.square())
            taken[name] = (learning_rate * first / (second.sqrt() + tau)).float()
            after |= {_MOMENTUM + name: first.float(), _SECOND + name: second.float()}
        return taken, after

    return ServerStep(start, update)
