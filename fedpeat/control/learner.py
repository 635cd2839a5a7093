"""Training a policy in a scene, by PPO with masked branches. Needs the extra `control`."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import gymnasium
import numpy as np
import torch
from sb3_contrib import MaskablePPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import VecEnv
from torch import nn

from fedpeat.control.features import BOUND, feature_count, features
from fedpeat.control.policy import NAMES, Policy, described
from fedpeat.control.world import Scene, World
from fedpeat.core import seed_for

Progress = Callable[[int, float], None]
"""Told of steps done, and of the mean sum of rewards in the federations kept for choosing."""


@dataclass(frozen=True)
class Recipe:
    """How a policy is trained.

    Attributes:
        steps: Rounds played in all.
        worlds: Federations played side by side.
        episodes: Federations that each of them plays between two updates.
        width: Of the trunk's layers.
        learning_rate: At the start; falls to 0 along a line.
        epochs: Times that an update goes through its rounds.
        batch: Rounds of a minibatch.
        entropy: Weight of the heads' entropy.
        clip: Of the ratio of probabilities.
        choosing: Federations, never trained in, by which the best of the policies on the way is kept.
    """

    steps: int = 200_000
    worlds: int = 64
    episodes: int = 4
    width: int = 128
    learning_rate: float = 1e-3
    epochs: int = 6
    batch: int = 256
    entropy: float = 0.005
    clip: float = 0.2
    choosing: int = 16


class Worlds(VecEnv):
    """All federations of a `World` as an environment of Stable-Baselines3: one step is a step of all arrays.

    Args:
        scene: What is played.
        count: How many federations.
        seed: What all chances follow from.
        scale: What rewards are divided by.
    """

    def __init__(self, scene: Scene, count: int, *, seed: int, scale: float = 1.0) -> None:
        problem = scene.problem
        self.world, self.scale, self._seed, self._begun = World(scene), scale, seed, 0
        self._actions = np.zeros(0, dtype=int)
        self._sums = np.zeros(count)
        super().__init__(
            count,
            gymnasium.spaces.Box(-BOUND, BOUND, (feature_count(problem),), np.float32),
            gymnasium.spaces.MultiDiscrete(problem.menu.branches(len(problem.clients))),
        )

    def _observed(self) -> np.ndarray:
        scene = self.world.scene
        return features(scene.problem, scene.curves, self.world.seen(), self.world.loss, self.world.age)

    def reset(self) -> np.ndarray:
        """Begin federations that none were before."""
        first = self._begun * self.num_envs
        self.world.start([seed_for(self._seed, "world", place) for place in range(first, first + self.num_envs)])
        self._begun += 1
        self._sums = np.zeros(self.num_envs)
        return self._observed()

    def step_async(self, actions: np.ndarray) -> None:
        """Note what is to be done."""
        self._actions = actions

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """Play a round in all federations; all end together, and begin anew."""
        step = self.world.step(*self.world.scene.problem.menu.split(self._actions))
        self._sums += step.reward
        observed, infos = self._observed(), [{} for _ in range(self.num_envs)]
        if step.done.all():
            rounds = self.world.scene.problem.rounds
            infos = [
                {"terminal_observation": last, "episode": {"r": float(total), "l": rounds, "t": 0.0}}
                for last, total in zip(observed, self._sums, strict=True)
            ]
            observed = self.reset()
        return observed, (step.reward / self.scale).astype(np.float32), step.done, infos

    def close(self) -> None:
        """Leave nothing behind."""

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:  # noqa: ARG002 (its signature)
        """Return an attribute of each federation; they have no rendering."""
        if attr_name == "render_mode":
            return [None] * self.num_envs
        return [getattr(self, attr_name)] * self.num_envs

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:  # noqa: ARG002 (its signature)
        """Set an attribute of all."""
        setattr(self, attr_name, value)

    def env_method(self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any) -> list[Any]:  # noqa: ARG002 (its signature)
        """Call a method for all; one result each."""
        return list(getattr(self, method_name)(*method_args, **method_kwargs))

    def env_is_wrapped(self, wrapper_class: type, indices: Any = None) -> list[bool]:  # noqa: ARG002 (its signature)
        """Say that nothing is wrapped."""
        return [False] * self.num_envs

    def action_masks(self) -> np.ndarray:
        """Return which levels are open, `(federations, sum of levels)`."""
        return self.world.mask()


class Trunk(BaseFeaturesExtractor):
    """The two layers that all heads and the critic share."""

    def __init__(self, observation_space: gymnasium.spaces.Box, width: int = 128) -> None:
        super().__init__(observation_space, width)
        self.trunk_1 = nn.Linear(observation_space.shape[0], width)
        self.trunk_2 = nn.Linear(width, width)

    def forward(self, observed: torch.Tensor) -> torch.Tensor:
        """Return the trunk's outputs, `(rows, width)`."""
        return torch.tanh(self.trunk_2(torch.tanh(self.trunk_1(observed))))


def weights_of(model: MaskablePPO) -> dict[str, np.ndarray]:
    """Return what of a model acts: its trunk and its heads."""
    state = model.policy.state_dict()
    found = {}
    for name in NAMES:
        layer, kind = name.split(".")
        key = f"action_net.{kind}" if layer == "heads" else f"features_extractor.{layer}.{kind}"
        found[name] = state[key].detach().cpu().numpy().copy()
    return found


def returns(policy: Policy, scene: Scene, seeds: Sequence[int]) -> np.ndarray:
    """Return the sum of rewards of a policy in federations of these seeds, `(seeds,)`."""
    world, problem = World(scene), scene.problem
    world.start(seeds)
    total = np.zeros(len(seeds))
    for _ in range(problem.rounds):
        observed = features(problem, policy.curves, world.seen(), world.loss, world.age)
        total += world.step(*problem.menu.split(policy.act(problem, observed, world.mask()))).reward
    return total


def train(
    scene: Scene,
    recipe: Recipe | None = None,
    *,
    seed: int = 0,
    progress: Progress = lambda _, __: None,
    tensorboard: str | None = None,
) -> Policy:
    """Return the best policy found in a scene.

    Args:
        scene: What is played.
        recipe: How.
        seed: What chances and the first weights follow from.
        progress: Told after each update.
        tensorboard: Folder for TensorBoard's files; None for none.

    Source: PPO with clipping, Schulman et al. 2017, arXiv:1707.06347, with invalid actions masked, Huang and Ontanon
        2020, arXiv:2006.14171, by sb3-contrib's MaskablePPO; branches by Tavakoli et al. 2018, arXiv:1711.08946.
    Departures: no discount, since a federation has an end; the joint ratio of all branches is clipped.
    """
    recipe = recipe or Recipe()
    problem = scene.problem
    env = Worlds(scene, recipe.worlds, seed=seed, scale=_scale(scene, seed))
    model = MaskablePPO(
        "MlpPolicy",
        env,
        learning_rate=lambda left: recipe.learning_rate * left,
        n_steps=problem.rounds * recipe.episodes,
        batch_size=recipe.batch,
        n_epochs=recipe.epochs,
        gamma=1.0,
        gae_lambda=0.95,
        clip_range=recipe.clip,
        ent_coef=recipe.entropy,
        policy_kwargs={
            "features_extractor_class": Trunk,
            "features_extractor_kwargs": {"width": recipe.width},
            "net_arch": [],
        },
        tensorboard_log=tensorboard,
        seed=seed_for(seed, "learner") % 2**31,
        device="cpu",
    )
    facts = {"recipe": asdict(recipe), "seed": seed, "trained_for": described(problem), "rounds": problem.rounds}
    keeper = _Keeper(scene, problem.signature, facts, recipe.choosing, seed, progress)
    model.learn(recipe.steps, callback=keeper)
    keeper.look(model)
    return keeper.kept


class _Keeper(BaseCallback):
    """Keeps the policy that does best in federations that are not trained in."""

    def __init__(
        self, scene: Scene, signature: str, facts: dict[str, Any], choosing: int, seed: int, progress: Progress
    ) -> None:
        super().__init__()
        self.scene, self.signature, self.facts, self.progress = scene, signature, facts, progress
        self.seeds = [seed_for(seed, "choosing", place) for place in range(choosing)]
        self.best = -np.inf
        self.kept = Policy({}, signature, scene.curves, facts)

    def look(self, model: MaskablePPO) -> None:
        """Score a model, and keep it if it is the best so far."""
        found = Policy(weights_of(model), self.signature, self.scene.curves, self.facts)
        mean = float(returns(found, self.scene, self.seeds).mean())
        self.progress(model.num_timesteps, mean)
        model.logger.record("choosing/return", mean)
        if mean > self.best:
            self.best, self.kept = mean, found

    def _on_rollout_start(self) -> None:
        self.look(self.model)  # type: ignore[arg-type]

    def _on_step(self) -> bool:
        return True


def _scale(scene: Scene, seed: int) -> float:
    """Return the standard deviation of a round's reward under random plans, at least a little."""
    world, problem, draw = World(scene), scene.problem, np.random.default_rng(seed_for(seed, "scale"))
    world.start([seed_for(seed, "scale", place) for place in range(64)])
    branches, found = problem.menu.branches(len(problem.clients)), []
    for _ in range(problem.rounds):
        found.append(world.step(*problem.menu.split(draw.integers(0, branches, (64, len(branches))))).reward)
    return float(max(np.std(found), 1e-6))
