"""Short visits: Ray beside the FlowerTune shape where a client takes one step, so that what surrounds it shows."""

from pathlib import Path

from benchmarks.processes import fresh
from benchmarks.samples import Aim, Section
from benchmarks.steps import COLUMNS, Sizes, on_flowertune, on_ray


def measure(folder: Path, *, smoke: bool) -> Section:
    """Measure both, each against two bare loops beside it."""
    sizes = Sizes(2, 1, 3, 2) if smoke else Sizes(clients=16, local_steps=1, rounds=9, batch_size=8)
    ours, template = fresh(on_ray, folder, sizes), fresh(on_flowertune, folder, sizes)
    times = ours["row"]["steps/s"] / template["row"]["steps/s"]
    aims = [Aim("ray over the FlowerTune shape, one step a visit (many times)", times, at_least=2.0)]
    facts = {"sizes": vars(sizes), "fedpeat_over_flowertune": times}
    return Section(
        "Steps a second with one step a visit", COLUMNS, [ours["bare"], ours["row"], template["row"]], aims, facts
    )
