import re
from collections import Counter

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fedpeat.core import ConfigError
from fedpeat.devices import Profile, assign, profiles_of, uniform

NUMBERS = {
    "flops": 1e9,
    "memory_mib": 512,
    "downlink_mbit": 8,
    "uplink_mbit": 2,
    "compute_watt": 2,
    "transmit_watt": 1,
    "receive_watt": 0,
}
PROFILES = profiles_of({"slow": {**NUMBERS, "share": 3}, "fast": {**NUMBERS, "flops": 1e12}})
CLIENTS = [f"client {number}" for number in range(400)]


def test_a_profile_is_its_numbers():
    assert PROFILES["slow"] == Profile("slow", 1e9, 512, 8, 2, 2, 1, 0, share=3)
    assert PROFILES["fast"].radiated_watt == 0.2


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"flops": 0}, "flops=0 .*above 0"),
        ({"memory_mib": -1}, "memory_mib=-1"),
        ({"uplink_mbit": float("inf")}, "uplink_mbit=inf .*finite"),
        ({"receive_watt": -0.5}, "receive_watt=-0.5 .*0 or more"),
        ({"share": "many"}, "share='many'"),
        ({"compute_watt": True}, "compute_watt=True"),
        ({"flop": 1}, "no such key: flop; did you mean 'flops'"),
    ],
)
def test_a_number_that_cannot_be_is_refused(change, says):
    with pytest.raises(ConfigError, match=says):
        profiles_of({"odd": {**NUMBERS, **change}})


def test_what_is_missing_is_named():
    with pytest.raises(ConfigError, match="'odd'; it lacks flops"):
        profiles_of({"odd": {key: value for key, value in NUMBERS.items() if key != "flops"}})
    with pytest.raises(ConfigError, match="not a mapping"):
        profiles_of({"odd": 3})
    with pytest.raises(ConfigError, match="empty"):
        profiles_of({})


def test_those_that_come_with_the_package_are_read_and_ordered_by_speed():
    from simulations.settings import conf_folder

    folder = conf_folder() / "devices" / "profiles"
    # As Hydra reads them: YAML 1.2 has numbers like 3e10, PyYAML has not.
    number = re.compile(r"[\d.]+e\d+")
    described = {
        path.stem: {k: float(v) if number.fullmatch(str(v)) else v for k, v in yaml.safe_load(path.read_text()).items()}
        for path in folder.glob("*.yaml")
    }
    profiles = profiles_of(described)
    speeds = [profiles[name].flops for name in ("phone", "tablet", "laptop", "edge_box", "workstation")]
    assert speeds == sorted(speeds)
    assert sum(profile.share for profile in profiles.values()) == pytest.approx(1)


def test_profiles_are_drawn_by_their_shares():
    found = Counter(profile.name for profile in assign(CLIENTS, PROFILES, seed=0).values())
    assert 260 < found["slow"] < 340  # 300 expected, of a standard deviation of 9
    again = Counter(profile.name for profile in assign(CLIENTS, PROFILES, seed=0, shares={"fast": 1}).values())
    assert again == {"fast": 400}


def test_a_draw_follows_seed_and_name_alone():
    all_of_them = assign(CLIENTS, PROFILES, seed=0)
    assert assign(CLIENTS[7:9], PROFILES, seed=0) == {name: all_of_them[name] for name in CLIENTS[7:9]}
    assert assign(CLIENTS, PROFILES, seed=1) != all_of_them


def test_a_client_may_be_named():
    named = {"client 3": "fast"}
    assert assign(CLIENTS[:5], PROFILES, seed=0, shares={"slow": 1}, named=named)["client 3"].name == "fast"
    for wrong, says in (
        ({"named": {"client 3": "quick"}}, "devices.named names the profile 'quick'"),
        ({"named": {"cliemt 3": "fast"}}, "devices.named names client 'cliemt 3'; no such client; did you mean"),
        ({"shares": {"quick": 1}}, "devices.shares names the profile 'quick'"),
        ({"shares": {"fast": 0}}, "one is above 0"),
        ({"shares": {"fast": -1, "slow": 2}}, "0 or more"),
    ):
        with pytest.raises(ConfigError, match=says):
            assign(CLIENTS, PROFILES, seed=0, **wrong)


@given(st.integers(0, 2**63 - 1), st.text(), st.integers(1, 10**6))
def test_uniform_is_between_0_and_1(seed, name, number):
    assert 0 < uniform(seed, "purpose", number, name) < 1
