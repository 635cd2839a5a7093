import threading
import time

import pytest
import torch
from flwr.app import Error, Message
from flwr.clientapp import ClientApp

from fedpeat.core import ClientUpdate, EngineError
from fedpeat.wire import read_arrays, read_failure, read_job, read_update, to_arrays, train_message, update_reply
from simulations.engines.serial import LocalGrid
from simulations.exchange import LONGEST_REST_SECONDS, Interrupted, exchange

app = ClientApp()


@app.train()
def echo(message, _context):
    job, arrays = read_job(message)
    if job["client"] == "slow":
        time.sleep(0.3)
    if job["client"] == "wrong":
        return Message(Error(code=2, reason="no such thing"), reply_to=message)
    if job["client"] == "dead":
        return Message(Error(code=0, reason="ActorDiedError: killed, OOM"), reply_to=message)
    return update_reply(ClientUpdate(job["client"], 1, read_arrays(arrays), 1.0, {}), to=message)


class Shuffled(LocalGrid):
    """Answers the newest message first and counts what is on its way."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.most = self.out = 0

    def push_messages(self, messages):
        identities = super().push_messages(messages)
        self.out += len(identities)
        self.most = max(self.most, self.out)
        return identities

    def pull_messages(self, message_ids):
        replies = super().pull_messages(list(message_ids)[::-1])
        self.out -= len(replies)
        return replies


def messages(names):
    arrays = to_arrays({"w": torch.ones(2)})
    return (train_message({"client": name, "round": 1}, arrays, node=1, ttl_seconds=None) for name in names)


def names_of(replies):
    return [reply.error.reason[:7] if reply.has_error() else read_update(reply).client for reply in replies]


@pytest.mark.parametrize("window", [1, 3, 100])
def test_replies_come_in_the_order_of_the_messages_and_the_window_holds(window):
    grid = Shuffled(app, 1)
    names = [f"c{i}" for i in range(17)]
    assert names_of(exchange(grid, messages(names), window=window)) == names
    assert grid.most <= window


def test_nothing_to_send_is_nothing_to_receive():
    assert list(exchange(LocalGrid(app, 1), messages([]), window=4)) == []


@pytest.mark.parametrize("window", [1, 2, 9])
def test_late_clients_are_stood_in_for_by_errors(window):
    replies = list(exchange(LocalGrid(app, 1), messages(["a", "slow", "b", "c"]), window=window, timeout_seconds=0.2))
    assert names_of(replies)[0] == "a"
    assert len(replies) == 4
    last = read_failure(replies[-1], client="c", server_round=1)
    assert last.kind == "timeout"


@pytest.mark.parametrize("window", [1, 2, 9])
def test_once_enough_came_nobody_else_is_waited_for(window):
    names = ["wrong", "a", "b", "c", "d"]
    replies = list(exchange(LocalGrid(app, 1), messages(names), window=window, enough=2))
    assert names_of(replies) == ["no such", "a", "b", "surplus", "surplus"]
    assert read_failure(replies[-1], client="d", server_round=1).kind == "surplus"
    everyone = list(exchange(LocalGrid(app, 1), messages(names), window=window, enough=5))
    assert names_of(everyone) == ["no such", "a", "b", "c", "d"]


def test_the_fastest_count_whatever_their_place():
    replies = list(exchange(Shuffled(app, 1), messages(["a", "b", "c", "d"]), window=4, enough=2))
    assert names_of(replies) == ["surplus", "surplus", "c", "d"]


def test_a_dead_worker_ends_the_run_with_advice():
    with pytest.raises(EngineError, match="worker process died") as caught:
        list(exchange(LocalGrid(app, 1), messages(["a", "dead", "b"]), window=4))
    assert "memory" in caught.value.found


def test_a_request_to_stop_is_heard():
    stop = threading.Event()
    replies = exchange(LocalGrid(app, 1), messages(["a", "b", "c"]), window=1, stop=stop)
    assert read_update(next(replies)).client == "a"
    stop.set()
    with pytest.raises(Interrupted):
        list(replies)


class Clock:
    """Time that passes only where it is told to."""

    def __init__(self):
        self.now, self.rests = 0.0, []

    def perf_counter(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        self.rests.append(seconds)


def test_one_look_that_took_long_is_not_followed_by_a_long_rest(monkeypatch):
    clock = Clock()

    class StoodStill(LocalGrid):
        def pull_messages(self, message_ids):
            if clock.rests:
                return super().pull_messages(message_ids)
            clock.now += 100.0
            return []

    monkeypatch.setattr("simulations.exchange.time", clock)
    assert names_of(exchange(StoodStill(app, 1), messages(["a"]), window=1)) == ["a"]
    assert clock.rests == [LONGEST_REST_SECONDS]
