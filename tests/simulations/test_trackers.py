import dataclasses
import importlib
import importlib.util
import math
import re
import sys
import time
import types

import pytest
import yaml

from fedpeat.core import ConfigError, Evaluation, RoundReport
from simulations import trackers
from simulations.report import summarise

CONFIG = {
    "seed": 1,
    "model": {"name": "tiny", "split": {"first": 2}},
    "empty": {},
    "odd key$": ["a", "b"],
    "none": None,
}
OPTIONS = {
    "tensorboard": {},
    "wandb": {"project": "fedpeat", "entity": None, "mode": "offline", "tags": ["test"]},
    "mlflow": {"tracking_uri": None, "experiment": "fedpeat"},
}


def summary_of(reports, status="finished"):
    return summarise(reports, config_hash="5f3a", versions={"torch": "2"}, status=status, bundle_bytes=1)


def run(tracker: trackers.Tracker, reports, folder, status="finished"):
    tracker.start(CONFIG, folder)
    for report in reports:
        tracker.log(report)
    tracker.finish(summary_of(reports, status))


@pytest.fixture
def installed(monkeypatch):
    """Make a package look installed, with a stand-in that records."""

    def install(name, **modules):
        monkeypatch.setattr(importlib.util, "find_spec", lambda module: types.SimpleNamespace(origin=f"{module}.py"))
        for path, content in modules.items():
            module = types.ModuleType(path.replace("__", "."))
            vars(module).update(content)
            monkeypatch.setitem(sys.modules, module.__name__, module)

    return install


def test_none_keeps_nothing(make_reports, tmp_path):
    run(trackers.none(), make_reports(2), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", OPTIONS)
def test_a_missing_package_is_told_before_the_run(monkeypatch, name):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=re.escape(f'pip install "fedpeat[{name}]"')):
        getattr(trackers, name)(**OPTIONS[name])


@pytest.mark.parametrize("name", OPTIONS)
def test_a_mere_folder_of_that_name_is_not_the_package(monkeypatch, name):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: types.SimpleNamespace(origin=None))
    with pytest.raises(ConfigError, match="not installed"):
        getattr(trackers, name)(**OPTIONS[name])


@pytest.mark.filterwarnings("default")  # theirs are not ours
@pytest.mark.parametrize("name", OPTIONS)
def test_each_real_package_takes_a_run_or_is_asked_for(make_reports, tmp_path, name, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    if importlib.util.find_spec(name) is None:
        with pytest.raises(ConfigError):
            getattr(trackers, name)(**OPTIONS[name])
        return
    reports = make_reports(3)
    run(getattr(trackers, name)(**OPTIONS[name]), reports, tmp_path / "run", status="interrupted")
    globals()[f"read_{name}"](tmp_path / "run", reports)


def read_tensorboard(folder, reports):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    found = {event.step: event.value for event in events.Scalars("perplexity/plug_in")}
    assert found == pytest.approx({report.round: report.evaluations["plug_in"].perplexity for report in reports})
    assert {"config/text_summary", "summary/text_summary"} <= set(events.Tags()["tensors"])


def read_mlflow(folder, reports):
    client = importlib.import_module("mlflow.tracking").MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("fedpeat")
    assert experiment.artifact_location.startswith(folder.as_uri())
    found = client.search_runs([experiment.experiment_id])[0]
    assert found.info.status == "KILLED"
    assert found.data.params == {
        "seed": "1", "model.name": "tiny", "model.split.first": "2", "empty": "{}", "odd key_": "['a', 'b']",
        "none": "None",
    }  # fmt: skip
    history = client.get_metric_history(found.info.run_id, "loss/plug_in")
    assert {one.step: one.value for one in history} == {
        report.round: report.evaluations["plug_in"].loss for report in reports
    }
    assert found.data.metrics["summary/rounds"] == 3


def read_wandb(folder, reports):
    kept = list((folder / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(kept) == 1
    deadline = time.monotonic() + 60
    while b"perplexity/plug_in" not in kept[0].read_bytes():  # its own process writes, a little after finish()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert b"tiny" in kept[0].read_bytes()


def test_wandb_is_told_all(make_reports, tmp_path, installed):
    calls = []

    class Run:
        summary = types.SimpleNamespace(update=lambda values: calls.append(("summary", values)))

        def log(self, values, step):
            calls.append(("log", step, values))

        def finish(self, exit_code):
            calls.append(("finish", exit_code))

    def init(**options):
        calls.append(("init", options))
        return Run()

    installed("wandb", wandb={"init": init, "Settings": lambda **options: options})
    reports = make_reports(2)
    run(trackers.wandb(**OPTIONS["wandb"]), reports, tmp_path / "run", status="failed")
    assert calls[0][1]["dir"] == str(tmp_path / "run")
    assert calls[0][1]["mode"] == "offline"
    assert calls[0][1]["config"] == CONFIG
    assert [call[1] for call in calls if call[0] == "log"] == [0, 1, 2]
    assert calls[-2][1]["metrics.plug_in.loss"] == reports[-1].evaluations["plug_in"].loss
    assert calls[-1] == ("finish", 1)


def test_wandb_modes_are_checked(installed):
    installed("wandb")
    with pytest.raises(ConfigError, match="offline, online or disabled"):
        trackers.wandb(**{**OPTIONS["wandb"], "mode": "ofline"})


def test_mlflow_is_told_all(make_reports, tmp_path, installed):
    calls = []

    class Client:
        def __init__(self, tracking_uri):
            calls.append(("client", tracking_uri))

        def get_experiment_by_name(self, _):
            return types.SimpleNamespace(experiment_id="7")

        def create_run(self, experiment, run_name):
            calls.append(("run", experiment, run_name))
            return types.SimpleNamespace(info=types.SimpleNamespace(run_id="1"))

        def log_batch(self, _, metrics=(), params=()):
            calls.append(("batch", list(metrics), list(params)))

        def set_terminated(self, _, status):
            calls.append(("end", status))

    entities = {"Param": lambda key, value: (key, value), "Metric": lambda key, value, _, step: (key, value, step)}
    installed("mlflow", mlflow={}, mlflow__entities=entities, mlflow__tracking={"MlflowClient": Client})
    tracker = trackers.mlflow(tracking_uri="http://localhost:5000", experiment="x")
    run(tracker, make_reports(1), tmp_path / "run")
    assert calls[0] == ("client", "http://localhost:5000")
    assert calls[1] == ("run", "7", "run")
    assert ("odd key_", "['a', 'b']") in calls[2][2]
    assert calls[-1] == ("end", "FINISHED")


def test_scalars_are_finite_floats():
    report = RoundReport(
        1, {}, (), {"plug_in": Evaluation(math.inf, 0.5, 1)}, 1, 2, {"train": math.nan}, {"update_norm": 1}
    )
    found = trackers.scalars(report)
    assert found == {
        "accuracy/plug_in": 0.5, "bytes/down": 1.0, "bytes/up": 2.0, "clients/counted": 0.0, "clients/failed": 0.0,
        "update_norm": 1.0,
    }  # fmt: skip
    assert all(isinstance(value, float) for value in found.values())
    report = dataclasses.replace(report, evaluations={"plug_in": Evaluation(1.0, 0.5, 1, 0.25)})
    assert trackers.scalars(report)["choice_accuracy/plug_in"] == 0.25


class Broken:
    """Fails wherever it is asked to."""

    def __init__(self, *where):
        self.where = where

    def _act(self, name, *_):
        if name in self.where:
            raise ConnectionError("no network")

    def start(self, config, folder):
        self._act("start", config, folder)

    def log(self, report):
        self._act("log", report)

    def finish(self, summary):
        self._act("finish", summary)


def test_a_tracker_that_breaks_is_told_of_once_and_ends_no_run(make_reports, tmp_path):
    told = []
    run(trackers.quietly(Broken("log", "finish"), told.append), make_reports(3), tmp_path)
    assert told == ["the tracker failed (ConnectionError: no network); the run goes on, metrics.jsonl has all"]


def test_a_run_that_fails_before_its_tracker_starts_leaves_the_tracker_alone(make_reports):
    told = []
    tracker = trackers.quietly(Broken("log", "finish"), told.append)
    tracker.log(make_reports(0)[0])
    tracker.finish(summary_of([], "failed"))
    assert told == []


def test_a_tracker_that_cannot_start_ends_the_run_at_once(tmp_path):
    tracker = trackers.quietly(Broken("start"), lambda _: None)
    with pytest.raises(ConnectionError):
        tracker.start({}, tmp_path)


def test_reports_with_new_models_are_logged_too(make_reports):
    report = make_reports(1)[-1]
    wider = dataclasses.replace(report, evaluations={"emulator_tuned/small": Evaluation(3.0, 0.1, 9)})
    assert trackers.scalars(wider)["loss/emulator_tuned/small"] == 3.0


def test_every_option_of_conf_builds(pytestconfig, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: types.SimpleNamespace(origin=f"{module}.py"))
    files = sorted((pytestconfig.rootpath / "conf" / "tracker").glob("*.yaml"))
    assert [path.stem for path in files] == ["mlflow", "none", "tensorboard", "wandb"]
    for path in files:
        options = yaml.safe_load(path.read_text(encoding="utf-8"))
        module, _, builder = options.pop("_target_").rpartition(".")
        assert (module, builder) == ("simulations.trackers", path.stem)
        assert getattr(trackers, builder)(**options)
