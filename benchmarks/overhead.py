"""What the framework itself costs: rounds of clients that do nothing but reply with zeros."""

from pathlib import Path
from typing import Any

from benchmarks.clients import no_op
from benchmarks.processes import fresh
from benchmarks.samples import Aim, Sample, Section
from benchmarks.stage import Watch, run_folder, set_up, settings_of
from simulations import engines

COLUMNS = ("engine", "clients", "KiB each way", "s/round", "quartiles", "rounds")


def measure(folder: Path, *, smoke: bool) -> Section:
    """Measure both engines."""
    clients, rounds = (6, 3) if smoke else (100, 12)
    chosen = ("serial",) if smoke else ("serial", "ray")
    rows = [fresh(rounds_of, folder, name, clients, rounds) for name in chosen]
    aims = [
        Aim(f"seconds a round with {clients} no-op clients, {row['engine']}", row["s/round"], at_most=0.5)
        for row in rows
    ]
    return Section("Framework time of a round with no-op clients", COLUMNS, rows, aims)


def rounds_of(folder: Path, name: str, clients: int, rounds: int) -> dict[str, Any]:
    """Return the row of one engine; the first round, in which workers start, is left out."""
    engine = engines.serial() if name == "serial" else engines.ray(workers=2)
    settings = settings_of(folder, f"rounds={rounds}", "client.batch_size=1", clients=clients, rows=1)
    with run_folder(folder) as run:
        stage = set_up(settings, engine=engine, folder=run)
        watch = Watch()
        stage.run(watch, client_app=no_op, folder=run)
    seconds = Sample.of(watch.seconds[1:])
    return {
        "engine": name if name == "serial" else "ray, 2 workers",
        "clients": clients,
        "KiB each way": stage.composed.federation.payload_bytes / 1024,
        "s/round": seconds.median,
        "quartiles": [seconds.low, seconds.high],
        "rounds": seconds.count,
    }
