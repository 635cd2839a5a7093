from dataclasses import replace

import numpy as np
import pytest
import torch

from fedpeat.core import ConfigError, EngineError, GlobalState
from strategies import aggregate
from strategies.robust import bulyan, fl_trust, geometric_median, krum, multi_krum, norm_clipping
from tests.federations import make_layout, make_situation, make_state, make_updates
from tests.oracles import robust as oracle
from tests.strategies.robust_rounds import (
    ALL,
    MEASURES,
    deltas_of,
    federation,
    near,
    points,
    reduce,
    same,
    signed,
)

pytestmark = pytest.mark.usefixtures("one_thread")


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
