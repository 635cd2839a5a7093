"""`fedpeat control fit|train|evaluate`: a policy learned by response curves, and how it does beside other rules."""

import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedpeat.control import (
    CapabilityControl,
    GreedyControl,
    RandomControl,
    SabppoControl,
    read_policy,
    write_policy,
)
from fedpeat.control.world import Scene, play
from fedpeat.core import ConfigError, nearest, seed_for, write_json
from simulations.fit_command import control_fit
from simulations.scenes import scene_of

VERBS = ("train", "evaluate")
OWN = {"train": {"policy": None, "steps": 200_000, "tensorboard": None}, "evaluate": {"policy": None, "episodes": 50}}
"""Keys of the command itself; all others are those of `fedpeat simulate`."""

USAGE = """usage: fedpeat control fit folder=FOLDER ...     ('fedpeat control fit --help' tells of it)
       fedpeat control train policy=FOLDER [steps=200000] [tensorboard=FOLDER] [key=value ...]
       fedpeat control evaluate policy=FOLDER [episodes=50] [key=value ...]

All other keys are those of `fedpeat simulate`: the devices, the menu (control.menu), what counts (control.objective).
"""

MEASURES = ("cost", "seconds", "bytes", "joules", "loss")


def control(arguments: Sequence[str]) -> int:
    """Run `fedpeat control`; return its exit code.

    Raises:
        ConfigError: If the verb, a key or a value is unknown, or no policy is named.
    """
    if not arguments or arguments[0] in {"-h", "--help", "help"}:
        print(USAGE)
        return 0
    verb, rest = arguments[0], arguments[1:]
    if verb == "fit":
        return control_fit(rest)
    if verb not in VERBS:
        raise ConfigError(f"fedpeat control {verb}", "no such verb", nearest(verb, (*VERBS, "fit")))
    own, overrides = split_arguments(verb, rest)
    if not own["policy"]:
        raise ConfigError(f"fedpeat control {verb} needs policy=FOLDER", "it is not given", "name a folder")
    with tempfile.TemporaryDirectory() as folder:
        scene, settings = scene_of(overrides, Path(folder))
    if verb == "train":
        return _train(scene, settings, own)
    return _evaluate(scene, settings, own)


def split_arguments(verb: str, arguments: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Return the command's own keys, and what is left for the run.

    Raises:
        ConfigError: If a number is none.

    >>> split_arguments("train", ["policy=p", "rounds=3", "steps=10"])
    ({'policy': 'p', 'steps': 10, 'tensorboard': None}, ['rounds=3'])
    """
    own, rest = dict(OWN[verb]), []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key not in own:
            rest.append(argument)
            continue
        if isinstance(OWN[verb][key], int):
            if not value.isdecimal() or int(value) < 1:
                raise ConfigError(f"cannot use {argument}", "it is a number, 1 or more", f"write {key}=50")
            own[key] = int(value)
        else:
            own[key] = value
    return own, rest


def _train(scene: Scene, settings: Mapping[str, Any], own: Mapping[str, Any]) -> int:
    try:
        from fedpeat.control.learner import Recipe, train
    except ImportError as error:
        raise ConfigError("cannot train a policy", str(error), "pip install 'fedpeat[control]'") from error
    curve: list[tuple[int, float]] = []

    def progress(steps: int, mean: float) -> None:
        curve.append((steps, mean))
        print(f"{steps:>9} rounds played, cost of a run {-mean:.4f}", flush=True)

    recipe = Recipe(steps=own["steps"])
    policy = train(scene, recipe, seed=settings["seed"], progress=progress, tensorboard=own["tensorboard"])
    write_policy(own["policy"], policy)
    write_json(Path(own["policy"]) / "training.json", [{"steps": steps, "cost": -mean} for steps, mean in curve])
    print(f"policy in {own['policy']}: use it by control=sabppo control.policy={own['policy']}")
    return 0


def _evaluate(scene: Scene, settings: Mapping[str, Any], own: Mapping[str, Any]) -> int:
    rows = compared(scene, read_policy(own["policy"]), settings, own["episodes"])
    write_json(Path(own["policy"]) / "evaluation.json", rows)
    print(table(rows))
    return 0


def compared(scene: Scene, policy: Any, settings: Mapping[str, Any], episodes: int) -> dict[str, dict[str, Any]]:
    """Return what runs come to under each controller, over seeds that no policy was trained with.

    Args:
        scene: What is played.
        policy: Of `sabppo`.
        settings: The run's.
        episodes: Runs of each.

    Returns:
        By controller, and by measure (`cost`, `seconds`, `bytes`, `joules`, `loss` at the end): mean and half-width of
        its 95 % interval; `beside` is the paired difference of costs to `sabppo`'s.
    """
    problem, steps = scene.problem, settings["client"]["local_steps"]
    asked = settings["clients"]["per_round"] or len(problem.clients)
    seeds = [seed_for(settings["seed"], "held-out channel", place) for place in range(episodes)]
    controllers = {
        "sabppo": lambda _: SabppoControl(problem, policy, steps),
        "greedy": lambda _: GreedyControl(problem, scene.objective, scene.curves, steps),
        "capability": lambda seed: CapabilityControl(problem, asked, steps, seed),
        "random": lambda seed: RandomControl(problem, asked, steps, seed),
    }
    found = {
        name: np.array([_measured(make(seed), scene, seed) for seed in seeds]) for name, make in controllers.items()
    }
    rows: dict[str, dict[str, Any]] = {}
    for name, values in found.items():
        rows[name] = {measure: interval(values[:, place]) for place, measure in enumerate(MEASURES)}
        rows[name]["beside"] = interval(values[:, 0] - found["sabppo"][:, 0])
    return rows


def _measured(controller: Any, scene: Scene, seed: int) -> list[float]:
    total, rounds = play(controller, scene, seed)
    spent = [sum(one[key] for one in rounds) for key in ("seconds", "bytes", "joules")]
    return [-total, *spent, rounds[-1]["loss"]]


def interval(values: np.ndarray) -> tuple[float, float]:
    """Return the mean and the half-width of its 95 % interval, by the normal distribution.

    >>> interval(np.array([1.0, 1.0, 1.0]))
    (1.0, 0.0)
    """
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
    return float(np.mean(values)), 1.96 * spread / math.sqrt(len(values))


def table(rows: Mapping[str, Mapping[str, tuple[float, float]]]) -> str:
    """Return what `compared` found as lines of text."""
    units = {"cost": 1, "seconds": 1, "bytes": 1e6, "joules": 1, "loss": 1, "beside": 1}
    heads = ("cost", "simulated s", "MB", "J", "final loss", "cost beside sabppo")
    lines = [f"{'controller':<12}" + "".join(f"{head:>22}" for head in heads)]
    for name, row in rows.items():
        cells = [f"{row[key][0] / unit:.4g} ± {row[key][1] / unit:.2g}" for key, unit in units.items()]
        lines.append(f"{name:<12}" + "".join(f"{cell:>22}" for cell in cells))
    return "\n".join(lines)
