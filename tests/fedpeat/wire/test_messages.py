import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedpeat.core import ClientUpdate, UpdateRefused
from fedpeat.wire import (
    answer_reply,
    error_reply,
    question,
    raw_arrays,
    read_answer,
    read_failure,
    read_job,
    read_question,
    read_update,
    to_arrays,
    train_message,
    update_reply,
)


@pytest.fixture
def message():
    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1
    made = train_message({"round": 3, "client": "a"}, to_arrays({"w": torch.ones(2)}), node=1, ttl_seconds=None)
    made.metadata.__dict__["_message_id"] = "m"
    return made


def test_a_job_and_an_update_survive_the_way(message):
    job, arrays = read_job(message)
    assert job == {"round": 3, "client": "a"}
    assert list(arrays) == ["w"]
    update = ClientUpdate("a", 3, {"w": torch.tensor([1.5, 2.5])}, 7, {"train_loss": 2.0})
    again = read_update(update_reply(update, to=message))
    assert (again.client, again.round, again.weight, again.metrics) == ("a", 3, 7.0, {"train_loss": 2.0})
    assert torch.equal(again.delta["w"], update.delta["w"])


def test_extras_and_the_encoding_travel_beside_the_delta(message):
    delta = {"w": torch.tensor([1, 2], dtype=torch.int8), "w|scale": torch.tensor([0.5], dtype=torch.float16)}
    extras = {"w": torch.tensor([3.0, 4.0]), "v": torch.tensor([5.0], dtype=torch.bfloat16)}
    encoding = {"name": "int8", "block_size": 64}
    again = read_update(update_reply(ClientUpdate("a", 3, delta, 7, {}, extras, encoding), to=message))
    assert again.encoding == encoding
    for found, sent in ((again.delta, delta), (again.extras, extras)):
        assert set(found) == set(sent)
        for name, tensor in sent.items():
            assert found[name].dtype is tensor.dtype
            assert torch.equal(found[name], tensor)
    assert again.payload_bytes == 2 + 2 + 8 + 2


@pytest.mark.parametrize("bundle", ["", "0123456789abcdef" * 2])
def test_an_update_says_which_bundle_it_was_made_with(message, bundle):
    again = read_update(update_reply(ClientUpdate("a", 3, {"w": torch.ones(2)}, 7, bundle=bundle), to=message))
    assert (again.bundle, again.payload_bytes) == (bundle, 8)


def test_what_was_sent_is_counted_before_it_is_decoded(message):
    half = {"w": torch.ones(10, dtype=torch.bfloat16)}
    assert read_update(update_reply(ClientUpdate("a", 3, half, 7), to=message)).payload_bytes == 20
    assert read_update(update_reply(ClientUpdate("a", 3, {}, 7), to=message)).payload_bytes == 0


@pytest.mark.parametrize("encoding", [None, "", "{", b"{}", "[" * 100_000, "9" * 5000])
def test_an_update_that_does_not_say_how_it_is_encoded_is_refused(message, encoding):
    said = {"client": "a", "round": 1} if encoding is None else {"client": "a", "round": 1, "encoding": encoding}
    content = {"arrays": to_arrays({"w": torch.ones(2)}), "metrics": MetricRecord({"num-examples": 1.0})}
    reply = Message(RecordDict({**content, "config": ConfigRecord(said)}), reply_to=message)
    with pytest.raises(UpdateRefused, match="use one version of fedpeat"):
        read_update(reply)


@pytest.mark.parametrize("said", [{"round": float("inf")}, {"round": float("nan")}, {"round": [1]}, {"round": "x"}])
def test_a_round_that_is_no_number_is_refused(message, said):
    config = ConfigRecord({"client": "a", "encoding": "{}", **said})
    metrics = MetricRecord({"num-examples": 1.0})
    with pytest.raises(UpdateRefused, match="who sent it"):
        read_update(
            Message(RecordDict({"arrays": ArrayRecord({}), "metrics": metrics, "config": config}), reply_to=message)
        )


@pytest.mark.parametrize("encoding", ["[]", "3", "null", '"int8"'])
def test_an_encoding_that_is_no_description_is_none(message, encoding):
    said = ConfigRecord({"client": "a", "round": 1, "encoding": encoding})
    metrics = MetricRecord({"num-examples": 1.0})
    reply = Message(RecordDict({"arrays": ArrayRecord({}), "metrics": metrics, "config": said}), reply_to=message)
    assert read_update(reply).encoding == {}


def test_a_failure_is_told_in_one_line(message):
    assert read_failure(error_reply("no rows", to=message), client="a", server_round=1).reason == "no rows"
    ray = "\x1b[36mray::run()\x1b[39m\n  File x\nRuntimeError: boom\n"
    failure = read_failure(Message(Error(code=2, reason=ray), reply_to=message), client="a", server_round=1)
    assert (failure.kind, failure.reason) == ("error", "RuntimeError: boom")
    dead = Message(Error(code=0, reason="<class 'ActorDiedError'>: gone"), reply_to=message)
    assert read_failure(dead, client="a", server_round=1).kind == "died"


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -1.0])
def test_a_weight_that_is_no_weight_is_refused(message, weight):
    update = ClientUpdate("a", 3, {"w": torch.ones(2)}, weight, {})
    with pytest.raises(UpdateRefused, match="weight"):
        read_update(update_reply(update, to=message))


@pytest.mark.parametrize(
    "content",
    [
        RecordDict({}),
        RecordDict({"arrays": ArrayRecord({}), "config": ConfigRecord({"client": "a", "round": 1})}),
        RecordDict({"arrays": ArrayRecord({}), "metrics": MetricRecord({"num-examples": 1.0})}),
    ],
)
def test_a_reply_without_its_parts_is_refused(message, content):
    with pytest.raises(UpdateRefused):
        read_update(Message(content, reply_to=message))
    with pytest.raises(UpdateRefused):
        read_job(Message(content, dst_node_id=1, message_type="train"))


@pytest.mark.parametrize("data", [b"", b"\0", bytes(range(256)) * 3])
def test_a_question_and_its_answer_survive_the_way(data):
    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1
    asked = {"version": "0" * 32, "pieces": [["a/b", 0, 3]], "manifest": {"ü": None}}
    made = question("bundle", asked, node=7, arrays=raw_arrays(data))
    assert (made.metadata.message_type, made.metadata.dst_node_id) == ("query.bundle", 7)
    assert read_question(made) == (asked, data)
    assert read_question(question("hello", {}, node=7)) == ({}, b"")
    made.metadata.__dict__["_message_id"] = "m"
    assert read_answer(answer_reply({"rows": 3}, to=made)) == {"rows": 3}


def test_what_is_no_question_or_no_answer_is_refused(message):
    with pytest.raises(UpdateRefused, match=r"config\.asked"):
        read_question(message)
    for said in ({}, {"answer": "{"}, {"answer": "[" * 100_000}, {"answer": "[1]"}):
        reply = Message(RecordDict({"config": ConfigRecord(said)}), reply_to=message)
        with pytest.raises(UpdateRefused, match="answer"):
            read_answer(reply)
