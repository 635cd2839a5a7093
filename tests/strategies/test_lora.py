from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeat.core import ConfigError, GlobalState
from strategies import aggregate
from strategies.exactness import mean_change
from strategies.general import fed_avg
from strategies.lora import fed_sa_lora, fed_sb, ffa_lora, lora_fair, ro_lora
from tests import federations
from tests.oracles import lora as twin

ON_FACTORS = {"ffa_lora": ffa_lora(), "ro_lora": ro_lora(), "fed_sa_lora": fed_sa_lora(), "lora_fair": lora_fair()}


def sent(recipe, number):
    """The parts whose deltas reach the server in a round."""
    half = recipe.client(number)
    kept = {*half.get("fixed", ()), *half.get("personal", ())}
    return [part for part in half.get("train_only", ["A", "B", "other"]) if part not in kept]


def numbers(tensors):
    return {name: tensor.double().numpy() for name, tensor in tensors.items()}


def layers_of(layout):
    return [(pair.module, pair.a, pair.b, pair.scaling) for pair in layout.pairs]


def clients_of(state, updates):
    return [
        (
            update.weight,
            numbers(state.tensors)
            | {name: (state.tensors[name].double() + delta.double()).numpy() for name, delta in update.delta.items()},
        )
        for update in updates
    ]


def run(recipe, state, layout, updates, number=1):
    situation = federations.make_situation(state, layout, number)
    change = mean_change(situation)
    for update in updates:
        change.add(update)
    after = aggregate(recipe, situation, updates).state
    return after, change.error(after)


def cored(layout):
    pairs = tuple(replace(pair, r=f"{pair.module}.lora_A.core") for pair in layout.pairs)
    return replace(layout, pairs=pairs)


@pytest.mark.parametrize("name", ["ffa_lora", "ro_lora", "fed_sa_lora"])
def test_three_rounds_average_what_was_sent_and_leave_the_rest(name):
    recipe, layout = ON_FACTORS[name], federations.make_layout(head=True)
    state = federations.make_state(layout)
    tensors = numbers(state.tensors)
    for number in (1, 2, 3):
        parts = sent(recipe, number)
        updates = federations.make_updates(state, 4, seed=number, weights=[1, 2, 3, 10], layout=layout, parts=parts)
        deltas = [(update.weight, numbers(update.delta)) for update in updates]
        clients = [(weight, {key: tensors[key] + delta[key] for key in delta}) for weight, delta in deltas]
        tensors = twin.average_only(tensors, clients, layout.names(parts))
        state, _ = run(recipe, state, layout, updates, number)
    assert not state.folds
    for key, value in tensors.items():
        np.testing.assert_allclose(state.tensors[key].numpy(), value, rtol=1e-6, atol=1e-6)


def test_client_halves():
    assert ffa_lora().client(5) == {"train_only": ["B", "other"], "fixed": ["A"]}
    assert [ro_lora().client(number)["train_only"][0] for number in (1, 2, 3, 4)] == ["B", "A", "B", "A"]
    assert fed_sa_lora().client(5) == {"personal": ["B"]}
    assert fed_sb().client(5) == {"train_only": ["R", "other"]}
    assert lora_fair().client(5) == {}


@pytest.mark.parametrize("name", ["ffa_lora", "ro_lora"])
@pytest.mark.parametrize("number", [1, 2])
def test_the_mean_of_one_factor_is_the_mean_of_the_products(name, number):
    recipe, layout = ON_FACTORS[name], federations.make_layout()
    state = federations.make_state(layout)
    parts = sent(recipe, number)
    updates = federations.make_updates(state, 4, weights=[1, 2, 3, 10], layout=layout, parts=parts, size=1.0)
    assert run(recipe, state, layout, updates, number)[1] < 1e-6
    both = federations.make_updates(state, 4, weights=[1, 2, 3, 10], size=1.0)
    assert run(fed_avg(), state, layout, both, number)[1] > 0.05


def test_at_loras_start_the_first_round_of_ro_lora_can_change_the_model():
    layout = federations.make_layout()
    state = federations.make_state(layout, zero_b=True)
    updates = federations.make_updates(state, 2, layout=layout, parts=sent(ro_lora(), 1))
    after, _ = run(ro_lora(), state, layout, updates)
    assert all((after.tensors[pair.b] @ after.tensors[pair.a]).any() for pair in layout.pairs)


def test_fed_sb_averages_cores_exactly():
    layout = cored(federations.make_layout(head=True))
    random = np.random.default_rng(0)
    shapes = {pair.r: (3, 3) for pair in layout.pairs} | {"head.weight": (3, 2)}
    state = GlobalState({name: torch.tensor(random.normal(size=shape)).float() for name, shape in shapes.items()})
    for number in (1, 2, 3):
        updates = federations.make_updates(
            state, 3, seed=number, weights=[1, 2, 5], layout=layout, parts=["R", "other"]
        )
        clients = clients_of(state, updates)
        state, error = run(fed_sb(), state, layout, updates, number)
        assert error < 1e-6
        for name, value in twin.average_only(state.tensors, clients, set(state.tensors)).items():
            np.testing.assert_allclose(state.tensors[name].numpy(), value, rtol=1e-6, atol=1e-6)
        for pair in layout.pairs:
            b, a = random.normal(size=(pair.shape[0], 3)), random.normal(size=(3, pair.shape[1]))
            mean = sum(weight * (b @ own[pair.r] @ a) for weight, own in clients) / 8
            np.testing.assert_allclose(b @ state.tensors[pair.r].double().numpy() @ a, mean, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ridge", [0.0, 0.01, 1.0])
def test_three_rounds_of_lora_fair_are_as_the_twin_has_them(ridge):
    recipe, layout = lora_fair(ridge=ridge), federations.make_layout(head=True)
    state = federations.make_state(layout, zero_b=True)
    for number in (1, 2, 3):
        updates = federations.make_updates(state, 4, seed=number, weights=[1, 2, 3, 10], size=1.0)
        wanted = twin.lora_fair(numbers(state.tensors), clients_of(state, updates), layers_of(layout), ridge)
        state, _ = run(recipe, state, layout, updates, number)
        for name, value in wanted.items():
            np.testing.assert_allclose(state.tensors[name].numpy(), value, rtol=1e-4, atol=1e-4)
    assert not state.folds


def test_lora_fair_by_hand():
    layout = federations.make_layout(rank=1, shapes={"m": (1, 1)}, scaling=3.0)
    pair = layout.pairs[0]
    state = GlobalState({pair.a: torch.tensor([[0.0]]), pair.b: torch.tensor([[0.0]])})
    updates = federations.make_updates(state, 2)
    deltas = [{pair.a: torch.tensor([[a]]), pair.b: torch.tensor([[b]])} for a, b in ((1.0, 2.0), (3.0, 6.0))]
    updates = [replace(update, delta=delta) for update, delta in zip(updates, deltas, strict=True)]
    # means 2 and 4, mean product (2 + 18) / 2 = 10, gap 10 - 8 = 2; D = 2 * 2 / (4 + ridge)
    for ridge, correction in ((0.0, 1.0), (4.0, 0.5)):
        after, _ = run(lora_fair(ridge=ridge), state, layout, updates)
        assert after.tensors[pair.a].item() == 2.0
        assert after.tensors[pair.b].item() == pytest.approx(4.0 + correction, rel=1e-6)


@settings(max_examples=40)
@given(
    weights=st.lists(st.integers(1, 10**6), min_size=2, max_size=4),
    size=st.sampled_from([0.01, 0.1, 1.0, 100.0]),
    ridge=st.sampled_from([0.0, 1e-3, 0.01, 1.0, 100.0]),
    seed=st.integers(0, 10**6),
)
def test_lora_fair_is_no_farther_from_the_mean_than_averaging_factors(weights, size, ridge, seed):
    layout = federations.make_layout(rank=2)
    state = federations.make_state(layout, seed=seed)
    updates = federations.make_updates(state, len(weights), seed=seed + 1, weights=weights, size=size)
    mended, plain = run(lora_fair(ridge=ridge), state, layout, updates)[1], run(fed_avg(), state, layout, updates)[1]
    # The change may be a hundredth of the product that it is a change of, of which fp32 has seven digits.
    assert mended <= plain + 1e-4


def test_a_smaller_ridge_comes_nearer_and_moves_b_farther():
    layout = federations.make_layout()
    state = federations.make_state(layout)
    updates = federations.make_updates(state, 4, size=1.0)
    average = run(fed_avg(), state, layout, updates)[0].tensors
    errors, moves = [], []
    for ridge in (0.0, 0.1, 1.0, 10.0, 1e9):
        after, error = run(lora_fair(ridge=ridge), state, layout, updates)
        errors.append(error)
        moves.append(sum(float((after.tensors[pair.b] - average[pair.b]).norm()) for pair in layout.pairs))
    assert errors == sorted(errors)
    assert errors[0] < errors[-1]
    assert moves == sorted(moves, reverse=True)
    assert moves[-1] < 1e-5


@pytest.mark.parametrize("ridge", [0.0, 0.01])
def test_lora_fair_bears_factors_of_lower_rank(ridge):
    layout = federations.make_layout(rank=3)
    state = federations.make_state(layout)
    state = GlobalState({name: tensor.clone() for name, tensor in state.tensors.items()})
    for pair in layout.pairs:
        state.tensors[pair.a][1] = state.tensors[pair.a][0]
        state.tensors[pair.a][2] = 0
    updates = federations.make_updates(state, 3, layout=layout, size=1.0)
    for update in updates:
        for pair in layout.pairs:
            update.delta[pair.a][1] = update.delta[pair.a][0]
            update.delta[pair.a][2] = 0
    after, error = run(lora_fair(ridge=ridge), state, layout, updates)
    _, worse = run(fed_avg(), state, layout, updates)
    assert error < worse
    for pair in layout.pairs:
        wanted = twin.lora_fair(numbers(state.tensors), clients_of(state, updates), layers_of(layout), ridge)[pair.b]
        np.testing.assert_allclose(after.tensors[pair.b].numpy(), wanted, rtol=1e-4, atol=1e-4)


def test_lora_fair_with_one_client_is_that_client():
    layout = federations.make_layout()
    state = federations.make_state(layout)
    updates = federations.make_updates(state, 1, weights=[3])
    after, error = run(lora_fair(), state, layout, updates)
    assert error < 1e-5
    for name, delta in updates[0].delta.items():
        torch.testing.assert_close(after.tensors[name], state.tensors[name] + delta)


@pytest.mark.parametrize("name", ON_FACTORS)
@pytest.mark.parametrize("cores", [False, True])
def test_layouts_without_factors_are_refused(name, cores):
    layout = federations.make_layout()
    refused = cored(layout) if cores else replace(layout, pairs=())
    with pytest.raises(ConfigError, match=rf"strategy={name} works on LoRA's factors.*use peft=lora"):
        aggregate(ON_FACTORS[name], federations.make_situation(federations.make_state(layout), refused), [])


@pytest.mark.parametrize("pairs", [False, True])
def test_fed_sb_refuses_layouts_without_cores(pairs):
    layout = federations.make_layout()
    refused = layout if pairs else replace(layout, pairs=())
    with pytest.raises(ConfigError, match=r"averages square cores.*use peft=lora_sb"):
        aggregate(fed_sb(), federations.make_situation(federations.make_state(layout), refused), [])


def test_a_negative_ridge_is_refused():
    with pytest.raises(ConfigError, match=r"strategy\.ridge=-1"):
        lora_fair(ridge=-1)


def test_facts_say_what_a_recipe_is():
    recipes = {**ON_FACTORS, "fed_sb": fed_sb()}
    exact = {
        "ffa_lora": "yes",
        "ro_lora": "yes",
        "fed_sa_lora": "personal",
        "lora_fair": "approximate",
        "fed_sb": "yes",
    }
    assert {name: recipe.facts.exact for name, recipe in recipes.items()} == exact
    assert [name for name, recipe in recipes.items() if not recipe.facts.linear] == ["lora_fair"]
    assert [name for name, recipe in recipes.items() if recipe.facts.client_state] == ["fed_sa_lora"]
