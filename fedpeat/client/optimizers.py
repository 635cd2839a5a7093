"""Any optimiser of `torch.optim` by name, and its state as named tensors."""

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from fedpeat.core import ConfigError, Tensors, nearest
from fedpeat.peft import Tuned

# One needs its loss as a function to call again, the other sparse gradients: neither fits a plain loop.
_NOT_HERE = {"LBFGS", "Optimizer", "SparseAdam"}


def optimizer_names() -> list[str]:
    """Return the optimisers that can be used.

    >>> {"AdamW", "SGD", "Adafactor"} <= set(optimizer_names())
    True
    """
    return sorted(name for name, _ in _classes())


def _classes() -> Iterator[tuple[str, type[Optimizer]]]:
    for name, value in vars(torch.optim).items():
        if isinstance(value, type) and issubclass(value, Optimizer) and name not in _NOT_HERE:
            yield name, value


def build_optimizer(tuned: Tuned, *, name: str, options: Mapping[str, Any], learning_rate: float) -> Optimizer:
    """Return a fresh optimiser of the trainable tensors.

    Args:
        tuned: Whose tensors.
        name: A class of `torch.optim`, such as "AdamW".
        options: Its keywords, the learning rate apart.
        learning_rate: Before the schedule's factor.

    Raises:
        ConfigError: If the optimiser or a keyword is unknown, or a value is refused.
    """
    classes = dict(_classes())
    if name not in classes:
        raise ConfigError(f"cannot use client.optimizer={name}", "torch.optim has no such", nearest(name, classes))
    known = set(inspect.signature(classes[name]).parameters) - {"params", "lr"}
    for option in options:
        if option not in known:
            remedy = "set client.learning_rate" if option == "lr" else nearest(option, known)
            raise ConfigError(f"cannot set {option!r} of the optimiser {name}", "no such keyword here", remedy)
    try:
        return classes[name](tuned.parameters, lr=learning_rate, **options)  # type: ignore[call-arg]
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"cannot build the optimiser {name} with {dict(options)}", str(error), "change client.optimizer_options"
        ) from error


def read_state(optimizer: Optimizer, tuned: Tuned) -> dict[str, torch.Tensor]:
    """Return copies, on the CPU, of all that `optimizer` remembers, as `<optimiser>/<tensor>/<key>`."""
    return {
        f"{type(optimizer).__name__}/{name}/{key}": value.detach().to("cpu", copy=True)
        for name, parameter in zip(tuned.names, tuned.parameters, strict=True)
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, torch.Tensor)
    }


def write_state(optimizer: Optimizer, tuned: Tuned, state: Tensors) -> None:
    """Make `optimizer` go on from what `read_state` returned, to the bit.

    Raises:
        ConfigError: If the state is another optimiser's or belongs to other tensors.
    """
    numbers = {name: number for number, name in enumerate(tuned.names)}
    loaded: dict[int, dict[str, torch.Tensor]] = {}
    for full_name, value in state.items():
        kind, name, key = [*full_name.split("/"), "", ""][:3]
        if kind != type(optimizer).__name__ or name not in numbers:
            raise ConfigError(
                f"cannot go on with the kept state of {type(optimizer).__name__}",
                f"it holds {full_name!r}, which is another optimiser's or of a tensor that does not train",
                "set client.optimizer_state=reset, or start a new run",
            )
        loaded.setdefault(numbers[name], {})[key] = value.clone()
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": loaded, "param_groups": groups})
