import numpy as np
import pytest

from tests.fedpeat.control.problems import CELL, problem, scene

pytest.importorskip("gymnasium")
GIVEN = scene(problem(3, shares=(1.0, 2.0), refresh=True, radio=CELL, memory=[4, 1, 0]), availability=0.7)


def environment(given=GIVEN):
    from fedpeat.control.environment import ControlEnvironment

    return ControlEnvironment(given)


@pytest.mark.parametrize("given", [GIVEN, scene(problem(2))], ids=["cell", "fixed"])
def test_it_passes_gymnasiums_own_checker(given):
    from gymnasium.utils.env_checker import check_env

    check_env(environment(given), skip_render_check=True)


def test_it_follows_the_seed():
    def episode(seed):
        env, found, draw = environment(), [], np.random.default_rng(0)
        first, _ = env.reset(seed=seed)
        found.append(first.tolist())
        for number in range(3):
            action = draw.integers(0, 1000, len(env.action_space.nvec)) % env.action_space.nvec
            observed, reward, ended, cut, _ = env.step(action)
            found.append((observed.tolist(), reward, env.action_masks().tolist()))
            assert (ended, cut) == (number == 2, False)
        return found

    assert episode(1) == episode(1)
    assert episode(1) != episode(2)


def test_a_federation_after_another_has_other_chances():
    env = environment()
    first, _ = env.reset(seed=1)
    second, _ = env.reset()
    assert first.tolist() != second.tolist()


def test_masks_have_a_level_for_each_branch():
    env = environment()
    for seed in range(20):
        env.reset(seed=seed)
        mask, ends = env.action_masks(), np.cumsum(env.action_space.nvec)
        assert mask.shape == (ends[-1],)
        assert all(mask[end - size : end].any() for end, size in zip(ends, env.action_space.nvec, strict=True))
