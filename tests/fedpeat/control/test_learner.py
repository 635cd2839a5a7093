"""`sabppo`: how it learns, and how near it comes to the best there is."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedpeat.control import Curves, GreedyControl, Objective, Pair, RandomControl, SabppoControl
from fedpeat.control.learner import Learner, Recipe, Seen, advantages_of, returns, surrogate, train
from fedpeat.control.optimum import optimum
from fedpeat.control.policy import NAMES, read_policy, write_policy
from fedpeat.control.world import play
from fedpeat.core import ConfigError, seed_for
from tests.fedpeat.control.problems import CELL, problem, scene
from tests.fedpeat.control.test_policy import by_chance

SIX = tuple(Pair(emulator, rank) for emulator in ("small", "middle", "large") for rank in (2, 8))
SMALL = {"worlds": 32, "batch": 160, "width": 32, "choosing": 1}


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def mean_of_random(given):
    of = given.problem
    return np.mean([play(RandomControl(of, len(of.clients), 10, seed), given, 0)[0] for seed in range(100)])


def way(given, total):
    """How far it is from random to the best there is, as a share."""
    best, least = optimum(given)[0], mean_of_random(given)
    return (total - least) / (best - least)


def of_greedy(given):
    return play(GreedyControl(given.problem, given.objective, given.curves, 10), given, 0)


def of_learned(given, **recipe):
    policy = train(
        given, Recipe(**SMALL, **{key: value for key, value in recipe.items() if key != "seed"}), seed=recipe["seed"]
    )
    return play(SabppoControl(given.problem, policy, 10), given, 0)


def plain(seed=0):
    """Three devices, three emulators, two ranks, three rounds; of the second, only the last loss counts, and bytes."""
    if seed == 0:
        return scene(problem(3, pairs=SIX, steps=(10,), memory=[6, 4, 3]), objective=Objective(time=0.3))
    objective = Objective(time=0.2, bytes=0.02, quality=2.0, quality_of="change")
    return scene(problem(3, pairs=SIX, steps=(10,), memory=[6, 6, 4], seed=seed), objective=objective)


def later():
    """A scene in which re-aligning the emulator costs more than it brings in its own round."""
    of = problem(2, pairs=(Pair("small", 8), Pair("large", 8)), steps=(10,), refresh=True)
    of = replace(of, refresh_bytes=np.full(2, 8e7))
    return scene(of, objective=Objective(time=0.3), curves=Curves(pace=0.3, ageing=0.3), rounds=5)


def test_greed_loses_where_a_realignment_pays_only_later():
    given = later()
    total, rounds = of_greedy(given)
    assert not any(one["plan"].refresh for one in rounds)
    assert any(flag for _, flag in optimum(given)[1])
    assert way(given, total) < 0.9


def test_in_seconds_it_comes_near_the_best():
    given = scene(problem(2, pairs=SIX[:4], steps=(10,), memory=[4, 2]), objective=Objective(time=0.3))
    total, _ = of_learned(given, steps=3000, seed=0)
    assert way(given, total) >= 0.97


# In all of these, the seeds are ones by which nothing of the learner was chosen.
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5, 10))
@pytest.mark.parametrize("which", [0, 3])
def test_it_comes_to_97_percent_of_the_way_from_random_to_the_best(which, seed):
    given = plain(which)
    assert way(given, of_learned(given, steps=30_000, seed=seed)[0]) >= 0.97


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10, 15))
def test_it_beats_greedy_where_greed_loses(seed):
    given = later()
    # One beginning in five or so never gets away from greedy's plan, so three are made.
    total, rounds = of_learned(given, steps=90_000, starts=3, seed=seed)
    assert total > of_greedy(given)[0]
    assert any(one["plan"].refresh for one in rounds)
    assert way(given, total) >= 0.97


@pytest.mark.parametrize("starts", [1, 2])
def test_training_follows_its_seed_and_the_best_is_kept(starts, tmp_path):
    given = scene(problem(2, radio=CELL, shares=(1.0, 2.0)), availability=0.8, dropout=0.1)
    recipe = Recipe(steps=240, worlds=8, width=8, choosing=4, batch=12, starts=starts)
    curve, same = [], []
    policy = train(given, recipe, seed=3, progress=curve.append)
    again = train(given, recipe, seed=3, progress=same.append)
    assert curve == same
    assert all((policy.weights[name] == again.weights[name]).all() for name in NAMES)
    assert curve[-1].steps == 240
    assert [one.steps for one in curve] == sorted(one.steps for one in curve)
    other = train(given, recipe, seed=4)
    assert any((policy.weights[name] != other.weights[name]).any() for name in NAMES)
    seeds = [seed_for(3, "choosing", place) for place in range(4)]
    assert -returns(policy, given, seeds).mean() == pytest.approx(min(one.cost for one in curve))
    assert policy.facts["cost"] == pytest.approx(min(one.cost for one in curve))
    write_policy(tmp_path, policy)
    assert (returns(read_policy(tmp_path), given, seeds) == returns(policy, given, seeds)).all()


def test_what_is_played_at_once_is_what_the_controller_plays():
    given = scene(problem(3, radio=CELL, refresh=True, memory=[4, 2, 0]), availability=0.7)
    policy = replace(by_chance(given.problem), curves=given.curves)
    alone = [play(SabppoControl(given.problem, policy, 5), given, seed)[0] for seed in (3, 4, 5)]
    assert returns(policy, given, [3, 4, 5]) == pytest.approx(alone)


def test_advantages_by_hand():
    rewards, values = torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([[3.0], [5.0], [1.0]])
    found, targets = advantages_of(rewards, values, 1.0)
    assert found.flatten().tolist() == [7 - 3, 6 - 5, 4 - 1]
    assert targets.flatten().tolist() == [7, 6, 4]
    found, _ = advantages_of(rewards, values, 0.0)
    assert found.flatten().tolist() == [1 + 5 - 3, 2 + 1 - 5, 4 - 1]


def test_the_clipped_gain_by_hand():
    moved, matters = torch.tensor([[2.0, 0.5, 3.0]]).log(), torch.tensor([[True, True, False]])
    good, bad = torch.tensor([1.0]), torch.tensor([-1.0])
    gain, share = surrogate(moved, good, matters, 0.2, "branch")
    assert float(gain) == pytest.approx(1.2 + 0.5)
    assert share == 1.0
    assert float(surrogate(moved, bad, matters, 0.2, "branch")[0]) == pytest.approx(-2.0 - 0.8)
    gain, share = surrogate(moved, good, matters, 0.2, "joint")
    assert (float(gain), share) == (pytest.approx(1.0), 0.0)
    with pytest.raises(ConfigError, match="did you mean 'branch'"):
        Recipe(ratio="brnach")


def test_rewards_are_cut_where_a_link_is_nearly_dead():
    given = scene(problem(2, radio=CELL))
    given = replace(given, gains=np.array([1e-30, 1e-11]))
    learner = Learner(given, Recipe(worlds=8, width=8), (0.0, 1.0), 0)
    rewards = learner.play().rewards
    assert torch.isfinite(rewards).all()
    assert float(rewards.min()) == -10.0


def test_what_is_seen_of_training_is_plain_numbers():
    curve: list[Seen] = []
    train(scene(problem(2)), Recipe(steps=24, worlds=4, width=8, choosing=1), progress=curve.append)
    assert all(isinstance(value, int | float) for one in curve for value in one)
    assert curve[-1].entropy > 0
