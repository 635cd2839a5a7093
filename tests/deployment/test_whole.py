"""A whole federation of real processes on real text, with a client killed in round 2 and the server in round 3.

It computes what a simulation does that nothing happened to.
"""

from dataclasses import dataclass

import pytest

from tests.deployment.conftest import CHOSEN, NAMES
from tests.deployment.machines import halted
from tests.processes import PATIENCE, wait_for

pytestmark = pytest.mark.slow


@dataclass
class Told:
    """What was said by each attempt, and what was delivered in it."""

    codes: list
    said: list
    delivered: list


@pytest.fixture(scope="module")
def story(federation, settle, read_json):
    """One run in three attempts: `(its folder, what was told)`."""
    settle(min_replies=3, timeout_seconds=None)
    told = Told([], [], [])

    def done(process, log):
        told.codes.append(process.wait(PATIENCE))
        told.said.append(log.read_text())
        told.delivered.append(read_json(place() / "delivery.json"))

    def place():
        return federation.runs()[-1]

    def wait_for_round(number, process, log, before=0):
        """Until a client trains in a round; `before` is the number of folders that were there."""
        wait_for(
            lambda: len(federation.runs()) > before and federation.has("ann", number),
            what=log.read_text,
            process=process,
        )

    before = len(federation.runs())
    with federation.running() as (process, log):
        wait_for_round(2, process, log, before)
        federation.clients["ann"].kill()
        done(process, log)
    federation.clients["ann"].wait_again()
    with federation.running("resume=latest") as (process, log):
        wait_for_round(3, process, log)
        for client in federation.clients.values():
            client.mark()
        federation.server.kill()
        done(process, log)
    for unit in (federation.server, *federation.clients.values()):
        unit.wait_again()
    with federation.running("resume=latest") as (process, log):
        done(process, log)
    return place(), told


@pytest.fixture(scope="module")
def real(story, open_run):
    folder, told = story
    assert told.codes[2] == 0, told.said[2]
    return open_run(folder)


def test_it_computes_what_one_process_does_that_nothing_happened_to(real, run):
    simulated = run(*CHOSEN)
    assert real.summary["status"] == "finished"
    assert real.summary["resumed_after_rounds"] == [1, 2]
    assert real.state == simulated.state
    assert real.losses == simulated.losses
    for one, other in zip(real.rounds, simulated.rounds, strict=True):
        assert (one["bytes_down"], one["bytes_up"]) == (other["bytes_down"], other["bytes_up"])
        assert one["failures"] == []


def test_and_leaves_an_export(real):
    assert list((real.folder / "export").rglob("*.safetensors"))


def test_a_client_that_is_killed_in_training_is_named_where_all_are_needed(story):
    _, told = story
    assert told.codes[0] == 1
    assert "ann: " in told.said[0]
    assert "bob: " not in told.said[0].split("error", 1)[-1]


def test_a_server_that_is_killed_ends_the_operators_command(story):
    _, told = story
    assert told.codes[1] == 1
    assert "the run has lost its server" in told.said[1]
    assert "resume=" in told.said[1]


def test_clients_come_back_by_themselves_and_need_no_bundle_again(story):
    _, told = story
    for delivered in told.delivered[1:]:
        sent = {name: (known["had"], known["bytes_down"]) for name, known in delivered.items()}
        assert sent == dict.fromkeys(NAMES, (True, 0))


def test_a_client_computes_in_one_process_as_long_as_it_runs(real):
    assert real.of("bob", "process", 1) == real.of("bob", "process", 2)  # the server was killed in round 3


def test_progress_is_seen_as_it_happens(story):
    _, told = story
    assert "3 clients are there" in told.said[2]
    assert "round 3/3" in told.said[2]
    assert "INFO" not in told.said[2]


def test_flower_leaves_the_users_home_alone(story, machines):
    assert not (machines / "home" / ".flwr").exists()
    for name in NAMES:
        assert (machines / name / "site" / "flower").is_dir()


@pytest.fixture(scope="module")
def stopped(story, federation, settle, open_run):
    """A run that is stopped after round 1, in which ann is started anew while the run does not look."""
    settle(min_replies=2)
    before, ann = len(federation.runs()), federation.clients["ann"]
    with federation.running() as (process, log):

        def until(found):
            wait_for(found, what=log.read_text, process=process)

        until(lambda: len(federation.runs()) > before and federation.has("ann", 1))
        let_in = federation.activations()
        with halted(federation.server, "flwr-serverapp"):
            ann.start_anew()
            until(lambda: federation.activations() > let_in)
        until((federation.runs()[-1] / "checkpoint/round-000001.safetensors").exists)
        code, said = federation.ask("stop")
        assert code == 0, said
        assert process.wait(PATIENCE) == 130
    return open_run(federation.runs()[-1])


def test_a_client_that_is_started_anew_before_the_run_looks_is_named(stopped):
    assert set(stopped.rounds[1]["clients"]) == {"bob", "eve"}
    (failure,) = stopped.rounds[1]["failures"]
    assert failure["client"] == "ann"
    assert "Message Unavailable" in failure["reason"]


def test_a_run_that_is_stopped_ends_in_order(stopped, federation):
    assert stopped.summary["status"] == "interrupted"
    code, said = federation.ask("status")
    assert code == 0, said
    assert "interrupted" in said
    assert all(name in said for name in NAMES)
    code, said = federation.ask("run", "resume=lates")
    assert code == 2
    assert "latest" in said
