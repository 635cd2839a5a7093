"""The best there is: all sequences of plans of a small scene in which nothing is left to chance."""

import math
from dataclasses import replace

import numpy as np

from fedpeat.control.greedy import all_choices
from fedpeat.control.objective import Objective
from fedpeat.control.world import Scene, World
from fedpeat.core import ConfigError

MOST_CHOICES = 200_000


def optimum(scene: Scene) -> tuple[float, list[tuple[np.ndarray, int]]]:
    """Return the largest sum of rewards, and a sequence of levels, `(devices, 3)`, and refreshes that comes to it.

    All sequences are looked at, but of two that lead to the same bundles and age, only one goes on if it has cost no
    more and its loss is no higher: a lower loss stays lower whatever follows.

    Raises:
        ConfigError: If chance has a part in the scene, or a round has too many choices.
    """
    problem, objective = scene.problem, scene.objective
    if not scene.deterministic:
        raise ConfigError("the best plan of all is asked for", "chance has a part in the scene", "take fading away")
    options = [problem.menu.options((1 + np.flatnonzero(fits)).tolist()) for fits in problem.fits]
    count = math.prod(map(len, options)) * (1 + problem.menu.refresh)
    if count > MOST_CHOICES:
        raise ConfigError(f"cannot look at {count} choices a round", f"at most {MOST_CHOICES}", "take fewer devices")
    chunks = list(all_choices(options, problem.menu.refresh))
    levels, flags = (np.concatenate(parts) for parts in zip(*chunks, strict=True))
    # A sum of changes is what the last round leaves: until then only the other terms tell sequences apart.
    counted = objective if objective.quality_of == "every" else replace(objective, quality=0.0)
    world = World(replace(scene, objective=counted))
    world.start([0])
    spent, taken = np.zeros(1), np.zeros((1, 0), dtype=int)
    for _ in range(problem.rounds):
        world, spent, taken = _next_round(world, spent, taken, levels, flags)
    total = spent + _left(objective, world.loss, scene.curves.start)
    least = int(np.argmin(total))
    return -float(total[least]), [(levels[place], int(flags[place])) for place in taken[least]]


def _left(objective: Objective, loss: np.ndarray, start: float) -> np.ndarray:
    return np.zeros_like(loss) if objective.quality_of == "every" else objective.quality * (loss - start)


def _next_round(
    world: World, spent: np.ndarray, taken: np.ndarray, levels: np.ndarray, flags: np.ndarray
) -> tuple[World, np.ndarray, np.ndarray]:
    """Return what all choices make of all sequences so far, without those that another is as good as."""
    found = []
    for place in range(len(spent)):
        branch = World(world.scene)
        branch.start([0] * len(flags))
        branch.round = world.round
        branch.loss, branch.age = branch.loss * 0 + world.loss[place], branch.age * 0 + world.age[place]
        branch.holds, branch.stale = branch.holds | world.holds[place], branch.stale | world.stale[place]
        step = branch.step(levels, flags)
        sequences = np.concatenate([np.repeat(taken[place][None], len(flags), 0), np.arange(len(flags))[:, None]], 1)
        found.append((branch, spent[place] - step.reward, sequences))
    ahead = World(world.scene)
    ahead.start([0])
    ahead.round = world.round + 1
    for name in ("loss", "age", "holds", "stale"):
        setattr(ahead, name, np.concatenate([getattr(branch, name) for branch, _, _ in found]))
    costs, sequences = np.concatenate([one for _, one, _ in found]), np.concatenate([one for _, _, one in found])
    kept = _undominated(ahead, costs)
    for name in ("loss", "age", "holds", "stale"):
        setattr(ahead, name, getattr(ahead, name)[kept])
    return ahead, costs[kept], sequences[kept]


def _undominated(world: World, costs: np.ndarray) -> np.ndarray:
    """Return the places of those that no other of the same bundles and age is as good as in both cost and loss."""
    alike = np.concatenate(
        [world.age[:, None], world.holds.reshape(len(costs), -1), world.stale.reshape(len(costs), -1)], axis=1
    )
    _, group = np.unique(alike, axis=0, return_inverse=True)
    order = np.lexsort((world.loss, costs, group.ravel()))
    kept, last, least = [], -1, np.inf
    for place in order:
        if group.ravel()[place] != last:
            last, least = group.ravel()[place], np.inf
        if world.loss[place] < least:
            kept.append(place)
            least = world.loss[place]
    return np.array(kept)
