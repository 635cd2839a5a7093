"""What fails in a real federation, what the run does then, and what its report says.

One run in two attempts, with all that can go wrong on the way; then it ends as if it had been one.

1. ann's link breaks in the middle of her bundle. In round 1 bob's disk is full. In round 2 eve is slower than the round
   may last, and ann's machine is gone just when she has trained. In round 3 all are well again, but the server's disk
   is full: the attempt ends.
2. eve's disk was emptied meanwhile.
"""

import shutil
from dataclasses import dataclass, field

import pytest

from tests.deployment.conftest import NAMES
from tests.deployment.machines import halted, is_busy
from tests.processes import PATIENCE, wait_for

pytestmark = pytest.mark.slow

SHORTEST_ROUND = 75
"""Seconds a round may last: enough to notice that a machine is gone. On a busy machine all takes longer."""

BUNDLE_BYTES = 20_000
"""More than anything else that ann is sent at once, and less than her bundle."""


@dataclass
class Told:
    """What was said by each attempt, and what was delivered in it."""

    codes: list = field(default_factory=list)
    said: list = field(default_factory=list)
    delivered: list = field(default_factory=list)


def emptied(site):
    """Remove all that a client keeps, but for who it is."""
    for path in site.iterdir():
        if path.name not in {"site.json", "key", "key.pub", "ca.crt"}:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


class Story:
    """The run, played up to its end.

    Args:
        federation: Who takes part.
        disks: The server's and bob's.
        read_json: Reads a file.
    """

    def __init__(self, federation, disks, read_json):
        self.federation, self.disks, self.read_json = federation, disks, read_json
        self.before = len(federation.runs())
        self.told = Told()

    @property
    def folder(self):
        return self.federation.runs()[-1]

    def attempt(self, *words, while_it_runs):
        with self.federation.running(*words) as (process, log):
            self.process, self.log = process, log
            while_it_runs()
            self.told.codes.append(process.wait(PATIENCE))
            self.told.said.append(log.read_text())
            self.told.delivered.append(self.read_json(self.folder / "delivery.json"))

    def until(self, found):
        wait_for(found, what=self.log.read_text, process=self.process)

    def until_round(self, number):
        """Wait until a round has begun."""
        past = f"checkpoint/round-{number - 1:06d}.safetensors"
        self.until(lambda: len(self.federation.runs()) > self.before and (self.folder / past).exists())

    def cut_bundle(self):
        link, log = self.federation.link, self.federation.site("ann") / "client.log"

        def losses():
            return log.read_text(errors="replace").count("Failed to receive message")

        before = losses()
        link.cut_within("down", BUNDLE_BYTES)
        self.until(lambda: link.is_cut)
        self.until(lambda: losses() > before)
        link.mend()

    def troubles(self):
        clients, network = self.federation.clients, self.federation.network
        self.cut_bundle()
        self.until_round(1)
        self.disks["bob"].fill()
        self.until_round(2)
        self.disks["bob"].free()
        with halted(clients["eve"]):
            self.until(lambda: is_busy(clients["ann"]))
            if network.apart:
                network.plug("ann", up=False)
            else:
                self.federation.link.cut()
            self.until_round(3)
        if network.apart:
            network.plug("ann", up=True)
        else:
            self.federation.link.mend()
        self.disks["server"].fill()

    def play(self):
        eve, ann = self.federation.clients["eve"], self.federation.clients["ann"]
        shutil.rmtree(self.federation.site("ann") / "bundles", ignore_errors=True)
        ann.mark()
        self.attempt(while_it_runs=self.troubles)
        self.ann_stayed = not ann.was_started_again()
        eve.turn_off()
        emptied(self.federation.site("eve"))
        self.disks["server"].free()
        self.rounds_before = (self.folder / "metrics.jsonl").read_text()
        eve.turn_on()
        for client in self.federation.clients.values():
            client.wait()
        self.attempt("resume=latest", while_it_runs=lambda: None)


@pytest.fixture(scope="module")
def story(disks, federation, settle, read_json):
    if not all(disk.is_there for disk in disks.values()):
        pytest.skip("file systems cannot be mounted here: needs root")
    settle(min_replies=1, timeout_seconds=round(max(SHORTEST_ROUND, 3 * federation.start_seconds)))
    made = Story(federation, disks, read_json)
    made.play()
    return made


@pytest.fixture(scope="module")
def real(story, open_run):
    assert story.told.codes[1] == 0, story.told.said[1]
    return open_run(story.folder)


def failures_of(real, number):
    return {failure["client"]: failure for failure in real.rounds[number]["failures"]}


def test_a_link_that_breaks_in_mid_transfer_costs_nothing(story, read_json):
    known = story.told.delivered[0]
    assert not known["ann"]["had"]
    files = read_json(story.federation.site("ann") / "bundles" / known["ann"]["bundle"] / "manifest.json")["files"]
    assert known["ann"]["bytes_down"] == sum(entry["bytes"] for entry in files.values())
    assert story.ann_stayed


def test_a_client_whose_disk_is_full_is_named_with_the_reason(real, story):
    assert set(real.rounds[1]["clients"]) == {"ann", "eve"}
    (failure,) = real.rounds[1]["failures"]
    assert failure["client"] == "bob"
    assert "the disk is full" in failure["reason"]
    assert str(story.federation.folder) not in failure["reason"]


def test_a_client_that_is_too_slow_is_named_and_the_others_count(real):
    assert set(real.rounds[2]["clients"]) == {"bob"}
    assert failures_of(real, 2)["eve"]["kind"] == "timeout"


def test_a_machine_that_is_gone_is_named(real):
    assert failures_of(real, 2)["ann"]["kind"] in {"error", "timeout"}


def test_nothing_late_counts_or_harms_the_next_round(real):
    assert set(real.rounds[3]["clients"]) == set(NAMES)
    assert [line["round"] for line in real.rounds] == [0, 1, 2, 3]
    assert real.rounds[3]["failures"] == []


def test_a_server_whose_disk_is_full_ends_and_says_so(story):
    assert story.told.codes[0] == 1
    assert "the disk is full" in story.told.said[0]
    assert "Traceback" not in story.told.said[0]


def test_and_goes_on_where_it_was(real, story):
    assert real.summary["resumed_after_rounds"][-1] == 2
    done = slice(3)  # rounds 0 to 2: the report of round 3 may have been written before the disk was full
    assert (real.folder / "metrics.jsonl").read_text().splitlines()[done] == story.rounds_before.splitlines()[done]
    assert [line["round"] for line in real.rounds[done]] == [0, 1, 2]


def test_a_client_whose_disk_was_emptied_gets_its_bundle_again_and_is_named(real, story):
    delivered = story.told.delivered[1]
    assert {name: known["had"] for name, known in delivered.items()} == {"ann": True, "bob": True, "eve": False}
    assert {name for name, metrics in real.rounds[3]["clients"].items() if metrics.get("state_lost")} == {"eve"}
