import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Error, Message
from flwr.clientapp import ClientApp

from fedpeat.core import ClientFailure, ClientUpdate, DevicePlan, EngineError, RoundPlan, UpdateRefused
from fedpeat.wire import read_arrays, read_job, to_arrays, update_reply
from simulations.engines.serial import LocalGrid
from simulations.exchange import exchange
from strategies import fed_avg
from strategies.flower import RecipeStrategy

START = {"w": torch.zeros(2), "b": torch.zeros(1)}
app = ClientApp()


def update(name, delta, *, server_round=1, weight=1.0):
    return ClientUpdate(name, server_round, delta, weight, {"train_tokens": 8.0, "train_loss": 1.0})


@app.train()
def misbehave(message, _context):
    job, arrays = read_job(message)
    name, tensors = job["client"], read_arrays(arrays)
    ones = {key: torch.ones_like(value) for key, value in tensors.items()}
    made = {
        "missing": update(name, {"w": ones["w"]}),
        "extra": update(name, {**ones, "x": ones["w"]}),
        "shape": update(name, {**ones, "w": torch.ones(3)}),
        "dtype": update(name, {**ones, "w": torch.ones(2, dtype=torch.float64)}),
        "nan": update(name, {**ones, "w": torch.tensor([1.0, float("nan")])}),
        "stale": update(name, ones, server_round=7),
        "thief": update("somebody", ones),
        "weight": update(name, ones, weight=float("nan")),
    }
    if name == "raises":
        return Message(Error(code=2, reason="boom"), reply_to=message)
    return update_reply(made.get(name, update(name, ones)), to=message)


def run(names, **more):
    seen = []
    strategy = RecipeStrategy(fed_avg(), job={}, node_of=lambda _: 1, observer=seen.append, **more)
    plan = RoundPlan(1, 0, 10, tuple(DevicePlan(client=name, local_steps=1) for name in sorted(names)))
    strategy.begin(plan, START, None)
    grid = LocalGrid(app, 1)
    sent = strategy.configure_train(1, to_arrays(START), ConfigRecord(), grid)
    arrays, metrics = strategy.aggregate_train(1, exchange(grid, sent, window=4))
    return strategy, seen, arrays, metrics


BAD = {"missing": "missing: b", "extra": "unknown: x", "shape": "(3,)", "dtype": "float64", "nan": "finite"}
BAD |= {"stale": "round 7", "thief": "signed", "weight": "weight"}


def test_good_updates_count_and_bad_ones_are_refused_with_the_reason():
    strategy, seen, arrays, metrics = run([*BAD, "raises", "good", "fine"])
    assert isinstance(arrays, ArrayRecord)
    assert torch.equal(strategy.aggregation.tensors["w"], torch.ones(2))
    assert set(strategy.aggregation.clients) == {"good", "fine"}
    reasons = {failure.client: failure for failure in strategy.failures}
    assert set(reasons) == {*BAD, "raises"}
    for name, words in BAD.items():
        assert reasons[name].kind == "refused"
        assert words in reasons[name].reason
    assert (reasons["raises"].kind, reasons["raises"].reason) == ("error", "boom")
    assert len(seen) == len(BAD) + 3
    assert sum(isinstance(event, ClientFailure) for event in seen) == len(BAD) + 1
    assert metrics["update-norm"] == pytest.approx(3**0.5)


def test_too_few_good_updates_end_the_run():
    with pytest.raises(EngineError, match="min_replies=2"):
        run(["good", "nan"], min_replies=2)


def test_the_server_is_one_more_participant_but_not_a_reply():
    def server(plan, tensors):
        return update("server", {key: torch.full_like(value, 3.0) for key, value in tensors.items()})

    strategy, *_ = run(["good"], server_update=server)
    assert torch.equal(strategy.aggregation.tensors["w"], torch.full((2,), 2.0))
    with pytest.raises(EngineError):
        run(["nan"], server_update=server)


def test_a_round_needs_its_plan():
    strategy = RecipeStrategy(fed_avg(), job={}, node_of=lambda _: 1)
    with pytest.raises(UpdateRefused, match="no plan"):
        list(strategy.configure_train(1, to_arrays(START), ConfigRecord(), LocalGrid(app, 1)))
