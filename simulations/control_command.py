"""`fedpeat control fit|train|evaluate`: a policy learned by response curves, and how it does beside other rules."""

import contextlib
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from fedpeat.control import SabppoControl, write_policy
from fedpeat.control.world import Scene
from fedpeat.core import ConfigError, nearest, write_json
from simulations.compare.grid import known_names
from simulations.control import policy_of
from simulations.fit_command import control_fit
from simulations.scenes import scene_of

if TYPE_CHECKING:
    from fedpeat.control.learner import Seen
    from simulations.contest import Contest

VERBS = ("train", "evaluate")
OWN: Mapping[str, Mapping[str, Any]] = {
    "train": {"policy": None, "steps": 300_000, "starts": 2, "tensorboard": None},
    "evaluate": {"policy": None, "episodes": 50, "folder": None},
}
"""Keys of the command itself; all others are those of `fedpeat simulate`."""

HELP = """fedpeat control: learn who does what in a round, and hold it against other rules

usage: fedpeat control fit folder=FOLDER ...           ('fedpeat control fit --help' tells of it)
       fedpeat control train policy=FOLDER [steps=300000] [starts=2] [tensorboard=FOLDER] [key=value ...]
       fedpeat control evaluate [policy=FOLDER] [episodes=50] [folder=FOLDER] [key=value ...]

train plays federations by response curves, and keeps the policy that does best in ones it is not trained in:

  policy=FOLDER        where it goes: policy.safetensors, policy.json, training.json, figures/learning.png
  steps=300000         rounds played in all
  starts=2             policies that are begun; the best of them is trained on
  tensorboard=FOLDER   also write TensorBoard's files there (pip install 'fedpeat[tensorboard]')

evaluate plays sabppo, the best fixed plan in hindsight, greedy, capability, fixed and random over the same held-out
runs:

  policy=FOLDER        of sabppo; default: the one that comes with the package, if it fits the run
  episodes=50          runs of each controller
  folder=FOLDER        where evaluation.json and figures/*.png go; default: the policy's folder

All other keys are those of 'fedpeat simulate --help'. Among them: devices=cell, rounds=N, the menu (control.menu.*),
what counts (control.objective.*), response curves (control.curves=FILE). Devices follow seed=N, too: train and use a
policy with the same. 'fedpeat simulate control=sabppo control.policy=FOLDER ...' runs a federation with it.
Exit code: 0 done, 2 a mistake in what was asked, 130 Ctrl-C.
"""


def control(arguments: Sequence[str]) -> int:
    """Run `fedpeat control`; return its exit code.

    Raises:
        ConfigError: If the verb, a key or a value is unknown, or no policy is named.
    """
    verb, rest = (arguments[0], arguments[1:]) if arguments else ("help", ())
    if verb == "fit":
        return control_fit(rest)
    if {"-h", "--help", "help"} & {verb, *rest}:
        print(HELP, end="")
        return 0
    if verb not in VERBS:
        raise ConfigError(f"fedpeat control {verb}", "no such verb", nearest(verb, (*VERBS, "fit")))
    own, overrides = split_arguments(verb, rest)
    if verb == "train" and not own["policy"]:
        raise ConfigError("fedpeat control train needs policy=FOLDER", "it is not given", "name a folder")
    console = Console(highlight=False)
    if verb == "train":
        return _train(own, overrides, console)
    return _evaluate(own, overrides, console)


def split_arguments(verb: str, arguments: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Return the command's own keys, and what is left for the run.

    Raises:
        ConfigError: If a key is unknown, or a number is none.

    >>> split_arguments("train", ["policy=p", "rounds=3", "steps=10"])
    ({'policy': 'p', 'steps': 10, 'starts': 2, 'tensorboard': None}, ['rounds=3'])
    """
    own, rest = dict(OWN[verb]), []
    known = known_names()
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            raise ConfigError(f"fedpeat control {verb} {argument}", "it has no value", f"write {key}=VALUE")
        if key not in own:
            if key.lstrip("+~") not in known and not _inside(key, known):
                raise ConfigError(f"fedpeat control {verb} {argument}", "no such key", nearest(key, [*own, *known]))
            rest.append(argument)
        elif isinstance(OWN[verb][key], int):
            if not value.isdecimal() or int(value) < 1:
                raise ConfigError(f"cannot use {argument}", "it is a number, 1 or more", f"write {key}=50")
            own[key] = int(value)
        else:
            own[key] = value or None
    return own, rest


def _inside(key: str, known: Collection[str]) -> bool:
    """Return whether a key lies in a mapping that takes any: settings check what is below."""
    parts = key.lstrip("+~").split(".")
    return any(".".join(parts[:place]) in known for place in range(1, len(parts)))


def _scene(overrides: Sequence[str]) -> tuple[Scene, dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        return scene_of(overrides, Path(folder))


def _train(own: Mapping[str, Any], overrides: Sequence[str], console: Console) -> int:
    from fedpeat.control.learner import Recipe, train
    from simulations import control_figures
    from simulations.report.style import write_png

    with _written(own["tensorboard"]) as write:
        scene, settings = _scene(overrides)
        curve: list[Seen] = []
        began = time.monotonic()
        with _watched(own["steps"], console) as show:

            def progress(seen: "Seen") -> None:
                curve.append(seen)
                write(seen)
                show(seen)

            recipe = Recipe(steps=own["steps"], starts=own["starts"])
            policy = train(scene, recipe, seed=settings["seed"], progress=progress)
    folder = Path(own["policy"])
    write_policy(folder, policy)
    write_json(folder / "training.json", [seen._asdict() for seen in curve])
    write_png(control_figures.learning(curve), folder / "figures" / "learning.png")
    best = min(seen.cost for seen in curve)
    console.print(
        f"cost of a run {curve[0].cost:.4g} -> {best:.4g}, {time.monotonic() - began:.0f} s; policy in {folder}"
    )
    console.print(f"beside others: fedpeat control evaluate policy={folder} ...; in a run: control.policy={folder}")
    return 0


@contextlib.contextmanager
def _watched(steps: int, console: Console) -> Iterator[Callable[["Seen"], None]]:
    """Show a bar on a terminal; elsewhere a line now and then."""
    if not console.is_terminal:
        told = [-1]

        def line(seen: "Seen") -> None:
            if seen.steps * 20 // steps > told[0]:
                told[0] = seen.steps * 20 // steps
                console.print(f"{seen.steps:>9,} rounds played, {words_of(seen)}", soft_wrap=True)

        yield line
        return
    columns = (TextColumn("training"), BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=console) as bars:
        bar = bars.add_task("", total=steps)
        best = [float("inf")]

        def move(seen: "Seen") -> None:
            best[0] = min(best[0], seen.cost)
            bars.update(bar, completed=seen.steps, description=f"{words_of(seen)}, best {best[0]:.4g}")

        yield move


def words_of(seen: "Seen") -> str:
    """Return where training stands, in words."""
    return f"cost of a run {seen.cost:.4g}, entropy {seen.entropy:.2f} nats"


@contextlib.contextmanager
def _written(folder: str | None) -> Iterator[Callable[["Seen"], None]]:
    """Write TensorBoard's files.

    Raises:
        ConfigError: If the package is not installed.
    """
    if not folder:
        yield lambda _: None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        remedy = "pip install 'fedpeat[tensorboard]'"
        raise ConfigError(f"cannot write tensorboard={folder}", str(error), remedy) from error
    writer = SummaryWriter(log_dir=folder)

    def write(seen: "Seen") -> None:
        for name, value in seen._asdict().items():
            if name != "steps":
                writer.add_scalar(f"control/{name}", value, seen.steps)

    try:
        yield write
    finally:
        writer.close()


def _evaluate(own: Mapping[str, Any], overrides: Sequence[str], console: Console) -> int:
    from simulations import control_figures
    from simulations.contest import contest
    from simulations.report.style import write_png

    policy = policy_of(own["policy"])
    scene, settings = _scene(overrides)
    SabppoControl(scene.problem, policy, settings["client"]["local_steps"])  # refused before anything is played
    with console.status("") if console.is_terminal else contextlib.nullcontext() as status:
        found = contest(scene, policy, settings, own["episodes"], told=status.update if status else lambda _: None)
    folder = Path(own["folder"] or own["policy"] or "evaluation")
    write_json(folder / "evaluation.json", found.to_json())
    write_png(control_figures.controllers(found), folder / "figures" / "controllers.png")
    for name in ("sabppo", "greedy"):
        title = f"What {name} chose in the first run"
        drawn = control_figures.choices(scene.problem, *found.first[name], title=title)
        write_png(drawn, folder / "figures" / f"choices_{name}.png")
    show(found, console)
    console.print(f"in {folder}: evaluation.json, figures/", soft_wrap=True)
    return 0


def show(found: "Contest", console: Console) -> None:
    """Print who takes what, and the best fixed plan."""
    from fedpeat.control.hindsight import in_words
    from simulations.contest import HEADINGS, rows

    told_of = rows(found)
    for places in ((0, 1, 2, 3), (0, 4, 5, 6, 7)):
        table = Table(header_style="bold", pad_edge=False)
        for place in places:
            table.add_column(HEADINGS[place], justify="right" if place else "left")
        for row in told_of:
            # In the wider table, intervals stand below means: a terminal may have 80 columns.
            table.add_row(*(Text(row[at] if len(places) == 4 else row[at].replace(" [", "\n[")) for at in places))
        console.print(table)
    hindsight = found.hindsight
    how = "all plans were played" if hindsight.exhaustive else "by coordinate ascent, not all plans were played"
    told = f"means over {len(found.seeds)} held-out runs with 95 % intervals; differences run by run"
    console.print(Text(told), soft_wrap=True)
    console.print(
        Text(f"best fixed plan in hindsight, over these very runs ({how}: {hindsight.played}):"), soft_wrap=True
    )
    for line in in_words(found.scene.problem, hindsight.plan):
        console.print(Text(f"  {line}"), soft_wrap=True)
