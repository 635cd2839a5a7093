import dataclasses

import pytest
import torch

from fedpeat.client import Guidance, TrainingSpec, train
from fedpeat.core import digest
from fedpeat.data import Rows
from tests.oracles import training as oracle

SGD = TrainingSpec(learning_rate=0.05, batch_size=4, optimizer="SGD")
ADAM = TrainingSpec(learning_rate=3e-3, batch_size=4)
METHOD = {"kind": "lora", "rank": 4, "dropout": 0.1}


def run(tuned, rows, spec=SGD, steps=5, **more):
    return train(tuned, rows, spec=spec, steps=steps, start_step=0, total_steps=10, seed=11, client="sympy", **more)


def moved(tuned):
    """Away from LoRA's start, where B is 0 and so are all gradients of A."""
    generator = torch.Generator().manual_seed(1)
    tuned.write(
        {name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator) for name, tensor in tuned.read().items()}
    )
    return tuned


def random_like(tuned, size=1.0, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return {name: size * torch.randn(tensor.shape, generator=generator) for name, tensor in tuned.read().items()}


def by_name(tuned):
    return dict(zip(tuned.names, tuned.parameters, strict=True))


def assert_near(left, right, **tolerances):
    assert set(left) == set(right)
    for name in left:
        torch.testing.assert_close(left[name], right[name], **tolerances)


@pytest.mark.parametrize("half", ["A", "B"])
@pytest.mark.parametrize("spec", [SGD, ADAM], ids=["SGD", "AdamW"])
def test_a_part_alone_trains_as_the_plain_loop_trains_it_to_the_bit(half, spec, make_tuned, rows):
    tuned, other = moved(make_tuned(method=METHOD)), moved(make_tuned(method=METHOD))
    chosen = sorted(tuned.layout.names([half]))
    start = tuned.read()
    result = run(tuned.only(chosen), rows, spec)

    parameters = [by_name(other)[name] for name in chosen]
    other.model.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = getattr(torch.optim, spec.optimizer)(parameters, lr=spec.learning_rate)
    oracle.train_loop(
        other.model, parameters, rows, optimizer=optimizer, run_seed=11, client="sympy", steps=5, batch_size=4
    )
    after = other.read()
    assert digest(result.delta) == digest({name: after[name] - start[name] for name in chosen})
    assert all(delta.any() for delta in result.delta.values())
    assert digest(tuned.read()) == digest(start)


def test_what_does_not_train_is_left_as_it_was(make_tuned, rows):
    tuned = make_tuned()
    part, seen = tuned.only(tuned.layout.names(["B"])), []

    def look(_module, _inputs):
        seen.append({name for name, parameter in by_name(tuned).items() if parameter.requires_grad})

    hook = tuned.model.register_forward_pre_hook(look)
    run(part, rows, steps=2)
    hook.remove()
    assert seen == [set(part.names)] * 2
    assert all(parameter.requires_grad and parameter.grad is None for parameter in tuned.parameters)
    trained = {id(parameter) for parameter in tuned.parameters}
    assert not any(one.requires_grad for one in tuned.model.parameters() if id(one) not in trained)
    with pytest.raises(IndexError):
        run(part, Rows(rows.input_ids + 10_000, rows.labels))
    assert all(parameter.requires_grad for parameter in tuned.parameters)


def test_the_correction_is_added_to_every_gradient(make_tuned, rows):
    tuned, other = moved(make_tuned()), moved(make_tuned())
    correction = random_like(tuned, size=0.3)
    plain, corrected = run(tuned, rows, steps=1), run(tuned, rows, steps=1, guidance=Guidance(correction=correction))
    moved_by = {name: (corrected.delta[name] - plain.delta[name]) / -SGD.learning_rate for name in correction}
    assert_near(moved_by, correction, atol=2e-5, rtol=1e-4)

    for name, parameter in by_name(other).items():
        parameter.register_hook(lambda gradient, name=name: gradient + correction[name])
    start = other.read()
    optimizer = torch.optim.SGD(other.parameters, lr=SGD.learning_rate)
    oracle.train_loop(
        other.model, other.parameters, rows, optimizer=optimizer, run_seed=11, client="sympy", steps=5, batch_size=4
    )
    after = {name: tensor - start[name] for name, tensor in other.read().items()}
    found = run(tuned, rows, guidance=Guidance(correction=correction)).delta
    assert_near(found, after, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_recorded_gradients_are_raw_and_their_mean_is_what_plain_steps_went_by(accumulate, make_tuned, rows):
    tuned = moved(make_tuned())
    spec = dataclasses.replace(SGD, accumulate=accumulate)
    result = run(tuned, rows, spec, guidance=Guidance(record_gradients=True))
    by_steps = {name: delta / (-5 * SGD.learning_rate) for name, delta in result.delta.items()}
    assert_near(result.mean_gradient, by_steps, atol=2e-6, rtol=1e-4)
    assert digest(result.delta) == digest(run(tuned, rows, spec).delta)

    bent = Guidance(record_gradients=True, correction=random_like(tuned), proximal_mu=2.0)
    one = run(tuned, rows, dataclasses.replace(spec, clip_norm=1e-3), steps=1, guidance=bent)
    raw = run(tuned, rows, spec, steps=1, guidance=Guidance(record_gradients=True))
    assert digest(one.mean_gradient) == digest(raw.mean_gradient)
    assert run(tuned, rows).mean_gradient == {}


def test_gradients_are_clipped_after_all_that_a_recipe_adds(make_tuned, rows):
    tuned = moved(make_tuned())
    guidance = Guidance(correction=random_like(tuned, size=100.0), tail_penalty=(10.0, 0.5))
    delta = run(tuned, rows, dataclasses.replace(SGD, clip_norm=0.01), steps=1, guidance=guidance).delta
    size = sum(float(tensor.square().sum()) for tensor in delta.values()) ** 0.5
    assert size == pytest.approx(0.01 * SGD.learning_rate, rel=1e-3)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.99])
def test_the_tail_penalty_is_a_term_of_the_loss(share, make_tuned, rows):
    """Ranks are 4: the tail begins at row 0, 1, 2 and 3."""
    tuned, other = moved(make_tuned()), moved(make_tuned())
    spec = dataclasses.replace(SGD, batch_size=21)  # all rows: the order does not count
    found = run(tuned, rows, spec, steps=1, guidance=Guidance(tail_penalty=(0.7, share))).delta

    named, first = by_name(other), int(share * 4)
    tails = [named[pair.b][:, first:].norm() * named[pair.a][first:].norm() for pair in other.layout.pairs]
    loss = other.model(input_ids=rows.input_ids, labels=rows.labels).loss + 0.7 * sum(tails)
    gradients = torch.autograd.grad(loss, other.parameters)
    wanted = {name: -SGD.learning_rate * gradient for name, gradient in zip(other.names, gradients, strict=True)}
    assert_near(found, wanted, atol=1e-6, rtol=1e-4)
    assert digest(found) != digest(run(tuned, rows, spec, steps=1).delta)


def test_without_a_tail_there_is_no_penalty(make_tuned, rows):
    tuned = moved(make_tuned())
    plain = digest(run(tuned, rows).delta)
    assert digest(run(tuned, rows, guidance=Guidance(tail_penalty=(0.7, 1.0))).delta) == plain
    assert digest(run(tuned, rows, guidance=Guidance(tail_penalty=(0.0, 0.5))).delta) == plain
    half = tuned.only(tuned.layout.names(["B"]))  # a product of which one factor is fixed is not weighed
    assert digest(run(half, rows, guidance=Guidance(tail_penalty=(0.7, 0.5))).delta) == digest(run(half, rows).delta)


def test_the_tail_penalty_is_finite_where_lora_starts(make_tuned, rows):
    tuned = make_tuned()  # B is 0, where a norm has no slope
    result = run(tuned, rows, guidance=Guidance(tail_penalty=(0.7, 0.5)))
    assert all(bool(torch.isfinite(tensor).all()) for tensor in result.delta.values())
    assert any(tensor.any() for tensor in result.delta.values())
