"""Four systems side by side on one modelled fleet: simulated time, traffic and energy to the same plug-in perplexity.

usage: python benchmarks/four_systems.py [--small] [--seeds N] [--jobs N] [--policy FOLDER] [--curves FILE]
           [--systems NAME ...] [--rate NAME=RATE ...] [--out FILE] [--plot FILE] [--folder FOLDER] [key=value ...]

Fed-FT (all weights of the full model travel), Fed-PEFT (LoRA on the full model), FedPEAT with the same plan in every
round, and FedPEAT with controllers; each run is a `fedpeat simulate` of its own. `key=value` are those of `fedpeat
simulate`: `control.*` for the controllers alone, `strategy*`, `emulator*` and `peft*` not for Fed-FT.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

# Run as a file, Python would look for our modules in this folder: look in the one above.
_ROOT = str(Path(__file__).resolve().parent.parent)
sys.path[:] = [_ROOT, *(entry for entry in sys.path if entry not in {_ROOT, str(Path(__file__).resolve().parent)})]

from benchmarks.systems import FED_FT, SYSTEMS, Point, draw, section  # noqa: E402 (found by the path above)

SETTING = (
    "devices=cell",
    "strategy=flex_lora",
    "rounds=12",
    "client.local_steps=2",
    "client.batch_size=4",
    "evaluation.max_rows=32",
    "control.menu.kept_blocks=[1]",
    "control.menu.ranks=[2,8]",
    "control.menu.steps=[1,2,4]",
    "control.objective.quality=2",
    "control.objective.energy=0.3",
)
SMALL = ("rounds=2", "clients.count=2", "client.local_steps=1", "client.batch_size=2", "evaluation.max_rows=4")
QUIET = ("evaluation.costs=false", "export=false", "report=false", "engine=serial")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all systems, print a table; return 0."""
    asked = _parse(arguments)
    from benchmarks.processes import quiet

    quiet()
    from rich.console import Console

    from benchmarks.tables import show

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 150)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="fedpeat-benchmark-") as scratch:
        runs = measure(asked, Path(asked.folder or scratch), console)
    plain = section(runs, asked.rates).to_json()
    show(console, plain)
    console.print(f"{time.perf_counter() - began:.0f} s")
    if asked.plot:
        from simulations.report.style import house_style, write_png

        with house_style():
            write_png(draw(runs), asked.plot)
    if asked.out:
        points = {
            name: {seed: [point._asdict() for point in own] for seed, own in of.items()} for name, of in runs.items()
        }
        asked.out.write_text(json.dumps({"sections": [plain], "runs": points}, indent=2) + "\n", encoding="utf-8")
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks/four_systems.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of `fedpeat simulate`")
    parser.add_argument("--small", action="store_true", help="everything in a minimal form: does it run?")
    parser.add_argument("--seeds", type=int, help="runs of each system; 3 by default")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at once; one a core by default")
    parser.add_argument("--policy", help="SABPPO's policy; {seed} in it is the run's seed")
    parser.add_argument("--curves", help="response curves of greedy (JSON)")
    parser.add_argument("--systems", nargs="+", choices=sorted(SYSTEMS), help="only these")
    parser.add_argument("--rate", action="append", default=[], metavar="NAME=RATE", help="a system's learning rate")
    parser.add_argument("--out", type=Path, help="also write everything as JSON")
    parser.add_argument("--plot", type=Path, help="also draw perplexity over time and traffic, as PNG")
    parser.add_argument("--folder", help="where runs are kept: those that are there already are not made again")
    asked = parser.parse_intermixed_args(arguments)
    asked.seeds = asked.seeds or (1 if asked.small else 3)
    asked.systems = [name for name in SYSTEMS if name in (asked.systems or SYSTEMS)]
    if not asked.policy:
        asked.systems = [name for name in asked.systems if name != "sabppo"]
    rates = dict(one.split("=", 1) for one in asked.rate)
    asked.rates = {name: float(rates.get(name, SYSTEMS[name].rate)) for name in asked.systems}
    return asked


def overrides_of(name: str, seed: int, asked: argparse.Namespace) -> list[str]:
    """Return the settings of a run: of two for the same key, the last counts."""
    system = SYSTEMS[name]
    controlled = any(one.startswith("control=") for one in system.overrides)
    given = [*QUIET, f"seed={seed}", *system.overrides]
    for one in [*SETTING, *(SMALL if asked.small else ()), *asked.overrides]:
        # Fed-FT has no LoRA to aggregate and no middle to leave out; a fixed plan has no menu, a rule no
        # objective.
        of_whole = one.startswith(("strategy", "emulator", "peft")) and name == FED_FT
        no_weights = one.startswith("control.objective") and name == "capability"
        if not (of_whole or no_weights) and (controlled or not one.startswith("control.")):
            given.append(one)
    given.append(f"client.learning_rate={asked.rates[name]}")
    # A policy is for one fleet, and which devices there are follows from the seed.
    given += [f"control.policy={Path(asked.policy.format(seed=seed)).absolute()}"] if name == "sabppo" else []
    given += [f"control.curves={Path(asked.curves).absolute()}"] if asked.curves and name == "greedy" else []
    return list({one.partition("=")[0]: one for one in given}.values())


def measure(asked: argparse.Namespace, folder: Path, console: Any) -> dict[str, dict[int, list[Point]]]:
    """Return what came of each system and seed."""
    work = [(name, seed) for seed in range(asked.seeds) for name in asked.systems]

    def one(task: tuple[str, int]) -> list[Point]:
        name, seed = task
        place, started = folder / f"{name}-{seed}", time.perf_counter()
        simulate(overrides_of(name, seed, asked), place)
        console.print(f"{name}, seed {seed}: {time.perf_counter() - started:.0f} s", style="dim")
        return points_of(place)

    with ThreadPoolExecutor(asked.jobs) as pool:
        found = dict(zip(work, pool.map(one, work), strict=True))
    return {name: {seed: found[name, seed] for seed in range(asked.seeds)} for name in asked.systems}


def simulate(overrides: Sequence[str], folder: Path) -> None:
    """Make a run in a folder, unless it is there."""
    note = folder.with_suffix(".json")
    if note.exists() and json.loads(note.read_text(encoding="utf-8")) == list(overrides):
        return
    command = [sys.executable, "-m", "simulations.cli", "simulate", *overrides, f"hydra.run.dir={folder}"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([_ROOT, os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-1000:]}{done.stderr[-3000:]}")
    note.write_text(json.dumps(list(overrides)), encoding="utf-8")


def points_of(folder: Path) -> list[Point]:
    """Return what a run had spent after each round that was evaluated, and how good it was."""
    from fedpeat.devices import CLOCK
    from fedpeat.server import read_history

    points, moved, joules = [], 0.0, 0.0
    for report in read_history(folder):
        moved += report.bytes_down + report.bytes_up
        moved += sum(facts.get("bundle_bytes") or 0 for facts in report.devices.values())
        joules += sum(facts.get("joules") or 0.0 for facts in report.devices.values())
        if "plug_in" in report.evaluations:
            clock = report.metrics.get(CLOCK, 0.0)
            points.append(Point(report.round, clock, moved, joules, report.evaluations["plug_in"].loss))
    return points


if __name__ == "__main__":
    sys.exit(main())
