"""The same plan in every round, which may differ from device to device."""

import math
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedpeat.core import ConfigError, DevicePlan, RoundPlan, RoundReport, nearest, seed_for

SAMPLINGS = ("fixed", "poisson")


@dataclass(frozen=True)
class FixedControl:
    """Sample clients; give each the same work, or its own where named.

    Attributes:
        clients: Names of all clients.
        per_round: How many take part in a round.
        local_steps: Optimiser steps of a device in a round.
        rounds: Rounds of the run.
        seed: What the samples follow from: the run's seed, or one that is kept secret.
        sampling: `fixed`: `per_round` clients, drawn uniformly without replacement; `poisson`: each client by itself,
            with the probability `per_round / len(clients)`, so that a round may have any number of them, none too.
        over_select: Clients asked in a round beyond `per_round`, as a share of it: the slowest are not waited for. In
            the order of the draw, then, so that no name is favoured.
        local_steps_of: Steps of single clients, by name.
        emulator_of: Emulator keys of single clients, by name.
        rank_of: PEFT ranks of single clients, by name.
    """

    clients: Sequence[str]
    per_round: int
    local_steps: int
    rounds: int
    seed: int
    sampling: str = "fixed"
    over_select: float = 0.0
    local_steps_of: Mapping[str, int] = field(default_factory=dict)
    emulator_of: Mapping[str, str] = field(default_factory=dict)
    rank_of: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check counts and names.

        Raises:
            ConfigError: If more clients are asked for than exist, a named client does not exist, or the sampling is
                unknown.
        """
        if self.sampling not in SAMPLINGS:
            raise ConfigError(
                f"control.sampling={self.sampling}", "no such sampling", nearest(str(self.sampling), SAMPLINGS)
            )
        if not 1 <= self.per_round <= len(self.clients):
            raise ConfigError(
                f"cannot sample clients.per_round={self.per_round} clients in a round",
                f"there are {len(self.clients)}",
                f"set clients.per_round between 1 and {len(self.clients)}",
            )
        known = set(self.clients)
        for key, named in (
            ("local_steps", self.local_steps_of),
            ("kept_blocks", self.emulator_of),
            ("rank", self.rank_of),
        ):
            for client in named:
                if client not in known:
                    raise ConfigError(
                        f"control.{key} names client {client!r}", "no such client", nearest(client, known)
                    )

    @property
    def asked(self) -> int:
        """How many clients are asked in a round, if their number is fixed."""
        return min(len(self.clients), math.ceil(self.per_round * (1 + self.over_select)))

    def start(self) -> dict[str, Any]:
        """Return the controller's state before round 1."""
        return {"global_step": 0}

    def choose(
        self, report: RoundReport | None, state: Mapping[str, Any], available: Collection[str] | None = None
    ) -> tuple[RoundPlan, dict[str, Any]]:
        """Return the plan of the round after `report` (None before round 1) and the next state.

        Args:
            report: Of the round before.
            state: Of this controller.
            available: Who can be asked; None for all. Of fewer than are to be asked, all are.
        """
        this_round = report.round + 1 if report else 1
        there = self.clients if available is None else self._among(set(available))
        names = self._sample(random.Random(seed_for(self.seed, "sample", this_round)), there)
        devices = tuple(
            DevicePlan(
                client=name,
                local_steps=self.local_steps_of.get(name, self.local_steps),
                emulator=self.emulator_of.get(name, "default"),
                rank=self.rank_of.get(name),
            )
            for name in names
        )
        start_step = int(state["global_step"])
        plan = RoundPlan(
            round=this_round, start_step=start_step, total_steps=self.rounds * self.local_steps, devices=devices
        )
        return plan, {"global_step": start_step + self.local_steps}

    def _among(self, names: set[str]) -> list[str]:
        return [name for name in self.clients if name in names]

    def _sample(self, generator: random.Random, there: Sequence[str]) -> list[str]:
        if self.sampling == "fixed":
            drawn = generator.sample(list(there), min(self.asked, len(there)))
            return drawn if self.asked > self.per_round else sorted(drawn)
        share = self.per_round / len(self.clients)
        return sorted(name for name in there if generator.random() < share)
