"""Flower's own classes in our loop, against Flower's own loop on the same replies."""

import gc
import logging
import random
from collections import OrderedDict

import flwr.serverapp.strategy as theirs
import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from hydra.utils import instantiate

from fedpeat.core import (
    ClientUpdate,
    ConfigError,
    EngineError,
    GlobalState,
    add,
    digest,
    read_tensors,
    without_prefix,
    write_tensors,
)
from simulations.settings import load_settings
from strategies import aggregate
from strategies.stock import REFUSED, flower, recall
from tests.federations import make_layout, make_situation, make_state, make_updates

ROUNDS, COUNT = 3, 8
LAYOUT = make_layout(head=True)
CASES = {
    "FedAvg": {},
    "FedProx": {"proximal_mu": 0.1},
    "FedAvgM": {"server_learning_rate": 0.7, "server_momentum": 0.9},
    "FedAdagrad": {"eta": 0.02},
    "FedAdam": {"eta": 0.02, "beta_1": 0.8, "beta_2": 0.95},
    "FedYogi": {"eta": 0.02},
    "FedMedian": {},
    "FedTrimmedAvg": {"beta": 0.2},
    "Krum": {"num_malicious_nodes": 1},
    "MultiKrum": {"num_malicious_nodes": 1, "num_nodes_to_select": 3},
    "Bulyan": {"num_malicious_nodes": 1},
    "QFedAvg": {"client_learning_rate": 0.1, "q": 0.5},
}
STATE = {
    "FedAvgM": {"current_arrays", "momentum_vector"},
    "FedAdagrad": {"current_arrays", "m_t", "v_t"},
    "FedAdam": {"current_arrays", "m_t", "v_t"},
    "FedYogi": {"current_arrays", "m_t", "v_t"},
    "QFedAvg": {"current_arrays"},
}


class PreparedGrid:
    """A grid that answers each round's messages with replies made beforehand."""

    def __init__(self, rounds):
        self.rounds = iter(rounds)

    def get_node_ids(self):
        return range(1, COUNT + 1)

    def send_and_receive(self, messages, timeout=None):
        return next(self.rounds) if list(messages) else []


@pytest.fixture
def _task_identity(monkeypatch):
    for name in ("_run_id", "_task_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def record(tensors):
    return ArrayRecord(OrderedDict(sorted(tensors.items())))


def message(full, weight, loss):
    metrics = MetricRecord({"num-examples": weight, "train_loss": loss})
    content = RecordDict({"arrays": record(full), "metrics": metrics})
    return Message(content, dst_node_id=1, message_type="train")


def round_of(state, number, size):
    weights = [float(3 * (index + number) % 7 + 1) for index in range(COUNT)]
    metrics = [{"train_loss": 1.0 + 0.1 * index} for index in range(COUNT)]
    return make_updates(state, COUNT, seed=100 + number, weights=weights, metrics=metrics, size=size)


def begin(near=False):
    state = make_state(LAYOUT)
    # Within a factor of two of its old value, an entry's fp32 step is exact.
    return GlobalState({name: 1.25 + tensor.abs() / 16 for name, tensor in state.tensors.items()}) if near else state


def play(name, state, size=0.1, between=lambda state: state):
    """Return the final state, what each round's clients ended with, and the state before the last round."""
    rounds = []
    for number in range(1, ROUNDS + 1):
        updates = round_of(state, number, size)
        rounds.append([(add(state.tensors, one.delta), one.weight, one.metrics["train_loss"]) for one in updates])
        recipe = flower(name=name, options=CASES[name])
        before = state
        state = between(aggregate(recipe, make_situation(state, LAYOUT, number), updates).state)
    return state, rounds, before


def their_run(name, start, rounds):
    replies = [[message(*local) for local in ended] for ended in rounds]
    strategy = getattr(theirs, name)(**CASES[name], fraction_evaluate=0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "collect", lambda: 0)  # some classes collect after every reply: a second each
        result = strategy.start(PreparedGrid(replies), record(start.tensors), num_rounds=ROUNDS)
    return strategy, {key: array.numpy() for key, array in result.arrays.items()}


def same(left, right):
    left, right = np.asarray(left), np.asarray(right)
    return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()


def as_dict(value):
    if isinstance(value, ArrayRecord):
        return {key: array.numpy() for key, array in value.items()}
    return dict(enumerate(value)) if isinstance(value, list) else value


@pytest.mark.usefixtures("_task_identity")
@pytest.mark.parametrize("name", CASES)
def test_three_rounds_equal_flowers_own_loop_to_the_bit(name):
    start = begin()
    state, rounds, before = play(name, start)
    strategy, want = their_run(name, start, rounds)
    memory = recall(without_prefix("reducer|", state.memory))
    got = as_dict(memory.pop("global"))
    assert list(got) == list(want)
    assert all(same(got[key], want[key]) for key in want)
    assert set(memory) == STATE.get(name, set())
    for attribute, value in memory.items():
        ours, flowers = as_dict(value), as_dict(getattr(strategy, attribute))
        assert type(value) is type(getattr(strategy, attribute))
        assert list(ours) == list(flowers)
        assert all(same(ours[key], flowers[key]) for key in flowers)
    for key, array in want.items():  # the federation adds fp32 steps: one rounding of the step, one of the sum
        new, old = torch.from_numpy(array).float(), before.tensors[key]
        assert ((state.tensors[key] - new).abs() <= 2**-23 * (old.abs() + new.abs())).all()
        assert not torch.equal(new, start.tensors[key])


@pytest.mark.usefixtures("_task_identity")
@pytest.mark.parametrize("name", CASES)
def test_where_steps_are_exact_the_federation_holds_flowers_arrays_to_the_bit(name):
    start = begin(near=True)
    state, rounds, _ = play(name, start, size=0.01)
    _, want = their_run(name, start, rounds)
    for key, array in want.items():
        assert same(state.tensors[key], array.astype(np.float32))


@pytest.mark.parametrize("name", CASES)
def test_state_survives_a_file_to_the_bit(name, tmp_path):
    def reload(state):
        write_tensors(tmp_path / "tensors", state.tensors)
        write_tensors(tmp_path / "memory", dict(reversed(state.memory.items())))
        return GlobalState(read_tensors(tmp_path / "tensors"), {}, read_tensors(tmp_path / "memory"))

    straight, *_ = play(name, begin())
    broken, *_ = play(name, begin(), between=reload)
    assert digest(straight.tensors) == digest(broken.tensors)
    assert digest(straight.memory) == digest(broken.memory)


@pytest.mark.parametrize("name", [name for name in STATE if name != "QFedAvg"])  # which sets its state anew each round
def test_without_its_memory_a_stateful_strategy_goes_elsewhere(name):
    kept, *_ = play(name, begin())
    lost, *_ = play(name, begin(), between=lambda state: GlobalState(state.tensors))
    assert digest(kept.tensors) != digest(lost.tensors)


def test_momentum_by_hand():
    """FedAvgM with rate 1 and momentum 0.5 on a plain tensor: pulls of 1, then 1, move it by 1, then by 1.5."""
    recipe = flower(name="FedAvgM", options={"server_momentum": 0.5})
    state = GlobalState({"w": torch.tensor([2.0])})
    for number, want in ((1, 3.0), (2, 4.5)):
        update = ClientUpdate("c", number, {"w": torch.tensor([1.0])}, 4.0)
        state = aggregate(recipe, make_situation(state, make_layout(), number), [update]).state
        assert state.tensors["w"].item() == want
    assert state.memory["reducer|momentum_vector|list|000000"].item() == -1.5


def test_names_that_nobody_sent_stay():
    state = begin()
    updates = make_updates(state, 3, layout=LAYOUT, parts=["B"])
    for name in ("FedAvg", "FedAdam"):
        after = aggregate(flower(name=name), make_situation(state, LAYOUT), updates).state
        sent = LAYOUT.names(["B"])
        for key, tensor in after.tensors.items():
            assert torch.equal(tensor, state.tensors[key]) is (key not in sent)


def test_the_server_counts_like_any_other_whatever_it_measures():
    state = GlobalState({"w": torch.zeros(1)})
    updates = [
        ClientUpdate("c", 1, {"w": torch.ones(1)}, 1.0, {"train_loss": 2.0, "train_tokens": 5.0}),
        ClientUpdate("server", 1, {"w": torch.full((1,), 4.0)}, 3.0, {"train_loss": 1.0}),
    ]
    after = aggregate(flower(name="FedAvg"), make_situation(state, make_layout()), updates).state
    assert after.tensors["w"].item() == (1 + 3 * 4) / 4


def test_updates_and_state_are_left_alone():
    state = begin()
    updates = round_of(state, 1, 0.1)
    first = aggregate(flower(name="FedAdam"), make_situation(state, LAYOUT), updates).state
    marks = [digest(update.delta) for update in updates], digest(state.tensors), digest(first.memory)
    for name, options in CASES.items():
        aggregate(flower(name=name, options=options), make_situation(state, LAYOUT), updates)
    aggregate(flower(name="FedAdam"), make_situation(first, LAYOUT, 2), updates)
    assert marks == ([digest(update.delta) for update in updates], digest(state.tensors), digest(first.memory))


@pytest.mark.usefixtures("_task_identity")
def test_flower_says_nothing_and_draws_nothing():
    heard = []
    handler = logging.Handler()
    handler.emit = heard.append
    log = logging.getLogger("flwr")
    level = log.level
    log.setLevel(logging.DEBUG)
    log.addHandler(handler)
    try:
        drawn = random.getstate()
        play("FedAdam", begin())
        flower(name="FedProx")
        assert not heard
        assert random.getstate() == drawn
        log.info("others are heard again")
        assert len(heard) == 1
        theirs.FedAvg().aggregate_train(1, [message({"w": torch.ones(1)}, 1.0, 1.0)])
        assert len(heard) > 1  # Flower itself does speak
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def test_every_class_of_flowers_runs_or_is_refused_with_a_reason():
    for name in theirs.__all__:
        if name in CASES or name == "Result":
            continue
        with pytest.raises(ConfigError, match="cannot use") as caught:
            flower(name=name)
        assert caught.value.found in REFUSED.values()
        assert "FedMedian" in caught.value.remedy


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("FedMedain", {}, "did you mean 'FedMedian'"),
        ("fedadam", {}, "did you mean 'FedAdam'"),
        ("Result", {}, "no such strategy"),
        ("FedAdam", {"etta": 1}, "did you mean 'eta'"),
        ("FedMedian", {"beta": 0.1}, "no keywords of its own"),
        ("FedAdam", {"eta": "much"}, "must be float"),
        ("FedAdam", {"eta": True}, "must be float"),
        ("FedAdam", {"eta": float("nan")}, "must be float"),
        ("Krum", {"num_malicious_nodes": 1.5}, "must be int"),
        ("FedTrimmedAvg", {"beta": 0.5}, r"range \[0, 0.5\)"),
        ("FedAvg", {"fraction_train": 0.5}, "clients.per_round"),
        ("FedAvg", {"weighted_by_key": "rows"}, "strategy.weight_by"),
        ("Bulyan", {"selection_rule": "x"}, "a function"),
        ("QFedAvg", {}, "client_learning_rate must be given"),
        ("FedProx", {"proximal_mu": -1}, "0 or more"),
    ],
)
def test_bad_settings_are_told(name, options, words):
    with pytest.raises(ConfigError, match=words):
        flower(name=name, options=options)


def test_classes_that_need_more_than_we_give_are_refused(monkeypatch):
    class Asks(theirs.FedAvg):
        def configure_train(self, server_round, arrays, config, grid):
            return grid.get_node_ids()

    class Tells(theirs.FedAvg):
        def configure_train(self, server_round, arrays, config, grid):
            config["temperature"] = 1.0
            return []

    class Alone(theirs.Strategy):
        pass

    for kind, words in ((Asks, "chooses its clients itself"), (Tells, "temperature"), (Alone, "not built on")):
        monkeypatch.setattr(theirs, "__all__", [*theirs.__all__, kind.__name__])
        monkeypatch.setattr(theirs, kind.__name__, kind, raising=False)
        with pytest.raises(ConfigError, match=words):
            flower(name=kind.__name__)


def test_proximal_mu_reaches_the_clients():
    assert flower(name="FedProx", options={"proximal_mu": 0.3}).client(2) == {"proximal_mu": 0.3}
    assert flower(name="FedAvg").client(2) == {}


def one(weight=1.0, **metrics):
    return ClientUpdate("c", 1, {"w": torch.ones(1)}, weight, metrics)


@pytest.mark.parametrize(
    ("name", "options", "updates", "words"),
    [
        ("FedAvg", {}, [one(0.0), one(0.0)], "weights sum to 0"),
        ("Bulyan", {"num_malicious_nodes": 1}, [one()] * 6, "needs 7 updates"),
        ("Krum", {}, [one(0.0)] * 3 + [one(1.0)], "ZeroDivisionError"),
        ("QFedAvg", {"client_learning_rate": 0.1}, [one()], "train_loss"),
        ("MultiKrum", {"num_nodes_to_select": 0}, [one()] * 3, "must give back"),
    ],
)
def test_what_flower_cannot_aggregate_is_told(name, options, updates, words):
    situation = make_situation(GlobalState({"w": torch.zeros(1)}), make_layout())
    with pytest.raises(EngineError, match=words):
        aggregate(flower(name=name, options=options), situation, updates)


def test_bulyan_needs_as_many_replies_as_flower_says():
    state = begin()
    updates = round_of(state, 1, 0.1)[:7]
    recipe = flower(name="Bulyan", options={"num_malicious_nodes": 1})
    assert aggregate(recipe, make_situation(state, LAYOUT), updates).update_norm > 0
    strategy = theirs.Bulyan(num_malicious_nodes=1)
    assert strategy.aggregate_train(1, [])[0] is None


def test_a_strategy_that_gives_nothing_is_told(monkeypatch):
    monkeypatch.setattr(theirs.FedAvg, "aggregate_train", lambda *_: (None, None))
    with pytest.raises(EngineError, match="gave nothing"):
        aggregate(flower(name="FedAvg"), make_situation(GlobalState({"w": torch.zeros(1)}), make_layout()), [one()])


def test_facts():
    for name, options in CASES.items():
        recipe = flower(name=name, options=options, weight_by="rows")
        assert (recipe.name, recipe.weight_by, recipe.mixes_ranks) == ("flower", "rows", False)
        assert (recipe.facts.family, recipe.facts.exact, recipe.facts.rebases) == ("flower", "no", False)
        assert f"Flower's {name}" in recipe.facts.source
    assert flower(name="FedMedian").facts.source == "Flower's FedMedian, arXiv 1803.01498"


def test_the_command_line_builds_it():
    chosen = load_settings(["strategy=flower", "strategy.name=FedTrimmedAvg", "strategy.options={beta: 0.3}"])
    assert chosen["strategy"]["options"] == {"beta": 0.3}
    assert instantiate(chosen["strategy"]).facts.source.startswith("Flower's FedTrimmedAvg")
    plain = load_settings(["strategy=flower", "strategy.name=FedMedian"])["strategy"]
    assert plain["options"] == {}
    assert instantiate(plain).weight_by == "tokens"
    with pytest.raises(ConfigError, match=r"strategy\.name must be given"):
        load_settings(["strategy=flower"])
