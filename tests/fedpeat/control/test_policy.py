"""A policy: what it chooses, how it is kept, and what it refuses."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedpeat.control import Curves, Menu, Pair, SabppoControl
from fedpeat.control.features import feature_count, features, split_features
from fedpeat.control.network import Network, chosen, draw
from fedpeat.control.policy import LAYERS, NAMES, Policy, packaged_policy, read_policy, shapes, write_policy
from fedpeat.control.signature import devices_of, signature_of
from fedpeat.core import ConfigError, FedPeatError
from tests.fedpeat.control.problems import CELL, PAIRS, problem, seen


def by_chance(of, seed=0, width=8):
    """A policy that nobody trained."""
    draw_from, weights = np.random.default_rng(seed), {}
    for layer, (outputs, inputs) in shapes(of, width).items():
        weights[f"{layer}.weight"] = draw_from.normal(size=(outputs, inputs)).astype(np.float32)
        weights[f"{layer}.bias"] = draw_from.normal(size=outputs).astype(np.float32)
    return Policy(weights, signature_of(of), Curves(), {"seed": seed})


def permuted(of, known, order):
    """The same devices in another order."""
    swapped = {name: getattr(of, name)[order] for name in ("flops", "memory_bytes", "watt", "data_share")}
    own = {
        name: getattr(known, name)[order] for name in ("available", "gains", "down_bits", "up_bits", "holds", "stale")
    }
    return replace(of, clients=tuple(of.clients[at] for at in order), **swapped), replace(known, **own)


def test_numpy_acts_as_torch_learned():
    of = problem(5, shares=(1.0, 2.0), refresh=True, radio=CELL, memory=[4, 3, 1, 0, 4])
    torch.manual_seed(0)
    network = Network(shapes(of, 16))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter)
    policy = Policy(network.acting(), {}, Curves())
    assert set(policy.weights) == set(NAMES)
    own, common = split_features(of, np.random.default_rng(0).normal(size=(7, feature_count(of))).astype(np.float32))
    levels, refresh = policy.logits(own, common)
    with torch.no_grad():
        scores, last, values = network(*(torch.from_numpy(np.ascontiguousarray(part)) for part in (own, common)))
    assert levels == pytest.approx(scores.numpy(), rel=1e-4, abs=1e-3)
    assert refresh == pytest.approx(last.numpy(), rel=1e-4, abs=1e-3)
    assert values.shape == (7,)


def test_the_order_of_devices_does_not_matter():
    of = problem(5, refresh=True, radio=CELL, memory=[4, 3, 1, 0, 4])
    known = seen(of, available=[True, True, True, True, False], holds=np.arange(10).reshape(5, 2) % 3 == 0)
    order = [3, 0, 4, 2, 1]
    other, theirs = permuted(of, known, order)
    policy, loss, age = by_chance(of), np.array(3.5), np.array(1)
    levels, refresh = policy.act(of, features(of, Curves(), known, loss, age), known.available)
    again, same = policy.act(other, features(other, Curves(), theirs, loss, age), theirs.available)
    assert levels[order].tolist() == again.tolist()
    assert refresh == same
    assert len({tuple(one) for one in levels.tolist()}) > 1
    SabppoControl(other, policy, 5)


@given(
    st.lists(st.integers(0, 5), min_size=3, max_size=3),
    st.lists(st.booleans(), min_size=3, max_size=3),
    st.integers(0, 20),
)
def test_what_does_not_fit_is_never_chosen(memory, available, seed):
    of = problem(3, memory=memory)
    controller = SabppoControl(of, by_chance(of, seed), 5)
    plan, state = controller.choose(None, controller.start(), seen(of, available=available, seed=seed))
    for device in plan.devices:
        place = of.clients.index(device.client)
        assert available[place]
        assert of.needs_bytes[of.menu.pairs.index((device.emulator, device.rank))] <= memory[place]
    assert json.loads(json.dumps(state)) == state


@given(st.lists(st.integers(0, 4), min_size=3, max_size=3), st.lists(st.booleans(), min_size=3, max_size=3))
def test_what_is_drawn_is_open(memory, available):
    of = problem(3, memory=memory, shares=(1.0, 2.0), refresh=True)
    mask = np.concatenate(of.menu.masks(of.fits, np.array([available])), axis=-1)
    assert all(part.any(-1).all() for part in of.menu.masks(of.fits, np.array([available])))
    levels, flags = draw(
        torch.randn(1, 3, 9),
        torch.randn(1, 2),
        torch.from_numpy(mask),
        of.menu.levels,
        torch.Generator().manual_seed(0),
    )
    ends = np.cumsum((0, *of.menu.levels[:-1]))
    assert all(mask[0, device, ends[branch] + levels[0, device, branch]] for device in range(3) for branch in range(3))
    assert flags.tolist() in ([0], [1])


def test_probabilities_by_hand():
    """Two devices, the second is not there; pairs 2, steps 2, shares 1, a refresh."""
    sizes, own = (3, 2, 1), torch.tensor([[[0.0, 0, 0, 0, 0, 0]] * 2])
    mask = torch.tensor([[[True, True, False, True, True, True], [True, False, False, True, False, True]]])
    refresh = torch.tensor([[0.0, np.log(3.0)]])
    inside = chosen(own, refresh, mask, sizes, (torch.tensor([[[1, 1, 0], [0, 0, 0]]]), torch.tensor([1])))
    half = -np.log(2)
    assert inside.logs[0].tolist() == pytest.approx([half, 0, half, 0, 0, 0, np.log(0.75)])
    assert inside.matters[0].tolist() == [True, False, True, False, False, False, True]
    outside = chosen(own, refresh, mask, sizes, (torch.tensor([[[0, 1, 0], [0, 0, 0]]]), torch.tensor([0])))
    assert outside.logs[0].tolist() == pytest.approx([half, 0, 0, 0, 0, 0, np.log(0.25)])
    spread = -0.75 * np.log(0.75) - 0.25 * np.log(0.25)
    # Steps are decided half of the time.
    assert float(inside.entropy) == pytest.approx(np.log(2) * 1.5 + spread, abs=1e-6)


def test_kept_as_two_files_without_pickle(tmp_path):
    of = problem(2, radio=CELL)
    policy = by_chance(of)
    write_policy(tmp_path, policy)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["policy.json", "policy.safetensors"]
    again = read_policy(tmp_path)
    assert (again.curves, again.facts) == (policy.curves, policy.facts)
    assert all((again.weights[name] == policy.weights[name]).all() for name in NAMES)
    SabppoControl(of, again, 5)


@pytest.mark.parametrize(
    "damage",
    [
        ("policy.json", b'{"format": 0}'),
        ("policy.json", b'{"format": 2}'),
        ("policy.json", b"[]"),
        ("policy.json", b"{"),
        ("policy.safetensors", b""),
        ("policy.safetensors", b"\x00" * 100),
    ],
)
def test_damage_is_told(damage, tmp_path):
    write_policy(tmp_path, by_chance(problem(2)))
    name, content = damage
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FedPeatError):
        read_policy(tmp_path)


@pytest.mark.parametrize("how", ["missing", "not finite", "shape"])
def test_layers_that_are_not_a_policys_are_told(how, tmp_path):
    of = problem(2)
    policy = by_chance(of)
    weights = dict(policy.weights)
    if how == "missing":
        del weights["refresh.bias"]
    elif how == "not finite":
        weights["refresh.bias"] = weights["refresh.bias"] * np.nan
    else:
        weights["encoder_1.weight"] = weights["encoder_1.weight"][:, 1:]
    write_policy(tmp_path, replace(policy, weights=weights))
    with pytest.raises(ConfigError, match="polic"):
        SabppoControl(of, read_policy(tmp_path), 5)


OTHERS = {
    "one more": ({"devices": 3}, "trained for 2 devices; here are 3"),
    "speed": ({"flops": np.array([1e9, 5e10])}, "FLOP/s of device"),
    "memory": ({"memory_bytes": np.array([4.0, 3.0])}, "memory, bytes of device"),
    "power": ({"watt": np.ones((2, 4))}, "W receiving of device"),
    "links": ({"links": np.array([[1e-11], [3e-11]])}, "mean gain of device 2"),
    "unknown links": ({"links": None}, "the links of its devices"),
    "a cell": ({"radio": None}, "trained with links radio; here: fixed"),
    "another cell": ({"radio": replace(CELL, bandwidth_up_hz=1e6)}, "a cell of"),
    "deadline": ({"deadline_seconds": 3.0}, "deadline_seconds None; here: 3.0"),
    "pairs": ({"menu": Menu((*PAIRS[:3], Pair("large", 9)), (5, 10))}, "control.menu's pairs"),
    "steps": ({"menu": Menu(PAIRS, (5,))}, "control.menu's steps"),
    "shares": ({"menu": Menu(PAIRS, (5, 10), (1.0, 2.0))}, "control.menu's shares"),
    "refresh": ({"menu": Menu(PAIRS, (5, 10), refresh=True)}, "control.menu's refresh"),
    "ladder": ({"kept": np.array([0.25, 0.5])}, "kept of its ladder"),
    "work": ({"step_flops": np.full(4, 3e9)}, "step_flops of its ladder"),
}


@pytest.mark.parametrize("which", OTHERS)
def test_a_policy_for_others_is_refused(which):
    own = replace(problem(2, radio=CELL), flops=np.array([1e9, 4e10]), links=np.array([[1e-11], [2e-11]]))
    changed, says = OTHERS[which]
    policy = by_chance(own)
    SabppoControl(replace(own, data_share=np.array([0.4, 0.6]), rounds=9, clients=("ann", "bob")), policy, 5)
    SabppoControl(replace(own, flops=own.flops * 1.001), policy, 5)
    if "devices" in changed:
        other = replace(problem(3, radio=CELL), links=np.full((3, 1), 1e-11))
    else:
        other = replace(own, **changed)
    with pytest.raises(ConfigError, match="does not fit the run") as caught:
        SabppoControl(other, policy, 5)
    assert says in caught.value.found
    assert "fedpeat control train" in caught.value.remedy


def test_devices_are_told_apart_by_all_that_they_have():
    of = problem(3, seed=4)
    found = devices_of(of)
    assert found.shape == (3, 6)
    assert (np.diff(found[:, 0]) >= 0).all()
    assert set(LAYERS) == set(shapes(of, 4))


def test_what_comes_with_the_package_can_be_read():
    assert set(packaged_policy().weights) == set(NAMES)
