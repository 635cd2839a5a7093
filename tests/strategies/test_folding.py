import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeat.core import ClientUpdate, ConfigError, EngineError, digest
from strategies import aggregate
from strategies.folding import fed_ex_lora, flora, fr_lora
from tests import federations
from tests.oracles import folding as twin

RECIPES = {
    "flora": flora(),
    "fed_ex_lora": fed_ex_lora(),
    "fr_lora": fr_lora(),
    "fr_lora of products": fr_lora(mean_of="products"),
}
EXACT = [name for name, recipe in RECIPES.items() if recipe.facts.exact == "yes"]
every_rule = pytest.mark.parametrize("name", RECIPES)
every_exact_rule = pytest.mark.parametrize("name", EXACT)


def numbers(tensors):
    return {name: tensor.double().numpy() for name, tensor in tensors.items()}


def layers_of(layout):
    return [(pair.module, pair.a, pair.b, pair.scaling) for pair in layout.pairs]


def clients_of(state, updates):
    """What clients ended with, at their own ranks: first rows and columns of the global factors, plus delta."""
    clients = []
    for update in updates:
        own = {}
        for name, delta in update.delta.items():
            start = state.tensors[name][tuple(slice(size) for size in delta.shape)]
            own[name] = start.double().numpy() + delta.double().numpy()
        clients.append((update.weight, own))
    return clients


def added(state, layout):
    """What each layer adds to its pre-trained weight."""
    return {
        layer[0]: twin.layer_weight(numbers(state.tensors), numbers(state.folds), layer) for layer in layers_of(layout)
    }


def twin_step(name, federation, clients, layers, start, after):
    tensors, folds = federation
    if name == "flora":
        return twin.flora(tensors, folds, clients, layers, numbers(after.tensors))
    if name == "fed_ex_lora":
        return twin.fed_ex_lora(tensors, folds, clients, layers)
    return twin.fr_lora(tensors, folds, clients, layers, start, "products" if "products" in name else "factors")


def step(recipe, state, layout, updates, number=1, seed=0):
    return aggregate(recipe, federations.make_situation(state, layout, number, seed=seed), updates).state


def three_rounds(name, layout, state, **options):
    """Run rule and twin side by side; the twin follows its own state, the clients' work is the same."""
    start, federation = numbers(state.tensors), (numbers(state.tensors), {})
    for number in (1, 2, 3):
        updates = federations.make_updates(state, 4, seed=number, layout=layout, **options)
        clients = clients_of(state, updates)
        after = step(RECIPES[name], state, layout, updates, number)
        federation = twin_step(name, federation, clients, layers_of(layout), start, after)
        state = after
    return state, federation


@every_rule
@pytest.mark.parametrize("zero_b", [True, False])
def test_three_rounds_are_as_the_twin_has_them(name, zero_b):
    layout = federations.make_layout(rank=3, head=True)
    state = federations.make_state(layout, zero_b=zero_b)
    state, (tensors, folds) = three_rounds(name, layout, state, weights=[1, 2, 3, 10])
    assert set(state.folds) == {"m.0", "m.1"}
    for module, fold in folds.items():
        np.testing.assert_allclose(state.folds[module].numpy(), fold, rtol=1e-5, atol=1e-5)
    for tensor, value in tensors.items():
        np.testing.assert_allclose(state.tensors[tensor].numpy(), value, rtol=1e-5, atol=1e-5)


def test_flora_mixes_ranks_over_three_rounds():
    layout = federations.make_layout(rank=4)
    state, (_, folds) = three_rounds("flora", layout, federations.make_state(layout), ranks=[1, 4, 2, 3])
    for module, fold in folds.items():
        np.testing.assert_allclose(state.folds[module].numpy(), fold, rtol=1e-5, atol=1e-5)


@every_exact_rule
@settings(max_examples=40)
@given(
    weights=st.lists(st.integers(1, 10**6), min_size=1, max_size=4),
    size=st.sampled_from([1e-4, 0.1, 1.0, 1e3]),
    seed=st.integers(0, 10**6),
)
def test_layers_change_by_the_mean_of_the_clients_changes(name, weights, size, seed):
    layout = federations.make_layout(rank=2)
    state = federations.make_state(layout, seed=seed)
    updates = federations.make_updates(state, len(weights), seed=seed + 1, weights=weights, size=size)
    clients, layers = clients_of(state, updates), layers_of(layout)
    after = added(step(RECIPES[name], state, layout, updates), layout)
    for layer in layers:
        wanted = twin.mean_product(clients, layer)
        scale = np.abs(wanted).max() + np.abs(added(state, layout)[layer[0]]).max()
        np.testing.assert_allclose(after[layer[0]], wanted, rtol=0, atol=1e-5 * scale)


def test_fr_lora_of_factors_is_off_the_mean_change():
    layout = federations.make_layout()
    state = federations.make_state(layout)
    updates = federations.make_updates(state, 3, size=1.0)
    errors = {}
    for name in ("fr_lora", "fr_lora of products"):
        after = step(RECIPES[name], state, layout, updates)
        federation = numbers(after.tensors), numbers(after.folds)
        before = numbers(state.tensors), {}
        errors[name] = twin.relative_error(before, federation, clients_of(state, updates), layers_of(layout))
    assert errors["fr_lora"] > 0.05
    assert errors["fr_lora of products"] < 1e-6


@every_rule
def test_one_client_leaves_its_own_product(name):
    layout = federations.make_layout()
    state = federations.make_state(layout)
    updates = federations.make_updates(state, 1, weights=[7])
    after = added(step(RECIPES[name], state, layout, updates), layout)
    for layer in layers_of(layout):
        np.testing.assert_allclose(after[layer[0]], twin.mean_product(clients_of(state, updates), layer), atol=1e-5)


@every_rule
def test_layers_are_as_before_when_no_client_changed_anything(name):
    layout = federations.make_layout(head=True)
    state = federations.make_state(layout)
    after = step(RECIPES[name], state, layout, federations.make_updates(state, 3, size=0.0))
    for module, before in added(state, layout).items():
        np.testing.assert_allclose(added(after, layout)[module], before, atol=1e-5)
    assert torch.equal(after.tensors["head.weight"], state.tensors["head.weight"])


def test_fed_ex_folds_nothing_when_all_clients_are_alike():
    layout = federations.make_layout()
    state = federations.make_state(layout)
    one = federations.make_updates(state, 1, size=1.0)[0]
    updates = [replace(one, client=f"c{index}", weight=float(index + 1)) for index in range(3)]
    after = step(RECIPES["fed_ex_lora"], state, layout, updates)
    assert max(float(fold.abs().max()) for fold in after.folds.values()) < 1e-5
    assert digest(after.tensors) != digest(state.tensors)


@every_rule
def test_only_lora_layers_take_folds_and_others_are_averaged(name):
    layout = federations.make_layout(head=True)
    state = federations.make_state(layout)
    updates = federations.make_updates(state, 3, weights=[1, 1, 2])
    after = step(RECIPES[name], state, layout, updates)
    assert {module: tuple(fold.shape) for module, fold in after.folds.items()} == federations.SHAPES
    assert all(fold.dtype is torch.float32 for fold in after.folds.values())
    assert not after.memory
    mean = twin.mean(clients_of(state, updates), "head.weight")
    np.testing.assert_allclose(after.tensors["head.weight"].numpy(), mean, rtol=1e-6)


@pytest.mark.parametrize("name", ["fr_lora", "fr_lora of products"])
def test_fr_lora_never_moves_the_factors(name):
    layout = federations.make_layout(head=True)
    state = federations.make_state(layout)
    after = step(RECIPES[name], state, layout, federations.make_updates(state, 3))
    for factor in layout.names("AB"):
        assert torch.equal(after.tensors[factor], state.tensors[factor])


def test_flora_starts_as_lora_does():
    shapes = {"m.0": (60, 50), "m.1": (40, 70), "m.2": (40, 70)}
    layout = federations.make_layout(rank=8, shapes=shapes)
    state = federations.make_state(layout)
    after = step(RECIPES["flora"], state, layout, federations.make_updates(state, 2))
    for pair in layout.pairs:
        a, bound = after.tensors[pair.a], pair.shape[1] ** -0.5
        assert not after.tensors[pair.b].any()
        assert 0.9 * bound < float(a.abs().max()) < bound * 1.001
        assert float(a.std()) == pytest.approx(bound / 3**0.5, rel=0.1)
    # HF peft draws with Kaiming's rule at slope sqrt(5)
    lora = torch.nn.init.kaiming_uniform_(torch.empty(8, 5000), a=5**0.5, generator=torch.Generator().manual_seed(0))
    assert float(lora.abs().max()) == pytest.approx(5000**-0.5, rel=1e-3)


def test_floras_new_start_follows_seed_round_and_layer_and_nothing_else():
    layout = federations.make_layout(shapes={"m.0": (6, 5), "m.1": (6, 5)})
    state = federations.make_state(layout)

    def start(number, seed, deltas=1, name="m.0.lora_A.weight"):
        updates = federations.make_updates(state, 2, seed=deltas)
        return step(RECIPES["flora"], state, layout, updates, number, seed).tensors[name]

    assert torch.equal(start(1, 0), start(1, 0, deltas=2))
    assert not torch.allclose(start(1, 0), start(2, 0))
    assert not torch.allclose(start(1, 0), start(1, 1))
    assert not torch.allclose(start(1, 0), start(1, 0, name="m.1.lora_A.weight"))


@every_rule
def test_updates_stay_as_they_are_and_are_not_kept(name):
    layout = federations.make_layout()
    state = federations.make_state(layout)
    situation = federations.make_situation(state, layout)
    reduce = RECIPES[name].reduce
    folded = reduce.start(situation)
    before, held = [], []
    for update in federations.make_updates(state, 3):
        before.append(digest(update.delta))
        folded = reduce.add(folded, update)
        assert digest(update.delta) == before[-1]
        held += [weakref.ref(delta) for delta in update.delta.values()]
        del update
    assert not any(ref() is not None for ref in held)
    assert reduce.finish(folded).folds


@every_rule
@pytest.mark.parametrize("cores", [False, True])
def test_layouts_without_factors_are_refused(name, cores):
    layout = federations.make_layout()
    cored = tuple(replace(pair, r=f"{pair.module}.lora_A.core") for pair in layout.pairs)
    refused = replace(layout, pairs=cored if cores else ())
    with pytest.raises(ConfigError, match=r"works on LoRA's factors.*use peft=lora"):
        step(RECIPES[name], federations.make_state(layout), refused, [])


@every_rule
def test_weights_that_sum_to_zero_are_refused(name):
    layout = federations.make_layout()
    state = federations.make_state(layout)
    with pytest.raises(EngineError, match="weights sum to 0"):
        step(RECIPES[name], state, layout, federations.make_updates(state, 2, weights=[0, 0]))


@every_exact_rule
def test_a_client_without_weight_does_not_count_however_odd_it_is(name):
    layout = federations.make_layout()
    state = federations.make_state(layout)
    updates = federations.make_updates(state, 3, weights=[1, 2, 0])
    huge = {key: torch.full_like(delta, 1e30) for key, delta in updates[2].delta.items()}
    after = step(RECIPES[name], state, layout, [*updates[:2], replace(updates[2], delta=huge)])
    assert digest(after.folds) == digest(step(RECIPES[name], state, layout, updates).folds)


def test_the_servers_own_update_counts_like_a_clients():
    layout = federations.make_layout()
    state = federations.make_state(layout)
    updates = federations.make_updates(state, 3)
    server = ClientUpdate("server", 1, updates[2].delta, updates[2].weight)
    wanted = step(RECIPES["fed_ex_lora"], state, layout, updates)
    assert digest(step(RECIPES["fed_ex_lora"], state, layout, [*updates[:2], server]).folds) == digest(wanted.folds)


def test_fr_lora_asks_for_a_known_mean():
    with pytest.raises(ConfigError, match="did you mean 'products'"):
        fr_lora(mean_of="product")


def test_facts_say_what_a_recipe_is():
    assert {name: recipe.facts.exact for name, recipe in RECIPES.items()} == {
        "flora": "yes",
        "fed_ex_lora": "yes",
        "fr_lora": "no",
        "fr_lora of products": "yes",
    }
    assert [name for name, recipe in RECIPES.items() if recipe.facts.rebases] == ["flora"]
    assert [name for name, recipe in RECIPES.items() if recipe.mixes_ranks] == ["flora"]
