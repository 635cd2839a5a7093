"""How controllers do beside each other: the same runs, played by response curves, and the best fixed plan of all."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from fedpeat.control import CapabilityControl, GreedyControl, Policy, Problem, RandomControl, SabppoControl
from fedpeat.control.hindsight import Hindsight, best_fixed, in_words, levels_for, realigns
from fedpeat.control.menu import OUT, PAIR, SHARE, STEPS
from fedpeat.control.plans import levels_of, round_plan
from fedpeat.control.problem import Observation
from fedpeat.control.world import Scene, play
from fedpeat.core import RoundPlan, RoundReport, seed_for
from simulations.compare.table import MINUS

MEASURES = ("objective", "seconds", "bytes", "joules", "loss")
"""What a run comes to: the sum of its rounds' costs, simulated time, traffic, energy, and the loss at its end."""

BEST_FIXED = "best fixed"


@dataclass(frozen=True, eq=False)
class Unchanging:
    """Give the same levels in every round to all that can be asked.

    Attributes:
        problem: What there is to decide.
        levels: Of each device's branches, `(devices, 3)`.
        rhythm: Every how many rounds the emulator is re-aligned; 0 for never.
        nominal_steps: The run's own local steps.
    """

    problem: Problem
    levels: np.ndarray
    rhythm: int
    nominal_steps: int

    def start(self) -> dict[str, Any]:
        """Return the controller's state before round 1."""
        return {"global_step": 0}

    def choose(
        self,
        report: RoundReport | None,  # noqa: ARG002 (what happened does not matter to it)
        state: Mapping[str, Any],
        seen: Observation,
    ) -> tuple[RoundPlan, dict[str, Any]]:
        """Return the plan of the round that is `seen`, and the next state."""
        levels = np.where(seen.available[:, None], self.levels, OUT)
        refresh = int(realigns(np.array(self.rhythm), seen.round))
        plan, step = round_plan(self.problem, seen, levels, refresh, state, self.nominal_steps)
        return plan, {"global_step": step}


class Spread(NamedTuple):
    """A mean with its 95 % interval.

    Attributes:
        mean: Of all runs.
        low: End of the interval.
        high: End of the interval.
    """

    mean: float
    low: float
    high: float


RESAMPLES = 10_000


def spread(values: np.ndarray) -> Spread:
    """Return the mean of values, `(runs,)`, with its 95 % interval by the bootstrap's percentiles.

    A round on a link that is nearly dead takes very long, so what runs come to is skewed: an interval that has the same
    width on both sides would say little.

    Source: Efron 1979, The Annals of Statistics 7(1).

    >>> spread(np.array([2.0, 2.0, 2.0]))
    Spread(mean=2.0, low=2.0, high=2.0)
    """
    draw = np.random.default_rng(0)
    means = values[draw.integers(len(values), size=(RESAMPLES, len(values)))].mean(-1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Spread(float(values.mean()), float(low), float(high))


class Entry(NamedTuple):
    """A controller over all runs.

    Attributes:
        name: Of the controller.
        values: What each run came to, `(runs, measures)`.
    """

    name: str
    values: np.ndarray

    def of(self, measure: str) -> np.ndarray:
        """Return what each run came to, `(runs,)`."""
        return self.values[:, MEASURES.index(measure)]


@dataclass(frozen=True, eq=False)
class Contest:
    """What controllers come to in the same runs.

    Attributes:
        entries: One a controller, the policy first.
        hindsight: The best fixed plan found.
        first: Each controller's levels in the first run, `(rounds, devices, 3)`, and its refreshes, `(rounds,)`.
        scene: What was played.
        seeds: Of the runs.
    """

    entries: Sequence[Entry]
    hindsight: Hindsight
    first: Mapping[str, tuple[np.ndarray, np.ndarray]]
    scene: Scene
    seeds: Sequence[int] = field(default_factory=list)

    def beside(self, entry: Entry, measure: str = "objective") -> np.ndarray:
        """Return how much more of a measure a controller takes than the first, run by run, `(runs,)`."""
        return entry.of(measure) - self.entries[0].of(measure)

    def to_json(self) -> dict[str, Any]:
        """Return everything, at full precision."""
        return {
            "runs": len(self.seeds),
            "measures": list(MEASURES),
            "controllers": {
                entry.name: {
                    **{measure: spread(entry.of(measure))._asdict() for measure in MEASURES},
                    "more_than_first": {measure: spread(self.beside(entry, measure))._asdict() for measure in MEASURES},
                    "runs_that_cost_more": int((self.beside(entry) > 0).sum()),
                    "values": entry.values.tolist(),
                }
                for entry in self.entries
            },
            "best_fixed": {
                "plan": in_words(self.scene.problem, self.hindsight.plan),
                "levels": self.hindsight.plan.levels.tolist(),
                "rhythm": self.hindsight.plan.rhythm,
                "exhaustive": self.hindsight.exhaustive,
                "plans_played": self.hindsight.played,
            },
        }


def held_out(seed: int, runs: int) -> list[int]:
    """Return the seeds of runs that nothing was trained or chosen by."""
    return [seed_for(seed, "held-out run", place) for place in range(runs)]


def contest(
    scene: Scene,
    policy: Policy,
    settings: Mapping[str, Any],
    runs: int,
    *,
    told: Callable[[str], None] = lambda _: None,
) -> Contest:
    """Play all controllers over the same runs.

    Args:
        scene: What is played.
        policy: Of `sabppo`.
        settings: The run's.
        runs: How many, with chances that no policy was trained by.
        told: Told what is being played.
    """
    problem, steps, seeds = scene.problem, settings["client"]["local_steps"], held_out(settings["seed"], runs)
    told("sweeping fixed plans")
    hindsight = best_fixed(scene, seeds)
    asked = settings["clients"]["per_round"] or len(problem.clients)
    best = Unchanging(problem, levels_for(problem, hindsight.plan), hindsight.plan.rhythm, steps)
    makers: dict[str, Callable[[int], Any]] = {
        "sabppo": lambda _: SabppoControl(problem, policy, steps),
        BEST_FIXED: lambda _: best,
        "greedy": lambda _: GreedyControl(problem, scene.objective, scene.curves, steps),
        "capability": lambda seed: CapabilityControl(problem, asked, steps, seed),
        "fixed": lambda _: Unchanging(problem, the_runs_own(problem, steps), 0, steps),
        "random": lambda seed: RandomControl(problem, asked, steps, seed),
    }
    entries, first = [], {}
    for name, make in makers.items():
        told(f"playing {name}")
        played = [play(make(seed), scene, seed) for seed in seeds]
        entries.append(Entry(name, np.array([_measured(*one) for one in played])))
        chosen = [levels_of(problem, one["plan"]) for one in played[0][1]]
        first[name] = np.stack([levels for levels, _ in chosen]), np.array([flag for _, flag in chosen])
    return Contest(entries, hindsight, first, scene, seeds)


def the_runs_own(problem: Problem, nominal_steps: int) -> np.ndarray:
    """Return the levels of `control=fixed`: the run's own emulator at its largest rank, its own steps, `(devices, 3)`.

    A device that this does not fit stays out.
    """
    menu = problem.menu
    own = [place for place, pair in enumerate(menu.pairs) if pair.emulator == menu.emulators[0]]
    pair = max(own, key=lambda place: menu.pairs[place].rank or 0)
    levels = np.zeros((len(problem.clients), 3), dtype=int)
    levels[:, PAIR] = np.where(problem.fits[:, pair], 1 + pair, OUT)
    levels[:, STEPS] = int(np.argmin(np.abs(np.array(menu.steps) - nominal_steps)))
    levels[:, SHARE] = int(np.argmin(np.abs(np.array(menu.shares) - 1.0)))
    return levels


def _measured(total: float, rounds: Sequence[Mapping[str, Any]]) -> list[float]:
    spent = [sum(one[key] for one in rounds) for key in ("seconds", "bytes", "joules")]
    return [-total, *spent, rounds[-1]["loss"]]


HEADINGS = ("controller", "objective", "more than sabppo", "in runs", "simulated s", "MB", "J", "loss at the end")


def rows(found: Contest) -> list[tuple[str, ...]]:
    """Return the table as words, a row a controller: means with 95 % intervals, and in how many runs it costs more."""
    made = []
    for entry in found.entries:
        first = entry is found.entries[0]
        more = found.beside(entry)
        made.append(
            (
                entry.name,
                words(spread(entry.of("objective"))),
                "" if first else words(spread(more), signed=True),
                "" if first else f"{int((more > 0).sum())} of {len(more)}",
                words(spread(entry.of("seconds"))),
                words(spread(entry.of("bytes") / 1e6)),
                words(spread(entry.of("joules"))),
                words(spread(entry.of("loss"))),
            )
        )
    return made


def words(found: Spread, *, signed: bool = False) -> str:
    """Return a mean with its interval, with as many places as the interval's width has a use for.

    >>> words(Spread(12.345, 12.1, 12.61)), words(Spread(0.5, 0.25, 0.75), signed=True), words(Spread(2.0, 2.0, 2.0))
    ('12.35 [12.10, 12.61]', '+0.50 [+0.25, +0.75]', '2')
    """
    width = found.high - found.low
    # What rounding of sums leaves is no width.
    if width <= 1e-9 * max(abs(found.mean), 1e-9):
        return _number(found.mean, f"{'+' if signed else ''}.6g")
    places = min(max(1 - int(np.floor(np.log10(width))), 0), 6)
    form = f"{'+' if signed else ''}.{places}f"
    mean, low, high = (_number(value, form) for value in found)
    return f"{mean} [{low}, {high}]"


def _number(value: float, form: str) -> str:
    return format(value, form).replace("-", MINUS)
