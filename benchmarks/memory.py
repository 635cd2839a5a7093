"""How much the driver's memory grows in one round of large updates, and whether it grows with their number.

Growth is the peak of resident memory in the round minus what was resident when the round began: model loaded, engine
started, nothing sent. Each number of updates has a process of its own. On Ray, resident memory counts the pages of the
object store that the driver has touched.
"""

from pathlib import Path
from typing import Any

from benchmarks.clients import no_op
from benchmarks.processes import fresh, peak, start_peak
from benchmarks.samples import Aim, Section
from benchmarks.stage import Watch, run_folder, set_up, settings_of
from simulations import engines

COLUMNS = ("engine", "updates", "MB each", "before MiB", "peak MiB", "growth MiB", "s/round")
RANK_OF_10_MB = 256


def measure(folder: Path, *, smoke: bool) -> Section:
    """Measure each engine with few and many updates."""
    counts, rank = ((2, 6), 8) if smoke else ((100, 1000), RANK_OF_10_MB)
    chosen = ("serial",) if smoke else ("serial", "ray")
    rows, aims = [], []
    for name in chosen:
        few, many = (fresh(one, folder, name, count, rank) for count in counts)
        rows += [few, many]
        label = f"{few['MB each']:.0f} MB updates, {few['engine']}"
        aims.append(Aim(f"growth with {counts[0]} {label}, MB", few["growth MiB"] * 1.048576, at_most=300))
        aims.append(Aim(f"growth with {counts[1]} {label}, MB", many["growth MiB"] * 1.048576, at_most=300))
    return Section("Peak memory of the driver in one round", COLUMNS, rows, aims)


def one(folder: Path, name: str, updates: int, rank: int) -> dict[str, Any]:
    """Return the row of one round."""
    engine = engines.serial() if name == "serial" else engines.ray(workers=2)
    settings = settings_of(
        folder,
        "rounds=2",
        "client.batch_size=1",
        f"peft.rank={rank}",
        f"peft.alpha={rank}",
        clients=updates,
        rows=1,
    )
    before: list[float] = []
    after: list[float] = []
    with run_folder(folder) as run:
        stage = set_up({**settings, "rounds": 1}, engine=engine, folder=run)
        watch = Watch(on_start=lambda _: before.append(start_peak()), on_finish=lambda _: after.append(peak()))
        stage.run(watch, client_app=no_op, folder=run)
    return {
        "engine": name if name == "serial" else "ray, 2 workers",
        "updates": updates,
        "MB each": stage.composed.federation.payload_bytes / 1e6,
        "before MiB": before[0],
        "peak MiB": after[1],
        "growth MiB": after[1] - before[0],
        "s/round": watch.seconds[0],
    }
