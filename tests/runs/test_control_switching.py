"""Emulators, ranks and steps that change in mid-run: what is sent for it, and runs that are killed or on Ray."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from fedpeat.bundles import BundleCache, open_bundle, parts_of, read_part
from fedpeat.client import app as client
from fedpeat.control import Curves, Policy, write_policy
from fedpeat.control.policy import shapes
from fedpeat.control.signature import signature_of
from fedpeat.core import ConfigError
from fedpeat.devices import read_ledger
from simulations.keeping import settings_to_resume
from simulations.run import simulate
from simulations.scenes import scene_of

MENU = (
    "devices=cell",
    "strategy=flex_lora",
    "strategy.keep_rest=true",
    "control.menu.kept_blocks=[1]",
    "control.menu.ranks=[2,8]",
    "control.menu.steps=[1,2,3]",
)
SWITCHING = (*MENU, "rounds=4", "evaluate_every=2")
KINDS = ("random", "sabppo", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("capability", "greedy")))


class Killed(BaseException):
    """As a SIGKILL would: nothing catches it on its way out."""


@pytest.fixture(scope="session")
def policy(tiny, tmp_path_factory):
    """The folder of a policy with random weights for these runs."""
    folder = tmp_path_factory.mktemp("policy")
    scene, _ = scene_of(tiny("control=sabppo", *SWITCHING), tmp_path_factory.mktemp("scene"))
    random_policy(folder, scene.problem)
    return folder


def random_policy(folder, problem, width=8, seed=5):
    draw = np.random.default_rng(seed)
    weights = {}
    for layer, shape in shapes(problem, width).items():
        weights[f"{layer}.weight"] = draw.normal(size=shape).astype(np.float32)
        weights[f"{layer}.bias"] = draw.normal(size=shape[:1]).astype(np.float32)
    write_policy(folder, Policy(weights, signature_of(problem), Curves(unit_steps=2.0)))


@pytest.fixture
def chosen(policy):
    """The overrides of a run with a controller."""

    def overrides(kind, *more):
        return (f"control={kind}", *SWITCHING, *([f"control.policy={policy}"] if kind == "sabppo" else []), *more)

    return overrides


def plain(folder):
    """The ledger's rows without what depends on the machine."""
    return [
        {name: value for name, value in row.items() if not name.startswith("measured")} for row in read_ledger(folder)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_killed_and_resumed_nothing_differs(kind, chosen, run, settings_of, tiny, open_run, monkeypatch, tmp_path):
    """Tensors, what is decided, what is paid for it, and the clock."""
    whole, work, done = run(*chosen(kind)), client.work, []

    def mortal(*arguments, **keywords):
        done.append(1)
        result = work(*arguments, **keywords)
        if len(done) == len(plain(whole.folder)) // 2:
            raise Killed
        return result

    monkeypatch.setattr(client, "work", mortal)
    with pytest.raises(Killed):
        simulate(settings_of(tuple(tiny(*chosen(kind)))), tmp_path)
    monkeypatch.setattr(client, "work", work)
    client.forget_models()
    summary = simulate(settings_to_resume(tmp_path, []), tmp_path, resume=True)
    assert 0 < summary["resumed_after_rounds"][0] < 4
    assert open_run(tmp_path).state == whole.state
    assert plain(tmp_path) == plain(whole.folder)


def test_a_policy_for_others_is_refused_before_anything_is_trained(chosen, run, tmp_path):
    with pytest.raises(ConfigError, match="does not fit the run"):
        run(*chosen("sabppo", "control.menu.steps=[1,2]"), folder=tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_the_policy_changes_its_mind(chosen, run):
    """Else the test above would say little of it."""
    rows = plain(run(*chosen("sabppo")).folder)
    by_client = {}
    for row in rows:
        by_client.setdefault(row["client"], set()).add((row["emulator"], row["rank"], row["local_steps"]))
    assert len(rows) >= 4
    assert len(set().union(*by_client.values())) > 1


@pytest.mark.parametrize("strategy", ["flex_lora", "het_lora"])
def test_a_device_works_with_what_was_decided_for_it(strategy, chosen, run, monkeypatch):
    """The bundle that its job names, its factors' rank, its steps: as in the ledger; a bundle is paid for once."""
    made, built = [], client.tuned_model

    def watched(job):
        tuned = built(job)
        made.append((job["round"], job["client"], Path(job["bundle"]), tuned.layout.rank, job["local_steps"]))
        return tuned

    monkeypatch.setattr(client, "tuned_model", watched)
    ran = run(*chosen("random", f"strategy={strategy}"), anew=True)
    rows = {(row["round"], row["client"]): row for row in plain(ran.folder)}
    assert len(made) == len(rows)
    folders, sizes, paid = {}, {}, {}
    for number, name, folder, rank, steps in made:
        row = rows[number, name]
        assert (rank, steps) == (row["rank"], row["local_steps"])
        assert folders.setdefault(row["emulator"], folder) == folder
        sizes[folder] = open_bundle(folder).payload_bytes
        paid.setdefault((name, folder), []).append(row["bundle_bytes"])
    assert len(sizes) == 2
    assert all(first == sizes[folder] and not any(rest) for (_, folder), (first, *rest) in paid.items())
    assert {rank for *_, rank, _ in made} == {2, 8}
    for folder, size in sizes.items():
        assert size == bytes_of_tensors(folder)


def bytes_of_tensors(folder):
    """What a bundle's files hold, counted tensor by tensor."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(str(path), "numpy") as file:
            total += sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    return total


def test_what_a_bundle_is_said_to_take_is_what_is_sent_of_it(run, chosen, monkeypatch, tmp_path):
    """Its files as a real federation delivers them; only their headers, config and tokenizer come on top."""
    seen, built = set(), client.tuned_model

    def watched(job):
        seen.add(Path(job["bundle"]))
        return built(job)

    monkeypatch.setattr(client, "tuned_model", watched)
    run(*chosen("random"), anew=True)
    for folder in seen:
        bundle, cache = open_bundle(folder), BundleCache(tmp_path / "kept", 2**30)
        cache.begin(bundle.manifest)
        sent = 0
        for part in parts_of(bundle, 2**16):
            data = read_part(bundle, part)
            cache.write(bundle.version, part, data)
            sent += len(data)
        cache.finish(bundle.version)
        others = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".safetensors"]
        beside = sum(path.stat().st_size for path in others if path.name != "manifest.json")
        assert 0 < sent - bundle.payload_bytes - beside < 2**15  # the headers of tensor files
    assert len(cache.versions()) == len(seen) == 2


def start(*arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "simulations.cli", "simulate", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["flex_lora", "het_lora"])
def test_engines_agree_and_a_kill_changes_nothing(strategy, chosen, run, tiny, open_run, tmp_path):
    """On Ray, killed outright in mid-run and resumed: the bytes of the serial engine."""
    overrides, folder = chosen("random", f"strategy={strategy}", "rounds=6"), tmp_path / "run"
    whole = run(*overrides)
    process = start(*tiny(*overrides, "engine=ray", "engine.workers=2", f"hydra.run.dir={folder}"))
    history = folder / "metrics.jsonl"
    while not history.exists() or history.read_bytes().count(b"\n") < 3:
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert start(f"resume={folder}").wait() == 0
    assert open_run(folder).state == whole.state
    assert plain(folder) == plain(whole.folder)
