"""A federation of a scene as a gymnasium environment. Needs the extra `control`."""

from typing import Any

import gymnasium
import numpy as np

from fedpeat.control.features import BOUND, feature_count, features
from fedpeat.control.world import Scene, World


class ControlEnvironment(gymnasium.Env[np.ndarray, np.ndarray]):
    """One federation: an action is a plan, a step a round, an episode a run.

    Actions are levels of all branches (`MultiDiscrete`, device by device, then the re-alignment); `action_masks()` says
    which are open. Observations are those of `fedpeat.control.features`.

    Args:
        scene: What is played.
    """

    metadata = {"render_modes": []}  # noqa: RUF012 (gymnasium's own attribute)

    def __init__(self, scene: Scene) -> None:
        problem = scene.problem
        self.world = World(scene)
        self.action_space = gymnasium.spaces.MultiDiscrete(problem.menu.branches(len(problem.clients)))
        self.observation_space = gymnasium.spaces.Box(-BOUND, BOUND, (feature_count(problem),), np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin a federation; its chances follow from `seed`, or from the generator of an earlier one."""
        super().reset(seed=seed, options=options)
        self.world.start([int(self.np_random.integers(2**62))])
        return self._observed(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Play a round; return the next observation, the reward, whether it was the last, and what it took."""
        levels, refresh = self.world.scene.problem.menu.split(np.asarray(action)[None])
        done = self.world.step(levels, refresh)
        info = {
            "loss": float(done.loss[0]),
            "seconds": float(done.price.seconds[0]),
            "bytes": float(done.price.bytes[0]),
            "joules": float(done.price.joules[0]),
        }
        ended = bool(done.done[0])
        return self._observed(), float(done.reward[0]), ended, False, info

    def action_masks(self) -> np.ndarray:
        """Return which levels are open, branch after branch, `(sum of levels,)`."""
        return self.world.mask()[0]

    def _observed(self) -> np.ndarray:
        world, scene = self.world, self.world.scene
        return features(scene.problem, scene.curves, world.seen(), world.loss, world.age)[0]
