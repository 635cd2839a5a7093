"""One simulated run, from settings to a folder of results."""

import platform
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from flwr.serverapp import Grid

from fedpeat.client.app import app as client_app
from fedpeat.core import (
    ConfigError,
    EngineError,
    Evaluation,
    RunState,
    locked,
    peak_rss_mib,
    write_json,
    write_text,
)
from fedpeat.data import FederatedData, client_table, plot_clients
from fedpeat.devices import write_ledger
from fedpeat.server import read_history
from simulations.baselines import Quietly, run_local_only, whole_model_settings
from simulations.building import built
from simulations.compose import Composed, compose
from simulations.corpus import cache_folder, prepare_data
from simulations.exchange import Interrupted
from simulations.export import export
from simulations.extraction import run_extraction
from simulations.federation import Observer
from simulations.keeping import check_made_of
from simulations.observers import Together
from simulations.progress import Progress
from simulations.report import summarise, write_report
from simulations.report.wording import percent
from simulations.rounds import run_rounds
from simulations.run_log import RunLog
from simulations.settings import settings_hash
from simulations.trackers import quietly

REPORTED = ("fedpeat", "torch", "transformers", "peft", "flwr", "ray", "safetensors", "numpy")


def versions() -> dict[str, str]:
    """Return the versions that results depend on."""
    found = {"python": platform.python_version()}
    for name in REPORTED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


class Where(NamedTuple):
    """Where a run's clients are: what differs between a simulation and a real federation.

    Attributes:
        engine: Returns what executes clients, with `workers` and `run`.
        data: Returns the partitioned data; tells what is waited for.
        delivered: Returns the composed run when clients have all that they need; an observer sees it.
        stop: Set to end the run early.
    """

    engine: Callable[[Mapping[str, Any]], Any]
    data: Callable[[Mapping[str, Any], Callable[[str], None]], FederatedData]
    delivered: Callable[[Composed, Observer], Composed]
    stop: threading.Event


def here() -> Where:
    """Return where a simulation's clients are: on this machine or a cluster, their data with them."""
    return Where(
        engine=lambda settings: built(settings["engine"]),
        data=lambda settings, _: prepare_data(settings),
        delivered=lambda composed, _: composed,
        stop=threading.Event(),
    )


def simulate(
    settings: Mapping[str, Any], folder: Path, where: Where | None = None, *, resume: bool = False
) -> dict[str, Any]:
    """Run the federation that `settings` describe; leave everything about it in `folder`.

    Args:
        settings: Plain and resolved, as `simulations.settings.load_settings` returns them.
        folder: Made if it does not exist.
        where: Where clients are; None for a simulation.
        resume: Whether to go on with the run in `folder`; `simulations.keeping.settings_to_resume` has its settings.

    Returns:
        The summary, as written to `summary.json`.

    Raises:
        FedPeatError: For whatever cannot be had; what was done until then is in `folder`.
    """
    folder = folder.absolute()
    with locked(folder):
        return _Run(settings, folder, where or here(), resume=resume).run()


class _Run:
    """One run; its folder is valid at any moment."""

    def __init__(self, settings: Mapping[str, Any], folder: Path, where: Where, *, resume: bool) -> None:
        self.settings = settings
        self.where = where
        self.folder = folder
        self.resume = resume
        self.started = time.perf_counter()
        self.hash = settings_hash(settings)
        self.text = yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True)
        self.stop = where.stop
        self.data: FederatedData | None = None
        self.composed: Composed | None = None
        self.state: RunState | None = None
        self.baselines: dict[str, Any] = {}
        self.status = "failed"
        self.error: BaseException | None = None
        self.seconds_before = 0.0
        self.progress = Progress()
        self.log = RunLog(folder, self.progress.message)
        self.observer = Together(self.progress, self.log)
        self.tracker = quietly(built(settings["tracker"]), self.observer.message)

    def run(self) -> dict[str, Any]:
        if not self.resume:
            self._check_folder()
        write_text(self.folder / "config.yaml", self.text)
        write_text(self.folder / "config.sha", self.hash + "\n")
        self.log.run_started(config=self.hash, rounds=self.settings["rounds"], resume=self.resume)
        with self.progress:
            try:
                self._execute(self._prepare())
                self.status = "finished"
            except (KeyboardInterrupt, Interrupted):
                self.status = "interrupted"
                self.observer.message("interrupted: writing what there is")
            except BaseException as error:
                self.error = error
                raise
            finally:
                summary = self._finish()
        self.progress.run_finished(summary, self.folder, report=self.settings["report"])
        return summary

    def _check_folder(self) -> None:
        """Refuse a folder with a run in it: its history would go on, and clients would use what they kept."""
        if (self.folder / "metrics.jsonl").exists() or (self.folder / "clients").exists():
            raise ConfigError(
                f"cannot run in {self.folder}",
                "there is a run in it",
                f"go on with it: resume={self.folder}; or remove it, or set another hydra.run.dir",
            )

    def _prepare(self) -> Composed:
        self.engine = self.where.engine(self.settings)
        self.tracker.start(self.settings, self.folder)
        self.observer.message("preparing data")
        self.data = self.where.data(self.settings, self.observer.message)
        if not self.data.remote:
            self._tell_of_clients(self.data)
        self.composed = self.where.delivered(self._compose(self.settings, self.folder), self.observer)
        if self.data.remote:  # how much they hold is known when they have what they need to count it
            self.data = self.composed.data
            self._tell_of_clients(self.data)
        return self.composed

    def _tell_of_clients(self, data: FederatedData) -> None:
        write_json(self.folder / "clients.json", client_table(data))
        if self.settings["report"]:
            plot_clients(data, self.folder / "figures" / "clients.png")
        self.observer.message(in_words_of(data))

    def _compose(self, settings: Mapping[str, Any], folder: Path) -> Composed:
        if self.data is None:
            raise EngineError("cannot compose a run", "its data is not prepared", "call simulate()")
        cache = cache_folder(settings)
        composed = compose(
            settings, self.data, folder=folder, cache=cache, workers=self.engine.workers, observer=self.observer
        )
        check_made_of(folder, composed.made_of)
        return composed

    def _execute(self, composed: Composed) -> None:
        slots = composed.federation.slots
        self.engine.run(partial(self._main, composed), client_app=client_app, slots=slots, stop=self.stop)

    def _main(self, composed: Composed, grid: Grid, nodes: Sequence[int] | Mapping[str, int]) -> None:
        wanted, federation = self.settings["baselines"], composed.federation
        rounds = federation.rounds if wanted["federated"] else 0
        observer = Together(self.progress, self.log, tracker=self.tracker)
        self.progress.run_started(rounds, also=int(federation.participant is not None))
        reports, self.state = run_rounds(
            replace(federation, rounds=rounds),
            grid,
            nodes,
            observer=observer,
            folder=self.folder,
            stop=self.stop,
            resume=self.resume,
        )
        done = self.state.resumed[-1] if self.resume and self.state.resumed else -1
        self.seconds_before = sum(report.seconds["total"] for report in reports if report.round <= done)
        if wanted["local_only"]:
            self.observer.message("baseline: each client tunes alone, with the same steps")
            alone = run_local_only(federation, grid, nodes, observer=self.observer, stop=self.stop)
            self.baselines["local_only"] = alone
        if wanted["whole_model"]:
            self.observer.message("baseline: the same federation on the whole model")
            self.baselines["whole_model"] = self._whole_model(grid, nodes).to_json()
        if wanted["extraction"]:
            self.observer.message("baseline: a curious client fine-tunes all that it holds")
            found = run_extraction(self.settings, federation, composed.data, observer=self.observer)
            self.baselines["extraction"] = found

    def _whole_model(self, grid: Grid, nodes: Sequence[int] | Mapping[str, int]) -> Evaluation:
        folder = self.folder / "baselines" / "whole_model"
        composed = self._compose(whole_model_settings(self.settings), folder)
        quiet = Quietly(self.observer)
        reports, _ = run_rounds(
            composed.federation, grid, nodes, observer=quiet, folder=folder, stop=self.stop, resume=self.resume
        )
        return reports[-1].evaluations["plug_in"]

    def _finish(self) -> dict[str, Any]:
        """Write summary, report and export from what there is, however the run ended."""
        path = self.folder / "metrics.jsonl"
        reports = read_history(path) if path.exists() else []
        write_ledger(self.folder, reports)
        summary = summarise(
            reports,
            config_hash=self.hash,
            versions=versions(),
            status=self.status,
            bundle_bytes=self.composed.bundles["default"].payload_bytes if self.composed else 0,
            rounds_planned=self.settings["rounds"],
            seconds_total=self.seconds_before + time.perf_counter() - self.started,
            peak_rss_mib=peak_rss_mib(),
            baselines=self.baselines,
            emulators=self.composed.costs if self.composed else {},
            privacy=self.composed.privacy if self.composed else None,
            settings=self.settings,
        )
        if self.composed and self.state and self.settings["export"]:
            self.observer.message("exporting the plugged-in model")
            summary["export"] = export(self.composed, self.state.shared, self.folder / "export")
        if self.state and self.state.resumed:
            summary["resumed_after_rounds"] = list(self.state.resumed)
        write_json(self.folder / "summary.json", summary)
        if self.settings["report"]:
            clients = client_table(self.data) if self.data else []
            write_report(self.folder, reports, summary, settings=self.settings, clients=clients)
        self.tracker.finish(summary)
        self.log.run_ended(summary, self.error)
        return summary


def in_words_of(data: FederatedData) -> str:
    """Return who holds what, in one line."""
    rows = sum(client.rows for client in data.clients)
    left_out = sum(data.report["clients"].get(reason, 0) for reason in ("too_small", "left_out"))
    also = f"; {left_out} left out (see clients.json and the report)" if left_out else ""
    return f"{len(data.clients)} clients hold {rows} rows of {data.block_size} tokens{also}{_choices_of(data)}"


def _choices_of(data: FederatedData) -> str:
    """Return what there is to choose from, and how often the answer that is right most often is right."""
    found = data.report.get("choices")
    if found is None:
        return ""
    cut = f", {found['cut']} prompts cut" if found["cut"] else ""
    often = f"always choosing the most frequent is {percent(found['most_frequent'])} right"
    return f"; {found['documents']} held-out documents have {len(found['names'])} possible answers ({often}{cut})"
