import dataclasses

import pytest
import torch

from fedpeat.client import Guidance, TrainingSpec, train, weight_of
from fedpeat.core import ConfigError, DataError, UpdateRefused, add, digest
from fedpeat.data import Rows
from tests.oracles import training as oracle

SPEC = TrainingSpec(learning_rate=3e-3, batch_size=4)
PLACE = {"seed": 11, "client": "sympy"}


def run(tuned, rows, spec=SPEC, steps=6, start_step=0, total_steps=18, **more):
    return train(
        tuned, rows, spec=spec, steps=steps, start_step=start_step, total_steps=total_steps, **{**PLACE, **more}
    )


def change(**settings):
    return dataclasses.replace(SPEC, **settings)


def outer_digest(tuned):
    return digest(dict(tuned.model.state_dict()))


def distance(left, right):
    return max(float((left[name] - right[name]).abs().max()) for name in left)


def twin(tuned, rows, optimizer, **settings):
    """The same steps by the plain loop, on a model of its own."""
    start = tuned.read()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    losses = oracle.train_loop(
        tuned.model, tuned.parameters, rows, optimizer=optimizer, run_seed=11, client="sympy", **settings
    )
    torch.set_num_threads(threads)
    return {name: tensor - start[name] for name, tensor in tuned.read().items()}, losses


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("method", [{"kind": "lora", "rank": 4, "dropout": 0.1}, {"kind": "full"}], ids=str)
def test_equals_the_plain_loop_to_the_bit(kind, method, make_tuned, rows):
    tuned, other = make_tuned(kind, method), make_tuned(kind, method)
    result = run(tuned, rows)
    delta, losses = twin(other, rows, torch.optim.AdamW(other.parameters, lr=3e-3), steps=6, batch_size=4)
    assert digest(result.delta) == digest(delta)
    assert result.metrics["train_loss"] == pytest.approx(sum(losses) / 6)
    assert result.metrics["train_loss_first"] == losses[0]
    assert result.metrics["train_loss_last"] == losses[-1]
    assert result.metrics["train_tokens"] == 6 * 4 * 12
    assert result.metrics["train_examples"] == 6 * 4
    assert result.metrics["train_seconds"] > 0


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_schedules_follow_the_closed_form(schedule, make_tuned, rows):
    result = run(make_tuned(), rows, change(schedule=schedule, warmup_steps=3), total_steps=8)
    other = make_tuned()
    delta, _ = twin(
        other,
        rows,
        torch.optim.AdamW(other.parameters, lr=3e-3),
        steps=6,
        batch_size=4,
        rate=lambda step: oracle.rate_at(step, peak=3e-3, schedule=schedule, warmup=3, total=8),
    )
    assert distance(result.delta, delta) <= 1e-9


def test_gradients_are_clipped(make_tuned, rows):
    spec = change(optimizer="SGD", learning_rate=1.0, clip_norm=0.01)
    result, other = run(make_tuned(), rows, spec), make_tuned()
    sgd = torch.optim.SGD(other.parameters, lr=1.0)
    delta, _ = twin(other, rows, sgd, steps=6, batch_size=4, clip_norm=0.01)
    assert distance(result.delta, delta) <= 1e-7
    one_step = run(make_tuned(), rows, spec, steps=1).delta
    assert sum(float(tensor.square().sum()) for tensor in one_step.values()) ** 0.5 == pytest.approx(0.01, rel=1e-3)


def test_the_proximal_pull(make_tuned, rows):
    result, other = run(make_tuned(), rows, change(optimizer="SGD"), guidance=Guidance(proximal_mu=0.5)), make_tuned()
    sgd = torch.optim.SGD(other.parameters, lr=3e-3)
    assert distance(result.delta, twin(other, rows, sgd, steps=6, batch_size=4, mu=0.5)[0]) <= 1e-8
    assert digest(run(make_tuned(), rows, change(optimizer="SGD")).delta) != digest(result.delta)


@pytest.mark.parametrize("which", ["rows", "answers"])
def test_accumulated_batches_are_one_batch(which, make_tuned, request):
    rows = request.getfixturevalue(which)
    spec = change(optimizer="SGD", learning_rate=0.1)
    whole = run(make_tuned(), rows, dataclasses.replace(spec, batch_size=8))
    parts = run(make_tuned(), rows, dataclasses.replace(spec, batch_size=2, accumulate=4))
    assert distance(whole.delta, parts.delta) <= 1e-6
    assert parts.metrics["train_loss"] == pytest.approx(whole.metrics["train_loss"], rel=1e-5)
    assert parts.metrics["train_tokens"] == whole.metrics["train_tokens"]


@pytest.mark.parametrize(
    "spec",
    [
        change(optimizer_state="keep", schedule="cosine", warmup_steps=2),
        change(optimizer_state="keep", optimizer="SGD", optimizer_options={"momentum": 0.9}),
        change(optimizer="SGD"),
    ],
    ids=["AdamW kept", "momentum kept", "SGD"],
)
def test_rounds_with_kept_state_are_one_long_run(spec, make_tuned, rows):
    method = {"kind": "lora", "rank": 4, "dropout": 0.2}
    whole = run(make_tuned(method=method), rows, spec, steps=18)
    tuned, state = make_tuned(method=method), None
    start = tuned.read()
    for number in range(3):
        result = run(tuned, rows, spec, start_step=6 * number, optimizer_state=state)
        tuned.write(add(tuned.read(), result.delta))
        state = result.optimizer_state
    total = {name: tensor - start[name] for name, tensor in tuned.read().items()}
    assert distance(total, whole.delta) <= 1e-6


def test_an_optimiser_that_remembers_nothing_leaves_nothing(make_tuned, rows):
    assert run(make_tuned(), rows, change(optimizer="SGD", optimizer_state="keep")).optimizer_state is None


def test_a_reset_optimiser_is_fresh(make_tuned, rows):
    result = run(make_tuned(), rows)
    assert result.optimizer_state is None
    kept = run(make_tuned(), rows, change(optimizer_state="keep")).optimizer_state
    assert digest(run(make_tuned(), rows, optimizer_state=kept).delta) == digest(result.delta)


def test_the_model_is_left_as_it_was(make_tuned, rows):
    tuned = make_tuned()
    before, random_state, threads = outer_digest(tuned), torch.get_rng_state(), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        run(tuned, rows, change(threads=1))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert outer_digest(tuned) == before
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not tuned.model.training
    assert all(parameter.grad is None for parameter in tuned.model.parameters())


def test_the_model_is_left_as_it_was_after_a_failure_too(make_tuned, rows):
    tuned = make_tuned()
    before = outer_digest(tuned)
    broken = Rows(rows.input_ids + 10_000, rows.labels)
    with pytest.raises(IndexError):
        run(tuned, broken)
    assert outer_digest(tuned) == before
    assert not tuned.model.training


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", [{"kind": "lora", "dropout": 0.3}, {"kind": "full"}], ids=str)
def test_equal_arguments_give_equal_bits(method, precision, make_tuned, rows):
    spec = change(precision=precision)
    results = [run(make_tuned(method=method), rows, spec, client=client).delta for client in ("a", "a", "b")]
    assert digest(results[0]) == digest(results[1]) != digest(results[2])
    assert {tensor.dtype for tensor in results[0].values()} == {torch.float32}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_bf16_model_learns_in_fp32(precision, make_tuned, rows):
    spec = change(precision=precision, learning_rate=0.01)
    for method in ({"kind": "lora"}, {"kind": "full"}):
        tuned = make_tuned("llama", method, dtype="bfloat16")
        result = run(tuned, rows, spec, steps=12)
        assert result.metrics["train_loss_last"] < result.metrics["train_loss_first"]
        assert {tensor.dtype for tensor in result.delta.values()} == {torch.float32}


def test_bf16_comes_near_fp32(make_tuned, rows):
    spec = change(optimizer="SGD", learning_rate=0.1)
    exact = run(make_tuned(), rows, spec).metrics["train_loss_last"]
    rounded = run(make_tuned(), rows, dataclasses.replace(spec, precision="bf16")).metrics["train_loss_last"]
    assert rounded == pytest.approx(exact, rel=1e-2)
    assert rounded != exact


def test_fewer_rows_than_a_batch(make_tuned, rows):
    few = Rows(rows.input_ids[:3], rows.labels[:3])
    result = run(make_tuned(), few, change(batch_size=8))
    other = make_tuned()
    delta, _ = twin(other, few, torch.optim.AdamW(other.parameters, lr=3e-3), steps=6, batch_size=8)
    assert digest(result.delta) == digest(delta)


def test_input_prompts_train(make_tuned, answers):
    tuned = make_tuned(method={"kind": "hf", "type": "PROMPT_TUNING", "options": {"num_virtual_tokens": 3}})
    result = run(tuned, answers, change(learning_rate=0.1), steps=12)
    assert result.metrics["train_loss_last"] < result.metrics["train_loss_first"]


def test_batches_without_a_scored_token_are_passed_over(make_tuned, answers):
    silent = torch.full_like(answers.labels, -100)
    with pytest.raises(DataError, match="token to score"):
        run(make_tuned(), Rows(answers.input_ids, silent))
    half = torch.where(torch.arange(10)[:, None] < 5, answers.labels, silent)
    result = run(make_tuned(), Rows(answers.input_ids, half), change(batch_size=1, accumulate=2), steps=20)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in result.delta.values())


def test_what_is_no_longer_finite_is_told(make_tuned, rows):
    with pytest.raises(UpdateRefused, match="client 'sympy' went out of bounds; the loss is nan at global step"):
        run(make_tuned(), rows, change(optimizer="SGD", learning_rate=1e30))
    with pytest.raises(UpdateRefused, match="a tensor is not finite"):
        run(make_tuned(), rows, change(optimizer_options={"eps": 0.0}), steps=1)  # 0 / 0 where there is no gradient


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"optimizer_state": "kept"}, "did you mean 'keep'"),
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
        ({"precision": "fp16"}, "client.precision=fp16"),
        ({"batch_size": 0}, "client.batch_size=0"),
        ({"accumulate": 0}, "client.accumulate=0"),
        ({"learning_rate": -1.0}, "client.learning_rate=-1.0"),
        ({"learning_rate": float("nan")}, "client.learning_rate=nan"),
        ({"clip_norm": 0.0}, "use null for none"),
        ({"threads": 0}, "client.threads=0"),
    ],
)
def test_bad_settings_are_told(settings, told):
    with pytest.raises(ConfigError, match=told):
        change(**settings)


def test_a_round_without_steps_is_told(make_tuned, rows):
    with pytest.raises(ConfigError, match=r"client\.local_steps"):
        run(make_tuned(), rows, steps=0)


def test_weights():
    metrics = {"train_tokens": 512.0, "train_rows": 9.0}
    assert [weight_of(name, metrics) for name in ("tokens", "rows", "equal")] == [512.0, 9.0, 1.0]
    with pytest.raises(UpdateRefused, match="did you mean 'tokens'"):
        weight_of("token", metrics)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_compiled_step_comes_near_the_plain_one(make_tuned, rows):
    plain, tuned = run(make_tuned(), rows), make_tuned()
    compiled = run(tuned, rows, change(compile=True))
    assert distance(plain.delta, compiled.delta) <= 1e-4
    assert compiled.metrics["train_loss"] == pytest.approx(plain.metrics["train_loss"], rel=1e-5)
    again = run(tuned, rows, change(compile=True))
    assert digest(again.delta) == digest(compiled.delta)
    assert again.metrics["train_seconds"] < compiled.metrics["train_seconds"] / 5
