"""Every option of `conf/strategy`, and random LoRA federations for it: what the law suite is written in."""

import dataclasses
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from fedpeat.core import ClientUpdate, GlobalState, Layout
from strategies import Recipe, Situation, aggregate, start
from strategies.aggregate import seen_by_recipe
from tests.federations import SCALING, make_layout, make_state, make_updates

FILES = {path.stem: path for path in sorted((Path(__file__).parents[2] / "conf" / "strategy").glob("*.yaml"))}
NEEDED = {"flower": {"name": "FedAvg"}}
"""Keywords without a default, by option."""
AS_A_MEAN = {"florist": {"energy": 1.0}}
"""Keywords under which an option keeps all that clients send, for the laws of means."""


def config_of(name):
    return OmegaConf.to_container(OmegaConf.load(FILES[name]))


def builder_of(name):
    module, function = config_of(name)["_target_"].rsplit(".", 1)
    return getattr(import_module(module), function)


@cache
def recipe_of(name, as_a_mean=False):
    keywords = {key: value for key, value in config_of(name).items() if key != "_target_"}
    return builder_of(name)(**keywords | NEEDED.get(name, {}) | (AS_A_MEAN.get(name, {}) if as_a_mean else {}))


def _builds(name):
    """A builder that fails is `test_it_builds`'s to tell; the other options are tried all the same."""
    try:
        return isinstance(recipe_of(name), Recipe)
    except Exception:
        return False


FACTS = {name: recipe_of(name).facts for name in FILES if _builds(name)}


def options(wanted=lambda facts: True):
    return pytest.mark.parametrize("name", [name for name, facts in FACTS.items() if wanted(facts)])


def holds_products(facts):
    """One client's product, or the product that all have, is what comes out."""
    return facts.needs == "pairs" and facts.exact != "personal" and facts.family == "lora"


def averages_tensors(facts):
    """The step of the reducer is a mean of what was sent, tensor by tensor."""
    return facts.linear and not holds_products(facts)


def is_mean(facts):
    return holds_products(facts) or averages_tensors(facts)


class Federation(NamedTuple):
    recipe: Recipe
    layout: Layout
    state: GlobalState


def federation(name, seed=0, zero_b=False, as_a_mean=False):
    recipe = recipe_of(name, as_a_mean)
    layout = make_layout(head=True)
    tensors = dict(make_state(layout, seed, zero_b).tensors)
    if recipe.facts.needs == "cores":
        pairs = [dataclasses.replace(pair, r=f"{pair.module}.lora_A.core") for pair in layout.pairs]
        layout = dataclasses.replace(layout, pairs=tuple(pairs))
        for pair in pairs:
            del tensors[pair.a], tensors[pair.b]
            tensors[pair.r] = torch.randn(layout.rank, layout.rank, generator=torch.Generator().manual_seed(seed))
    return Federation(recipe, layout, start(recipe, tensors))


def size_of(name):
    """How many clients: rules that discard some want many."""
    return 15 if FACTS[name].family in ("robust", "flower") else 4


def parts_of(recipe, number):
    """The parts that a round's clients send."""
    half = recipe.client(number)
    trained = set(half.get("train_only", ("A", "B", "R", "other")))
    return trained - set(half.get("personal", ())) - set(half.get("fixed", ()))


def updates_for(fed, count, number=1, *, seed=1, weights=None, equal=False, size=0.1, ranks=None):
    """What clients of a round send: the parts, metrics and extras that the recipe asks for; the server's own last."""
    draw = np.random.default_rng(seed)
    needed = fed.recipe.facts.server_takes_part == "needed"
    updates = make_updates(
        fed.state,
        count + needed,
        seed=seed,
        weights=[*weights, weights[0]][: count + needed] if weights else None,
        ranks=[*ranks, fed.layout.rank] if ranks else None,
        layout=fed.layout,
        parts=parts_of(fed.recipe, number),
        size=size,
    )
    finished = []
    for update in updates:
        steps = 3.0 if equal else float(draw.integers(1, 9))
        loss = 2.0 if equal else draw.uniform(1, 4)
        metrics = {"train_steps": steps, "effective_steps": steps, "train_tokens": 64 * steps, "start_loss": loss}
        delta = updates[0].delta if equal else update.delta
        extras = {}
        if fed.recipe.client(number).get("control_variates"):
            extras = {key: torch.from_numpy(draw.normal(size=value.shape)).float() for key, value in delta.items()}
        finished.append(ClientUpdate(update.client, number, delta, update.weight, metrics, extras))
    return [*finished[:-1], dataclasses.replace(finished[-1], client="server")] if needed else finished


def play(fed, updates, number=1):
    """The state after a round."""
    return aggregate(fed.recipe, Situation(number, fed.state, fed.layout, 20, 7), updates).state


def folded(fed, updates, number=1):
    """The reducer's own step, before the server's."""
    accumulator = fed.recipe.reduce.start(seen_by_recipe(Situation(number, fed.state, fed.layout, 20, 7)))
    for update in updates:
        accumulator = fed.recipe.reduce.add(accumulator, update)
    return fed.recipe.reduce.finish(accumulator)


def product(tensors, pair, delta=None):
    """`s B A`, fp64, with a client's delta added at its own rank."""
    a, b = (tensors[name].numpy().astype(float) for name in (pair.a, pair.b))
    for name in (pair.a, pair.b):
        if delta and name in delta:
            rank = delta[name].shape[0 if name == pair.a else 1]
            a, b = a[:rank], b[:, :rank]
    if delta and pair.a in delta:
        a = a + delta[pair.a].numpy()
    if delta and pair.b in delta:
        b = b + delta[pair.b].numpy()
    return SCALING * b @ a


def held(fed, state):
    """What a model would hold: products and folds of the LoRA layers, and the other tensors; fp64, by name."""
    found = {name: state.tensors[name].numpy().astype(float) for name in rest(fed)}
    for pair in factored(fed):
        fold = state.folds[pair.module].numpy() if pair.module in state.folds else 0.0
        found[pair.module] = product(state.tensors, pair) + fold
    return found


def wanted(fed, updates):
    """What a model would hold after the exact weighted mean: of products, and of the other tensors."""
    share = np.array([update.weight for update in updates]) / sum(update.weight for update in updates)
    found = {}
    for name in rest(fed):
        mean = sum(p * u.delta[name].numpy().astype(float) for p, u in zip(share, updates, strict=True))
        found[name] = fed.state.tensors[name].numpy() + mean
    for pair in factored(fed):
        products = [product(fed.state.tensors, pair, update.delta) for update in updates]
        fold = fed.state.folds[pair.module].numpy() if pair.module in fed.state.folds else 0.0
        found[pair.module] = sum(p * q for p, q in zip(share, products, strict=True)) + fold
    return found


def factored(fed):
    return [pair for pair in fed.layout.pairs if pair.r is None]


def rest(fed):
    return [*fed.layout.others, *(pair.r for pair in fed.layout.pairs if pair.r)]


def distance(left, right, origin=None):
    """`|left - right| / |right - origin|` over all names together."""
    off = sum(np.sum((left[name] - right[name]) ** 2) for name in right)
    size = sum(np.sum((right[name] - (0.0 if origin is None else origin[name])) ** 2) for name in right)
    return float(np.sqrt(off / size))


def finite(found):
    return all(np.isfinite(value).all() for value in found.values())


def same(left, right):
    """Whether two states are the same to the bit."""
    return all(same_tensors(getattr(left, part), getattr(right, part)) for part in ("tensors", "folds", "memory"))


def same_tensors(left, right):
    return set(left) == set(right) and all(
        left[key].dtype == right[key].dtype and torch.equal(left[key], right[key]) for key in left
    )


def copied(value):
    return {name: tensor.clone() for name, tensor in value.items()}
