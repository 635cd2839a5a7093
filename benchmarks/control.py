"""What adaptive control costs: steps of the environment, training a policy, and choosing a plan.

usage: python benchmarks/control.py [--small] [--devices N] [--clients N] [--steps N] [--threads N] [--out FILE]

Devices of five kinds in a radio cell, three emulators at three ranks, three numbers of steps, three band weights, 12
rounds. Nothing is trained but the policy: the response curves stand for the federation.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Run as a file, Python would look for our modules in this folder: look in the one above.
_ROOT = str(Path(__file__).resolve().parent.parent)
sys.path[:] = [_ROOT, *(entry for entry in sys.path if entry not in {_ROOT, str(Path(__file__).resolve().parent)})]

if TYPE_CHECKING:
    from benchmarks.samples import Section
    from fedpeat.control.world import Scene

WORLDS = (1, 16, 128)
PLAYED_COLUMNS = ("environment", "steps/s", "quartiles")
CHOSEN_COLUMNS = ("controller", "ms a plan", "quartiles")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print tables; return 0."""
    parser = argparse.ArgumentParser(prog="benchmarks/control.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--small", action="store_true", help="everything in a minimal form: does it run?")
    parser.add_argument("--devices", type=int, default=20, help="of the environment and of training")
    parser.add_argument("--clients", type=int, default=100, help="for whom a plan is chosen")
    parser.add_argument("--steps", type=int, default=300_000, help="rounds played in training; 0: do not train")
    parser.add_argument("--threads", type=int, default=1, help="torch threads, of training alone")
    parser.add_argument("--out", type=Path, help="also write everything as JSON")
    asked = parser.parse_args(arguments)
    if asked.small:
        asked.devices, asked.clients, asked.steps = 3, 4, 200
    from rich.console import Console

    from benchmarks.simulation import machine
    from benchmarks.tables import show

    console, about = Console(highlight=False, width=None if sys.stdout.isatty() else 120), machine()
    seconds = 0.05 if asked.small else 1.0
    sections = [played(asked.devices, seconds), chosen(asked.clients, small=asked.small)]
    if asked.steps:
        sections.append(trained(asked.devices, asked.steps, asked.threads))
    plain = [section.to_json() for section in sections]
    for section in plain:
        show(console, section)
    console.print(f"{about['cpu']}, {about['cores']} cores")
    if asked.out:
        asked.out.write_text(json.dumps({"machine": about, "sections": plain}, indent=2) + "\n", encoding="utf-8")
    return 0


def scene_of(devices: int) -> "Scene":
    """Return a scene of devices of five kinds in a cell; memory closes the largest pairs to the smallest."""
    import numpy as np

    from fedpeat.control import Curves, Menu, Objective, Pair, Problem
    from fedpeat.control.world import Scene
    from fedpeat.devices import Radio, distance_km, path_loss_db

    radio, kinds = Radio(), np.arange(devices) % 5
    names = tuple(f"device-{place:04d}" for place in range(devices))
    away = [distance_km(radio, name, seed=0) for name in names]
    gains = np.array([10 ** (-path_loss_db(distance) / 10) for distance in away])
    keeps, ranks = np.array([0.25, 0.5, 0.75]), np.array([2, 4, 8])
    problem = Problem(
        clients=names,
        menu=Menu(
            tuple(Pair(f"kept_{key}", int(rank)) for key in (2, 4, 6) for rank in ranks), (5, 10, 20), (0.5, 1.0, 2.0)
        ),
        rounds=12,
        flops=np.array([3e10, 6e10, 2e11, 1e12, 1e13])[kinds],
        memory_bytes=np.array([2, 4, 8, 8, 24])[kinds] * 2.0**30,
        watt=np.array([[1, 3, 1.5, 0.2], [0.8, 5, 1.2, 0.2], [1, 25, 1.5, 0.2], [1, 15, 1, 0.2], [2, 250, 2, 0.2]])[
            kinds
        ],
        data_share=np.full(devices, 1 / devices),
        step_flops=(1e10 * (1 + keeps[:, None] + ranks / 100)).ravel(),
        needs_bytes=((1 + 2 * keeps[:, None] + ranks / 50) * 2.0**30).ravel(),
        bytes_down=np.tile(ranks * 4e4, 3),
        bytes_up=np.tile(ranks * 4e4, 3),
        kept=keeps,
        bundle_bytes=2e7 * (1 + keeps),
        refresh_bytes=np.zeros(3),
        radio=radio,
        links=gains[:, None],
    )
    return Scene(problem, Objective(time=1.0, quality=2.0), Curves(pace=0.4), gains=gains, availability=0.9)


def timed(work: Callable[[], int], seconds: float) -> list[float]:
    """Return the things done in a second of a core's time, of each of at least five goes.

    The process's own time, not the clock's: what else the machine does is none of its cost.
    """
    work()
    found, began = [], time.process_time()
    while len(found) < 5 or time.process_time() - began < seconds:
        before = time.process_time()
        done = work()
        found.append(done / (time.process_time() - before))
    return found


def played(devices: int, seconds: float) -> "Section":
    """Return how fast federations are played: the step, what is seen, and the masks."""
    import numpy as np

    from benchmarks.samples import Aim, Sample, Section
    from fedpeat.control.environment import ControlEnvironment
    from fedpeat.control.features import features
    from fedpeat.control.world import World

    scene = scene_of(devices)
    problem, draw = scene.problem, np.random.default_rng(0)
    branches = problem.menu.branches(devices)
    rows, best = [], 0.0

    def line(name: str, rates: Sequence[float]) -> float:
        sample = Sample.of(rates)
        rows.append(dict(zip(PLAYED_COLUMNS, (name, sample.median, [sample.low, sample.high]), strict=True)))
        return sample.median

    environment, actions = ControlEnvironment(scene), draw.integers(0, 2**30, (100, len(branches))) % branches

    def single() -> int:
        environment.reset(seed=0)
        for action in actions:
            if environment.step(action)[2]:
                environment.reset()
        return len(actions)

    alone = line("gymnasium, one federation", timed(single, seconds))
    for count in WORLDS:
        world = World(scene)
        levels, refresh = problem.menu.split(draw.integers(0, 2**30, (count, len(branches))) % branches)

        def whole(world: World = world, choice: Any = (levels, refresh), count: int = count) -> int:
            world.start(range(count))
            for _ in range(problem.rounds):
                world.mask()
                features(problem, scene.curves, world.seen(), world.loss, world.age)
                world.step(*choice)
            return count * problem.rounds

        best = max(best, line(f"world of {count}", timed(whole, seconds)))
    aims = [Aim("steps/s, gymnasium", alone, at_least=5000), Aim("steps/s, the largest", best, at_least=5000)]
    return Section(f"Playing federations of {devices} devices, one core", PLAYED_COLUMNS, rows, aims)


def chosen(clients: int, *, small: bool) -> "Section":
    """Return how long a plan takes to choose."""
    import numpy as np

    from benchmarks.samples import Aim, Sample, Section
    from fedpeat.control import CapabilityControl, Curves, GreedyControl, Policy, RandomControl, SabppoControl
    from fedpeat.control.policy import shapes
    from fedpeat.control.signature import signature_of
    from fedpeat.control.world import World, only

    scene = scene_of(clients)
    problem, draw = scene.problem, np.random.default_rng(0)
    world = World(scene)
    world.start([0])
    seen, weights = only(world.seen()), {}
    for layer, (outputs, inputs) in shapes(problem, 64).items():
        weights[f"{layer}.weight"] = draw.normal(size=(outputs, inputs)).astype(np.float32)
        weights[f"{layer}.bias"] = np.zeros(outputs, dtype=np.float32)
    controllers = {
        "sabppo": (SabppoControl(problem, Policy(weights, signature_of(problem), Curves()), 10), 50, 5.0),
        "capability": (CapabilityControl(problem, clients, 10, 0), 50, 5.0),
        "random": (RandomControl(problem, clients, 10, 0), 50, 5.0),
        "greedy": (GreedyControl(problem, scene.objective, scene.curves, 10), 3, None),
    }
    rows, aims = [], []
    for name, (controller, goes, most) in controllers.items():
        state, times = controller.start(), []
        controller.choose(None, state, seen)
        for _ in range(2 if small else goes):
            before = time.process_time()
            controller.choose(None, state, seen)
            times.append(1000 * (time.process_time() - before))
        sample = Sample.of(times)
        rows.append(dict(zip(CHOSEN_COLUMNS, (name, sample.median, [sample.low, sample.high]), strict=True)))
        aims.append(Aim(f"ms a plan, {name}", sample.median, at_most=most))
    return Section(f"Choosing a plan for {clients} devices", CHOSEN_COLUMNS, rows, aims)


def trained(devices: int, steps: int, threads: int) -> "Section":
    """Return how long training a policy takes."""
    import torch

    from benchmarks.samples import Aim, Section
    from fedpeat.control.learner import Recipe, Seen, train

    torch.set_num_threads(threads)
    curve: list[Seen] = []
    began = time.perf_counter()
    train(scene_of(devices), Recipe(steps=steps, starts=2), progress=curve.append)
    minutes = (time.perf_counter() - began) / 60
    columns = ("rounds played", "minutes", "rounds/s", "cost of a run before", "after")
    found = (curve[-1].steps, minutes, curve[-1].steps / minutes / 60, curve[0].cost, min(one.cost for one in curve))
    title = f"Training a policy for {devices} devices, torch threads: {threads}"
    return Section(title, columns, [dict(zip(columns, found, strict=True))], [Aim("minutes", minutes, at_most=10)])


if __name__ == "__main__":
    sys.exit(main())
