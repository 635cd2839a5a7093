"""A controller that re-aligns the emulator in some rounds only: who is sent what, what it costs, and the checkpoint."""

from dataclasses import replace

import numpy as np
import pytest

from fedpeat.client import app as client
from fedpeat.control import RandomControl
from fedpeat.control.objective import price
from fedpeat.control.plans import levels_of
from fedpeat.core import count_bytes, digest
from fedpeat.devices import read_ledger
from fedpeat.server import read_checkpoint, read_history
from simulations import rounds as loop
from simulations.devices import Books
from simulations.keeping import settings_to_resume
from simulations.run import simulate

NUMBER = 6
REFRESHED = (2, 5)
REFRESHING = (
    "control=random",
    "devices=cell",
    "control.menu.kept_blocks=[]",
    "control.menu.steps=[1,2]",
    "clients.per_round=2",
    f"rounds={NUMBER}",
    "evaluate_every=3",
    "data.server_share=0.3",
    "realign.every=1",
    "realign.steps=2",
    "client.learning_rate=0.01",
    "checkpoints=6",
)


@pytest.fixture(autouse=True)
def _asked(monkeypatch):
    """The random controller's own plans, with a re-alignment before rounds 2 and 5."""
    choose = RandomControl.choose

    def asked(self, report, state, seen):
        plan, state = choose(self, report, state, seen)
        return replace(plan, refresh=plan.round in REFRESHED), state

    monkeypatch.setattr(RandomControl, "choose", asked)


@pytest.fixture
def watched(monkeypatch):
    """What a controller knew and decided, and what it knew from: `(problem, seen, plan)` by round."""
    found, chosen = {}, loop._chosen

    def choose(federation, report, state, books, there):
        seen = books.observe(federation.controller.problem, state.round + 1, books.changes(state.emulator))
        plan, after = chosen(federation, report, state, books, there)
        found[plan.round] = (federation.controller.problem, seen, plan)
        return plan, after

    monkeypatch.setattr(loop, "_chosen", choose)
    return found


def emulators(ran):
    """What was changed of the emulator, by round."""
    states = [read_checkpoint(path) for path in sorted((ran.folder / "checkpoint").iterdir())]
    return {state.round: digest(state.emulator) if state.emulator else "" for state in states}


def test_the_emulator_changes_exactly_then(run):
    found = emulators(run(*REFRESHING))
    assert found[1] == "" != found[2]
    assert found[2] == found[3] == found[4] != found[5] == found[6]


def test_what_is_foretold_is_what_is_sent(run, watched):
    """The controller's price of a plan is the ledger's, byte by byte: bundles and changes once to each device."""
    ran = run(*REFRESHING, anew=True)
    size = count_bytes(read_checkpoint(max((ran.folder / "checkpoint").iterdir())).emulator)
    rows = read_ledger(ran.folder)
    assert set(watched) == set(range(1, NUMBER + 1))
    for number, (problem, seen, plan) in watched.items():
        assert problem.refresh_bytes.tolist() == [size]
        own = [row for row in rows if row["round"] == number]
        levels, refresh = levels_of(problem, plan)
        foretold = price(problem, seen, levels[None], np.array([refresh]))
        sent = sum(row["bytes_down"] + row["bytes_up"] + row["bundle_bytes"] for row in own)
        assert float(foretold.bytes[0]) == sent
        assert float(foretold.joules[0]) == pytest.approx(sum(row["joules"] for row in own))
        lasted = own[0]["clock_after_seconds"] - own[0]["clock_before_seconds"]
        assert float(foretold.seconds[0]) == pytest.approx(lasted)
    assert_sent_when_lacked(rows, size)


def assert_sent_when_lacked(rows, size):
    """A device gets the changes in its first round after each re-alignment, and in no other."""
    has, times = {}, 0
    for row in rows:
        newest = max((number for number in REFRESHED if number <= row["round"]), default=0)
        lacks = newest and has.get(row["client"]) != newest
        assert row["refresh_bytes"] == (size if lacks else 0)
        has[row["client"]] = newest
        times += bool(lacks)
    assert times > len(REFRESHED)


def test_killed_and_resumed_nothing_differs(run, settings_of, tiny, open_run, monkeypatch, tmp_path):
    whole, work, done = run(*REFRESHING), client.work, []

    class Killed(BaseException):
        pass

    def mortal(*arguments, **keywords):
        done.append(1)
        if len(done) in {4, 11}:
            raise Killed
        return work(*arguments, **keywords)

    monkeypatch.setattr(client, "work", mortal)
    with pytest.raises(Killed):
        simulate(settings_of(tuple(tiny(*REFRESHING))), tmp_path)
    for _ in range(2):
        client.forget_models()
        try:
            simulate(settings_to_resume(tmp_path, []), tmp_path, resume=True)
        except Killed:
            continue
    assert open_run(tmp_path).summary["resumed_after_rounds"] == [1, 4]
    assert open_run(tmp_path).state == whole.state
    assert plain(tmp_path) == plain(whole.folder)


def plain(folder):
    return [
        {name: value for name, value in row.items() if not name.startswith("measured")} for row in read_ledger(folder)
    ]


def test_books_are_made_again_from_the_history(run):
    """Who has which changes is in no checkpoint of its own: a resumed run reads it off its reports."""
    ran, last = run(*REFRESHING), REFRESHED[-1]
    state = read_checkpoint(ran.folder / "checkpoint" / f"round-{last:06d}.safetensors")
    books = Books(None, {}, read_history(ran.folder)[: last + 1])
    has = {row["client"] for row in read_ledger(ran.folder) if row["round"] == last}
    assert len(has) == 2
    assert books.changes(state.emulator).held_by == has
    assert not books.changes({}).tensors


def test_capability_never_asks_for_it(run):
    ran = run(*REFRESHING, "control=capability", "rounds=2")
    assert not read_checkpoint(max((ran.folder / "checkpoint").iterdir())).emulator
