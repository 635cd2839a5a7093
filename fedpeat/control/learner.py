"""Training a policy in a scene, by PPO with masked branches."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
import torch

from fedpeat.control.features import features, split_features
from fedpeat.control.network import Network, chosen, draw
from fedpeat.control.policy import Policy, shapes
from fedpeat.control.signature import signature_of
from fedpeat.control.world import Scene, World
from fedpeat.core import ConfigError, nearest, seed_for

RATIOS = ("branch", "joint")
WIDEST = 10.0
"""Rewards are cut at so many standard deviations: a link that is nearly dead must not outweigh all else."""


class Seen(NamedTuple):
    """Where training stands.

    Attributes:
        steps: Rounds played.
        cost: Mean cost of the federations kept for choosing, with the likeliest levels.
        entropy: Of what is decided in a round, nats.
        clipped: Share of branches whose ratio was clipped.
        explained: Share of the returns' variance that the critic explains.
    """

    steps: int
    cost: float
    entropy: float = 0.0
    clipped: float = 0.0
    explained: float = 0.0


Progress = Callable[[Seen], None]


@dataclass(frozen=True)
class Recipe:
    """How a policy is trained.

    Attributes:
        steps: Rounds played in all.
        worlds: Federations played side by side; all of them are played to their end between two updates.
        width: Of the layers.
        learning_rate: At the start; falls to 0 along a line.
        epochs: Times that an update goes through its rounds.
        batch: Rounds of a minibatch.
        entropy: Weight of the entropy at the start, divided by how many branches have several levels; falls to 0 along
            a line. Large, so that what pays only over rounds is still tried when the rest is settled; divided, since
            the more is decided at once, the less of a round's outcome is any one branch's doing.
        clip: Of the ratio of probabilities.
        ratio: `branch`: each branch's own ratio is clipped; `joint`: that of all branches together.
        trace: Lambda of the generalised advantage estimate.
        choosing: Federations, never trained in, by which the best of the policies on the way is kept.
        starts: Policies that are begun; the best of them, after `trial` of all rounds, is trained on.
        trial: Share of `steps` that all beginnings take together; only where there are several.
    """

    steps: int = 300_000
    worlds: int = 128
    width: int = 64
    learning_rate: float = 2e-3
    epochs: int = 4
    batch: int = 512
    entropy: float = 3.0
    clip: float = 0.2
    ratio: str = "branch"
    trace: float = 0.95
    choosing: int = 32
    starts: int = 1
    trial: float = 0.4

    def __post_init__(self) -> None:
        """Check the ratio.

        Raises:
            ConfigError: If it is unknown.
        """
        if self.ratio not in RATIOS:
            raise ConfigError(f"ratio={self.ratio}", "no such ratio", nearest(self.ratio, RATIOS))


class Played(NamedTuple):
    """Rounds of federations that were played by a policy; all arrays begin with `(rounds, worlds)`."""

    own: torch.Tensor
    common: torch.Tensor
    mask: torch.Tensor
    levels: torch.Tensor
    flags: torch.Tensor
    logs: torch.Tensor
    values: torch.Tensor
    rewards: torch.Tensor


def returns(policy: Policy, scene: Scene, seeds: Sequence[int]) -> np.ndarray:
    """Return the sum of rewards of a policy in federations of these seeds, `(seeds,)`."""
    world, problem = World(scene), scene.problem
    world.start(seeds)
    total = np.zeros(len(seeds))
    for _ in range(problem.rounds):
        known = world.seen()
        observed = features(problem, policy.curves, known, world.loss, world.age)
        total += world.step(*policy.act(problem, observed, known.available)).reward
    return total


def train(
    scene: Scene,
    recipe: Recipe | None = None,
    *,
    seed: int = 0,
    progress: Progress = lambda _: None,
) -> Policy:
    """Return the best policy found in a scene.

    Args:
        scene: What is played.
        recipe: How.
        seed: What chances and the first weights follow from.
        progress: Told after each update.

    Source: PPO with clipping, Schulman et al. 2017, arXiv:1707.06347, with invalid actions masked, Huang and Ontanon
        2020, arXiv:2006.14171; branches by Tavakoli et al. 2018, arXiv:1711.08946.
    Departures: no discount, since a federation has an end; each branch's ratio is clipped by itself, and a branch that
        changes nothing (the steps of a device that stays out) has no part in it; rewards are cut at `WIDEST`.
    """
    recipe = recipe or Recipe()
    units = _units(scene, seed)
    learners = [Learner(scene, recipe, units, seed_for(seed, "start", place)) for place in range(recipe.starts)]
    choosing = [seed_for(seed, "choosing", place) for place in range(recipe.choosing)]
    trial, played = (recipe.trial if recipe.starts > 1 else 0.0), 0
    for learner in learners if trial else ():
        played = _train_on(learner, played, played + int(trial * recipe.steps / recipe.starts), choosing, progress)
    best = max(learners, key=lambda one: one.best)
    _train_on(best, played, recipe.steps, choosing, progress)
    best = max(learners, key=lambda one: one.best)
    facts = {
        "recipe": asdict(recipe),
        "seed": seed,
        "rounds": scene.problem.rounds,
        "objective": asdict(scene.objective),
        "cost": -best.best,
    }
    return Policy(best.kept, signature_of(scene.problem), scene.curves, facts)


def _train_on(learner: "Learner", played: int, until: int, choosing: Sequence[int], progress: Progress) -> int:
    """Train until so many rounds were played in all, and keep the best weights; return how many were."""
    while True:
        learner.look(choosing)
        progress(Seen(played, -learner.last, **learner.found))
        if played >= until:
            return played
        played += learner.update()


class Learner:
    """A network in training.

    Args:
        scene: What is played.
        recipe: How.
        units: What rewards are measured by: what is taken off, and what the rest is divided by.
        seed: What chances and the first weights follow from.

    Attributes:
        best: Largest mean sum of rewards in the federations for choosing so far.
        kept: The weights that came to it.
        last: Mean sum of rewards when it was looked at last.
        found: Of the last update, as in `Seen`.
    """

    def __init__(self, scene: Scene, recipe: Recipe, units: tuple[float, float], seed: int) -> None:
        self.scene, self.recipe, self.units, self.seed = scene, recipe, units, seed
        self.generator = torch.Generator().manual_seed(seed % 2**63)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed % 2**63)
            self.network = Network(shapes(scene.problem, recipe.width))
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=recipe.learning_rate, eps=1e-5)
        self.sizes = scene.problem.menu.levels
        branches = scene.problem.menu.branches(len(scene.problem.clients))
        self.entropy = recipe.entropy / max(int((branches > 1).sum()), 1)
        self.played = self.begun = 0
        trial = recipe.trial if recipe.starts > 1 else 0.0
        self.planned = max(recipe.steps * (1 - trial * (recipe.starts - 1) / recipe.starts), 1.0)
        self.best, self.last, self.kept = -np.inf, -np.inf, self.network.acting()
        self.found: dict[str, float] = {}

    def look(self, seeds: Sequence[int]) -> None:
        """Score the weights as they are, and keep them if they are the best so far."""
        weights = self.network.acting()
        self.last = float(returns(Policy(weights, {}, self.scene.curves), self.scene, seeds).mean())
        if self.last > self.best:
            self.best, self.kept = self.last, weights

    def update(self) -> int:
        """Play federations to their end and learn from them; return how many rounds that were."""
        left = max(1 - self.played / self.planned, 0.0)
        rounds = self.play()
        advantages, targets = advantages_of(rounds.rewards, rounds.values, self.recipe.trace)
        flat = Played(*(part.flatten(0, 1) for part in rounds))
        spread = targets.var()
        explained = 1 - (targets - rounds.values).var() / spread if spread > 0 else torch.tensor(0.0)
        self._learn(flat, advantages.flatten(), targets.flatten(), left)
        self.found["explained"] = float(explained)
        count = len(flat.rewards)
        self.played += count
        return count

    @torch.no_grad()
    def play(self) -> Played:
        """Play as many federations as there are worlds, with levels drawn by their probabilities."""
        problem, curves, world = self.scene.problem, self.scene.curves, World(self.scene)
        first = self.begun * self.recipe.worlds
        world.start([seed_for(self.seed, "world", place) for place in range(first, first + self.recipe.worlds)])
        self.begun += 1
        rounds: list[Played] = []
        for _ in range(problem.rounds):
            known = world.seen()
            observed = features(problem, curves, known, world.loss, world.age)
            own, common = (torch.from_numpy(np.ascontiguousarray(part)) for part in split_features(problem, observed))
            mask = torch.from_numpy(np.concatenate(problem.menu.masks(problem.fits, known.available), axis=-1))
            scores, last, values = self.network(own, common)
            levels, flags = draw(scores, last, mask, self.sizes, self.generator)
            logs = chosen(scores, last, mask, self.sizes, (levels, flags)).logs
            step = world.step(levels.numpy(), flags.numpy())
            rewards = np.clip((step.reward - self.units[0]) / self.units[1], -WIDEST, WIDEST).astype(np.float32)
            rounds.append(Played(own, common, mask, levels, flags, logs, values, torch.from_numpy(rewards)))
        return Played(*(torch.stack(parts) for parts in zip(*rounds, strict=True)))

    def _learn(self, rounds: Played, advantages: torch.Tensor, targets: torch.Tensor, left: float) -> None:
        recipe, entropy, clipped = self.recipe, [], []
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.learning_rate * left
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-6)
        for _ in range(recipe.epochs):
            for rows in torch.randperm(len(targets), generator=self.generator).split(recipe.batch):
                some = Played(*(part[rows] for part in rounds))
                scores, last, values = self.network(some.own, some.common)
                now = chosen(scores, last, some.mask, self.sizes, (some.levels, some.flags))
                gain, share = surrogate(now.logs - some.logs, advantages[rows], now.matters, recipe.clip, recipe.ratio)
                spread = now.entropy.mean()
                loss = 0.5 * (values - targets[rows]).square().mean() - gain - left * self.entropy * spread
                self.optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
                self.optimizer.step()
                entropy.append(float(spread.detach()))
                clipped.append(share)
        self.found |= {"entropy": float(np.mean(entropy)), "clipped": float(np.mean(clipped))}


def surrogate(
    moved: torch.Tensor, advantages: torch.Tensor, matters: torch.Tensor, clip: float, ratio: str
) -> tuple[torch.Tensor, float]:
    """Return PPO's clipped gain, and the share of ratios that were clipped.

    Args:
        moved: What was added to the log-probability of each branch's level, `(rows, branches)`.
        advantages: Of each row, `(rows,)`.
        matters: Whether a branch changes anything, `(rows, branches)`.
        clip: How far a ratio may be from 1.
        ratio: `branch` or `joint`, as in `Recipe`.
    """
    moved = torch.where(matters, moved, 0.0)
    if ratio == "joint":
        moved, matters = moved.sum(-1, keepdim=True), torch.ones_like(matters[:, :1])
    ratios, worth = moved.exp(), advantages[:, None]
    gains = torch.minimum(ratios * worth, ratios.clamp(1 - clip, 1 + clip) * worth)
    outside = ((ratios.detach() - 1).abs() > clip) & matters
    share = float(outside.sum()) / max(int(matters.sum()), 1)
    return torch.where(matters, gains, 0.0).sum(-1).mean(), share


def advantages_of(rewards: torch.Tensor, values: torch.Tensor, trace: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return generalised advantages without discount, and what values should have been, `(rounds, worlds)` each.

    Source: Schulman et al. 2016, arXiv:1506.02438, equations 11 to 16; nothing follows the last round.
    """
    found, after, coming = torch.zeros_like(rewards), torch.zeros_like(rewards[0]), torch.zeros_like(rewards[0])
    for place in reversed(range(len(rewards))):
        coming = rewards[place] + after - values[place] + trace * coming
        found[place], after = coming, values[place]
    return found, found + values


def _units(scene: Scene, seed: int) -> tuple[float, float]:
    """Return the median of a round's reward under random plans, and its spread between quartiles, at least a little."""
    world, problem, draw_from = World(scene), scene.problem, np.random.default_rng(seed_for(seed, "scale"))
    world.start([seed_for(seed, "scale", place) for place in range(64)])
    branches, found = problem.menu.branches(len(problem.clients)), []
    for _ in range(problem.rounds):
        found.append(world.step(*problem.menu.split(draw_from.integers(0, branches, (64, len(branches))))).reward)
    low, middle, high = np.quantile(found, [0.25, 0.5, 0.75])
    return float(middle), float(max(high - low, 1e-6))
