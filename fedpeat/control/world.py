"""Many federations at once, played by response curves instead of training: what a controller learns in."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from fedpeat.control.menu import OUT, PAIR
from fedpeat.control.objective import Objective, Price, cost
from fedpeat.control.outcome import Situation, foretold
from fedpeat.control.plans import levels_of
from fedpeat.control.problem import Observation, Problem
from fedpeat.control.surrogate import Curves
from fedpeat.core import ConfigError, Evaluation, RoundReport


@dataclass(frozen=True, eq=False)
class Scene:
    """A problem, and what of it is left to chance.

    Attributes:
        problem: What there is to decide.
        objective: What counts.
        curves: How good the model would be.
        gains: Mean share of radiated power that arrives from and at each device, `(devices,)`; only for a radio link.
        down_bits: Fixed rates down, bit/s, `(devices,)`; only without a radio link.
        up_bits: Fixed rates up, likewise.
        fading: Whether the channel fades from round to round (Rayleigh).
        availability: Probability with which a device can be asked in a round.
        dropout: Probability with which a device that was asked is gone before it is done, at a uniform share of its own
            time.
    """

    problem: Problem
    objective: Objective
    curves: Curves
    gains: np.ndarray | None = None
    down_bits: np.ndarray | None = None
    up_bits: np.ndarray | None = None
    fading: bool = True
    availability: float = 1.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        """Check that there are links.

        Raises:
            ConfigError: If gains are missing with a radio link, or rates without one.
        """
        links = (self.gains,) if self.problem.radio else (self.down_bits, self.up_bits)
        if any(link is None for link in links):
            what = "gains" if self.problem.radio else "down_bits and up_bits"
            raise ConfigError("a scene needs its devices' links", f"{what} are missing", f"give {what}")

    @property
    def deterministic(self) -> bool:
        """Whether nothing is left to chance."""
        return self.availability >= 1 and self.dropout <= 0 and not (self.problem.radio and self.fading)


class Step(NamedTuple):
    """What a round brought in each federation.

    Attributes:
        reward: The negative cost, `(worlds,)`.
        price: What it took.
        loss: After it, nats a token, `(worlds,)`.
        done: Whether it was the last, `(worlds,)`.
    """

    reward: np.ndarray
    price: Price
    loss: np.ndarray
    done: np.ndarray


@dataclass(eq=False)
class World:
    """Federations that play the same scene, each with its own chances, in step.

    Attributes:
        scene: What is played.
        round: That comes next, counted from 1.
        loss: Before it, nats a token, `(worlds,)`.
        age: Rounds since the emulator was re-aligned, `(worlds,)`.
        holds: Whether a device holds an emulator's bundle, `(worlds, devices, emulators)`.
        stale: Whether the device lacks what was re-aligned of it, likewise.
    """

    scene: Scene
    round: int = 1
    loss: np.ndarray = field(default_factory=lambda: np.zeros(0))
    age: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=int))
    holds: np.ndarray = field(default_factory=lambda: np.zeros(0))
    stale: np.ndarray = field(default_factory=lambda: np.zeros(0))
    _gains: np.ndarray = field(default_factory=lambda: np.zeros(0))
    _there: np.ndarray = field(default_factory=lambda: np.zeros(0))
    _leaves: np.ndarray | None = None
    _rates: tuple[np.ndarray, np.ndarray] = (np.zeros(0), np.zeros(0))

    def start(self, seeds: Sequence[int]) -> None:
        """Begin anew, one federation a seed: all chances of a federation follow from its own."""
        problem, count = self.scene.problem, len(seeds)
        devices, emulators = len(problem.clients), len(problem.menu.emulators)
        self.round = 1
        self.loss, self.age = np.full(count, self.scene.curves.start), np.zeros(count, dtype=int)
        self.holds = np.zeros((count, devices, emulators), dtype=bool)
        self.stale = np.zeros_like(self.holds)
        # One more than is played: what is seen after the last round has the same shape as before.
        self._gains = np.ones((count, problem.rounds + 1, devices))
        self._gains *= 1.0 if self.scene.gains is None else self.scene.gains
        self._there = np.ones(self._gains.shape, dtype=bool)
        self._leaves = np.full(self._gains.shape, np.inf) if self.scene.dropout > 0 else None
        down, up, unknown = self.scene.down_bits, self.scene.up_bits, np.full(devices, np.nan)
        self._rates = (unknown, unknown) if problem.radio or down is None or up is None else (down, up)
        if self.scene.deterministic:
            return
        for place, seed in enumerate(seeds):
            draw = np.random.default_rng(seed)
            self._there[place] = draw.random(self._there.shape[1:]) < self.scene.availability
            if problem.radio and self.scene.fading:
                self._gains[place] *= draw.exponential(size=self._there.shape[1:])
            if self._leaves is not None:
                chance = 1 - draw.random(self._there.shape[1:])  # above 0: of a dead link's time, that is no number
                self._leaves[place] = np.where(chance < self.scene.dropout, chance / self.scene.dropout, np.inf)

    def seen(self) -> Observation:
        """Return what is known of the coming round; all arrays begin with `worlds`."""
        place = self.round - 1
        return Observation(
            round=self.round,
            available=self._there[:, place],
            gains=self._gains[:, place],
            down_bits=self._rates[0],
            up_bits=self._rates[1],
            holds=self.holds,
            stale=self.stale,
        )

    def mask(self) -> np.ndarray:
        """Return which levels are open in each branch, side by side, `(worlds, sum of levels)`."""
        problem = self.scene.problem
        return problem.menu.flat_mask(problem.fits, self._there[:, self.round - 1])

    def step(self, levels: np.ndarray, refresh: np.ndarray) -> Step:
        """Play a round.

        A pair that is closed to a device counts as staying out.

        Args:
            levels: Of each device's branches, `(worlds, devices, 3)`.
            refresh: Whether the emulator is re-aligned before it, `(worlds,)`.
        """
        scene, seen = self.scene, self.seen()
        problem = scene.problem
        pair = np.maximum(levels[..., PAIR] - 1, 0)
        able = seen.available & problem.fits[np.arange(len(problem.clients)), pair]
        levels = np.where(able[..., None], levels, OUT)
        before, now = self.loss, Situation(self.loss, self.age)
        leaves = None if self._leaves is None else self._leaves[:, self.round - 1]
        took, self.loss = foretold(problem, scene.curves, seen, (levels, refresh), now, leaves)
        self._fetch(took.fetched, problem.emulator_of[pair], refresh)
        self.age, self.round = np.where(refresh > 0, 0, self.age) + 1, self.round + 1
        reward = -cost(scene.objective, took, before, self.loss)
        return Step(reward, took, self.loss, np.full(len(before), self.round > problem.rounds))

    def _fetch(self, fetched: np.ndarray, emulator: np.ndarray, refresh: np.ndarray) -> None:
        """Note who holds what after a round: after a re-alignment all lack the changes, until they fetch them."""
        got = fetched[..., None] & (emulator[..., None] == np.arange(self.holds.shape[-1]))
        self.stale = (self.stale | (refresh > 0)[:, None, None]) & ~got
        self.holds = self.holds | got


def play(controller: Any, scene: Scene, seed: int) -> tuple[float, list[Mapping[str, Any]]]:
    """Let a controller decide a whole federation of a scene; return the sum of rewards, and each round's facts.

    Args:
        controller: With `start()` and `choose()`, of the scene's problem.
        scene: What is played; what is foretold is also what is measured.
        seed: Of the federation's chances.
    """
    world = World(scene)
    world.start([seed])
    state, total, rounds = controller.start(), 0.0, []
    report = _report(0, scene.curves.start)
    for number in range(1, scene.problem.rounds + 1):
        plan, state = controller.choose(report, state, only(world.seen()))
        levels, refresh = levels_of(scene.problem, plan)
        step = world.step(levels[None], np.array([refresh]))
        total += float(step.reward[0])
        facts = {"seconds": step.price.seconds, "bytes": step.price.bytes, "joules": step.price.joules}
        rounds.append({"plan": plan, "loss": float(step.loss[0]), **{k: float(v[0]) for k, v in facts.items()}})
        report = _report(number, float(step.loss[0]))
    return total, rounds


def only(seen: Observation) -> Observation:
    """Return what the first of several federations knows."""
    return Observation(
        seen.round, seen.available[0], seen.gains[0], seen.down_bits, seen.up_bits, seen.holds[0], seen.stale[0]
    )


def _report(number: int, loss: float) -> RoundReport:
    return RoundReport(number, {}, (), {"plug_in": Evaluation(loss, 0.0, 1)}, 0, 0, {}, {})
