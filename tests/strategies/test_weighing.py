from dataclasses import replace

import pytest
import torch

from fedpeat.core import ConfigError, EngineError, GlobalState
from strategies import Recipe, aggregate
from strategies.folding import fed_ex_lora, flora
from strategies.general import fed_avg
from strategies.reducers import weighted_mean
from strategies.robust import geometric_median, multi_krum, norm_clipping
from strategies.svd import flex_lora
from strategies.weighing import reweighted
from tests.federations import make_layout, make_situation
from tests.oracles import robust as oracle
from tests.strategies.robust_rounds import (
    ALL,
    deltas_of,
    federation,
    near,
    points,
    reduce,
    same,
    signed,
)

BEHIND = {"fed_avg": fed_avg, "fed_ex_lora": fed_ex_lora, "flora": flora, "flex_lora": flex_lora}
WITH_THEN = ["multi_krum", "geometric_median", "norm_clipping", "fl_trust"]


pytestmark = pytest.mark.usefixtures("one_thread")


def test_claimed_weights_count_only_if_asked_for():
    situation, updates = federation(5)
    claimed = [replace(update, weight=1e9 if update.client == "c04" else 0.0) for update in updates]
    for name in ("multi_krum", "geometric_median", "norm_clipping"):
        plain, boosted = (reduce(ALL[name](), situation, some).tensors for some in (updates, claimed))
        assert all(torch.equal(plain[key], boosted[key]) for key in plain)
        asked = reduce(ALL[name](weight_by="tokens"), situation, claimed).tensors if name != "multi_krum" else None
        assert asked is None or not all(torch.equal(plain[key], asked[key]) for key in plain)
    shares = [0.1, 0.2, 0.3, 0.3, 0.1]
    weighted = [replace(update, weight=1000 * share) for update, share in zip(updates, shares, strict=True)]
    want = oracle.geometric_median(points(situation, updates, "both"), shares)
    step = reduce(geometric_median(weight_by="rows", iterations=3000), situation, weighted)
    same(step.tensors, oracle.mean(deltas_of(updates), want), atol=1e-4)


def test_the_server_keeps_the_weight_that_it_was_given():
    situation, updates = federation(5)
    updates = [*updates[:-1], replace(updates[-1], client="server", weight=3.0)]
    step = reduce(norm_clipping(norm=1e9, factor_ratio=1e9), situation, updates)
    same(step.tensors, oracle.mean(deltas_of(updates), [1, 1, 1, 1, 3]))


def test_zero_weights_are_told():
    situation, updates = federation(5, weights=[0] * 5)
    for name in ("multi_krum", "geometric_median", "norm_clipping"):
        with pytest.raises(EngineError, match="weights sum to 0"):
            reduce(ALL[name](weight_by="tokens"), situation, updates)


@pytest.mark.parametrize("then", BEHIND)
@pytest.mark.parametrize("name", WITH_THEN)
def test_the_rule_behind_keeps_its_needs_and_averages_what_counts(name, then):
    situation, updates = federation(7)
    updates = signed(near(updates))
    base = BEHIND[then]()
    plain = reduce(ALL[name](), situation, updates)
    recipe = ALL[name](then=then)
    step = reduce(recipe, situation, updates)
    assert recipe.mixes_ranks == base.mixes_ranks
    assert (recipe.facts.rebases, recipe.facts.needs) == (base.facts.rebases, base.facts.needs)
    assert (recipe.facts.family, recipe.facts.exact, recipe.name) == ("robust", "robust", name)
    assert bool(step.folds) == (then in {"fed_ex_lora", "flora"})
    if then in {"fed_avg", "fed_ex_lora"}:
        same(step.tensors, {n: t.numpy() for n, t in plain.tensors.items()})


@pytest.mark.parametrize("then", ["flora", "flex_lora"])
def test_an_exact_rule_behind_multi_krum_gives_the_mean_of_the_chosen_products(then):
    situation, updates = federation(7, head=False, ranks=[1, 2, 3, 3, 2, 1, 3])
    chosen = oracle.krum(points(situation, updates, "both"), 1, 6)
    after = aggregate(multi_krum(then=then), situation, updates).state
    exact = aggregate(BEHIND[then](weight_by="equal"), situation, [updates[i] for i in sorted(chosen)]).state
    for left, right in ((after.tensors, exact.tensors), (after.folds, exact.folds)):
        assert set(left) == set(right)
        for name in left:
            torch.testing.assert_close(left[name], right[name], rtol=1e-5, atol=1e-6)


def test_a_reducer_sees_only_those_with_weight():
    situation, updates = federation(3)
    seen = []

    def note(total, update):
        seen.append((update.client, update.weight))
        return weighted_mean().add(total, update)

    spy = weighted_mean()._replace(add=note)
    wrapped = reweighted(lambda _, some: [2.0, 0.0, 0.5], spy)
    reduce(Recipe("x", wrapped), situation, updates)
    assert seen == [("c00", 2.0), ("c02", 0.5)]
    with pytest.raises(EngineError, match="weights sum to 0"):
        reduce(Recipe("x", reweighted(lambda _, some: [0.0] * 3, spy)), situation, updates)


@pytest.mark.parametrize("then", ["flora", "fed_ex_lora", "flex_lora"])
def test_a_rule_behind_that_needs_lora_says_so_at_once(then):
    layout = replace(make_layout(), pairs=(), others=("w",), rank=0)
    with pytest.raises(ConfigError):
        geometric_median(then=then).reduce.start(make_situation(GlobalState({"w": torch.zeros(2)}), layout))
