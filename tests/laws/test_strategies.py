"""What every option of `conf/strategy` keeps: each is found there, built, and run on random LoRA federations.

Which laws an option is held to follows from its `Facts`.
"""

import dataclasses
import inspect
import json
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeat.core import EngineError, FedPeatError, GlobalState, Layout, read_tensors, write_tensors
from strategies import Situation
from strategies.aggregate import seen_by_recipe
from strategies.recipe import WEIGHTS
from tests.federations import make_layout
from tests.laws.options import (
    FACTS,
    FILES,
    averages_tensors,
    builder_of,
    config_of,
    copied,
    distance,
    factored,
    federation,
    finite,
    folded,
    held,
    holds_products,
    is_mean,
    options,
    play,
    recipe_of,
    same,
    same_tensors,
    size_of,
    updates_for,
    wanted,
)

pytestmark = pytest.mark.usefixtures("one_thread")


# What is written down


@pytest.mark.parametrize("name", FILES)
def test_it_builds_and_is_called_what_its_file_is(name):
    recipe = recipe_of(name)
    assert recipe.name == name
    assert recipe.weight_by in WEIGHTS
    assert recipe.facts.family in ("general", "lora", "robust", "flower")
    assert recipe.facts.needs in ("any", "pairs", "cores")
    assert recipe.facts.server_takes_part in ("yes", "no", "needed")
    assert recipe.facts.source


@pytest.mark.parametrize("name", FILES)
def test_its_file_repeats_the_builders_defaults_and_explains_each_key(name):
    lines = FILES[name].read_text().splitlines()
    assert re.match(r"# \S.*\.$", lines[0])
    assert all("  # " in line for line in lines[2:] if line and not line.startswith("#"))
    written = {key: value for key, value in config_of(name).items() if key != "_target_"}
    parameters = inspect.signature(builder_of(name)).parameters
    empty = inspect.Parameter.empty
    assert written == {key: "???" if value.default is empty else value.default for key, value in parameters.items()}


@pytest.mark.parametrize("name", FILES)
def test_its_builder_says_where_the_rule_is_from_and_where_it_departs(name):
    text = builder_of(name).__doc__
    assert "Source:" in text
    assert "Departures:" in text


@options()
def test_its_client_half_is_plain_data(name):
    for number in (1, 2, 3):
        half = recipe_of(name).client(number)
        assert json.loads(json.dumps(half)) == half
        known = {"proximal_mu", "train_only", "fixed", "personal", "control_variates", "probe_rows", "tail_penalty"}
        assert set(half) <= known


# Every option


@options()
def test_three_rounds_from_loras_start_stay_in_form(name):
    fed = federation(name, zero_b=True)
    before = fed.state
    for number in (1, 2, 3):
        fed = fed._replace(state=play(fed, updates_for(fed, size_of(name), number, seed=number), number))
        assert list(fed.state.tensors) == list(before.tensors)
        assert all(torch.isfinite(tensor).all() for tensor in fed.state.memory.values())
        for key, tensor in fed.state.tensors.items():
            assert (tensor.dtype, tensor.shape) == (torch.float32, before.tensors[key].shape)
        shapes = {pair.module: pair.shape for pair in fed.layout.pairs}
        assert all(fold.shape == shapes[module] for module, fold in fed.state.folds.items())
        assert all(fold.dtype == torch.float32 for fold in fed.state.folds.values())


@options()
def test_three_rounds_learn_something(name):
    fed = federation(name, zero_b=True)
    state = fed.state
    for number in (1, 2, 3):
        updates = updates_for(fed, size_of(name), number, seed=1)
        state = play(fed._replace(state=state), updates, number)
    assert any(not torch.equal(state.tensors[key], fed.state.tensors[key]) for key in state.tensors)


@options()
def test_what_it_sends_beside_the_tensors_is_finite_and_named_for_them(name):
    fed = federation(name)
    for number in (1, 2):
        extra = fed.recipe.sends(seen_by_recipe(Situation(number, fed.state, fed.layout, 20, 7)))
        for key, tensor in extra.items():
            assert tensor.shape == fed.state.tensors[key].shape
            assert torch.isfinite(tensor).all()
        fed = fed._replace(state=play(fed, updates_for(fed, size_of(name), number), number))


@options()
def test_equal_calls_give_equal_bits_and_leave_their_arguments_alone(name):
    fed = federation(name)
    fed = fed._replace(state=play(fed, updates_for(fed, size_of(name), seed=3)))
    updates = updates_for(fed, size_of(name), 2)
    state = [copied(part) for part in (fed.state.tensors, fed.state.folds, fed.state.memory)]
    sent = [(copied(update.delta), copied(update.extras)) for update in updates]
    once, again = play(fed, updates, 2), play(fed, updates, 2)
    assert same(once, again)
    assert same(fed.state, GlobalState(*state))
    for update, (delta, extras) in zip(updates, sent, strict=True):
        assert same_tensors(update.delta, delta)
        assert same_tensors(update.extras, extras)


@options()
def test_a_state_written_down_and_read_again_goes_on_to_the_bit(name, tmp_path):
    fed = federation(name)
    for number in (1, 2):
        fed = fed._replace(state=play(fed, updates_for(fed, size_of(name), number, seed=number), number))
    parts = {}
    for part in ("tensors", "folds", "memory"):
        write_tensors(tmp_path / part, getattr(fed.state, part))
        parts[part] = read_tensors(tmp_path / part)
    resumed = fed._replace(state=GlobalState(**parts))
    assert same(resumed.state, fed.state)
    updates = updates_for(fed, size_of(name), 3, seed=3)
    assert same(play(resumed, updates, 3), play(fed, updates, 3))


@options(lambda facts: facts.family != "robust")
def test_the_order_of_replies_does_not_matter(name):
    """Robust rules may choose clients, and of equals the first in the plan's order, in which all replies are folded."""
    fed = federation(name)
    updates = updates_for(fed, size_of(name), weights=list(range(1, 1 + size_of(name))))
    clients = [update for update in updates if update.client != "server"]
    turned = [*reversed(clients), *updates[len(clients) :]]
    assert distance(held(fed, play(fed, turned)), held(fed, play(fed, updates))) < 2e-6


@options()
def test_only_the_ratios_of_weights_count(name):
    fed = federation(name)
    weights = list(range(1, 1 + size_of(name)))
    once, twice, thrice = (
        play(fed, updates_for(fed, size_of(name), weights=[factor * weight for weight in weights]))
        for factor in (1, 2, 3)
    )
    assert same(once, twice)
    assert distance(held(fed, thrice), held(fed, once)) < 2e-6


@options(lambda facts: facts.server_takes_part == "yes")
def test_the_servers_own_update_counts_like_any_other(name):
    fed = federation(name)
    clients = updates_for(fed, size_of(name))
    joined = [*clients[:-1], dataclasses.replace(clients[-1], client="server")]
    assert same(play(fed, joined), play(fed, clients))


@options()
def test_no_updates_are_told(name):
    fed = federation(name)
    with pytest.raises(EngineError, match="min_replies=1"):
        play(fed, [])


@options()
def test_one_survivor_is_enough_or_the_number_needed_is_told(name):
    fed = federation(name)
    try:
        after = play(fed, updates_for(fed, size_of(name))[-1:])
    except EngineError as error:
        assert re.search(r"\d", error.asked), error  # noqa: PT017
        assert error.remedy  # noqa: PT017
    else:
        assert finite(held(fed, after))


@options()
def test_weights_of_0_are_told_or_do_not_matter(name):
    fed = federation(name)
    updates = updates_for(fed, size_of(name))
    weightless = [dataclasses.replace(update, weight=0.0) for update in updates]
    try:
        after = play(fed, weightless)
    except EngineError as error:
        assert "weight" in str(error)  # noqa: PT017
    else:
        assert not is_mean(FACTS[name])
        assert same(after, play(fed, updates))


@options(lambda facts: facts.needs != "any")
def test_rules_on_lora_tell_what_they_miss_before_the_first_update(name):
    tensors = {"head.weight": torch.zeros(3, 2)}
    nothing = Situation(1, GlobalState(tensors), Layout((), ("head.weight",), 0))
    with pytest.raises(FedPeatError, match="peft="):
        recipe_of(name).reduce.start(nothing)


@options(lambda facts: facts.needs == "pairs")
def test_rules_on_factors_refuse_square_cores(name):
    layout = make_layout()
    pairs = tuple(dataclasses.replace(pair, r=f"{pair.module}.lora_A.core") for pair in layout.pairs)
    cores = GlobalState({pair.r: torch.zeros(3, 3) for pair in pairs})
    with pytest.raises(FedPeatError, match="peft="):
        recipe_of(name).reduce.start(Situation(1, cores, dataclasses.replace(layout, pairs=pairs)))


@pytest.mark.parametrize("name", [name for name in FACTS if recipe_of(name).mixes_ranks])
def test_ranks_are_mixed_where_it_says_so(name):
    fed = federation(name)
    for number in (1, 2):
        ranks = [1 + index % fed.layout.rank for index in range(size_of(name))]
        fed = fed._replace(state=play(fed, updates_for(fed, size_of(name), number, ranks=ranks), number))
        assert finite(held(fed, fed.state))


# Means


@options(averages_tensors)
@settings(max_examples=5)
@given(seed=st.integers(0, 10**6), size=st.sampled_from([0.1, 0.0]))
def test_equal_deltas_give_that_delta(name, seed, size):
    fed = federation(name, seed, as_a_mean=True)
    updates = updates_for(fed, 4, seed=seed, weights=[1, 7, 2, 5], equal=True, size=size)
    step = folded(fed, updates)
    assert set(step.tensors) == set(updates[0].delta)
    for key, delta in updates[0].delta.items():
        torch.testing.assert_close(step.tensors[key], delta, rtol=1e-6, atol=0)


@options(averages_tensors)
@settings(max_examples=5)
@given(seed=st.integers(0, 10**6), weight=st.integers(1, 10**6))
def test_one_client_alone_gets_its_delta(name, seed, weight):
    fed = federation(name, seed, as_a_mean=True)
    (update,) = updates_for(fed, 1, seed=seed, weights=[weight])
    for key, taken in folded(fed, [update]).tensors.items():
        torch.testing.assert_close(taken, update.delta[key], rtol=1e-6, atol=0)


@options(holds_products)
@settings(max_examples=5)
@given(seed=st.integers(0, 10**6), size=st.sampled_from([0.1, 0.0, 3.0]))
def test_equal_products_give_that_product(name, seed, size):
    fed = federation(name, seed, as_a_mean=True)
    updates = updates_for(fed, 4, seed=seed, weights=[1, 7, 2, 5], equal=True, size=size)
    assert distance(held(fed, play(fed, updates)), wanted(fed, updates[:1])) < 1e-5


@options(holds_products)
@settings(max_examples=5)
@given(seed=st.integers(0, 10**6), weight=st.integers(1, 10**6))
def test_one_client_alone_gets_its_product(name, seed, weight):
    fed = federation(name, seed, as_a_mean=True)
    updates = updates_for(fed, 1, seed=seed, weights=[weight])
    assert distance(held(fed, play(fed, updates)), wanted(fed, updates)) < 1e-5


# Robust rules


@options(lambda facts: facts.family == "robust")
@settings(max_examples=5)
@given(seed=st.integers(0, 10**6), size=st.sampled_from([0.001, 0.1, 30.0]))
def test_equal_deltas_give_that_direction_and_no_more(name, seed, size):
    fed = federation(name, seed)
    updates = updates_for(fed, 15, seed=seed, equal=True, size=size)
    step, delta = (
        np.concatenate([tensors[key].numpy().astype(float).ravel() for key in sorted(updates[0].delta)])
        for tensors in (folded(fed, updates).tensors, updates[0].delta)
    )
    share = step @ delta / (delta @ delta)
    assert 0 < share < 1 + 1e-5
    assert np.linalg.norm(step - share * delta) < 1e-5 * np.linalg.norm(step)


# Exactness


@options(lambda facts: facts.exact == "yes")
@settings(max_examples=5)
@given(seed=st.integers(0, 10**6), weights=st.lists(st.integers(1, 99), min_size=2, max_size=5))
def test_exact_rules_apply_the_mean_of_the_products(name, seed, weights):
    fed = federation(name, seed)
    for number in (1, 2, 3):
        updates = updates_for(fed, len(weights), number, seed=seed + number, weights=weights)
        after = play(fed, updates, number)
        assert distance(held(fed, after), wanted(fed, updates), origin=held(fed, fed.state)) < 1e-5
        fed = fed._replace(state=after)


@options(lambda facts: facts.exact == "best rank-r")
@settings(max_examples=5)
@given(seed=st.integers(0, 10**6), weights=st.lists(st.integers(1, 99), min_size=2, max_size=5))
def test_best_approximations_are_the_best_of_their_rank(name, seed, weights):
    fed = federation(name, seed)
    updates = updates_for(fed, len(weights), seed=seed, weights=weights, size=1.0)
    found, means = held(fed, play(fed, updates)), wanted(fed, updates)
    for pair in factored(fed):
        mean = means[pair.module]
        lost = np.linalg.norm(np.linalg.svd(mean, compute_uv=False)[fed.layout.rank :])  # Eckart and Young
        assert np.linalg.norm(found[pair.module] - mean) <= lost + 1e-5 * np.linalg.norm(mean)


@options(lambda facts: facts.exact == "approximate")
def test_approximations_are_nearer_than_the_mean_of_the_factors(name):
    far = []
    for option in (name, "fed_avg"):
        errors = []
        for seed in range(5):
            fed = federation(option, seed, as_a_mean=True)
            updates = updates_for(fed, 4, seed=seed, weights=[1, 7, 2, 5], size=0.5)
            errors.append(distance(held(fed, play(fed, updates)), wanted(fed, updates)))
        far.append(np.mean(errors))
    assert far[0] < far[1]
