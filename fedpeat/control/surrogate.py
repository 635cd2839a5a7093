"""How good the plug-in model would be after a round: response curves with few parameters, which are data."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np

from fedpeat.control.menu import OUT, PAIR, STEPS
from fedpeat.control.problem import Problem
from fedpeat.core import ConfigError, nearest


@dataclass(frozen=True)
class Curves:
    """Response curves of the plug-in model's loss.

    With shares `d_n` of all data, kept shares `k_n`, rank shares `r_n`, steps `t_n`, age `a` (rounds since the emulator
    was re-aligned), sums over those that take part, and `c = sum d_n`:
    `s_n = (t_n / unit_steps)^steps r_n^rank`, `m = sum d_n s_n / c`,
    `floor = least + gap (1 - sum d_n k_n / c) - apart ln c`, and the loss moves by
    `1 - exp(-pace m exp(-ageing a))` of its way to the floor.

    `-ln c` is the Kullback-Leibler divergence of the data that take part from all data: a round of few devices pulls
    the model to what these hold, and may make it worse for all.

    Attributes:
        start: Loss before training, nats a token.
        least: Loss that training without compression would come to with everybody, nats a token.
        gap: What an emulator of nothing adds to it, nats a token.
        pace: Share of the way in a round (as `1 - exp(-pace)`) with all ranks full and `unit_steps`.
        unit_steps: Local steps at that pace.
        steps: Exponent of local steps.
        rank: Exponent of the rank's share of the largest.
        apart: What each nat of that divergence adds to the floor, nats a token.
        ageing: How much slower it goes with each round since the emulator was re-aligned.

    Departures: our own form, chosen by measured runs; the defaults of this class are no measurement, those in the
        package are (`fedpeat.control.read_fit`).
    """

    start: float = 4.0
    least: float = 3.0
    gap: float = 0.5
    pace: float = 0.3
    unit_steps: float = 10.0
    steps: float = 0.6
    rank: float = 0.1
    apart: float = 0.1
    ageing: float = 0.0

    def __post_init__(self) -> None:
        """Check all numbers.

        Raises:
            ConfigError: If one is not finite, or below 0, or start or unit is 0.
        """
        for one in fields(self):
            value = getattr(self, one.name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            zero = value == 0 and one.name in {"start", "unit_steps"}
            if not number or not math.isfinite(value) or value < 0 or zero:
                raise ConfigError(f"cannot use {one.name}={value!r} of response curves", "it is 0 or more", "fit anew")

    def starting_at(self, loss: float) -> "Curves":
        """Return the same response of a run whose loss before training is another: all losses in proportion.

        Args:
            loss: Before training, nats a token.
        """
        factor = loss / self.start
        return replace(self, start=loss, least=self.least * factor, gap=self.gap * factor, apart=self.apart * factor)

    def to_json(self) -> dict[str, float]:
        """Return the parameters by name."""
        return asdict(self)

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> "Curves":
        """Return the curves of these parameters; those left out are the defaults.

        Raises:
            ConfigError: If it is no mapping, a name is unknown, or a value out of range.
        """
        if not isinstance(plain, Mapping):
            raise ConfigError("cannot read response curves", "they are no mapping", "fit anew")
        known = [one.name for one in fields(cls)]
        for name in plain:
            if name not in known:
                raise ConfigError(f"response curves have {name!r}", "no such parameter", nearest(name, known))
        return cls(**plain)


def next_loss(
    problem: Problem, curves: Curves, loss: np.ndarray | float, age: np.ndarray | int, levels: np.ndarray
) -> np.ndarray:
    """Return the loss after a round, nats a token, `(...)`; without anybody it stays as it is.

    Args:
        problem: The run.
        curves: The response.
        loss: Before the round, `(...)`.
        age: Rounds since the emulator was re-aligned, 0 right after it, `(...)`.
        levels: Of each device's branches, `(..., devices, 3)`.
    """
    into = levels[..., PAIR] != OUT
    weight = np.where(into, problem.data_share, 0.0)
    steps = np.array(problem.menu.steps, dtype=float)
    table = work_of_device(curves, problem.rank_share[:, None], steps)
    pair = np.maximum(levels[..., PAIR] - 1, 0)
    return moved(curves, loss, age, weight, table[pair, levels[..., STEPS]], problem.kept[problem.emulator_of][pair])


def work_of_device(curves: Curves, rank: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Return how much a device does in a round, `s_n` of `Curves`, from its share of the rank and its steps."""
    return (steps / curves.unit_steps) ** curves.steps * rank**curves.rank


def moved(
    curves: Curves,
    loss: np.ndarray | float,
    age: np.ndarray | int,
    weight: np.ndarray,
    work: np.ndarray,
    kept: np.ndarray,
) -> np.ndarray:
    """Return the loss after a round, nats a token, `(...)`; without anybody it stays as it is.

    Args:
        curves: The response.
        loss: Before the round, `(...)`.
        age: Rounds since the emulator was re-aligned, `(...)`.
        weight: Share of all data that each device holds, 0 of those that stay out, `(..., devices)`.
        work: How much each does, `(..., devices)`.
        kept: Share of the middle that its emulator keeps, `(..., devices)`.
    """
    covered = weight.sum(-1)
    safe = np.where(covered > 0, covered, 1.0)
    floor = curves.least + curves.gap * (1 - (weight * kept).sum(-1) / safe) + curves.apart * -np.log(safe)
    ageing = np.exp(-curves.ageing * np.asarray(age, dtype=float))
    goes = -np.expm1(-curves.pace * (weight * work).sum(-1) / safe * ageing)
    return np.where(covered > 0, loss + goes * (floor - loss), loss)
