"""What a large population costs while few of it are sampled: added time of a round, and of starting.

Data is prepared and cached beforehand. Starting is all from the settings to the first message: finding the prepared
data, its table and plot, loading the model, finding the bundle, building the emulated model, attaching PEFT, evaluating
8 rows before tuning, and starting the engine. Importing packages comes before and does not depend on the population.
"""

import time
from pathlib import Path
from typing import Any

from benchmarks.clients import reader
from benchmarks.processes import fresh
from benchmarks.samples import Aim, Sample, Section
from benchmarks.stage import Watch, run_folder, set_up, settings_of
from fedpeat.core import write_json
from fedpeat.data import client_table, plot_clients
from simulations import engines
from simulations.corpus import prepare_data

COLUMNS = ("engine", "population", "sampled", "s/round", "quartiles", "start-up s", "of it data s", "runs")


def measure(folder: Path, *, smoke: bool) -> Section:
    """Measure a small and a large population by turns, on each engine."""
    small, large, sampled, rounds, runs = (10, 40, 3, 3, 1) if smoke else (100, 10_000, 10, 8, 3)
    chosen = ("serial",) if smoke else ("serial", "ray")
    for population in (small, large):
        fresh(prepare, folder, population, sampled, rounds)
    rows, aims = [], []
    for name in chosen:
        found: dict[int, list[dict[str, Any]]] = {small: [], large: []}
        for _ in range(runs):
            for population, measured in found.items():
                measured.append(fresh(one, folder, name, population, sampled, rounds))
        both = {population: row(name, population, sampled, measured) for population, measured in found.items()}
        rows += both.values()
        added = both[large]["s/round"] - both[small]["s/round"]
        start = both[large]["start-up s"]
        label = f"{large} clients, {name}"
        aims.append(Aim(f"added seconds a round, {label}", added, at_most=0.4))
        aims.append(Aim(f"start-up seconds, {label}", start, at_most=5.0))
        aims.append(Aim(f"start-up seconds added to {small} clients', {label}", start - both[small]["start-up s"]))
    return Section(f"Population, {sampled} sampled in a round", COLUMNS, rows, aims)


def _settings(folder: Path, population: int, sampled: int, rounds: int) -> dict[str, Any]:
    return settings_of(folder, f"rounds={rounds}", "client.batch_size=1", clients=population, rows=1, per_round=sampled)


def prepare(folder: Path, population: int, sampled: int, rounds: int) -> None:
    """Prepare the data, before the measurement."""
    prepare_data(_settings(folder, population, sampled, rounds))


def one(folder: Path, name: str, population: int, sampled: int, rounds: int) -> dict[str, Any]:
    """Return seconds of starting and of each round but the first."""
    started: list[float] = []
    with run_folder(folder) as run:
        begin = time.perf_counter()
        settings = _settings(folder, population, sampled, rounds)
        engine = engines.serial() if name == "serial" else engines.ray(workers=2)
        data = prepare_data(settings)
        write_json(run / "clients.json", client_table(data))
        plot_clients(data, run / "figures" / "clients.png")
        prepared = time.perf_counter() - begin
        stage = set_up(settings, engine=engine, folder=run)
        watch = Watch(on_start=lambda _: started.append(time.perf_counter() - begin))
        stage.run(watch, client_app=reader, folder=run)
    return {"start": started[0], "data": prepared, "rounds": watch.seconds[1:]}


def row(name: str, population: int, sampled: int, measured: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a table row."""
    seconds = Sample.of([value for run in measured for value in run["rounds"]])
    return {
        "engine": name if name == "serial" else "ray, 2 workers",
        "population": population,
        "sampled": sampled,
        "s/round": seconds.median,
        "quartiles": [seconds.low, seconds.high],
        "start-up s": Sample.of([run["start"] for run in measured]).median,
        "of it data s": Sample.of([run["data"] for run in measured]).median,
        "runs": len(measured),
    }
