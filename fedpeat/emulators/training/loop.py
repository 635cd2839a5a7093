"""The training loop of an emulator: seeded batches, checkpoints, and the same bits however often it is interrupted."""

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedpeat.core import (
    ConfigError,
    ModelError,
    StorageError,
    Tensors,
    digest,
    read_json,
    read_tensors,
    seed_for,
    write_json,
    write_tensors,
)

CHECKPOINT_SECONDS = 20.0
"""Time between checkpoints."""

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Pace:
    """How to descend: AdamW without weight decay, linear warm-up, then a cosine down to nothing.

    Attributes:
        steps: Optimiser steps.
        learning_rate: At the end of the warm-up.
        batch_size: Rows of a step.
        warmup: Steps of the rise.
        clip_norm: Largest gradient norm; None for no clipping.
    """

    steps: int
    learning_rate: float
    batch_size: int
    warmup: int
    clip_norm: float | None

    def check(self) -> None:
        """Check the numbers.

        Raises:
            ConfigError: If one is out of range.
        """
        clips = self.clip_norm is None or self.clip_norm > 0
        if self.steps < 1 or self.batch_size < 1 or self.warmup < 0 or not clips:
            raise ConfigError("cannot train an emulator so", str(self), "set steps, batch_size and clip_norm above 0")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ConfigError("cannot train an emulator so", str(self), "set learning_rate above 0, such as 0.001")

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, from 0.

        >>> [round(Pace(4, 1.0, 8, 2, None).rate(step), 3) for step in range(4)]
        [0.5, 1.0, 1.0, 0.5]
        """
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * (1 + math.cos(math.pi * done)) / 2


def batch_indices(seed: int, purpose: str, *, count: int, size: int, step: int) -> list[int]:
    """Return the rows of a step: each epoch goes through all `count` rows, in an order of its own.

    >>> batches = [batch_indices(0, "any", count=4, size=2, step=step) for step in range(2)]
    >>> sorted(batches[0] + batches[1])
    [0, 1, 2, 3]
    """
    places = (divmod(position, count) for position in range(step * size, (step + 1) * size))
    return [_order(seed_for(seed, purpose, epoch), count)[place] for epoch, place in places]


@lru_cache(maxsize=2)
def _order(seed: int, count: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


def descend(
    parameters: Mapping[str, nn.Parameter],
    loss_at: Callable[[int], torch.Tensor],
    pace: Pace,
    *,
    folder: Path | None = None,
    tell: Callable[[float], None] = lambda _share: None,
) -> list[float]:
    """Lower a loss, in place; go on from the checkpoint in `folder`, if there is a sound one.

    Args:
        parameters: What trains, by name, fp32.
        loss_at: The loss of a step, from 0; it must follow from the step and the parameters alone.
        pace: How to descend.
        folder: Where checkpoints are kept; None keeps none.
        tell: Told the share of steps done, after each.

    Returns:
        The loss of each step.

    Raises:
        ModelError: If the loss is not finite.
        StorageError: If a checkpoint cannot be written.
    """
    trained = list(parameters.values())
    optimizer = torch.optim.AdamW(trained, lr=pace.learning_rate, weight_decay=0.0)
    losses = _resume(folder, parameters, optimizer) if folder is not None else []
    saved = time.monotonic()
    for step in range(len(losses), pace.steps):
        for group in optimizer.param_groups:
            group["lr"] = pace.rate(step)
        loss = loss_at(step)
        losses.append(check_finite(loss.item(), step))
        gradients = torch.autograd.grad(loss, trained, allow_unused=True)
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.grad = gradient
        if pace.clip_norm is not None:
            nn.utils.clip_grad_norm_(trained, pace.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        if folder is not None and time.monotonic() - saved >= CHECKPOINT_SECONDS:
            _checkpoint(folder, parameters, optimizer, losses)
            saved = time.monotonic()
        tell((step + 1) / pace.steps)
    return losses


def check_finite(loss: float, step: int) -> float:
    """Return `loss`.

    Raises:
        ModelError: If it is not finite.
    """
    if not math.isfinite(loss):
        raise ModelError(
            f"cannot go on training the emulator after {step} steps",
            f"the loss is {loss}",
            "lower its learning_rate (a tenth, say) or set its clip_norm to 1.0; "
            "if it is so from the start, load the model with model.dtype=float32 or bfloat16",
        )
    return loss


def _checkpoint(
    folder: Path, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, losses: Sequence[float]
) -> None:
    tensors: dict[str, torch.Tensor] = {f"value.{name}": value for name, value in parameters.items()}
    for name, parameter in parameters.items():
        tensors |= {f"{kind}.{name}": value for kind, value in optimizer.state.get(parameter, {}).items()}
    write_kept(folder, f"step-{len(losses)}", tensors, {"losses": list(losses)})
    write_json(folder / "last.json", {"name": f"step-{len(losses)}"})
    clear_checkpoints(folder, but=f"step-{len(losses)}")


def clear_checkpoints(folder: Path, *, but: str = "") -> None:
    """Delete the checkpoints in `folder`, except the one named `but`."""
    for path in folder.glob("step-*"):
        if path.stem != but:
            path.unlink(missing_ok=True)
    if not but:
        (folder / "last.json").unlink(missing_ok=True)


def _resume(folder: Path, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> list[float]:
    with contextlib.suppress(StorageError, KeyError, TypeError):
        found = read_kept(folder, str(read_json(folder / "last.json")["name"]))
        if found is None or not {f"value.{name}" for name in parameters} <= found[0].keys():
            return []
        tensors, state = found
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(tensors[f"value.{name}"])
                if f"step.{name}" in tensors:
                    kept = {kind: tensors[f"{kind}.{name}"].clone() for kind in _MOMENTS}
                    optimizer.state[parameter] = {
                        kind: value if kind == "step" else value.to(parameter.device) for kind, value in kept.items()
                    }
        return list(state["losses"])
    return []


def write_kept(folder: Path, name: str, tensors: Tensors, state: Mapping[str, object]) -> None:
    """Keep tensors, and what is said of them, as `<name>.safetensors` and `<name>.json`.

    Raises:
        StorageError: If they cannot be written.
    """
    write_tensors(folder / f"{name}.safetensors", tensors)
    write_json(folder / f"{name}.json", {**state, "digest": digest(tensors)})


def read_kept(folder: Path, name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """Return what `write_kept` kept; None if it is not there, or damaged."""
    try:
        state = read_json(folder / f"{name}.json")
        tensors = read_tensors(folder / f"{name}.safetensors")
        return (tensors, state) if state["digest"] == digest(tensors) else None
    except (StorageError, KeyError, TypeError):
        return None
