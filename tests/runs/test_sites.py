"""A real federation without the network: the server's half and the clients' halves, each in a folder of its own.

What Flower's processes add is in `tests/deployment`.
"""

import json
import shutil
from types import SimpleNamespace

import pytest
import yaml

from fedpeat.bundles import parts_of
from fedpeat.client.app import app
from fedpeat.core import EngineError
from simulations.deployment import delivery, server_app
from simulations.deployment import init as room
from simulations.engines.serial import LocalGrid

NAMES = ("ann", "bob", "eve")


class Machines(LocalGrid):
    """A grid of one node for each client's folder; `names` are those that keys were registered by."""

    def __init__(self, folders, names=None):
        super().__init__(app, len(folders))
        self.names = list(names or folders)
        self.asked = []
        for context, folder in zip(self._contexts.values(), folders.values(), strict=True):
            context.node_config = {"site": str(folder / "site.json")}

    def get_nodes(self):
        return [SimpleNamespace(name=name, node_id=node) for name, node in zip(self.names, self._contexts, strict=True)]

    def push_messages(self, messages):
        messages = list(messages)
        self.asked += [(message.metadata.message_type, message.metadata.dst_node_id) for message in messages]
        return super().push_messages(messages)


@pytest.fixture
def deployed(tiny, held_out, only, tmp_path, settings_of, monkeypatch):
    """A deployment and its clients' machines: `deployed(*overrides, names=...)`."""
    monkeypatch.setattr(room, "load_settings", settings_of)

    def make(*overrides, names=NAMES, insecure=False):
        without = ("data.path", "data.server_path", "data.client_field", "cache")
        words = [word for word in tiny(*overrides) if word.partition("=")[0] not in without]
        words += [f"data.path={held_out}", f"names=[{','.join(names)}]", "hosts=[127.0.0.1]"]
        made = room.init(tmp_path / "server" / "federation", words, insecure=insecure)
        folders = {}
        for name in names:
            folders[name] = tmp_path / name
            shutil.move(made.client(name).folder, folders[name])
            site = json.loads((folders[name] / "site.json").read_text())
            site["data"]["path"] = str(only(name))
            (folders[name] / "site.json").write_text(json.dumps(site))
        return made, folders

    return make


@pytest.fixture
def federate(open_run):
    """Run a federation: `federate(deployment, grid, name="run")`."""

    def launch(deployment, grid, name="run"):
        folder = deployment.runs / name
        folder.mkdir(parents=True)
        server_app.federate(grid, folder)
        return open_run(folder)

    return launch


SCENARIOS = {
    "plain": (),
    "what clients keep": ("client.optimizer_state=keep", "codec=top_k", "peft.dropout=0.1"),
    "control variates": ("strategy=scaffold",),
    "some clients, own steps, own ranks": (
        "clients.per_round=2",
        "rounds=3",
        "control.local_steps={eve: 4}",
        "control.rank={bob: 2}",
        "strategy=flex_lora",
    ),
    "several emulators": ("control.kept_blocks={bob: 1}",),
    "the server trains": ("server.train=full", "data.server_share=0.5"),
    "hidden states on disk": ("model.split.first=0", "client.prefix_mib=1"),
    "trained parts of the emulator": ("client.unfreeze=[norm]",),
    "realigned": ("realign.every=1", "realign.steps=2", "data.server_share=0.5"),
}


EVERY_DAY = ("control variates", "several emulators")


@pytest.mark.parametrize(
    "scenario", [pytest.param(name, marks=[] if name in EVERY_DAY else pytest.mark.slow) for name in SCENARIOS]
)
def test_it_computes_what_a_simulation_does(deployed, federate, run, scenario):
    deployment, folders = deployed(*SCENARIOS[scenario])
    real, simulated = federate(deployment, Machines(folders)), run(*SCENARIOS[scenario])
    assert real.digest == simulated.digest
    assert real.losses == simulated.losses
    for one, other in zip(real.rounds, simulated.rounds, strict=True):
        assert (one["bytes_down"], one["bytes_up"]) == (other["bytes_down"], other["bytes_up"])
        assert not one["failures"]


def test_clients_own_tensors_are_not_scored_by_a_server_that_has_none(deployed, federate, run):
    deployment, folders = deployed("strategy=fed_sa_lora")
    real = federate(deployment, Machines(folders))
    assert real.digest == run("strategy=fed_sa_lora").digest
    assert "personal" not in real.summary["metrics"]


def test_bundles_go_in_parts_once_and_then_never_again(deployed, federate, read_json, monkeypatch):
    deployment, folders = deployed("control.kept_blocks={bob: 1}")
    limit = 50_000
    monkeypatch.setattr(delivery, "parts_of", lambda bundle: parts_of(bundle, limit))
    grid = Machines(folders)
    first = read_json(federate(deployment, grid, "one").folder / "delivery.json")
    assert first["bob"]["bundle"] != first["ann"]["bundle"] == first["eve"]["bundle"]
    for name in NAMES:
        kept = folders[name] / "bundles" / first[name]["bundle"]
        size = sum(entry["bytes"] for entry in read_json(kept / "manifest.json")["files"].values())
        assert first[name]["bytes_down"] == size
        assert first[name]["parts"] == -(-size // limit) > 1
    sent = [kind for kind, _ in grid.asked]
    assert sent.count("query.bundle") == sum(known["parts"] for known in first.values())
    assert sent.count("train") == 2 * len(NAMES)
    again = Machines(folders)
    second = read_json(federate(deployment, again, "two").folder / "delivery.json")
    assert "query.bundle" not in [kind for kind, _ in again.asked]
    assert all((known["had"], known["bytes_down"]) == (True, 0) for known in second.values())


def test_nothing_on_the_server_tells_of_clients_files(deployed, federate, only):
    deployment, folders = deployed()
    federate(deployment, Machines(folders))
    words = json.loads(only("ann").read_text().splitlines()[0])["text"].encode()
    for path in deployment.folder.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        assert words not in content, path
        assert str(only("ann")).encode() not in content, path


def test_without_keys_clients_are_who_they_say(deployed, federate, run):
    deployment, folders = deployed(insecure=True)
    grid = Machines(dict(reversed(folders.items())), names=["", "", ""])
    assert federate(deployment, grid).digest == run().digest


def test_a_machine_with_the_folder_of_another_is_found_out(deployed, federate):
    deployment, folders = deployed()
    with pytest.raises(EngineError, match="calls itself 'bob'"):
        federate(deployment, Machines(folders, names=["bob", "ann", "eve"]))


def test_two_nodes_of_one_name_are_found_out(deployed, federate):
    deployment, folders = deployed()
    with pytest.raises(EngineError, match="one node"):
        federate(deployment, Machines(folders, names=["ann", "ann", "eve"]))


def test_one_that_is_missing_is_named(deployed, federate, monkeypatch, capsys):
    monkeypatch.setattr(server_app, "WAIT_SECONDS", 0.01)
    deployment, folders = deployed()
    with pytest.raises(EngineError, match="not there: eve"):
        federate(deployment, Machines({name: folders[name] for name in ("ann", "bob")}))
    assert "waiting for eve" in capsys.readouterr().out


def test_another_version_of_fedpeat_is_refused_and_of_torch_told(deployed, federate, monkeypatch, capsys):
    from fedpeat.client import site

    deployment, folders = deployed()
    true = site.version
    monkeypatch.setattr(site, "version", lambda name: "9.9" if name == "torch" else true(name))
    federate(deployment, Machines(folders), "one")
    assert "ann has torch 9.9" in capsys.readouterr().out
    monkeypatch.setattr(site, "version", lambda name: "9.9" if name == "fedpeat" else true(name))
    with pytest.raises(EngineError, match=r"ann has 9\.9"):
        federate(deployment, Machines(folders), "two")


def test_a_client_without_enough_data_is_named_with_the_reason(deployed, federate, read_json):
    deployment, folders = deployed()
    (folders["bob"] / "empty.jsonl").write_text('{"text": "a"}\n')
    site = read_json(folders["bob"] / "site.json")
    site["data"]["path"] = str(folders["bob"] / "empty.jsonl")
    (folders["bob"] / "site.json").write_text(json.dumps(site))
    with pytest.raises(EngineError, match=r"1 of 3 clients .*bob: .*too little"):
        federate(deployment, Machines(folders))
    assert read_json(deployment.runs / "run" / "summary.json")["status"] == "failed"


def test_a_client_that_loses_its_bundle_fails_alone(deployed, federate):
    deployment, folders = deployed()

    class Forgetful(Machines):
        def push_messages(self, messages):
            messages = list(messages)
            if messages[0].metadata.message_type == "train":
                shutil.rmtree(folders["eve"] / "bundles", ignore_errors=True)
            return super().push_messages(messages)

    real = federate(deployment, Forgetful(folders))
    for line in real.rounds[1:]:
        assert sorted(line["clients"]) == ["ann", "bob"]
        assert [(failure["client"], "bundle" in failure["reason"]) for failure in line["failures"]] == [("eve", True)]


def test_a_wish_to_stop_ends_it_in_order(deployed, federate, read_json, monkeypatch):
    deployment, folders = deployed()
    asked = deployment.runs / "run" / "stop"
    waits = server_app._watch

    def at_once(path, stop, ended):
        asked.touch()
        waits(path, stop, ended)

    monkeypatch.setattr(server_app, "_watch", at_once)
    grid = Machines(folders)
    monkeypatch.setattr(grid, "pull_messages", lambda _: [])
    assert federate(deployment, grid).summary["status"] == "interrupted"


def test_settings_are_read_anew_for_each_run(deployed, federate):
    deployment, folders = deployed()
    settings = yaml.safe_load(deployment.config.read_text())
    deployment.config.write_text(yaml.safe_dump({**settings, "rounds": 1}))
    assert len(federate(deployment, Machines(folders)).rounds) == 2


@pytest.mark.parametrize("said", [{"rows": -1}, {"rows": "many"}, {"rows": 2**70}, {"tokens": None}, {"rows": True}])
def test_a_client_that_says_nonsense_of_what_it_holds_is_named(deployed, federate, monkeypatch, said):
    from fedpeat.client import site

    deployment, folders = deployed()
    true = site.begin
    monkeypatch.setattr(site, "begin", lambda here, asked: {**true(here, asked), **said, "bytes_down": -7})
    with pytest.raises(EngineError, match="ann must say what it holds"):
        federate(deployment, Machines(folders))


@pytest.mark.parametrize(
    "said", [{"bundles": 3, "versions": 3}, {"bundles": None, "versions": None}, {"name": ["ann"]}]
)
def test_a_client_that_says_nonsense_of_itself_is_named(deployed, federate, monkeypatch, said):
    from fedpeat.client import site

    deployment, folders = deployed()
    true = site.hello
    monkeypatch.setattr(site, "hello", lambda here: {**true(here), **said})
    with pytest.raises(EngineError, match="ann"):
        federate(deployment, Machines(folders))


def test_a_client_that_says_nonsense_of_its_bundles_is_sent_one(deployed, federate, monkeypatch, read_json):
    from fedpeat.client import site

    deployment, folders = deployed()
    true = site.hello
    monkeypatch.setattr(site, "hello", lambda here: {**true(here), "bundles": 3})
    real = federate(deployment, Machines(folders))
    assert all(known["parts"] == 1 for known in read_json(real.folder / "delivery.json").values())


def test_a_client_whose_data_is_gone_is_named_without_its_path(deployed, federate, read_json):
    deployment, folders = deployed()
    site = read_json(folders["bob"] / "site.json")
    site["data"]["path"] = "/home/bob/private/diary.jsonl"
    (folders["bob"] / "site.json").write_text(json.dumps(site))
    with pytest.raises(EngineError, match="bob: cannot read") as told:
        federate(deployment, Machines(folders))
    assert "private" not in str(told.value)
    assert str(folders["bob"]) not in str(told.value)
