"""LoRA updates of any number and size, as Flower messages and in memory."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from flwr.supercore.task_identity import TaskIdentity

from fedpeat.core import ClientUpdate, GlobalState, Layout, LoraPair
from fedpeat.wire import to_arrays, train_message, update_reply
from strategies import Situation


class Case(NamedTuple):
    """How many updates, and how large: `pairs` LoRA layers, each `width` high and wide."""

    updates: int
    pairs: int
    width: int
    rank: int = 8

    @property
    def megabytes(self) -> float:
        """Of one update with both factors."""
        return self.pairs * 2 * self.rank * self.width * 4 / 1e6


def layout_of(case: Case) -> Layout:
    """Return the layout of the case's LoRA layers."""
    names = [f"model.layers.{number}.mlp.up_proj" for number in range(case.pairs)]
    shape = (case.width, case.width)
    pairs = [LoraPair(name, f"{name}.lora_A.weight", f"{name}.lora_B.weight", 2.0, shape) for name in names]
    return Layout(tuple(pairs), (), case.rank)


def situation_of(case: Case) -> Situation:
    """Return the situation of a round; B is not zeros any more."""
    layout = layout_of(case)
    return Situation(1, GlobalState(_factors(np.random.default_rng(0), layout, ("A", "B"))), layout, case.updates)


def updates_of(case: Case, parts: Sequence[str] = ("A", "B")) -> list[ClientUpdate]:
    """Return the case's updates, all different, with these parts of the LoRA layers."""
    draw, layout = np.random.default_rng(1), layout_of(case)
    return [_update(number, _factors(draw, layout, parts)) for number in range(case.updates)]


def messages_of(case: Case, parts: Sequence[str] = ("A", "B")) -> list[Any]:
    """Return the same updates as replies."""
    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1
    asked = train_message({"round": 1}, to_arrays({}), node=1, ttl_seconds=None)
    asked.metadata.__dict__["_message_id"] = "asked"
    draw, layout = np.random.default_rng(1), layout_of(case)
    numbers = range(case.updates)
    return [update_reply(_update(number, _factors(draw, layout, parts)), to=asked) for number in numbers]


@functools.cache
def _pool() -> np.ndarray:
    return np.random.default_rng(2).standard_normal(2**22, dtype=np.float32)


def _update(number: int, delta: dict[str, torch.Tensor]) -> ClientUpdate:
    return ClientUpdate(f"client-{number:04}", 1, delta, 1000.0 + number, {"train_loss": 1.0})


def _factors(draw: np.random.Generator, layout: Layout, parts: Sequence[str]) -> dict[str, torch.Tensor]:
    """Return random factors: pieces from anywhere in a pool of normal numbers, as drawing them all takes long."""
    pool = _pool()
    found = {}
    for pair in layout.pairs:
        out, width = pair.shape
        for part, name, shape in (("A", pair.a, (layout.rank, width)), ("B", pair.b, (out, layout.rank))):
            if part in parts:
                start = int(draw.integers(pool.size - math.prod(shape)))
                found[name] = torch.from_numpy(pool[start : start + math.prod(shape)].reshape(shape).copy())
    return found
