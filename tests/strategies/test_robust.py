from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeat.core import ConfigError, EngineError, GlobalState
from strategies import Recipe, aggregate
from strategies.folding import fed_ex_lora, flora
from strategies.general import fed_avg
from strategies.gram import gram, squared_distances
from strategies.reducers import weighted_mean
from strategies.robust import bulyan, fl_trust, geometric_median, krum, multi_krum, norm_clipping
from strategies.selection import krum_scores, repeated_krum, weiszfeld
from strategies.svd import flex_lora
from strategies.weighing import reweighted
from tests.federations import make_layout, make_situation, make_state, make_updates
from tests.oracles import robust as oracle

MEASURES = ["products", "factors", "both"]
ALL = {
    "krum": krum,
    "multi_krum": multi_krum,
    "bulyan": bulyan,
    "geometric_median": geometric_median,
    "norm_clipping": norm_clipping,
    "fl_trust": fl_trust,
}
BEHIND = {"fed_avg": fed_avg, "fed_ex_lora": fed_ex_lora, "flora": flora, "flex_lora": flex_lora}
WITH_THEN = ["multi_krum", "geometric_median", "norm_clipping", "fl_trust"]


def reduce(recipe, situation, updates):
    folded = recipe.reduce.start(situation)
    for update in updates:
        folded = recipe.reduce.add(folded, update)
    return recipe.reduce.finish(folded)


def federation(count=7, seed=0, head=True, size=0.1, **more):
    layout = make_layout(head=head)
    state = make_state(layout, seed)
    return make_situation(state, layout), make_updates(state, count, seed + 1, size=size, layout=layout, **more)


def signed(updates):
    """The same, the last as the server's."""
    return [*updates[:-1], replace(updates[-1], client="server")]


def points(situation, updates, measure):
    return oracle.points(situation.state, situation.layout, [update.delta for update in updates], measure)


def deltas_of(updates):
    return [{name: delta.numpy() for name, delta in update.delta.items()} for update in updates]


def same(got, want, atol=1e-6):
    assert set(got) == set(want)
    for name in want:
        assert got[name].dtype == torch.float32
        np.testing.assert_allclose(got[name].numpy(), np.asarray(want[name]), rtol=1e-5, atol=atol)


def hostile(situation, kind, like):
    """What an attacker sends instead of an honest update."""
    tensors = situation.state.tensors
    made = {
        "huge": {name: torch.full_like(delta, 1e30) for name, delta in like.items()},
        "largest": {name: torch.full_like(delta, -3e38) for name, delta in like.items()},
        "flipped and boosted": {name: -20 * delta for name, delta in like.items()},
        "rescaled factors": {
            **{name: torch.zeros_like(delta) for name, delta in like.items()},
            **{pair.a: tensors[pair.a] * (1e-6 - 1) for pair in situation.layout.pairs},
            **{pair.b: tensors[pair.b] * (1e6 - 1) for pair in situation.layout.pairs},
        },
    }
    return made[kind]


def near(updates, spread=0.2, seed=3):
    """Honest updates that agree but for noise."""
    first = updates[0].delta
    generator = torch.Generator().manual_seed(seed)
    return [
        replace(
            update,
            delta={
                n: d + spread * d.norm() / d.numel() ** 0.5 * torch.randn(d.shape, generator=generator)
                for n, d in first.items()
            },
        )
        for update in updates
    ]


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("byzantine", [0, 1, 2])
def test_krum_takes_the_twins_choice(measure, byzantine):
    for seed in range(4):
        situation, updates = federation(2 * byzantine + 3 + seed, seed)
        (chosen,) = oracle.krum(points(situation, updates, measure), byzantine)
        step = reduce(krum(byzantine=byzantine, measure=measure), situation, updates)
        assert all(torch.equal(step.tensors[name], delta) for name, delta in updates[chosen].delta.items())


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("byzantine", [0, 1, 2])
def test_multi_krum_averages_the_twins_choice(measure, byzantine):
    for seed in range(3):
        situation, updates = federation(2 * byzantine + 3 + seed, seed)
        chosen = oracle.krum(points(situation, updates, measure), byzantine, len(updates) - byzantine)
        step = reduce(multi_krum(byzantine=byzantine, measure=measure), situation, updates)
        same(step.tensors, oracle.mean([deltas_of(updates)[i] for i in chosen], [1] * len(chosen)))


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize(("byzantine", "count"), [(0, 3), (1, 7), (1, 9), (2, 11)])
def test_bulyan_is_the_twins(measure, byzantine, count):
    situation, updates = federation(count, count)
    step = reduce(bulyan(byzantine=byzantine, measure=measure), situation, updates)
    same(step.tensors, oracle.bulyan(points(situation, updates, measure), deltas_of(updates), byzantine))


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_the_geometric_median_is_the_twins(measure, count):
    situation, updates = federation(count, count)
    weights = oracle.geometric_median(points(situation, updates, measure), [1 / count] * count)
    step = reduce(geometric_median(measure=measure, iterations=3000), situation, updates)
    same(step.tensors, oracle.mean(deltas_of(updates), weights), atol=1e-4)


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


@pytest.mark.parametrize("zero_b", [False, True])
def test_norm_clipping_scales_as_the_twin(zero_b):
    layout = make_layout(head=True)
    state = make_state(layout, zero_b=zero_b)
    updates = [
        replace(update, delta={name: (index + 1) * delta for name, delta in update.delta.items()})
        for index, update in enumerate(make_updates(state, 5))
    ]
    whole, factors = (lambda v: (v[0], v[2])), (lambda v: (v[1],))
    vectors = [oracle.vectors(state, layout, update.delta) for update in updates]
    norms = sorted(float(np.linalg.norm(np.concatenate(whole(v)))) for v in vectors)
    widths = sorted(float(np.linalg.norm(v[1])) for v in vectors)
    for norm, ratio in ((None, 2.0), (norms[1], 1.2), (0.1 * norms[0], 100.0)):
        bound = norms[2] if norm is None else norm
        scales = [
            min(
                oracle.scale_to(state, layout, update.delta, bound, whole),
                oracle.scale_to(state, layout, update.delta, ratio * widths[2], factors),
            )
            for update in updates
        ]
        assert min(scales) < 1
        clipped = [
            {n: c * np.float64(d) for n, d in delta.items()}
            for c, delta in zip(scales, deltas_of(updates), strict=True)
        ]
        step = reduce(norm_clipping(norm=norm, factor_ratio=ratio), make_situation(state, layout), updates)
        same(step.tensors, oracle.mean(clipped, [1] * 5))


def test_an_update_within_the_bounds_is_not_touched():
    situation, (update,) = federation(1)
    step = reduce(norm_clipping(), situation, [update])
    assert all(torch.equal(step.tensors[name], delta) for name, delta in update.delta.items())


@pytest.mark.parametrize("measure", MEASURES)
def test_fl_trust_is_the_twins(measure):
    for seed in range(3):
        situation, updates = federation(6, seed)
        updates = signed([*near(updates[:3], 1.0), *updates[3:4], *near(updates[:2], 1.0)])
        found = [oracle.vectors(situation.state, situation.layout, update.delta) for update in updates]
        own = {"products": lambda v: [(v[0], v[2])], "factors": lambda v: [(v[1], v[2])]}
        own["both"] = lambda v: [(v[0], v[2]), (v[1],)]

        def parts(vectors, own=own[measure], server=found[-1]):
            lengths = [np.linalg.norm(np.concatenate(part)) for part in own(server)]
            return [vector / length for part, length in zip(own(vectors), lengths, strict=True) for vector in part]

        flat = [np.concatenate(parts(vectors)) for vectors in found]
        size = np.linalg.norm(flat[-1])
        trust = [max(0.0, point @ flat[-1] / np.linalg.norm(point) / size) for point in flat[:-1]]
        scaled = []
        for update, delta in zip(updates[:-1], deltas_of(updates), strict=False):
            c = oracle.scale_to(situation.state, situation.layout, update.delta, size, parts, most=1e9)
            scaled.append({name: c * np.float64(value) for name, value in delta.items()})
        step = reduce(fl_trust(measure=measure), situation, updates)
        same(step.tensors, oracle.mean(scaled, trust))


def test_fl_trust_leaves_the_state_where_nobody_is_trusted():
    situation, updates = federation(4)
    memory = {"kept": torch.ones(1)}
    situation = replace(situation, state=replace(situation.state, memory=memory))
    opposed = [replace(u, delta={n: -0.01 * d for n, d in updates[-1].delta.items()}) for u in updates[:-1]]
    still = [replace(u, delta={n: 0 * d for n, d in u.delta.items()}) for u in updates]
    for round_ in (opposed + updates[-1:], still, updates[:3] + still[-1:], still[:3] + updates[-1:]):
        step = reduce(fl_trust(), situation, signed(round_))
        assert step.tensors == {}
        assert step.memory == memory
        plain = replace(situation, state=GlobalState(situation.state.tensors))
        after = aggregate(fl_trust(), plain, signed(round_))
        assert all(torch.equal(after.state.tensors[name], tensor) for name, tensor in situation.state.tensors.items())
        assert after.update_norm == 0


def test_fl_trust_brings_small_and_large_updates_to_the_servers_size():
    situation, updates = federation(3)
    server = updates[-1].delta
    for factor in (1e-20, 1e-3, 1e3, 1e12):
        scaled = [replace(u, delta={n: factor * d for n, d in server.items()}) for u in updates[:-1]]
        step = reduce(fl_trust(measure="factors"), situation, signed([*scaled, updates[-1]]))
        same(step.tensors, server)


def test_fl_trust_needs_the_server():
    situation, updates = federation(3)
    with pytest.raises(EngineError, match=r"set server\.train=emulator"):
        reduce(fl_trust(), situation, updates)
    assert fl_trust().facts.server_takes_part == "needed"


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


@settings(max_examples=300)
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


@pytest.mark.parametrize(
    ("name", "byzantine", "least"),
    [("krum", 0, 3), ("krum", 2, 7), ("multi_krum", 1, 5), ("bulyan", 0, 3), ("bulyan", 2, 11)],
)
def test_the_bounds_on_clients_are_those_of_the_papers(name, byzantine, least):
    situation, updates = federation(least)
    recipe = ALL[name](byzantine=byzantine)
    assert set(reduce(recipe, situation, updates).tensors) == set(situation.state.tensors)
    with pytest.raises(EngineError, match=f"needs {least} updates a round; {least - 1} came.*byzantine"):
        reduce(recipe, situation, updates[1:])


def test_one_client_is_enough_where_no_one_is_chosen():
    situation, (update,) = federation(1)
    for make in (geometric_median, norm_clipping):
        step = reduce(make(), situation, [update]).tensors
        assert all(torch.equal(step[name], delta) for name, delta in update.delta.items())


@pytest.mark.parametrize("name", ALL)
def test_rules_work_without_lora(name):
    layout = replace(make_layout(), pairs=(), others=("w",), rank=0)
    state = GlobalState({"w": torch.zeros(4, 3)})
    updates = signed(near(make_updates(state, 8, layout=layout)))
    bad = replace(updates[1], delta={"w": torch.full((4, 3), -1e30)})
    step = reduce(ALL[name](), make_situation(state, layout), [updates[0], bad, *updates[2:]]).tensors["w"]
    assert float((step - updates[0].delta["w"]).norm()) < float(updates[0].delta["w"].norm())


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


@pytest.mark.parametrize("name", ALL)
def test_three_rounds_are_those_of_the_twin(name):
    layout = make_layout(head=True)
    state = make_state(layout)
    twin = {key: tensor.numpy().astype(np.float64) for key, tensor in state.tensors.items()}
    for number in (1, 2, 3):
        updates = signed(near(make_updates(state, 7, seed=number), seed=number))
        held = GlobalState({key: torch.tensor(value) for key, value in twin.items()})
        step = twin_step(name, make_situation(held, layout), updates)
        twin = {key: value + step[key] for key, value in twin.items()}
        state = aggregate(ALL[name](), make_situation(state, layout, number), updates).state
    for key, want in twin.items():
        np.testing.assert_allclose(state.tensors[key].numpy(), want, rtol=0, atol=2e-5)


def twin_step(name, situation, updates):
    deltas, rows = deltas_of(updates), points(situation, updates, "both")
    state, layout = situation.state, situation.layout
    if name == "krum":
        return deltas[oracle.krum(rows, 1)[0]]
    if name == "multi_krum":
        chosen = oracle.krum(rows, 1, 6)
        return oracle.mean([deltas[i] for i in chosen], [1] * 6)
    if name == "bulyan":
        return oracle.bulyan(rows, deltas, 1)
    if name == "geometric_median":
        return oracle.mean(deltas, oracle.geometric_median(rows, [1 / 7] * 7))
    vectors = [oracle.vectors(state, layout, update.delta) for update in updates]
    if name == "norm_clipping":
        norms = [float(np.linalg.norm(np.concatenate((v[0], v[2])))) for v in vectors]
        bound = sorted(norms)[3]
        scales = [oracle.scale_to(state, layout, u.delta, bound, lambda v: (v[0], v[2])) for u in updates]
        weights, counted = [1] * 7, deltas
    else:
        server = [np.concatenate((vectors[-1][0], vectors[-1][2])), vectors[-1][1]]

        def parts(v):
            return [np.concatenate((v[0], v[2])) / np.linalg.norm(server[0]), v[1] / np.linalg.norm(server[1])]

        flat = [np.concatenate(parts(v)) for v in vectors]
        weights = [max(0.0, f @ flat[-1] / np.linalg.norm(f) / np.linalg.norm(flat[-1])) for f in flat[:-1]]
        scales = [oracle.scale_to(state, layout, u.delta, 2**0.5, parts, most=1e9) for u in updates[:-1]]
        counted = deltas[:-1]
    scaled = [{n: c * np.float64(d) for n, d in delta.items()} for c, delta in zip(scales, counted, strict=True)]
    return oracle.mean(scaled, weights)


@pytest.mark.parametrize(
    ("make", "keywords", "words"),
    [
        (krum, {"byzantine": -1}, "strategy.byzantine=-1"),
        (bulyan, {"byzantine": 1.5}, "whole number"),
        (krum, {"measure": "product"}, "did you mean 'products'"),
        (multi_krum, {"then": "flex"}, "did you mean 'flex_lora'"),
        (multi_krum, {"weight_by": "token"}, "did you mean 'tokens'"),
        (geometric_median, {"iterations": 0}, "strategy.iterations"),
        (geometric_median, {"smoothing": -1}, "strategy.smoothing"),
        (norm_clipping, {"norm": 0}, "strategy.norm"),
        (norm_clipping, {"factor_ratio": 0}, "strategy.factor_ratio"),
        (fl_trust, {"measure": "all"}, "strategy.measure"),
    ],
)
def test_settings_out_of_range_are_told(make, keywords, words):
    with pytest.raises(ConfigError, match=words):
        make(**keywords)


@pytest.mark.parametrize("then", ["flora", "fed_ex_lora", "flex_lora"])
def test_a_rule_behind_that_needs_lora_says_so_at_once(then):
    layout = replace(make_layout(), pairs=(), others=("w",), rank=0)
    with pytest.raises(ConfigError):
        geometric_median(then=then).reduce.start(make_situation(GlobalState({"w": torch.zeros(2)}), layout))
