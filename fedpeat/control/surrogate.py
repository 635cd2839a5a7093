"""How good the plug-in model would be after a round: response curves with few parameters, which are data."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from fedpeat.control.menu import OUT, PAIR, STEPS
from fedpeat.control.problem import Problem
from fedpeat.core import ConfigError, nearest


@dataclass(frozen=True)
class Curves:
    """Response curves of the plug-in model's loss.

    With shares `d_n` of all data, kept shares `k_n`, rank shares `r_n`, steps `t_n`, age `a` (rounds since the emulator
    was re-aligned) and all those that take part in sums and means:
    `s_n = (t_n / unit_steps)^steps r_n^rank k_n^depth`, `m = sum d_n s_n / sum d_n`, `c = (sum d_n)^coverage`,
    `floor = least + gap (1 - mean k)^curve`, and the loss moves by `1 - exp(-pace m c exp(-ageing a))` of its way to
    the floor.

    Attributes:
        start: Loss before training, nats a token.
        least: Loss that training without compression would come to, nats a token.
        gap: What an emulator of nothing adds to it, nats a token.
        curve: How fast that grows with what is left out.
        pace: Share of the way in a round (as `1 - exp(-pace)`) with everybody, everything kept and all ranks full.
        unit_steps: Local steps at that pace.
        steps: Exponent of local steps.
        rank: Exponent of the rank's share of the largest.
        depth: Exponent of the share kept.
        coverage: Exponent of the share of data that takes part.
        ageing: How much slower it goes with each round since the emulator was re-aligned.

    Departures: our own form, made to be fitted to measured runs; the defaults are no measurement.
    """

    start: float = 4.0
    least: float = 3.0
    gap: float = 0.5
    curve: float = 1.5
    pace: float = 0.3
    unit_steps: float = 10.0
    steps: float = 0.6
    rank: float = 0.1
    depth: float = 0.3
    coverage: float = 0.3
    ageing: float = 0.0

    def __post_init__(self) -> None:
        """Check all numbers.

        Raises:
            ConfigError: If one is not finite, or below 0, or a unit is 0.
        """
        for one in fields(self):
            value = getattr(self, one.name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or value < 0 or (one.name == "unit_steps" and value == 0):
                raise ConfigError(f"cannot use {one.name}={value!r} of response curves", "it is 0 or more", "fit anew")

    def to_json(self) -> dict[str, float]:
        """Return the parameters by name."""
        return asdict(self)

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> "Curves":
        """Return the curves of these parameters; those left out are the defaults.

        Raises:
            ConfigError: If a name is unknown or a value out of range.
        """
        known = [one.name for one in fields(cls)]
        for name in plain:
            if name not in known:
                raise ConfigError(f"response curves have {name!r}", "no such parameter", nearest(name, known))
        return cls(**plain)

    @classmethod
    def parse(cls, text: str) -> "Curves":
        """Return the curves that are written as JSON.

        Raises:
            ConfigError: If it cannot be read.
        """
        try:
            plain = json.loads(text)
        except ValueError as error:
            raise ConfigError("cannot read response curves", str(error), "fit anew") from error
        if not isinstance(plain, dict):
            raise ConfigError("cannot read response curves", "they are no mapping", "fit anew")
        return cls.from_json(plain)


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
    covered = weight.sum(-1)
    safe = np.where(covered > 0, covered, 1.0)
    speed, kept = _tables(problem, curves)
    pair = np.maximum(levels[..., PAIR] - 1, 0)
    mean = (weight * speed[pair, levels[..., STEPS]]).sum(-1) / safe
    floor = curves.least + curves.gap * np.maximum(1 - (weight * kept[pair]).sum(-1) / safe, 0.0) ** curves.curve
    ageing = np.exp(-curves.ageing * np.asarray(age, dtype=float))
    goes = -np.expm1(-curves.pace * mean * covered**curves.coverage * ageing)
    # With a coverage of 0 even nobody would cover all.
    return np.where(covered > 0, loss + goes * (floor - loss), loss)


def _tables(problem: Problem, curves: Curves) -> tuple[np.ndarray, np.ndarray]:
    """Return how much a device does with each pair and number of steps, `(pairs, steps)`, and what pairs keep."""
    kept = problem.kept[problem.emulator_of]
    steps = (np.array(problem.menu.steps) / curves.unit_steps) ** curves.steps
    return (problem.rank_share**curves.rank * kept**curves.depth)[:, None] * steps, kept
