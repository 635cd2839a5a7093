import pytest

from fedpeat.control import FixedControl
from fedpeat.core import ConfigError, RoundReport

NAMES = [f"client-{i}" for i in range(20)]


def control(**more):
    settings = {"clients": NAMES, "per_round": 5, "local_steps": 3, "rounds": 4, "seed": 1}
    return FixedControl(**{**settings, **more})


def plans(controller, rounds):
    state, report = controller.start(), None
    for _ in range(rounds):
        plan, state = controller.choose(report, state)
        report = RoundReport(plan.round, {}, (), {}, 0, 0, {}, {})
        yield plan


def test_sampling_follows_the_seed_and_the_round_alone():
    names = [[device.client for device in plan.devices] for plan in plans(control(), 4)]
    assert names == [[device.client for device in plan.devices] for plan in plans(control(), 4)]
    assert all(sorted(set(row)) == row and len(row) == 5 for row in names)
    assert len({tuple(row) for row in names}) > 1
    assert names != [[device.client for device in plan.devices] for plan in plans(control(seed=2), 4)]


def test_sampling_is_uniform():
    counts = dict.fromkeys(NAMES, 0)
    for plan in plans(control(rounds=2000), 2000):
        for device in plan.devices:
            counts[device.client] += 1
    # 2000 draws with p = 1/4: standard deviation 19; six of them on either side.
    assert all(500 - 6 * 19.4 < count < 500 + 6 * 19.4 for count in counts.values())


def test_who_is_asked_beyond_that_favours_no_name():
    made = control(over_select=0.5, rounds=400)
    assert made.asked == 8
    assert control(over_select=9).asked == 20
    first = [next(iter(plan.devices)).client for plan in plans(made, 400)]
    assert all(len({device.client for device in plan.devices}) == 8 for plan in plans(made, 5))
    # 400 draws with p = 1/20: standard deviation 4.4; six of them on either side would go below 0.
    assert max(first.count(name) for name in NAMES) < 20 + 6 * 4.4
    assert set(first) == set(NAMES)


def test_steps_add_up_and_single_devices_may_differ():
    own = {"local_steps_of": {"client-3": 9}, "emulator_of": {"client-4": "kept_2"}, "rank_of": {"client-5": 2}}
    chosen = control(per_round=20, **own)
    first, second = plans(chosen, 2)
    assert (first.start_step, second.start_step, first.total_steps) == (0, 3, 12)
    of = {device.client: device for device in first.devices}
    assert of["client-3"].local_steps == 9
    assert of["client-4"].emulator == "kept_2"
    assert of["client-5"].rank == 2
    assert (of["client-6"].local_steps, of["client-6"].emulator, of["client-6"].rank) == (3, "default", None)


@pytest.mark.parametrize("per_round", [0, 21])
def test_more_clients_than_there_are(per_round):
    with pytest.raises(ConfigError, match=r"clients\.per_round"):
        control(per_round=per_round)


def test_an_unknown_client_is_told():
    with pytest.raises(ConfigError, match="did you mean 'client-7'"):
        control(emulator_of={"clientt-7": "kept_2"})


def test_poisson_sampling_draws_each_by_itself():
    drawn = [
        {device.client for device in plan.devices} for plan in plans(control(rounds=2000, sampling="poisson"), 2000)
    ]
    assert drawn == [{d.client for d in plan.devices} for plan in plans(control(rounds=2000, sampling="poisson"), 2000)]
    of = {name: sum(name in names for names in drawn) for name in NAMES}
    # 2000 draws with p = 1/4: standard deviation 19; six of them on either side.
    assert all(500 - 6 * 19.4 < count < 500 + 6 * 19.4 for count in of.values())
    sizes = [len(names) for names in drawn]
    # Their number varies as 20 such draws do, by 3.75, which 2000 rounds tell within 0.12; six of them.
    assert abs(sum((size - 5) ** 2 for size in sizes) / 2000 - 3.75) < 6 * 0.12
    assert 0 in sizes
    both = sum({"client-1", "client-2"} <= names for names in drawn)
    assert abs(both - 2000 / 16) < 6 * 10.9
    everyone = next(plans(control(per_round=20, sampling="poisson"), 1))
    assert [device.client for device in everyone.devices] == sorted(NAMES)


def test_an_empty_round_goes_on_counting_steps():
    found = list(plans(control(per_round=1, rounds=20, sampling="poisson"), 20))
    assert any(not plan.devices for plan in found)
    assert [plan.start_step for plan in found] == [3 * index for index in range(20)]


def test_an_unknown_sampling_is_told():
    with pytest.raises(ConfigError, match=r"control\.sampling=poison.*did you mean 'poisson'"):
        control(sampling="poison")
