import json
import os

import pytest

from fedpeat.bundles import parts_of, read_part
from fedpeat.client import site as room
from fedpeat.client.site import Site, answer, data_settings, place, read_site, without_paths
from fedpeat.core import ConfigError, FedPeatError, StorageError, UpdateRefused
from fedpeat.data import open_rows, prepare
from fedpeat.emulators import uniform
from fedpeat.models import load_tokenizer, make_split
from tests.bundles import bundled

DATA = {"kind": "jsonl", "block_size": 8, "test_share": 0.25, "separator": "eos"}
IDENTITY = "0123456789abcdef" * 2


@pytest.fixture(scope="module")
def bundle(miniature, tmp_path_factory):
    split, folder = make_split(4, first=1, last=1), tmp_path_factory.mktemp("bundles")
    return bundled(miniature("llama", blocks=4), split=split, builder=uniform(kept_blocks=1), folder=folder)


def write_text(path, author, count=30):
    lines = [
        json.dumps({"who": author, "text": f"{author} wrote {'abc' * (i % 5)} {i}", "secret": "x"})
        for i in range(count)
    ]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def machine(tmp_path):
    """A client's folder; returns its node config."""
    folder = tmp_path / "ann"
    folder.mkdir()
    data = {"path": str(write_text(tmp_path / "own.jsonl", "ann"))}
    (folder / "site.json").write_text(json.dumps({"name": "ann", "data": data, "cache_mib": 10}))
    return {"site": str(folder / "site.json")}


@pytest.fixture
def ready(machine, bundle):
    """The same, with a bundle."""
    (part,) = parts_of(bundle)
    asked = {"version": bundle.version, "part": 0, "parts": 1, "pieces": part, "manifest": bundle.manifest}
    assert answer("bundle", machine, json.loads(json.dumps(asked)), read_part(bundle, part)) == {"part": 0}
    return machine


def begun(config, bundle, identity=IDENTITY, **more):
    asked = {"federation": identity, "bundle": bundle.version, "data": DATA, "seed": 3, "batch_size": 2, **more}
    return answer("begin", config, asked, b"")


def test_a_machine_says_who_it_is_and_what_it_has(machine, ready, bundle):
    said = answer("hello", ready, {}, b"")
    assert said["name"] == "ann"
    assert said["bundles"] == [bundle.version]
    assert set(said["versions"]) >= {"fedpeat", "torch"}


@pytest.fixture
def simulated(tmp_path):
    """A simulation's job: its folders are on this machine, but for a client's state, which it makes."""
    paths = {name: tmp_path / name for name in ("bundle", "data", "run")}
    for path in paths.values():
        path.mkdir()
    paths["state_folder"] = paths.pop("run") / "clients"
    return {"client": "ann", "attack": {"kind": "nans"}, **{name: str(path) for name, path in paths.items()}}


def test_without_a_site_a_job_stays_as_it_is_and_nothing_is_answered(simulated):
    assert place(simulated, {"partition-id": 3}) == simulated
    with pytest.raises(ConfigError, match="site"):
        answer("hello", {}, {}, b"")


@pytest.mark.parametrize("name", ["bundle", "data", "state_folder"])
def test_a_worker_on_a_machine_without_the_runs_folders_says_so(simulated, name):
    missing = {**simulated, name: "/no/such folder/at all"}
    with pytest.raises(StorageError, match=r"no such folder; workers on several machines need one file system"):
        place(missing, {"partition-id": 3})


def test_a_job_gets_this_machines_paths_and_no_others(ready, bundle, tmp_path):
    begun(ready, bundle)
    job = {"client": "ann", "federation": IDENTITY, "bundle": bundle.version, "data": "/etc", "state_folder": "/etc"}
    placed = place({**job, "attack": {"kind": "nans"}, "round": 2}, ready)
    assert placed["attack"] is None
    assert placed["round"] == 2
    for key in ("bundle", "data", "state_folder"):
        assert placed[key].startswith(str(tmp_path / "ann") + os.sep), key
    assert len(open_rows(placed["data"], "ann", "train")) > 2


@pytest.mark.parametrize("identity", ["../../../../etc/0123456789abcde", "", None, "A" * 32, IDENTITY + "/..", 7])
def test_a_federation_is_a_hash_and_never_a_path(ready, bundle, tmp_path, identity):
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UpdateRefused):
        begun(ready, bundle, identity)
    with pytest.raises(UpdateRefused):
        place({"client": "ann", "federation": identity, "bundle": bundle.version}, ready)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("version", ["../own.jsonl", "/etc", None, "0" * 32])
def test_a_bundle_is_one_that_was_sent(ready, bundle, version):
    begun(ready, bundle)
    with pytest.raises(StorageError):
        place({"client": "ann", "federation": IDENTITY, "bundle": version}, ready)
    with pytest.raises(StorageError):
        answer("begin", ready, {"federation": IDENTITY, "bundle": version, "data": DATA}, b"")


def test_a_job_for_another_client_is_refused(ready, bundle):
    begun(ready, bundle)
    with pytest.raises(UpdateRefused, match="'ann' alone"):
        place({"client": "bob", "federation": IDENTITY, "bundle": bundle.version}, ready)


def test_a_federation_that_never_began_here_has_no_rows(ready, bundle):
    with pytest.raises(StorageError):
        place({"client": "ann", "federation": IDENTITY, "bundle": bundle.version}, ready)


@pytest.mark.parametrize("tail", ["drop", "pad"])
def test_own_rows_are_those_of_the_simulated_client(ready, bundle, tmp_path, tail):
    found = begun(ready, bundle, data={**DATA, "tail": tail})
    own = place({"client": "ann", "federation": IDENTITY, "bundle": bundle.version}, ready)
    both = tmp_path / "both.jsonl"
    others = [write_text(tmp_path / f"{who}.jsonl", who).read_text() for who in ("bob", "eve")]
    both.write_text("\n".join([others[0], (tmp_path / "own.jsonl").read_text(), others[1]]))
    simulated = prepare(
        {**DATA, "path": str(both), "client_field": "who", "tail": tail},
        tokenizer=load_tokenizer(bundle.folder / "tokenizer"),
        tokenizer_id="same",
        clients_count=None,
        seed=3,
        cache_folder=tmp_path / "cache",
        batch_size=2,
    )
    for part in ("train", "test"):
        here, there = open_rows(own["data"], "ann", part), open_rows(simulated.folder, "ann", part)
        assert here.input_ids.tolist() == there.input_ids.tolist(), part
        assert here.labels.tolist() == there.labels.tolist(), part
    (shard,) = (client for client in simulated.clients if client.name == "ann")
    assert found == {"rows": shard.rows, "tokens": shard.tokens, "documents": shard.documents}


def test_a_server_cannot_say_where_data_lies(tmp_path):
    site = Site("ann", tmp_path, {"path": "/own.jsonl", "text_field": "mine"})
    asked = {**DATA, "path": "/etc/passwd", "server_path": "/etc", "client_field": "who", "text_field": "secret"}
    found = data_settings(site, asked)
    assert found["path"] == "/own.jsonl"
    assert found["text_field"] == "mine"
    assert not {"server_path", "client_field"} & set(found)


@pytest.mark.parametrize("kind", ["docstrings", "hub", None])
def test_what_is_no_file_a_machine_has_to_choose_itself(tmp_path, kind):
    with pytest.raises(ConfigError, match=r"data\.kind"):
        data_settings(Site("ann", tmp_path, {"path": "/own"}), {**DATA, "kind": kind})
    own = {"path": "/own", "kind": "hub"}
    assert data_settings(Site("ann", tmp_path, own), {**DATA, "kind": kind})["kind"] == "hub"


def test_a_machine_without_data_says_so(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.path"):
        data_settings(Site("ann", tmp_path, {"path": None}), DATA)


def test_too_little_data_is_told(ready, bundle, tmp_path):
    write_text(tmp_path / "own.jsonl", "ann", count=1)
    with pytest.raises(FedPeatError, match="too little"):
        begun(ready, bundle, batch_size=50)


def test_rows_stay_those_of_the_beginning_when_the_file_changes(ready, bundle, tmp_path):
    begun(ready, bundle)
    job = {"client": "ann", "federation": IDENTITY, "bundle": bundle.version}
    before = open_rows(place(job, ready)["data"], "ann").input_ids
    write_text(tmp_path / "own.jsonl", "zoe")
    assert open_rows(place(job, ready)["data"], "ann").input_ids.tolist() == before.tolist()


def test_federations_of_long_ago_make_room(ready, bundle, monkeypatch):
    monkeypatch.setattr(room, "KEPT_FEDERATIONS", 2)
    site = read_site(ready["site"])
    identities = [f"{number:032x}" for number in range(3)]
    for seed, identity in enumerate(identities):
        begun(ready, bundle, identity, seed=seed)
        os.utime(site.folder / "federations" / identity, (seed, seed))
    assert {path.name for path in (site.folder / "federations").iterdir()} == set(identities[1:])
    assert len(list((site.folder / "data").iterdir())) == 2
    job = {"client": "ann", "bundle": bundle.version}
    assert len(open_rows(place({**job, "federation": identities[2]}, ready)["data"], "ann"))


@pytest.mark.parametrize("text", ["{", "[]", '{"data": {}}', '{"name": "ann"}'])
def test_a_damaged_site_file_is_told(tmp_path, text):
    (tmp_path / "site.json").write_text(text)
    with pytest.raises(FedPeatError, match=r"site\.json"):
        read_site(tmp_path / "site.json")


def test_what_goes_wrong_is_told_without_this_machines_paths(machine, tmp_path):
    own, folder = tmp_path / "own.jsonl", tmp_path / "ann"
    told = (
        f"cannot read data.path={own}; no such file, nor its folder {tmp_path}; see '{folder}/data/x.safetensors', ok"
    )
    assert without_paths(told, machine) == (
        "cannot read data.path=<a path of its own>; no such file, nor its folder <a path of its own>;"
        " see '<a path of its own>', ok"
    )
    assert without_paths(told, {}) == told
    (folder / "site.json").write_text("{")
    assert str(folder) not in without_paths(told, machine)
