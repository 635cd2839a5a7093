from dataclasses import replace

import numpy as np
import pytest

from fedpeat.control import CapabilityControl, Curves, GreedyControl, Objective, RandomControl, cost, next_loss, price
from fedpeat.control.features import feature_count, features
from fedpeat.control.plans import device_plans, levels_of, round_plan
from fedpeat.control.world import Scene, World, only, play
from fedpeat.core import ConfigError
from fedpeat.devices import Fleet, Profile, Traffic, Work, drops_out_at
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
    assert fetched == pytest.approx([bundle[0], patch[0] + bundle[0] + patch[0], bundle[1] + patch[1]])
    assert world.holds[0].tolist() == [[True, True], [True, False]]
    assert world.stale[0].tolist() == [[False, False], [False, True]]
    world.start([0])
    world.step(np.array([[small, small]]), np.array([0]))
    world.step(np.array([[small, out]]), np.array([1]))
    assert world.stale[0].tolist() == [[False, True], [True, True]]
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


def fleet_of(of, given, **more):
    """The same devices as a fleet, with links as they are without fading."""
    profiles = {}
    for place, client in enumerate(of.clients):
        receives, computes, sends, radiated = of.watt[place]
        rates = (given.down_bits[place] / 1e6, given.up_bits[place] / 1e6)
        memory = of.memory_bytes[place] / 2**20
        profiles[client] = Profile(
            client, of.flops[place], memory, *rates, computes, sends, receives, radiated_watt=max(radiated, 1e-3)
        )
    pairs = zip(of.menu.pairs, of.step_flops, of.needs_bytes, strict=True)
    work = {tuple(pair): Work(flops, needs) for pair, flops, needs in pairs}
    return Fleet(profiles, work, 5, **more)


@pytest.mark.parametrize("seed", range(4))
def test_deadlines_and_absences_are_those_of_the_fleet(seed):
    dropout, deadline = 0.4, 12.0
    of = replace(problem(6, steps=(5, 10, 20), seed=seed), deadline_seconds=deadline)
    given = scene(of, dropout=dropout, rounds=4)
    of = given.problem
    fleet = fleet_of(of, given, dropout=dropout, deadline_seconds=deadline)
    world, held, statuses = World(given), set(), []
    world.start([0])
    for number in range(1, 5):
        leaves = [drops_out_at(client, number, probability=dropout, seed=5) for client in of.clients]
        world._leaves[0, number - 1] = [np.inf if share is None else share for share in leaves]
        levels, _ = actions(of, 1, 10 * seed + number)
        plan, _ = round_plan(of, only(world.seen()), levels[0], 0, {"global_step": 0}, 5)
        traffic = []
        for device in plan.devices:
            place = of.menu.pairs.index((device.emulator, device.rank))
            bundle = 0 if (device.client, device.emulator) in held else of.bundle_bytes[of.emulator_of[place]]
            traffic.append(Traffic(of.bytes_down[place], of.bytes_up[place], bundle))
        before = world.loss.copy()
        played = fleet.play(plan, traffic)
        found = world.step(levels, np.array([0]))
        counted = {device.client for device in played.plan.devices}
        sent = [
            (one.down + one.up) * (d.client in counted) + one.bundle
            for one, d in zip(traffic, plan.devices, strict=True)
        ]
        assert found.price.seconds[0] == pytest.approx(played.seconds)
        assert found.price.joules[0] == pytest.approx(sum(one["joules"] for one in played.facts.values()))
        assert found.price.bytes[0] == pytest.approx(sum(sent))
        assert {c for c, counts in zip(of.clients, found.price.counts[0], strict=True) if counts} == counted
        left = np.where([[client in counted] for client in of.clients], levels[0], 0)
        assert found.loss[0] == pytest.approx(float(next_loss(of, given.curves, before[0], number - 1, left)))
        held |= {(d.client, d.emulator) for d in plan.devices if played.facts[d.client]["holds"]}
        assert {
            (c, e) for i, c in enumerate(of.clients) for j, e in enumerate(of.menu.emulators) if world.holds[0, i, j]
        } == held
        statuses += [one["status"] for one in played.facts.values()]
    assert {"counted", "late", "dropped"} <= set(statuses)


def test_an_empty_round_lasts_to_the_deadline():
    of = replace(problem(2), deadline_seconds=7.0)
    world = World(scene(of))
    world.start([0])
    found = world.step(np.zeros((1, 2, 3), dtype=int), np.array([0]))
    assert found.price.seconds.tolist() == [7.0]
    assert found.price.bytes.tolist() == found.price.joules.tolist() == [0.0]
    assert found.loss.tolist() == [world.scene.curves.start]


def test_who_leaves_follows_the_worlds_seed_and_is_as_frequent_as_asked():
    given = scene(problem(5), dropout=0.3)
    world = World(given)
    world.start(range(200))
    gone = np.isfinite(world._leaves)
    assert abs(gone.mean() - 0.3) < 0.03
    assert ((world._leaves[gone] > 0) & (world._leaves[gone] < 1)).all()
    other = World(given)
    other.start([7])
    assert (other._leaves[0] == world._leaves[7]).all()
