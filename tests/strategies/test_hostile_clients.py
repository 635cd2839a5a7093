from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeat.core import GlobalState
from strategies import aggregate
from strategies.gram import gram, squared_distances
from strategies.order_statistics import coordinate_median, trimmed_mean
from strategies.robust import bulyan, fl_trust, geometric_median, krum
from strategies.selection import krum_scores, repeated_krum, weiszfeld
from tests.federations import make_layout, make_situation, make_updates
from tests.strategies.robust_rounds import (
    ALL,
    MEASURES,
    deltas_of,
    federation,
    hostile,
    near,
    reduce,
    same,
    signed,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("kind", ["huge", "largest", "flipped and boosted", "rescaled factors"])
@pytest.mark.parametrize("name", ALL)
def test_hostile_clients_move_the_state_no_further_than_honest_ones_differ(name, kind):
    situation, updates = federation(12)
    honest = near(updates)
    bad = hostile(situation, kind, honest[0].delta)
    attacked = signed([replace(u, delta=bad) if i in {0, 5} else u for i, u in enumerate(honest)])
    recipe = ALL[name](byzantine=2) if name in {"krum", "multi_krum", "bulyan"} else ALL[name]()
    after = aggregate(recipe, situation, attacked).state
    for key, delta in honest[1].delta.items():
        moved = after.tensors[key] - situation.state.tensors[key]
        assert float((moved - delta).norm()) < 1.5 * float(delta.norm()), key


@pytest.mark.parametrize("name", ["krum", "multi_krum"])
def test_rescaled_factors_get_past_distances_of_products_alone(name):
    situation, updates = federation(7)
    bad = hostile(situation, "rescaled factors", updates[0].delta)
    attacked = [replace(u, delta=bad) if i == 2 else u for i, u in enumerate(updates)]
    moved = {m: reduce(ALL[name](measure=m), situation, attacked).tensors["m.0.lora_B.weight"].norm() for m in MEASURES}
    assert moved["products"] > 1e4
    assert max(moved["both"], moved["factors"]) < 10


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.integers(3, 8), st.sampled_from(["huge", "largest", "flipped and boosted"]), st.data())
def test_an_outlier_is_never_chosen(seed, count, kind, data):
    situation, updates = federation(count + 2, seed)
    honest = near(updates, 0.5, seed)
    place = data.draw(st.integers(0, count + 1))
    honest[place] = replace(honest[place], delta=hostile(situation, kind, honest[place - 1].delta))
    step = reduce(krum(), situation, honest).tensors
    assert not all(torch.equal(step[name], delta) for name, delta in honest[place].delta.items())
    squared = squared_distances(gram(situation, honest, "both"))
    assert place not in krum_scores(squared, 1).argsort(stable=True)[:-1]
    shares = torch.full((count + 2,), 1 / (count + 2), dtype=torch.float64)
    weights = weiszfeld(gram(situation, honest, "both"), shares, 100, 1e-6)
    assert weights.isfinite().all()
    assert weights.argmin() == place


def test_of_equals_the_first_is_taken():
    situation, (first, *rest) = federation(7)
    same_ones = [replace(update, delta=first.delta) for update in (first, *rest)]
    squared = squared_distances(gram(situation, same_ones, "both"))
    assert not squared.any()
    assert repeated_krum(squared, 1, 5) == [0, 1, 2, 3, 4]
    for name, make in ALL.items():
        step = reduce(make(), situation, signed(same_ones) if name == "fl_trust" else same_ones)
        for key, delta in first.delta.items():
            torch.testing.assert_close(step.tensors[key], delta, rtol=2e-7, atol=1e-12)


def test_two_groups_of_equals_tie_and_the_first_wins():
    situation, updates = federation(6)
    paired = [replace(update, delta=updates[i % 2].delta) for i, update in enumerate(updates)]
    step = reduce(krum(), situation, paired).tensors
    assert all(torch.equal(step[name], delta) for name, delta in updates[0].delta.items())
    weights = weiszfeld(gram(situation, paired, "both"), torch.full((6,), 1 / 6, dtype=torch.float64), 50, 1e-6)
    assert weights.tolist() == pytest.approx([1 / 6] * 6)


@pytest.mark.parametrize("name", ALL)
def test_zero_deltas_are_a_zero_step(name):
    situation, updates = federation(7)
    still = signed([replace(u, delta={n: torch.zeros_like(d) for n, d in u.delta.items()}) for u in updates])
    step = reduce(ALL[name](), situation, still).tensors
    assert not any(tensor.any() for tensor in step.values())


def test_a_majority_of_equals_holds_against_the_rest():
    situation, updates = federation(7)
    agreed = [replace(u, delta=updates[0].delta) if i < 4 else u for i, u in enumerate(updates)]
    step = reduce(geometric_median(), situation, agreed).tensors
    same(step, deltas_of(updates)[0], atol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_rules_work_without_lora(name):
    layout = replace(make_layout(), pairs=(), others=("w",), rank=0)
    state = GlobalState({"w": torch.zeros(4, 3)})
    updates = signed(near(make_updates(state, 8, layout=layout)))
    bad = replace(updates[1], delta={"w": torch.full((4, 3), -1e30)})
    step = reduce(ALL[name](), make_situation(state, layout), [updates[0], bad, *updates[2:]]).tensors["w"]
    assert float((step - updates[0].delta["w"]).norm()) < float(updates[0].delta["w"].norm())


def test_the_largest_minority_moves_no_rule_that_needs_no_count():
    situation, updates = federation(11)
    honest = near(updates)
    for kind in ("huge", "largest", "flipped and boosted", "rescaled factors"):
        bad = hostile(situation, kind, honest[0].delta)
        attacked = [replace(u, delta=bad) if i % 2 else u for i, u in enumerate(honest)]  # 5 of 11
        for recipe in (geometric_median(), coordinate_median(), trimmed_mean(share=0.46)):
            step = reduce(recipe, situation, attacked).tensors
            for key, delta in honest[0].delta.items():
                assert float((step[key] - delta).norm()) < 1.5 * float(delta.norm()), (kind, recipe.name, key)


def test_fl_trust_withstands_a_majority():
    situation, updates = federation(11)
    honest = near(updates)
    for kind in ("flipped and boosted", "rescaled factors"):
        bad = hostile(situation, kind, honest[0].delta)
        attacked = [replace(u, delta=bad) if i < 8 else u for i, u in enumerate(honest)]
        step = reduce(fl_trust(), situation, signed(attacked)).tensors
        for key, delta in honest[-1].delta.items():
            assert float((step[key] - delta).norm()) < 1.5 * float(delta.norm()), (kind, key)


def test_bulyan_withstands_a_change_in_one_coordinate_that_krum_takes():
    situation, updates = federation(7, head=False)
    honest = near(updates, 0.5)
    name = "m.0.lora_B.weight"
    hidden = {n: torch.stack([u.delta[n] for u in honest]).mean(0) for n in updates[0].delta}
    hidden[name][0, 0] += 0.3  # six standard deviations, yet nearer to the others than these are to each other
    far = float(hidden[name][0, 0])
    attacked = [replace(u, delta=hidden) if i == 3 else u for i, u in enumerate(honest)]
    assert float(reduce(krum(measure="factors"), situation, attacked).tensors[name][0, 0]) == pytest.approx(far)
    values = [float(u.delta[name][0, 0]) for i, u in enumerate(honest) if i != 3]
    taken = float(reduce(bulyan(measure="factors"), situation, attacked).tensors[name][0, 0])
    assert min(values) <= taken <= max(values)
