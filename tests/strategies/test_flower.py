import dataclasses

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Error, Message
from flwr.clientapp import ClientApp

from fedpeat.codecs import bf16, from_description, none, top_k
from fedpeat.core import (
    ClientFailure,
    ClientUpdate,
    DevicePlan,
    EngineError,
    GlobalState,
    RoundPlan,
    UpdateRefused,
    count_bytes,
    digest,
)
from fedpeat.wire import read_arrays, read_job, update_reply
from simulations.engines.serial import LocalGrid
from simulations.exchange import exchange
from strategies import aggregate, start
from strategies.flower import RecipeStrategy
from strategies.folding import fed_ex_lora, flora
from strategies.general import fed_avg
from strategies.limits import Limits
from strategies.lora import ffa_lora
from tests.federations import make_layout, make_situation, make_state

START = {"w": torch.zeros(2), "b": torch.zeros(1)}
CUTS = Limits(tokens_a_step=1, weight_share=0.1)
app = ClientApp()


def update(name, delta, *, server_round=1, weight=1.0):
    encoding = {"name": "none"}
    return ClientUpdate(name, server_round, delta, weight, {"train_tokens": 8.0, "train_loss": 1.0}, encoding=encoding)


@app.train()
def misbehave(message, _context):
    job, arrays = read_job(message)
    name, tensors = job["client"], read_arrays(arrays)
    ones = {key: torch.ones_like(value) for key, value in tensors.items()}
    made = {
        "missing": update(name, {"w": ones["w"]}),
        "more": update(name, {**ones, "x": ones["w"]}),
        "shape": update(name, {**ones, "w": torch.ones(3)}),
        "dtype": update(name, {**ones, "w": torch.ones(2, dtype=torch.float64)}),
        "nan": update(name, {**ones, "w": torch.tensor([1.0, float("nan")])}),
        "stale": update(name, ones, server_round=7),
        "bundle": dataclasses.replace(update(name, ones), bundle="another"),
        "thief": update("somebody", ones),
        "weight": update(name, ones, weight=float("nan")),
        "heavy": update(name, ones, weight=31.0),
        "huge": update(name, {**ones, "w": torch.tensor([0.0, 11.0])}),
        "codec": dataclasses.replace(update(name, ones), encoding={"name": "bf16"}),
        "variates": dataclasses.replace(update(name, ones), extras=ones),
    }
    if name == "raises":
        return Message(Error(code=2, reason="boom"), reply_to=message)
    return update_reply(made.get(name, update(name, ones)), to=message)


def plan_of(*devices, number=1):
    made = [device if isinstance(device, DevicePlan) else DevicePlan(device, local_steps=1) for device in devices]
    return RoundPlan(number, 0, 10, tuple(sorted(made, key=lambda device: device.client)))


def run(names, **more):
    seen = []
    strategy = RecipeStrategy(fed_avg(), job={}, node_of=lambda _: 1, observer=seen.append, **more)
    strategy.begin(plan_of(*names), start(strategy.recipe, START))
    grid = LocalGrid(app, 1)
    sent = strategy.configure_train(1, ArrayRecord(), ConfigRecord(), grid)
    arrays, metrics = strategy.aggregate_train(1, exchange(grid, sent, window=4))
    return strategy, seen, arrays, metrics


BAD = {"missing": "missing: b", "more": "unknown: x", "shape": "(3,)", "dtype": "float64", "nan": "finite"}
BAD |= {
    "stale": "round 7",
    "bundle": "it says 'another'",
    "thief": "signed",
    "weight": "weight",
    "codec": "encoded by",
    "variates": "its extras",
}


def test_good_updates_count_and_bad_ones_are_refused_with_the_reason():
    strategy, seen, arrays, metrics = run([*BAD, "raises", "good", "fine"])
    assert isinstance(arrays, ArrayRecord)
    assert torch.equal(strategy.aggregation.state.tensors["w"], torch.ones(2))
    assert digest(read_arrays(arrays)) == digest(strategy.aggregation.state.tensors)
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
    assert strategy.aggregation.clients["good"]["bytes_up"] == 12.0
    assert strategy.bytes_down == dict.fromkeys([*BAD, "raises", "good", "fine"], 12)


def test_too_few_good_updates_end_the_run():
    with pytest.raises(EngineError, match="min_replies=2") as caught:
        run(["good", "nan"], min_replies=2)
    assert "nan: " in caught.value.found


def test_the_server_is_one_more_participant_but_not_a_reply():
    asked = []

    def server(plan, state, half):
        asked.append((plan.round, set(state.tensors), dict(half)))
        return update("server", {key: torch.full_like(value, 3.0) for key, value in state.tensors.items()})

    strategy, *_ = run(["good"], server_update=server)
    assert torch.equal(strategy.aggregation.state.tensors["w"], torch.full((2,), 2.0))
    assert list(strategy.aggregation.clients) == ["good", "server"]
    assert "server" not in strategy.bytes_down
    assert asked == [(1, {"w", "b"}, {})]
    with pytest.raises(EngineError):
        run(["nan"], server_update=server)


def test_a_round_needs_its_plan():
    strategy = RecipeStrategy(fed_avg(), job={}, node_of=lambda _: 1)
    with pytest.raises(UpdateRefused, match="no plan"):
        list(strategy.configure_train(1, ArrayRecord(), ConfigRecord(), LocalGrid(app, 1)))
    strategy.begin(plan_of("a", number=2), GlobalState(START))
    with pytest.raises(UpdateRefused, match="round 1 has no plan"):
        list(strategy.configure_train(1, ArrayRecord(), ConfigRecord(), LocalGrid(app, 1)))


# A federation on LoRA, whose clients answer with noise of the shapes they are asked for.

LAYOUT = make_layout(rank=3, head=True)
STATE = make_state(LAYOUT, zero_b=True)
devices = ClientApp()
RECEIVED: dict = {}


@devices.train()
def answer(message, _context):
    job, arrays = read_job(message)
    RECEIVED[job["client"]] = (job, read_arrays(arrays))
    delta, codec = noise_for(job, RECEIVED[job["client"]][1]), from_description(job["codec"])
    sent, _ = codec.encode(delta, codec.start(delta), 0)
    said = {"encoding": codec.description, "bundle": job.get("bundle", "")}
    return update_reply(ClientUpdate(job["client"], job["round"], sent, job["local_steps"], {}, **said), to=message)


def noise_for(job, tensors):
    """What the recipe has this device send: of the names it was sent, those that train."""
    wanted = LAYOUT.names(job["extras"].get("train_only", ["A", "B", "other"]))
    generator = torch.Generator().manual_seed(len(job["client"]))
    return {name: 0.1 * torch.randn(tensors[name].shape, generator=generator) for name in sorted(wanted & set(tensors))}


def round_of(recipe, *plan, state=STATE, number=1, **more):
    RECEIVED.clear()
    strategy = RecipeStrategy(recipe, job={"seed": 5}, node_of=lambda _: 1, layout=LAYOUT, **more)
    strategy.begin(plan_of(*plan, number=number), state)
    grid = LocalGrid(devices, 1)
    sent = strategy.configure_train(number, ArrayRecord(), ConfigRecord(), grid)
    strategy.aggregate_train(number, exchange(grid, sent, window=4))
    assert strategy.failures == []
    return strategy


def test_devices_of_different_ranks_get_and_send_different_tensors():
    plan = (DevicePlan("a", 1, rank=1), DevicePlan("bb", 2, rank=2), DevicePlan("ccc", 3))
    strategy = round_of(flora(), *plan)
    for client, rank in (("a", 1), ("bb", 2), ("ccc", 3)):
        tensors = RECEIVED[client][1]
        for pair in LAYOUT.pairs:
            assert torch.equal(tensors[pair.a], STATE.tensors[pair.a][:rank])
            assert torch.equal(tensors[pair.b], STATE.tensors[pair.b][:, :rank])
        floats = sum(rank * sum(pair.shape) for pair in LAYOUT.pairs) + 6
        assert strategy.bytes_down[client] == 4 * floats
        assert strategy.aggregation.clients[client]["bytes_up"] == 4 * floats


def test_devices_of_one_rank_share_one_record():
    strategy = RecipeStrategy(fed_avg(), job={}, node_of=lambda _: 1, layout=LAYOUT)
    strategy.begin(plan_of("a", "b", DevicePlan("c", 1, rank=2)), STATE)
    messages = list(strategy.configure_train(1, ArrayRecord(), ConfigRecord(), LocalGrid(app, 1)))
    first, second, third = (next(iter(message.content.array_records.values())) for message in messages)
    assert first is second
    assert first is not third


def test_devices_with_parts_of_their_own_do_not_share_the_others_record():
    fixed, personal = {"fixed": ["A"], "train_only": ["B", "other"]}, {"personal": ["B"], "train_only": ["A", "other"]}
    plan = (DevicePlan("a", 1, extras=fixed), DevicePlan("bb", 1), DevicePlan("ccc", 1, extras=personal))
    round_of(fed_avg(), *plan)
    a, b = LAYOUT.names(["A"]), LAYOUT.names(["B"])
    assert set(RECEIVED["a"][1]) == set(STATE.tensors) - a
    assert set(RECEIVED["bb"][1]) == set(STATE.tensors)
    assert set(RECEIVED["ccc"][1]) == set(STATE.tensors) - b


@pytest.mark.parametrize("codec", [none(), bf16(), top_k(share=0.3)], ids=lambda codec: codec.name)
def test_updates_are_decoded_by_the_codec_that_clients_are_told(codec):
    strategy = round_of(fed_avg(), "a", "bb", codec=codec)
    updates = []
    for client in ("a", "bb"):
        job, tensors = RECEIVED[client]
        assert job["codec"] == codec.description
        delta = noise_for(job, tensors)
        sent, _ = codec.encode(delta, codec.start(delta), 0)
        assert strategy.aggregation.clients[client]["bytes_up"] == count_bytes(sent)
        decoded = codec.decode(sent, {name: tensor.shape for name, tensor in delta.items()})
        updates.append(ClientUpdate(client, 1, decoded, 1.0))
    wanted = aggregate(fed_avg(), make_situation(STATE, LAYOUT), updates).state
    assert digest(strategy.aggregation.state.tensors) == digest(wanted.tensors)


def test_a_recipes_half_is_in_the_job_and_decides_what_travels():
    strategy = round_of(ffa_lora(), "a", "bb")
    b = LAYOUT.names(["B", "other"])
    for client in ("a", "bb"):
        job, tensors = RECEIVED[client]
        assert job["extras"] == {"train_only": ["B", "other"], "fixed": ["A"]}
        assert set(tensors) == b
        assert strategy.bytes_down[client] == sum(4 * STATE.tensors[name].numel() for name in b)
    after = strategy.aggregation.state.tensors
    assert {name for name in after if not torch.equal(after[name], STATE.tensors[name])} == b


def test_a_plan_may_change_the_half_for_one_device():
    more = DevicePlan("bb", 1, extras={"train_only": ["B"]})
    strategy = round_of(fed_avg(), "a", more, "ccc", job_of=lambda device: {"bundle": device.emulator})
    assert [RECEIVED[name][0]["extras"] for name in ("a", "bb", "ccc")] == [{}, {"train_only": ["B"]}, {}]
    assert strategy.aggregation.clients["bb"]["bytes_up"] == 4 * 3 * (6 + 4)
    job = RECEIVED["bb"][0]
    assert (job["bundle"], job["seed"], job["weight_by"], job["round"]) == ("default", 5, "tokens", 1)
    assert (job["client"], job["local_steps"], job["start_step"], job["total_steps"]) == ("bb", 1, 0, 10)


def test_what_is_folded_goes_down_whole_in_the_next_round():
    first = round_of(fed_ex_lora(), "a", DevicePlan("bb", 2), exactness=True)
    state = first.aggregation.state
    assert set(state.folds) == {"m.0", "m.1"}
    assert first.aggregation.error < 1e-5
    second = round_of(fed_ex_lora(), "a", "bb", state=state, number=2)
    for client in ("a", "bb"):
        assert digest(RECEIVED[client][1]) == digest(
            {**state.tensors, **{f"fold|{n}": f for n, f in state.folds.items()}}
        )
    assert second.bytes_down["a"] == first.bytes_down["a"] + 4 * (6 * 5 + 4 * 7)


def test_exactness_is_measured_only_where_asked_for():
    assert round_of(fed_avg(), "a", DevicePlan("bb", 2)).aggregation.error is None
    assert round_of(fed_avg(), "a", DevicePlan("bb", 2), exactness=True).aggregation.error > 0.01
    assert round_of(fed_avg(), "a", exactness=True).aggregation.error < 1e-6


def test_a_new_round_starts_afresh():
    strategy = round_of(fed_avg(), "a", "bb")
    strategy.begin(plan_of("a", number=2), strategy.aggregation.state)
    assert (strategy.failures, strategy.aggregation, strategy.bytes_down) == ([], None, {})
    assert strategy.situation.round == 2
    assert strategy.situation.layout is LAYOUT


def test_who_claims_too_much_is_refused_or_cut_and_counted():
    """`fed_avg()` weighs by tokens: three steps of 10 tokens may weigh 30; `heavy` says 31, all others 1."""
    plans = [DevicePlan(name, local_steps=3) for name in ("heavy", "huge", "good")]
    strategy, *_ = run(plans, limits=Limits(update_norm=10.0, tokens_a_step=10))
    assert set(strategy.aggregation.clients) == {"good"}
    assert {failure.client: failure.kind for failure in strategy.failures} == {"heavy": "refused", "huge": "refused"}
    said = {failure.client: failure.reason for failure in strategy.failures}
    assert "may weigh 30 tokens at most" in said["heavy"]
    assert "round.max_update_norm=10" in said["huge"]
    assert strategy.cut == []
    strategy, *_ = run([DevicePlan(name, local_steps=2) for name in ("good", "fine")], limits=CUTS)
    assert strategy.cut == ["fine", "good"]
    assert strategy.aggregation.clients["fine"]["weight"] == pytest.approx(0.4)


def test_an_update_made_with_another_bundle_is_refused():
    """The version is the last part of what the job names, a path in a simulation; an old reply names another."""
    names = ["good", "old"]

    def answers(bundle_of):
        own = {"bundle": "/cache/bundles/v2"}
        strategy = RecipeStrategy(fed_avg(), job={}, node_of=lambda _: 1, job_of=lambda _: own)
        strategy.begin(plan_of(*names), start(strategy.recipe, START))
        replies = []
        for message in strategy.configure_train(1, ArrayRecord(), ConfigRecord(), LocalGrid(app, 1)):
            job, arrays = read_job(message)
            message.metadata.__dict__["_message_id"] = "m"
            ones = {key: torch.ones_like(value) for key, value in read_arrays(arrays).items()}
            made = dataclasses.replace(update(job["client"], ones), bundle=bundle_of[job["client"]])
            replies.append(update_reply(made, to=message))
        strategy.aggregate_train(1, replies)
        return strategy

    strategy = answers({"good": "v2", "old": "v1"})
    assert set(strategy.aggregation.clients) == {"good"}
    (failure,) = strategy.failures
    assert (failure.client, failure.kind) == ("old", "refused")
    assert "bundle 'v2'" in failure.reason
    assert not answers({"good": "v2", "old": "v2"}).failures
