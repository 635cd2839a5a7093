import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedpeat.core import ClientUpdate, UpdateRefused
from fedpeat.wire import error_reply, read_failure, read_job, read_update, to_arrays, train_message, update_reply


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
