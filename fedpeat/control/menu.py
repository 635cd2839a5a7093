"""What can be decided for each device in a round, as levels of branches, and which levels are open to it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fedpeat.core import ConfigError

OUT = 0
"""Level of the first branch that leaves a device out of the round."""

PAIR, STEPS, SHARE = range(3)
"""Places of a device's branches."""


class Pair(NamedTuple):
    """An emulator and a rank, which need memory together.

    Attributes:
        emulator: Its key.
        rank: PEFT rank, or None for the run's own.
    """

    emulator: str
    rank: int | None


@dataclass(frozen=True)
class Menu:
    """The levels of each branch.

    A device has three branches: whether it takes part and with which pair of emulator and rank (level 0: it stays out,
    level `k`: `pairs[k - 1]`), its local steps, and its weight in sharing the bands out. Emulator and rank are one
    branch, since memory closes them together; and staying out is a level of it, so that no branch is ever closed whole,
    and no plan has two codes.

    Attributes:
        pairs: What a device may train.
        steps: Optimiser steps, ascending.
        shares: Weights in sharing the bands out; `(1.0,)` for equal shares.
        refresh: Whether the emulator can be re-aligned before a round: one more branch, for all devices.
    """

    pairs: tuple[Pair, ...]
    steps: tuple[int, ...]
    shares: tuple[float, ...] = (1.0,)
    refresh: bool = False

    def __post_init__(self) -> None:
        """Check the levels.

        Raises:
            ConfigError: If a branch has none, one twice, or one that is out of range.
        """
        for key in ("pairs", "steps", "shares"):
            levels = getattr(self, key)
            if not levels or len(set(levels)) != len(levels):
                raise ConfigError(f"control.menu.{key}={list(levels)}", "it needs levels that differ", "change them")
        for key, levels in (("steps", self.steps), ("shares", self.shares)):
            for level in levels:
                if not 0 < level < math.inf:
                    raise ConfigError(f"control.menu.{key} has {level}", "it must be above 0", "raise it")

    @property
    def emulators(self) -> tuple[str, ...]:
        """Their keys, in the order of the pairs."""
        return tuple(dict.fromkeys(pair.emulator for pair in self.pairs))

    @property
    def levels(self) -> tuple[int, int, int]:
        """How many levels a device's branches have."""
        return 1 + len(self.pairs), len(self.steps), len(self.shares)

    def branches(self, devices: int) -> np.ndarray:
        """Return how many levels each branch has, `(3 devices + 1,)`: device by device, then the refresh.

        >>> Menu((Pair("default", 8),), (5, 10)).branches(2).tolist()
        [2, 2, 1, 2, 2, 1, 1]
        """
        return np.array([*self.levels * devices, 1 + self.refresh])

    def masks(self, fits: np.ndarray, available: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return which levels are open, for pairs, steps and shares: `(..., devices, levels)` each.

        A device that cannot be asked, or that no pair fits, has the first level of each branch alone: it stays out.

        Args:
            fits: Whether a pair fits a device's memory, `(devices, pairs)`.
            available: Who can be asked, `(..., devices)`.
        """
        pairs = fits & available[..., None]
        able = pairs.any(-1, keepdims=True)
        stays = np.ones((*available.shape, 1), dtype=bool)

        def open_to(count: int) -> np.ndarray:
            return np.concatenate([stays, np.repeat(able, count - 1, axis=-1)], axis=-1)

        return np.concatenate([stays, pairs], axis=-1), open_to(len(self.steps)), open_to(len(self.shares))

    def flat_mask(self, fits: np.ndarray, available: np.ndarray) -> np.ndarray:
        """Return all masks side by side in the order of `branches`, `(..., sum of levels)`."""
        own = np.concatenate(self.masks(fits, available), axis=-1)
        last = np.ones((*available.shape[:-1], 1 + self.refresh), dtype=bool)
        return np.concatenate([own.reshape(*available.shape[:-1], -1), last], axis=-1)

    def split(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return a flat action, `(..., 3 devices + 1)`, as levels, `(..., devices, 3)`, and the refresh, `(...)`."""
        levels = actions[..., :-1]
        return levels.reshape(*levels.shape[:-1], -1, 3), actions[..., -1]

    def options(self, open_pairs: Sequence[int]) -> np.ndarray:
        """Return all that can be chosen for a device, `(options, 3)`, staying out first and once.

        Args:
            open_pairs: Levels of its first branch that are open, beside staying out.
        """
        grid = [
            (pair, steps, share)
            for pair in open_pairs
            if pair != OUT
            for steps in range(len(self.steps))
            for share in range(len(self.shares))
        ]
        return np.array([(OUT, 0, 0), *grid])
