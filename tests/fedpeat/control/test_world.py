import numpy as np
import pytest

from fedpeat.control import CapabilityControl, Curves, GreedyControl, Objective, RandomControl, cost, next_loss, price
from fedpeat.control.features import feature_count, features
from fedpeat.control.plans import device_plans, levels_of, round_plan
from fedpeat.control.world import Scene, World, play
from fedpeat.core import ConfigError
from tests.fedpeat.control.problems import CELL, problem, scene, seen

SHAKY = {"of": problem(4, shares=(1.0, 2.0), refresh=True, radio=CELL, memory=[4, 3, 1, 0]), "availability": 0.6}


def actions(of, count, seed=0):
    draw = np.random.default_rng(seed)
    return of.menu.split(draw.integers(0, 1000, (count, 3 * len(of.clients) + 1)) % of.menu.branches(len(of.clients)))


def run(given, seeds, seed=0):
    """Rewards and losses of all rounds, `(rounds, worlds)` each, under random actions, the same in every world."""
    world, found = World(given), []
    world.start(seeds)
    for number in range(given.problem.rounds):
        levels, refresh = actions(given.problem, 1, seed + number)
        step = world.step(np.repeat(levels, len(seeds), 0), np.repeat(refresh, len(seeds)))
        assert step.done.all() == (number == given.problem.rounds - 1)
        found.append((step.reward, step.loss))
    return np.array(found)


def test_worlds_follow_their_own_seeds():
    both = run(scene(**SHAKY), [3, 4])
    assert (both == run(scene(**SHAKY), [3, 4])).all()
    assert both[..., 1] == pytest.approx(run(scene(**SHAKY), [4])[..., 0])
    assert (both[..., 0] != both[..., 1]).any()


def test_without_chance_all_are_alike():
    calm = scene(problem(4, refresh=True))
    assert calm.deterministic
    assert not scene(**SHAKY).deterministic
    found = run(calm, [3, 4])
    assert (found[..., 0] == found[..., 1]).all()


def test_what_is_closed_stays_out():
    given = scene(**SHAKY)
    world = World(given)
    world.start([5])
    for number in range(3):
        levels, refresh = actions(given.problem, 1, number)
        known, loss, age = world.seen(), world.loss, world.age
        may = known.available[0, :, None] & given.problem.fits
        closed = [p for p in range(4) if levels[0, p, 0] and not may[p, levels[0, p, 0] - 1]]
        out = levels.copy()
        out[0, closed] = 0
        after = next_loss(given.problem, given.curves, loss, np.where(refresh, 0, age), out)
        worth = -cost(given.objective, price(given.problem, known, out, refresh), loss, after)
        assert world.step(levels, refresh).reward == pytest.approx(worth)


def test_bundles_are_fetched_once_and_are_old_after_a_realignment():
    given = scene(problem(2, refresh=True))
    world = World(given)
    world.start([0])
    small, large, out = [1, 0, 0], [3, 0, 0], [0, 0, 0]
    fetched = []
    for levels, refresh in (([small, out], 0), ([small, small], 1), ([large, small], 0)):
        here = np.array([levels])
        took = world.step(here, np.array([refresh])).price
        plain = sum(
            given.problem.bytes_down[one[0] - 1] + given.problem.bytes_up[one[0] - 1] for one in levels if one[0]
        )
        fetched.append(took.bytes[0] - plain)
    bundle, patch = given.problem.bundle_bytes, given.problem.refresh_bytes
    assert fetched == pytest.approx([bundle[0], patch[0] + bundle[0] + patch[0], bundle[1]])
    assert world.holds[0].tolist() == [[True, True], [True, False]]
    assert not world.stale.any()
    world.start([0])
    world.step(np.array([[small, small]]), np.array([0]))
    world.step(np.array([[small, out]]), np.array([1]))
    assert world.stale[0].tolist() == [[False, False], [True, False]]
    assert world.age.tolist() == [1]


def test_masks_and_features_fit_each_other():
    given = scene(**SHAKY)
    world = World(given)
    world.start(range(20))
    mask, of = world.mask(), given.problem
    assert mask.shape == (20, of.menu.branches(4).sum())
    first = mask[:, : of.menu.levels[0]]
    assert first[:, 0].all()
    assert 0 < first[:, 4].sum() < 20  # the largest pair fits the first device, which is not always there
    found = features(of, given.curves, world.seen(), world.loss, world.age)
    assert found.shape == (20, feature_count(of))
    assert found.dtype == np.float32
    assert np.isfinite(found).all()
    world.step(*actions(of, 20))
    changed = features(of, given.curves, world.seen(), world.loss, world.age) != found
    assert changed.any(0).sum() > 8


def test_a_plan_is_read_as_it_was_written():
    of = problem(4, shares=(0.5, 1.0), refresh=True, radio=CELL)
    levels = np.array([[0, 0, 0], [2, 1, 1], [4, 0, 0], [1, 1, 0]])
    plan, step = round_plan(of, seen(of), levels, 1, {"global_step": 3}, 5)
    again, refresh = levels_of(of, plan)
    assert (again.tolist(), refresh, step) == (levels.tolist(), 1, 8)
    assert [device.band for device in device_plans(of, levels)] == [1.0, 0.5, 0.5]


def test_controllers_play_and_better_ones_win():
    given = scene(objective=Objective(time=0.02, quality_of="change"), rounds=4)
    of = given.problem
    totals = {
        "random": np.mean([play(RandomControl(of, 2, 5, seed), given, seed)[0] for seed in range(20)]),
        "capability": play(CapabilityControl(of, 3, 5, 0), given, 0)[0],
        "greedy": play(GreedyControl(of, given.objective, given.curves, 5), given, 0)[0],
    }
    assert totals["greedy"] > totals["random"]
    total, rounds = play(GreedyControl(of, given.objective, given.curves, 5), given, 0)
    spent = sum(0.02 * one["seconds"] / 60 for one in rounds) + rounds[-1]["loss"] - given.curves.start
    assert total == pytest.approx(-spent)
    assert len(rounds) == 4


def test_a_scene_has_links():
    with pytest.raises(ConfigError, match="down_bits"):
        Scene(problem(), Objective(), Curves())
    with pytest.raises(ConfigError, match="gains"):
        Scene(problem(radio=CELL), Objective(), Curves())
