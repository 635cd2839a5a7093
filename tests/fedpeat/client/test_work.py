import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedpeat.client import Guidance, Store, Task, TrainingSpec, train, work
from fedpeat.client.train import probe_loss
from fedpeat.client.work import effective_steps
from fedpeat.core import DataError, UpdateRefused, add, digest, subtract, zeros_like
from fedpeat.data import Rows

SGD = TrainingSpec(learning_rate=0.05, batch_size=4, optimizer="SGD")
ADAM = TrainingSpec(learning_rate=3e-3, batch_size=4)
KEEP = dataclasses.replace(ADAM, optimizer_state="keep")
STEPS = 3


def task(number=1, client="sympy", **half):
    return Task(client, STEPS, STEPS * (number - 1), 12, 11, half)


def do(tuned, rows, tensors, *, number=1, spec=SGD, store=None, extras=None, **half):
    return work(
        tuned,
        rows,
        task=task(number, **half),
        spec=spec,
        tensors=tensors,
        extras=extras or {},
        store=store or Store(None, "sympy"),
    )


def by_train(tuned, rows, tensors, *, number=1, spec=SGD, **more):
    """What `train` makes of the same round, from these tensors."""
    tuned.write({**tuned.read(), **tensors})
    place = {"steps": STEPS, "start_step": STEPS * (number - 1), "total_steps": 12, "seed": 11, "client": "sympy"}
    return train(tuned, rows, spec=spec, **place, **more)


def random_like(tensors, seed, size=0.1):
    generator = torch.Generator().manual_seed(seed)
    return {name: size * torch.randn(tensors[name].shape, generator=generator) for name in sorted(tensors)}


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "clients", "sympy")


def assert_near(left, right, **tolerances):
    assert set(left) == set(right)
    for name in left:
        torch.testing.assert_close(left[name], right[name], **tolerances)


def test_plain_work_is_training_from_the_global_tensors(make_tuned, rows):
    tuned = make_tuned()
    shared = random_like(tuned.initial, 1)
    done = do(tuned, rows, shared, number=2)
    wanted = by_train(tuned, rows, shared, number=2)
    assert digest(done.delta) == digest(wanted.delta)
    assert done.extras == {}
    assert done.metrics["train_loss"] == wanted.metrics["train_loss"]
    assert done.metrics["effective_steps"] == STEPS
    assert "start_loss" not in done.metrics
    assert digest(tuned.read()) == digest(shared)


def test_a_recipes_words_reach_the_steps(make_tuned, rows):
    tuned = make_tuned()
    shared = random_like(tuned.initial, 1)
    for half, guidance in (
        ({"proximal_mu": 3.0}, Guidance(proximal_mu=3.0)),
        ({"tail_penalty": [0.5, 0.5]}, Guidance(tail_penalty=(0.5, 0.5))),
    ):
        done = do(tuned, rows, shared, **half)
        assert digest(done.delta) == digest(by_train(tuned, rows, shared, guidance=guidance).delta)
        assert digest(done.delta) != digest(do(tuned, rows, shared).delta)


@pytest.mark.parametrize("parts", [["A"], ["B"], ["A", "B"], ["B", "other"]])
def test_only_what_trains_is_sent(parts, make_tuned, rows):
    tuned = make_tuned(method={"kind": "lora", "rank": 4, "train_head": True})
    shared = random_like(tuned.initial, 1)
    done = do(tuned, rows, shared, train_only=parts)
    chosen = tuned.layout.names(parts)
    assert set(done.delta) == chosen
    assert digest(done.delta) == digest(by_train(tuned.only(chosen), rows, {n: shared[n] for n in chosen}).delta)


def test_fixed_parts_start_from_what_all_have_alike_and_need_not_be_sent(make_tuned, rows):
    tuned = make_tuned()
    shared, names = random_like(tuned.initial, 1), tuned.layout.names(["B"])
    sent = {name: shared[name] for name in names}
    tuned.write(random_like(tuned.initial, 2))  # what another client's round left behind
    done = do(tuned, rows, sent, train_only=["B", "other"], fixed=["A"])
    assert set(done.delta) == names
    assert digest(tuned.read()) == digest({**tuned.initial, **sent})
    other = make_tuned()
    wanted = by_train(other.only(names), rows, sent).delta  # A as it was attached
    assert digest(done.delta) == digest(wanted)


def test_tensors_that_are_missing_are_told(make_tuned, rows):
    tuned = make_tuned()
    shared = random_like(tuned.initial, 1)
    before, halves = digest(tuned.read()), {part: tuned.layout.names([part]) for part in "AB"}
    for half, absent in (({}, "A"), ({"fixed": ["A"]}, "B"), ({"personal": ["B"]}, "A"), ({"train_only": ["B"]}, "A")):
        short = {name: tensor for name, tensor in shared.items() if name not in halves[absent]}
        with pytest.raises(UpdateRefused, match=rf"missing, '{min(halves[absent])}'"):
            do(tuned, rows, short, **half)
    with pytest.raises(UpdateRefused, match="unknown"):
        do(tuned, rows, {**shared, "more": torch.zeros(1)})
    assert digest(tuned.read()) == before


def test_personal_tensors_stay_with_the_client_and_go_on_in_its_next_round(make_tuned, rows, store):
    tuned = make_tuned()
    own, common = tuned.layout.names(["B"]), tuned.layout.names(["A"])
    shared = {name: tensor for name, tensor in random_like(tuned.initial, 1).items() if name in common}
    later = {name: tensor for name, tensor in random_like(tuned.initial, 2).items() if name in common}

    first = do(tuned, rows, shared, store=store, personal=["B"])
    wanted = by_train(tuned, rows, {**tuned.initial, **shared}).delta
    assert digest(first.delta) == digest({name: wanted[name] for name in common})
    kept = store.read("personal")
    assert digest(kept) == digest({name: tuned.initial[name] + wanted[name] for name in own})

    second = do(tuned, rows, later, number=2, store=store, personal=["B"])
    wanted = by_train(tuned, rows, {**kept, **later}, number=2).delta
    assert digest(second.delta) == digest({name: wanted[name] for name in common})
    assert digest(store.read("personal")) == digest(add(kept, wanted))
    assert digest(store.read("personal")) != digest(kept)


def test_each_client_has_personal_tensors_of_its_own(make_tuned, rows, tmp_path):
    tuned = make_tuned()
    shared = {name: tensor for name, tensor in tuned.initial.items() if name in tuned.layout.names(["A"])}
    ann, bob = Store(tmp_path, "ann"), Store(tmp_path, "bob/../ann")
    do(tuned, rows, shared, store=ann, personal=["B"])
    assert bob.read("personal") == {}
    first = do(tuned, rows, shared, store=bob, personal=["B"])
    again = do(tuned, rows, shared, store=Store(None, "eve"), personal=["B"])
    assert digest(first.delta) == digest(again.delta)
    assert {path.parent.parent for path in tmp_path.rglob("*.safetensors")} == {tmp_path}


def test_a_part_that_is_personal_but_does_not_train_is_kept_as_it_is(make_tuned, rows, store):
    tuned = make_tuned()
    done = do(tuned, rows, dict(tuned.initial), store=store, personal=["B"], train_only=["A"])
    assert set(done.delta) == tuned.layout.names(["A"])
    assert digest(store.read("personal")) == digest({name: tuned.initial[name] for name in tuned.layout.names(["B"])})


def test_without_variates_yet_control_is_plain_training_to_the_bit(make_tuned, rows, store):
    for spec in (SGD, ADAM):
        tuned = make_tuned()
        shared = random_like(tuned.initial, 1)
        done = do(tuned, rows, shared, spec=spec, store=store, extras=zeros_like(shared), control_variates=True)
        assert digest(done.delta) == digest(do(tuned, rows, shared, spec=spec).delta)
        store = Store(None, "sympy")


def test_a_clients_variate_is_option_two_of_the_paper(make_tuned, rows, store):
    """c_k+ = c_k - c + (x - y) / (K eta), for plain steps, with and without a correction."""
    tuned = make_tuned()
    shared, variate = random_like(tuned.initial, 1), zeros_like(tuned.initial)
    common = zeros_like(tuned.initial)
    for number in (1, 2, 3):
        done = do(tuned, rows, shared, number=number, store=store, extras=common, control_variates=True)
        moved = {name: delta / (STEPS * SGD.learning_rate) for name, delta in done.delta.items()}
        after = subtract(subtract(variate, common), moved)
        assert_near(store.read("control"), after, rtol=1e-4, atol=2e-6)
        assert_near(done.extras, subtract(after, variate), rtol=1e-4, atol=4e-6)
        assert digest(add(variate, done.extras)) != digest(variate)
        correction = subtract(common, variate)
        wanted = by_train(tuned, rows, shared, number=number, guidance=Guidance(correction=correction)).delta
        assert digest(done.delta) == digest(wanted)
        variate, common = store.read("control"), random_like(tuned.initial, 10 + number, size=0.02)
        shared = add(shared, done.delta)


def test_a_server_without_a_store_does_without_variates(make_tuned, rows):
    tuned = make_tuned()
    extras = random_like(tuned.initial, 3)
    done = do(tuned, rows, dict(tuned.initial), extras=extras, control_variates=True)
    assert done.extras == {}
    assert digest(done.delta) == digest(do(tuned, rows, dict(tuned.initial)).delta)


def test_halves_by_turns_each_keep_their_optimisers_memory(make_tuned, rows, store):
    tuned = make_tuned()
    names = {part: sorted(tuned.layout.names([part])) for part in "AB"}
    shared, states = random_like(tuned.initial, 1), {"A": None, "B": None}
    for number, part in enumerate("ABAB", 1):
        done = do(tuned, rows, shared, number=number, spec=KEEP, store=store, train_only=[part])
        tuned.write(shared)
        place = {"spec": KEEP, "number": number, "optimizer_state": states[part]}
        wanted = by_train(tuned.only(names[part]), rows, {name: shared[name] for name in names[part]}, **place)
        states[part] = wanted.optimizer_state
        assert digest(done.delta) == digest(wanted.delta)
        assert digest(store.read("optimizer")) == digest({**(states["A"] or {}), **(states["B"] or {})})
        shared = {**shared, **add({name: shared[name] for name in names[part]}, done.delta)}
    steps = {float(value) for name, value in store.read("optimizer").items() if name.endswith("/step")}
    assert steps == {2.0 * STEPS}


def test_an_optimiser_that_is_reset_leaves_nothing_behind(make_tuned, rows, store):
    tuned = make_tuned()
    do(tuned, rows, dict(tuned.initial), spec=ADAM, store=store)
    assert store.read("optimizer") == {}


def by_hand(tuned, rows, count):
    """The mean loss of the scored tokens of the first rows, one by one."""
    total, tokens = 0.0, 0
    with torch.no_grad():
        for number in range(min(count, len(rows))):
            logits = tuned.model(**{k: v for k, v in rows.batch([number]).items() if k != "labels"}).logits[0, :-1]
            labels = rows.labels[number, 1:]
            for position in (labels != -100).nonzero().flatten().tolist():
                total -= float(logits[position].double().log_softmax(0)[labels[position]])
                tokens += 1
    return total / tokens


@pytest.mark.parametrize("count", [1, 4, 7, 100])
@pytest.mark.parametrize("which", ["rows", "answers"])
def test_the_probe_is_the_mean_loss_of_the_first_rows(which, count, make_tuned, request):
    rows, tuned = request.getfixturevalue(which), make_tuned(method={"kind": "lora", "rank": 4, "dropout": 0.5})
    tuned.write(random_like(tuned.initial, 1))
    wanted = by_hand(tuned, rows, count)
    for batch_size in (3, 50):
        found = probe_loss(tuned, rows, count=count, batch_size=batch_size, threads=1)
        assert found == pytest.approx(wanted, rel=1e-5)
    tuned.model.train()
    assert probe_loss(tuned, rows, count=count, batch_size=3, threads=1) == pytest.approx(wanted, rel=1e-5)
    assert tuned.model.training


def test_a_probe_with_nothing_to_score_is_told(make_tuned, rows):
    silent = Rows(rows.input_ids, torch.full_like(rows.labels, -100))
    with pytest.raises(DataError, match="token to score"):
        probe_loss(make_tuned(), silent, count=4, batch_size=4, threads=1)


def test_the_start_loss_is_that_of_the_global_tensors_before_training(make_tuned, rows):
    tuned = make_tuned()
    shared = random_like(tuned.initial, 1)
    done = do(tuned, rows, shared, probe_rows=6)
    tuned.write(shared)
    assert done.metrics["start_loss"] == pytest.approx(by_hand(tuned, rows, 6), rel=1e-5)
    assert digest(done.delta) == digest(do(tuned, rows, shared).delta)


SETTINGS = st.one_of(
    st.fixed_dictionaries({"momentum": st.floats(0, 1, allow_subnormal=False)}),
    st.fixed_dictionaries({"momentum": st.floats(0.01, 1), "dampening": st.floats(0, 1)}),
    st.fixed_dictionaries({"momentum": st.floats(0.01, 1), "nesterov": st.just(True)}),
)


@given(SETTINGS, st.integers(1, 12))
def test_effective_steps_are_how_far_the_optimiser_goes_on_a_slope_of_one(options, steps):
    place = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
    optimizer = torch.optim.SGD([place], lr=1.0, **options)
    for _ in range(steps):
        place.grad = torch.ones_like(place)
        optimizer.step()
    spec = TrainingSpec(0.1, 8, optimizer="SGD", optimizer_options=options)
    assert effective_steps(spec, steps) == pytest.approx(-place.item(), rel=1e-9)


@given(st.floats(0.01, 0.99), st.integers(1, 40))
def test_effective_steps_with_momentum_are_the_papers(rho, steps):
    spec = TrainingSpec(0.1, 8, optimizer="SGD", optimizer_options={"momentum": rho})
    wanted = sum((1 - rho**left) / (1 - rho) for left in range(1, steps + 1))
    assert effective_steps(spec, steps) == pytest.approx(wanted, rel=1e-9)


def test_steps_of_other_optimisers_count_as_one():
    assert effective_steps(ADAM, 7) == effective_steps(SGD, 7) == 7.0
    rmsprop = TrainingSpec(0.1, 8, optimizer="RMSprop", optimizer_options={"momentum": 0.9})
    assert effective_steps(rmsprop, 7) == 7.0
