import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeat.core import ClientUpdate, ConfigError, GlobalState, norm
from strategies import Situation, aggregate, start
from strategies.adaptive import fed_adam, fed_avg_m
from strategies.general import fed_avg
from strategies.lora import ffa_lora
from strategies.privacy import Clipping, private, why_not_private
from tests.federations import make_layout, make_situation, make_state, make_updates
from tests.laws.options import FILES, federation, folded, parts_of, recipe_of, same_tensors

LAYOUT = make_layout(head=True)
STATE = make_state(LAYOUT)
SITUATION = make_situation(STATE, LAYOUT)
HUGE = 1e6


def quiet(recipe=None, clip=HUGE, expected=4, **more):
    """A private recipe without noise."""
    clipping = clip if isinstance(clip, Clipping) else Clipping(clip)
    return private(recipe or fed_avg(), noise_multiplier=0.0, clipping=clipping, expected=expected, **more)


def noisy(multiplier=1.0, clip=1.0, expected=1, seed=5, recipe=None):
    clipping = Clipping(clip)
    return private(
        recipe or fed_avg(), noise_multiplier=multiplier, clipping=clipping, expected=expected, noise_seed=seed
    )


def step_of(recipe, updates, situation=SITUATION):
    total = recipe.reduce.start(situation)
    for update in updates:
        total = recipe.reduce.add(total, update)
    return recipe.reduce.finish(total)


def play(recipe, updates, state, number=1):
    return aggregate(recipe, Situation(number, state, LAYOUT), updates, min_replies=0)


def close(left, right, atol=1e-6):
    assert set(left) == set(right)
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-6, atol=atol)


# What it computes


@pytest.mark.parametrize("build", [fed_avg, fed_avg_m, fed_adam], ids=lambda build: build.__name__)
def test_without_noise_and_clipping_it_is_the_rule_with_equal_weights(build):
    updates = make_updates(STATE, 4, weights=[1, 7, 2, 9])
    honest = [dataclasses.replace(update, weight=1.0) for update in updates]
    plain, recipe = build(weight_by="equal"), quiet(build(weight_by="tokens"))
    assert recipe.weight_by == "equal"
    left, right = start(recipe, STATE.tensors), start(plain, STATE.tensors)
    for number in (1, 2):
        left, right = (play(one, two, three, number).state for one, two, three in (
            (recipe, updates, left), (plain, honest, right)
        ))  # fmt: skip
    close(left.tensors, right.tensors)
    close(left.memory, right.memory)


@pytest.mark.parametrize("replied", [1, 2, 4])
def test_the_sum_is_divided_by_the_number_expected(replied):
    updates = make_updates(STATE, 4)[:replied]
    found = step_of(quiet(expected=5), updates).tensors
    close(found, {name: sum(update.delta[name] for update in updates) / 5 for name in found})


def test_a_factor_that_stays_gets_no_noise():
    recipe = noisy(recipe=ffa_lora())
    found = step_of(recipe, make_updates(STATE, 2, parts=("B", "other"), layout=LAYOUT)).tensors
    assert set(found) == set(LAYOUT.names(["B", "other"]))


@pytest.mark.parametrize("name", FILES)
def test_a_rule_of_the_mean_is_a_rule_of_the_mean(name):
    """The fact that decides who may be private: many updates make the same step as one that is their mean."""
    fed = federation(name, seed=3)
    if why_not_private(fed.recipe):
        return
    number, count = 2, 4
    parts = parts_of(fed.recipe, number)
    updates = make_updates(fed.state, count, layout=fed.layout, parts=parts)
    mean = {key: sum(update.delta[key].double() for update in updates) / count for key in updates[0].delta}
    one = ClientUpdate("all", number, {key: value.float() for key, value in mean.items()}, 1.0)
    found, wanted = folded(fed, updates, number), folded(fed, [one], number)
    for part in ("tensors", "folds"):
        close(getattr(found, part), getattr(wanted, part), atol=1e-5)
    assert not wanted.memory
    # and what is private without noise takes that step, too
    close(folded(fed._replace(recipe=quiet(fed.recipe)), updates, number).tensors, wanted.tensors, atol=1e-5)


def test_who_may_be_private_and_who_not_with_the_reason():
    may = {name for name in FILES if not why_not_private(recipe_of(name))}
    assert may == {
        *("fed_avg", "fed_prox", "fed_avg_m", "fed_adagrad", "fed_adam", "fed_yogi"),
        *("ffa_lora", "ro_lora", "fed_sb", "fed_svd", "fr_lora"),
    }
    for name, reason in (
        ("fed_sa_lora", "keep tensors of their own"),
        ("scaffold", "control variates"),
        ("norm_clipping", "one by one"),
        ("fl_trust", "one by one"),
        ("fed_nova", "more of each client"),
        ("q_fed_avg", "more of each client"),
        ("fed_ex_lora", "more of each client"),
        ("flora", "more of each client"),
        ("flower", "more of each client"),
    ):
        with pytest.raises(ConfigError, match=f"strategy={name}; .*{reason}"):
            quiet(recipe_of(name))
    for name in set(FILES) - may:
        with pytest.raises(ConfigError, match=f"privacy=client_level does not go with strategy={name}"):
            quiet(recipe_of(name))


# What a client can do


# Torch may flush subnormals to zero, which only makes a delta shorter.
ENTRIES = st.floats(-(2.0**120), 2.0**120, width=32, allow_subnormal=False)
HOSTILE = st.lists(ENTRIES, min_size=5, max_size=5).map(
    lambda values: {"v": torch.tensor(values[:2]), "w": torch.tensor(values[2:]).reshape(3, 1)}
)
PLAIN = Situation(1, GlobalState({"v": torch.zeros(2), "w": torch.zeros(3, 1)}))


def update_of(delta, name="c0", **metrics):
    return ClientUpdate(name, 1, delta, 1.0, metrics)


def sum_of(recipe, deltas):
    """The clipped sum in fp64, before it is divided."""
    total = recipe.reduce.start(PLAIN)
    for index, delta in enumerate(deltas):
        total = recipe.reduce.add(total, update_of(delta, f"c{index}"))
    zeros = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in PLAIN.state.tensors.items()}
    return {**zeros, **total.deltas.sums}, total.centred


@settings(max_examples=60, deadline=None)
@given(st.lists(HOSTILE, max_size=3), HOSTILE, st.lists(HOSTILE, max_size=2), st.floats(2.0**-20, 2.0**20))
def test_one_client_more_or_less_moves_the_sum_by_the_clip_norm_at_most(before, hostile, after, bound):
    recipe = quiet(clip=bound)
    there, bits = sum_of(recipe, [*before, hostile, *after])
    gone, fewer = sum_of(recipe, [*before, *after])
    moved = norm({name: there[name] - gone[name] for name in there})
    assert moved <= bound * (1 + 1e-9)
    assert abs(bits - fewer) == 0.5
    # What is within the bound counts as it is.
    if norm(hostile) <= bound:
        assert moved == pytest.approx(norm(hostile), abs=1e-9 * bound)
    else:
        assert moved == pytest.approx(bound, rel=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_a_number_counts_as_not_come(value):
    good = {"v": torch.ones(2), "w": torch.ones(3, 1)}
    wrong = {**good, "v": torch.tensor([value, 1.0])}
    recipe = quiet()
    assert same_tensors(sum_of(recipe, [good, wrong])[0], sum_of(recipe, [good])[0])


def test_claimed_weights_and_names_out_of_place_do_nothing():
    good = {"v": torch.ones(2), "w": torch.ones(3, 1)}
    claimed = dataclasses.replace(update_of(good), weight=1e9)
    found = step_of(quiet(expected=1), [claimed], PLAIN).tensors
    assert same_tensors(found, good)
    more = step_of(quiet(expected=1), [update_of({**good, "x": torch.ones(2)})], PLAIN).tensors
    assert set(more) == {"v", "w"}


# Noise


def test_noise_on_the_sum_has_the_deviation_it_should():
    state = GlobalState({"a": torch.zeros(300, 300), "b": torch.zeros(10_000)})
    for multiplier, clip, expected in ((2.0, 0.5, 1), (1.0, 3.0, 10)):
        recipe = noisy(multiplier, clip, expected)
        for updates in ([], [update_of({name: torch.zeros_like(value) for name, value in state.tensors.items()})] * 3):
            found = step_of(recipe, updates, Situation(1, state)).tensors
            values = torch.cat([value.flatten() for value in found.values()]).double() * expected / (multiplier * clip)
            # 100,000 draws: the deviation of their mean is 0.0032, that of their deviation 0.0022; six of them.
            assert abs(values.mean()) < 0.019
            assert abs(values.std() - 1) < 0.0135


def test_noise_follows_seed_and_round_and_nothing_else():
    updates = make_updates(STATE, 2)
    zeros = [
        dataclasses.replace(update, delta={name: torch.zeros_like(value) for name, value in update.delta.items()})
        for update in updates
    ]

    def drawn(seed, number=1, replies=zeros):
        return step_of(noisy(seed=seed), replies, dataclasses.replace(SITUATION, round=number)).tensors

    assert same_tensors(drawn(1), drawn(1))
    assert same_tensors(drawn(1), drawn(1, replies=[]))
    for other in (drawn(2), drawn(1, 2), drawn(None)):
        assert not any(torch.equal(drawn(1)[name], other[name]) for name in other)
    assert not same_tensors(drawn(None), drawn(None))


def test_a_round_without_anyone_is_noise_and_without_privacy_nothing():
    found = play(noisy(), [], STATE)
    assert not any(torch.equal(found.state.tensors[name], value) for name, value in STATE.tensors.items())
    assert found.metrics == {"clip_norm": 1.0}
    assert play(fed_avg(), [], STATE).state is STATE


# Clipping that adapts


def sized(*sizes):
    return [
        update_of({"v": torch.tensor([size, 0.0]), "w": torch.zeros(3, 1)}, f"c{i}") for i, size in enumerate(sizes)
    ]


def test_an_adapting_bound_goes_where_it_should_by_hand():
    """Andrew et al. 2021, algorithm 1, without noise: three rounds of four expected clients."""
    clipping = Clipping(1.0, quantile=0.5, learning_rate=0.2)
    recipe = quiet(clip=clipping)
    state = PLAIN.state
    bound = 1.0
    for number, (sizes, centred) in enumerate(
        [
            ((0.5, 0.9, 1.0, 0.1), 4 / 2),  # all below, the one at the bound too
            ((9.0, 9.0, 9.0, 0.1), 1 / 2 - 3 / 2),
            ((9.0,), -1 / 2),  # three did not come
        ],
        start=1,
    ):
        done = aggregate(recipe, Situation(number, state), sized(*sizes))
        assert done.metrics["clip_norm"] == pytest.approx(bound)
        assert done.metrics["clipped_share"] == sum(size > bound for size in sizes) / len(sizes)
        clipped = sum(min(size, bound) for size in sizes) / 4
        assert float(done.state.tensors["v"][0] - state.tensors["v"][0]) == pytest.approx(clipped, rel=1e-5)
        bound *= math.exp(-0.2 * (centred / 4 + 0.5 - 0.5))
        state = done.state
    assert float(state.memory["reducer|clip_norm"]) == pytest.approx(bound)
    assert bound == pytest.approx(math.exp(-0.1 + 0.05 + 0.025))


def test_the_bound_finds_the_quantile():
    recipe, state = quiet(clip=Clipping(100.0, quantile=0.75, learning_rate=0.5), expected=8), PLAIN.state
    for number in range(1, 61):
        state = aggregate(recipe, Situation(number, state), sized(*range(1, 9))).state
    assert 5.5 < float(state.memory["reducer|clip_norm"]) < 7.5


def test_the_count_is_noised():
    clipping = Clipping(1.0, quantile=0.5, learning_rate=1.0, bit_noise=3.0)
    bounds = []
    for seed in range(2000):
        recipe = private(fed_avg(), noise_multiplier=0.0, clipping=clipping, expected=10, noise_seed=seed)
        bounds.append(float(step_of(recipe, [], PLAIN).memory["clip_norm"]))
    logs = np.log(bounds)  # -(0 + 3 n) / 10
    assert abs(logs.mean()) < 6 * 0.3 / 2000**0.5
    assert abs(logs.std() / 0.3 - 1) < 6 / 4000**0.5


def test_clients_that_clip_are_sent_the_bound_and_believed_in_a_bit_only():
    clipping = Clipping(1.0, on="client", quantile=0.5, learning_rate=1.0)
    recipe = quiet(clip=clipping, expected=2)
    assert recipe.client(1)["clip_delta"] is True
    remembered = dataclasses.replace(PLAIN.state, memory={"clip_norm": torch.tensor(2.5, dtype=torch.float64)})
    situation = dataclasses.replace(PLAIN, state=remembered)
    assert float(recipe.sends(situation)["clip_norm"]) == 2.5
    assert float(recipe.sends(PLAIN)["clip_norm"]) == 1.0
    (liar,) = sized(50.0)  # that says it did not have to clip
    for said, centred in ((0.0, 0.5), (1.0, -0.5), (1e9, -0.5), (math.nan, -0.5)):
        step = step_of(recipe, [dataclasses.replace(liar, metrics={"clipped": said})], situation)
        assert float(step.tensors["v"][0]) == pytest.approx(2.5 / 2)
        assert float(step.memory["clip_norm"]) == pytest.approx(2.5 * math.exp(-centred / 2))
    assert "clip_delta" not in quiet().client(1)


@pytest.mark.parametrize(
    ("keywords", "told"),
    [
        ({"norm": 0.0}, "clip_norm=0.0; it must be above 0"),
        ({"norm": math.nan}, "clip_norm=nan"),
        ({"norm": math.inf}, "clip_norm=inf"),
        ({"on": "moon"}, "choose server or client"),
        ({"quantile": 1.0}, r"adaptive\.quantile"),
        ({"quantile": -0.1}, r"adaptive\.quantile"),
        ({"learning_rate": 0.0}, r"adaptive\.learning_rate"),
        ({"bit_noise": -1.0}, r"adaptive\.bit_noise"),
    ],
)
def test_what_cannot_be_is_told(keywords, told):
    with pytest.raises(ConfigError, match=told):
        Clipping(**{"norm": 1.0, **keywords})
