"""Runs whose controller looks at the devices: who trains what, from round to round."""

import json

import pytest

from fedpeat.client import app as client
from fedpeat.control import packaged_policy, read_fit, read_policy
from fedpeat.core import ConfigError
from fedpeat.devices import COLUMNS, read_ledger
from simulations.control_command import control
from simulations.keeping import settings_to_resume
from simulations.run import simulate
from simulations.scenes import scene_of

MEASURED = {column.name for column in COLUMNS if column.name.startswith("measured")}
SWITCHING = (
    "devices=cell",
    "strategy=het_lora",
    "control.menu.kept_blocks=[1]",
    "control.menu.ranks=[2,8]",
    "control.menu.steps=[1,2,3]",
    "rounds=4",
)


def plain(folder):
    """The ledger's rows without what depends on the machine."""
    return [{name: value for name, value in row.items() if name not in MEASURED} for row in read_ledger(folder)]


def test_random_control_switches_emulators_ranks_and_steps(run):
    ran = run("control=random", *SWITCHING)
    rows = plain(ran.folder)
    assert {row["emulator"] for row in rows} == {"default", "kept_1"}
    assert {row["rank"] for row in rows} == {2, 8}
    assert {row["local_steps"] for row in rows} == {1, 2, 3}
    assert all(row["status"] == "counted" for row in rows)
    fetched = {}
    for row in rows:
        key = (row["client"], row["emulator"])
        assert (row["bundle_bytes"] > 0) == (key not in fetched)
        fetched[key] = True
        assert row["modelled_memory_mib"] <= row["memory_limit_mib"]
    assert len(fetched) > 3  # some device was given another emulator
    needed = {(row["emulator"], row["rank"]): row["modelled_memory_mib"] for row in rows}
    assert needed["default", 8] > needed["default", 2]
    assert needed["default", 8] > needed["kept_1", 8]


def test_killed_and_resumed_it_decides_the_same(run, settings_of, tiny, open_run, monkeypatch, tmp_path):
    whole, work, done = run("control=greedy", *SWITCHING), client.work, []

    def mortal(*arguments, **keywords):
        done.append(1)
        if len(done) == 5:
            raise KeyboardInterrupt
        return work(*arguments, **keywords)

    monkeypatch.setattr(client, "work", mortal)
    settings = settings_of(tuple(tiny("control=greedy", *SWITCHING)))
    assert simulate(settings, tmp_path)["status"] == "interrupted"
    assert len(plain(tmp_path)) < len(plain(whole.folder))
    monkeypatch.setattr(client, "work", work)
    simulate(settings_to_resume(tmp_path, []), tmp_path, resume=True)
    assert plain(tmp_path) == plain(whole.folder)
    assert open_run(tmp_path).state == whole.state


def test_capability_gives_small_devices_less(run):
    both = "devices.named={ann: phone, bob: workstation, eve: workstation}"
    need = run("control=random", *SWITCHING)
    needed = {row["modelled_memory_mib"] for row in plain(need.folder)}
    small = (min(needed) + max(needed)) / 2
    ran = run("control=capability", *SWITCHING, both, f"devices.profiles.phone.memory_mib={small}")
    given = {row["client"]: (row["emulator"], row["rank"]) for row in plain(ran.folder)}
    assert given["bob"] == given["eve"] == ("default", 8)
    assert given["ann"] != ("default", 8)
    assert all(row["status"] == "counted" for row in plain(ran.folder))


def test_who_has_memory_for_nothing_stays_out(run):
    named = "devices.named={ann: phone, bob: workstation, eve: workstation}"
    ran = run("control=random", *SWITCHING, named, "devices.profiles.phone.memory_mib=1")
    assert {row["client"] for row in plain(ran.folder)} == {"bob", "eve"}


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("devices=none",), "no model of them"),
        (("devices=mixed", "control.rank={ann: 2}", "strategy=het_lora"), "decides that itself"),
        (("devices=mixed", "control.menu.ranks=[2]"), "can mix"),
        (("devices=mixed", "strategy=het_lora", "control.menu.ranks=[9]"), "from 1 to peft.rank"),
        (("devices=mixed", "round.over_select=0.5"), "who takes part"),
        (("devices=mixed", "control.menu.steps=[0]"), "from 1 on"),
        (("devices=mixed", "control.menu.kept_blocks=[99]"), "cannot keep 99 middle blocks"),
    ],
)
def test_what_does_not_go_with_it(more, says, run):
    with pytest.raises(ConfigError, match=says):
        run("control=random", *more)


def test_trained_evaluated_and_used(run, tiny, tmp_path, capsys):
    given, folder = tiny("control=sabppo", *SWITCHING), tmp_path / "policy"
    assert control(["train", f"policy={folder}", "steps=400", f"tensorboard={tmp_path / 'board'}", *given]) == 0
    assert read_policy(folder).facts["rounds"] == 4
    assert len(json.loads((folder / "training.json").read_text())) >= 2
    assert list((tmp_path / "board").glob("events*"))
    assert control(["evaluate", f"policy={folder}", "episodes=3", *given]) == 0
    told = capsys.readouterr().out
    assert "more than sabppo" in told
    assert "best fixed plan in hindsight" in told
    found = json.loads((folder / "evaluation.json").read_text())
    assert set(found["controllers"]) == {"sabppo", "best fixed", "greedy", "capability", "fixed", "random"}
    drawn = {path.stem for path in (folder / "figures").glob("*.png")}
    assert drawn == {"learning", "controllers", "choices_sabppo", "choices_greedy"}
    ran = run("control=sabppo", *SWITCHING, f"control.policy={folder}")
    assert all(row["status"] == "counted" for row in plain(ran.folder))
    with pytest.raises(ConfigError, match="does not fit the run"):
        run("control=sabppo", *SWITCHING, f"control.policy={folder}", "control.menu.steps=[1,2]")


def test_a_policy_is_named(run):
    # Where one comes with the package, it is of other devices than these.
    with pytest.raises(ConfigError, match=r"control\.policy is not given|does not fit the run"):
        run("control=sabppo", "devices=mixed", "control.menu.kept_blocks=[1]")


def test_deadlines_absences_and_links_are_known_to_the_scene(tiny):
    from pathlib import Path
    from tempfile import TemporaryDirectory

    from simulations.scenes import scene_of

    more = ("devices.dropout=0.2", "devices.availability=0.9", "devices.deadline_seconds=30")
    with TemporaryDirectory() as folder:
        scene, _ = scene_of(tiny("control=sabppo", *SWITCHING, *more), Path(folder))
    assert (scene.dropout, scene.availability, scene.problem.deadline_seconds) == (0.2, 0.9, 30)
    assert scene.problem.links is not None
    assert scene.gains is not None
    assert scene.problem.links[:, 0].tolist() == scene.gains.tolist()


@pytest.mark.slow
def test_the_policy_in_the_package_is_for_its_experiment(tmp_path):
    scene, _ = scene_of(["experiment=adaptive"], tmp_path)
    packaged_policy().check(scene.problem)
    assert scene.curves == read_fit().curves.starting_at(scene.curves.start)
