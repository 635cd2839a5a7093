import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeat.core import ClientUpdate, ConfigError, EngineError, GlobalState
from strategies import aggregate, start
from strategies.aggregate import seen_by_recipe
from strategies.drift import fed_nova, scaffold
from strategies.general import fed_avg
from tests.federations import make_layout, make_situation, make_state, make_updates
from tests.oracles import drift as oracle
from tests.oracles.drift import as_arrays

LAYOUT = make_layout(head=True)
NOWHERE = make_layout(shapes={})


def with_variates(updates, seed):
    generator = torch.Generator().manual_seed(seed)
    draw = {u.client: {n: torch.randn(d.shape, generator=generator) for n, d in u.delta.items()} for u in updates}
    return [dataclasses.replace(update, extras=draw[update.client]) for update in updates]


def moved(twin, update):
    return {name: value + as_arrays(update.delta)[name] for name, value in twin.items()}


def sent(recipe, state, number=1, layout=LAYOUT):
    return recipe.sends(seen_by_recipe(make_situation(state, layout, number)))


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(5, 500), st.sampled_from([1.0, 0.5]))
def test_scaffold_is_its_twin_in_three_rounds(seed, count, population, rate):
    recipe = scaffold(server_learning_rate=rate)
    state = start(recipe, make_state(LAYOUT, seed).tensors)
    twin = as_arrays(state.tensors)
    variate = {name: np.zeros(value.shape) for name, value in twin.items()}
    for number in (1, 2, 3):
        updates = with_variates(make_updates(state, count, seed=seed + number), seed + number)
        state = aggregate(recipe, make_situation(state, LAYOUT, number, population), updates).state
        locals_, changes = [moved(twin, update) for update in updates], [as_arrays(update.extras) for update in updates]
        twin, variate = oracle.scaffold_round(twin, variate, locals_, changes, population, rate)
        for name, value in sent(recipe, state, number + 1).items():
            np.testing.assert_allclose(value.numpy(), variate[name], atol=3e-6)
    for name, value in twin.items():
        np.testing.assert_allclose(state.tensors[name].numpy(), value, atol=3e-6)


def test_the_first_round_sends_zeros_for_every_travelling_tensor():
    state = start(scaffold(), make_state(LAYOUT).tensors)
    variates = sent(scaffold(), state)
    assert {name: value.shape for name, value in variates.items()} == {n: t.shape for n, t in state.tensors.items()}
    assert not any(value.any() for value in variates.values())
    assert scaffold().client(1) == {"control_variates": True}


def test_a_variate_is_kept_for_what_a_round_does_not_send():
    state = GlobalState({"v": torch.ones(1), "w": torch.ones(1)}, {}, {"reducer|v": torch.tensor([5.0])})
    update = ClientUpdate("c0", 1, {"w": torch.ones(1)}, 1.0, extras={"w": torch.tensor([2.0])})
    after = aggregate(scaffold(), make_situation(state, NOWHERE, population=4), [update]).state
    assert {name: value.item() for name, value in sent(scaffold(), after, 2).items()} == {"v": 5.0, "w": 0.5}


def test_the_server_counts_in_the_mean_without_a_variate():
    state = make_state(LAYOUT)
    clients = with_variates(make_updates(state, 2), 3)
    server = dataclasses.replace(make_updates(state, 1, seed=9)[0], client="server")
    situation = make_situation(start(scaffold(), state.tensors), LAYOUT, population=8)
    alone, joined = (aggregate(scaffold(), situation, updates).state for updates in (clients, [*clients, server]))
    plain = aggregate(fed_avg(weight_by="equal"), situation, [*clients, server]).state
    assert all(torch.equal(joined.tensors[name], plain.tensors[name]) for name in plain.tensors)
    assert all(torch.equal(joined.memory[name], alone.memory[name]) for name in alone.memory)


@pytest.mark.parametrize("kept", [0, 1])
def test_a_client_without_its_variates_is_told(kept):
    update = with_variates(make_updates(make_state(LAYOUT), 1), 3)[0]
    update = dataclasses.replace(update, extras=dict(list(update.extras.items())[:kept]))
    with pytest.raises(EngineError, match="control variate for each tensor that 'c00' sent"):
        aggregate(scaffold(), make_situation(make_state(LAYOUT), LAYOUT), [update])


def test_a_variate_of_another_shape_is_told():
    state = GlobalState({"w": torch.ones(2)})
    update = ClientUpdate("c0", 1, {"w": torch.ones(2)}, 1.0, extras={"w": torch.ones(1)})
    with pytest.raises(EngineError, match="mis-shaped: w"):
        aggregate(scaffold(), make_situation(state, NOWHERE), [update])


CURVES, CENTRES = (0.2, 1.0, 3.0), (-4.0, 1.0, 2.0)
BEST = sum(h * b for h, b in zip(CURVES, CENTRES, strict=True)) / sum(CURVES)


def test_the_recorded_mean_gradient_is_the_papers_option_two():
    local, after = oracle.scaffold_client(2.0, 0.3, -0.5, lambda x: 3 * (x - 1), 4, 0.05)
    path, gradients = 2.0, []
    for _ in range(4):
        gradients.append(3 * (path - 1))
        path -= 0.05 * (gradients[-1] + 0.5 + 0.3)
    assert path == pytest.approx(local)
    assert np.mean(gradients) == pytest.approx(after)


def quadratics(recipe, rounds, corrected):
    """Clients that minimise `h (x - b)^2 / 2` by ten steps of plain SGD; where the federation ends."""
    state = start(recipe, {"w": torch.zeros(1)})
    own = [0.0] * len(CURVES)
    for number in range(1, rounds + 1):
        here, updates = float(state.tensors["w"]), []
        common = float(sent(recipe, state, number, NOWHERE)["w"]) if corrected else 0.0
        for index, (curve, centre) in enumerate(zip(CURVES, CENTRES, strict=True)):
            gradient = lambda x, h=curve, b=centre: h * (x - b)  # noqa: E731
            before = own[index] if corrected else 0.0
            local, after = oracle.scaffold_client(here, common, before, gradient, 10, 0.1)
            extras = {"w": torch.tensor([after - before])} if corrected else {}
            updates.append(ClientUpdate(f"c{index}", number, {"w": torch.tensor([local - here])}, 1.0, {}, extras))
            own[index] = after
        state = aggregate(recipe, make_situation(state, NOWHERE, number, len(CURVES)), updates).state
    return float(state.tensors["w"])


def test_scaffold_finds_the_optimum_where_averaging_drifts_off():
    assert quadratics(scaffold(), 60, True) == pytest.approx(BEST, abs=1e-4)
    assert abs(quadratics(fed_avg(), 60, False) - BEST) > 0.4


def worked(updates, work):
    pairs = zip(updates, work, strict=True)
    return [dataclasses.replace(update, metrics={"effective_steps": steps}) for update, steps in pairs]


@settings(max_examples=20)
@given(
    st.integers(0, 10**6),
    st.lists(st.tuples(st.floats(0.5, 200), st.integers(1, 5000)), min_size=1, max_size=5),
)
def test_nova_is_its_twin_in_three_rounds(seed, clients):
    work, weights = [float(steps) for steps, _ in clients], [float(weight) for _, weight in clients]
    state = make_state(LAYOUT, seed)
    twin = as_arrays(state.tensors)
    for number in (1, 2, 3):
        updates = worked(make_updates(state, len(clients), seed=seed + number, weights=weights), work)
        state = aggregate(fed_nova(), make_situation(state, LAYOUT, number), updates).state
        twin = oracle.nova_round(twin, [moved(twin, update) for update in updates], work, weights)
    for name, value in twin.items():
        # Entries may grow with the ratio of the most work to the least.
        np.testing.assert_allclose(state.tensors[name].numpy(), value, rtol=1e-6, atol=1e-5)


@given(st.integers(0, 10**6), st.lists(st.integers(1, 5000), min_size=1, max_size=5), st.integers(1, 100))
@settings(max_examples=20)
def test_equal_work_is_plain_averaging(seed, weights, steps):
    state = make_state(LAYOUT, seed)
    updates = worked(make_updates(state, len(weights), seed=seed, weights=weights), [float(steps)] * len(weights))
    situation = make_situation(state, LAYOUT)
    nova, plain = (aggregate(recipe, situation, updates).state.tensors for recipe in (fed_nova(), fed_avg()))
    for name in plain:
        torch.testing.assert_close(nova[name], plain[name], rtol=1e-6, atol=1e-7)


def test_nova_by_hand():
    # Directions 3 / 1 and 6 / 3, in shares of 1/4 and 3/4; tau_eff = 1/4 + 9/4.
    updates = [
        ClientUpdate("c0", 1, {"w": torch.tensor([3.0])}, 1.0, {"effective_steps": 1.0}),
        ClientUpdate("c1", 1, {"w": torch.tensor([6.0])}, 3.0, {"effective_steps": 3.0}),
    ]
    state = GlobalState({"w": torch.zeros(1)})
    after = aggregate(fed_nova(), make_situation(state, NOWHERE), updates).state
    assert after.tensors["w"].item() == 2.5 * (0.25 * 3 + 0.75 * 2)


def uneven(recipe, rounds=200):
    """Clients with minima -1 and 1 that take 2 and 20 small steps of SGD; where the federation ends."""
    state = GlobalState({"w": torch.zeros(1)})
    for number in range(1, rounds + 1):
        here, updates = float(state.tensors["w"]), []
        for index, (centre, steps) in enumerate([(-1.0, 2), (1.0, 20)]):
            local, _ = oracle.scaffold_client(here, 0.0, 0.0, lambda x, b=centre: x - b, steps, 0.01)
            delta = {"w": torch.tensor([local - here])}
            updates.append(ClientUpdate(f"c{index}", number, delta, 1.0, {"effective_steps": float(steps)}))
        state = aggregate(recipe, make_situation(state, NOWHERE, number), updates).state
    return float(state.tensors["w"])


def test_nova_takes_the_bias_of_uneven_work_away():
    assert uneven(fed_avg()) > 0.7
    assert abs(uneven(fed_nova())) < 0.06


@pytest.mark.parametrize(("steps", "momentum"), [(1, 0.9), (7, 0.0), (10, 0.9), (40, 0.5)])
def test_the_norm_of_weights_has_the_closed_form(steps, momentum):
    closed = (steps - momentum * (1 - momentum**steps) / (1 - momentum)) / (1 - momentum)
    assert oracle.norm_of_weights(steps, momentum) == pytest.approx(closed)


@pytest.mark.parametrize("metrics", [{}, {"effective_steps": 0.0}, {"effective_steps": float("nan")}])
def test_missing_or_impossible_work_is_told(metrics):
    update = dataclasses.replace(make_updates(make_state(LAYOUT), 1)[0], metrics=metrics)
    with pytest.raises(EngineError, match="effective_steps of 'c00'"):
        aggregate(fed_nova(), make_situation(make_state(LAYOUT), LAYOUT), [update])


@pytest.mark.parametrize("recipe", [scaffold(), fed_nova()])
def test_weights_of_0_are_told(recipe):
    updates = worked(with_variates(make_updates(make_state(LAYOUT), 2, weights=[0.0, 0.0]), 1), [3.0, 3.0])
    with pytest.raises(EngineError, match="weights sum to 0"):
        aggregate(recipe, make_situation(make_state(LAYOUT), LAYOUT), updates)


def test_keywords_out_of_range_are_told():
    with pytest.raises(ConfigError, match="server_learning_rate=-1"):
        scaffold(server_learning_rate=-1)
    assert fed_nova().weight_by == "rows"
