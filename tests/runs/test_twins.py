"""A run computes what plain PyTorch loops compute (`tests/oracles/whole_run.py`)."""

import pytest
import torch

from tests.oracles import whole_run as oracle

ADAPTER, KEPT, MIDDLE = (0, 5), (1, 4), (1, 2, 3, 4)
RATE = 0.003


# The gradient of a bias of keys is rounding noise alone, which AdamW with a small eps blows up to whole steps.
EPS = 1e-4
STEADY = f"client.optimizer_options={{eps: {EPS}}}"


def adam(parameters):
    return torch.optim.AdamW(parameters, lr=RATE, eps=EPS)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


@pytest.fixture(scope="session")
def only_ann(only):
    return only("ann")


@pytest.fixture
def start_of(run):
    """The travelling tensors before any training: how LoRA starts is drawn at random, so a run has to tell."""
    return lambda *overrides: run(*overrides, "rounds=0").tensors


@pytest.mark.parametrize(
    ("kind", "method", "kept"),
    [
        ("llama", "lora", KEPT),
        ("llama", "full", MIDDLE),
        ("gpt2", "lora", MIDDLE),
        ("gpt2", "full", KEPT),
    ],
)
def test_one_client_and_one_round_are_a_plain_loop(kind, method, kept, run, start_of, model_folder, only_ann, held_out):
    folder = model_folder(kind)
    lora = {"rank": 4, "alpha": 8, "dropout": 0.1} if method == "lora" else {}
    chosen = [f"model.name={folder}", f"data.path={only_ann}", f"emulator.kept_blocks={len(kept)}", f"peft={method}"]
    chosen += ["rounds=1", "client.local_steps=6", STEADY, *(f"peft.{key}={value}" for key, value in lora.items())]
    ran = run(*chosen)
    model, parameters = oracle.set_up(folder, adapter=ADAPTER, kept=kept, **lora)
    if lora:
        oracle.write(parameters, start_of(*chosen))
    start = oracle.read(parameters)
    rows = oracle.read_rows(only_ann, 16, "ann")
    optimizer = adam(list(parameters.values()))
    oracle.train(model, parameters, rows, optimizer, first=0, steps=6, batch_size=2, client="ann")
    assert oracle.largest_difference(ran.tensors, oracle.read(parameters)) <= 1e-6
    assert oracle.largest_difference(ran.tensors, start) > 1e-3
    test_rows = oracle.read_rows(held_out, 16)
    assert ran.losses["emulator_tuned"] == pytest.approx(oracle.loss_of(model, test_rows), rel=1e-6)
    full, whole = oracle.set_up(folder, adapter=ADAPTER, kept=MIDDLE, **lora)
    oracle.write(whole, start)
    assert ran.losses["full_zero_shot"] == pytest.approx(oracle.loss_of(full, test_rows), rel=1e-6)
    oracle.write(whole, oracle.read(parameters))
    assert ran.losses["plug_in"] == pytest.approx(oracle.loss_of(full, test_rows), rel=1e-6)


def test_many_clients_and_rounds_are_plain_loops_and_a_mean(run, start_of, model_folder, notes, held_out):
    steps = {"ann": 2, "bob": 3, "eve": 2}
    chosen = ["rounds=3", "control.local_steps={bob: 3}", "peft.rank=4", "peft.alpha=8", STEADY]
    ran = run(*chosen)
    model, parameters = oracle.set_up(model_folder(), adapter=ADAPTER, kept=KEPT, rank=4, alpha=8)
    rows_of = {author: oracle.read_rows(notes, 16, author) for author in steps}
    tuned = oracle.federate(
        model, parameters, start_of(*chosen), rows_of, rounds=3, steps=steps, pace=2, batch_size=2, make_optimizer=adam
    )
    assert oracle.largest_difference(ran.tensors, tuned) <= 1e-6
    oracle.write(parameters, tuned)
    assert ran.losses["emulator_tuned"] == pytest.approx(
        oracle.loss_of(model, oracle.read_rows(held_out, 16)), rel=1e-6
    )


KEEP = ("client.optimizer_state=keep", STEADY)
SCHEDULE = ("client.schedule=cosine", "client.warmup_steps=3")
SGD = ("client.optimizer=SGD", "client.learning_rate=0.1")


@pytest.mark.parametrize(
    "chosen",
    [SGD, KEEP, (*KEEP, *SCHEDULE), (*SGD, "client.optimizer_options={momentum: 0.9}", KEEP[0])],
    ids=["SGD", "AdamW kept", "AdamW kept, scheduled", "momentum kept"],
)
def test_many_rounds_of_one_client_are_one_long_run(chosen, run, only_ann):
    alone = (f"data.path={only_ann}", "peft.dropout=0.1", *chosen)
    rounds = run(*alone, "rounds=4", "client.local_steps=2")
    whole = run(*alone, "rounds=1", "client.local_steps=8")
    assert oracle.largest_difference(rounds.tensors, whole.tensors) <= 1e-6
    assert rounds.losses["plug_in"] == pytest.approx(whole.losses["plug_in"], rel=1e-6)


def test_an_optimiser_that_is_reset_is_not_one_long_run(run, only_ann):
    alone = (f"data.path={only_ann}", STEADY)
    rounds = run(*alone, "rounds=4", "client.local_steps=2")
    whole = run(*alone, "rounds=1", "client.local_steps=8")
    assert oracle.largest_difference(rounds.tensors, whole.tensors) > 1e-4


@pytest.mark.parametrize("method", ["lora", "full"])
def test_payload_bytes_are_those_of_the_tensors_that_travel(method, run, model_folder):
    ran = run(f"peft={method}", "rounds=3", "clients.per_round=2")
    lora = {"rank": 8, "alpha": 16} if method == "lora" else {}
    _, parameters = oracle.set_up(model_folder(), adapter=ADAPTER, kept=KEPT, **lora)
    declared = sum(4 * parameter.numel() for parameter in parameters.values())
    assert ran.summary["bytes"]["down"] == ran.summary["bytes"]["up"] == 3 * 2 * declared
    for line in ran.rounds[1:]:
        assert {client["bytes_up"] for client in line["clients"].values()} == {declared}
        assert {client["bytes_down"] for client in line["clients"].values()} == {declared}
