"""Aggregation alone: our rules beside Flower's own strategies on the same updates, and SVD rules by layer width.

usage: python benchmarks/aggregation.py [--small] [--out FILE]

Updates are LoRA factors in Flower messages; each measurement has a process of its own, with one thread. Our rules read
and fold updates one by one, as in a round; Flower's strategies get all at once, their way. Seconds are CPU time, so
that other work on the machine counts little; MiB are the growth of resident memory, at its peak, with all updates
loaded before.
"""

import argparse
import importlib
import json
import logging
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

# Run as a file, Python would look for our modules in this folder: look in the one above.
_ROOT = str(Path(__file__).resolve().parent.parent)
sys.path[:] = [_ROOT, *(entry for entry in sys.path if entry not in {_ROOT, str(Path(__file__).resolve().parent)})]

if TYPE_CHECKING:
    from benchmarks.samples import Section
    from benchmarks.updates import Case
    from fedpeat.core import ClientUpdate
    from strategies import Recipe

REPEATS = 3
PATIENCE = 20.0
"""Seconds after which a measurement is not repeated."""
HOSTILE = 1
"""How many hostile clients Krum reckons with."""


class Rule(NamedTuple):
    """A rule of ours with its keywords, and the name of Flower's strategy of the same kind, if there is one."""

    builder: str
    keywords: tuple[tuple[str, Any], ...] = ()
    stock: str = ""

    @property
    def name(self) -> str:
        """As in `conf/strategy/`, with the keywords."""
        return " ".join([self.builder.rpartition(".")[2], *(f"{key}={value}" for key, value in self.keywords)])


PLAIN = (("measure", "factors"),)
"""Flower's Krum measures distances of the factors; ours also those of their products, unless told otherwise."""

RULES = (
    Rule("strategies.general.fed_avg", stock="FedAvg"),
    Rule("strategies.lora.ffa_lora"),
    Rule("strategies.robust.norm_clipping"),
    Rule("strategies.order_statistics.coordinate_median", stock="FedMedian"),
    Rule("strategies.order_statistics.trimmed_mean", stock="FedTrimmedAvg"),
    Rule("strategies.robust.krum", PLAIN, stock="Krum"),
    Rule("strategies.robust.krum"),
    Rule("strategies.robust.multi_krum", PLAIN, stock="MultiKrum"),
)

WIDTHS = (256, 512, 1024, 2048, 4096, 8192)
SVD_RULES = (
    "strategies.svd.flex_lora",
    "strategies.svd.florist",
    "strategies.svd.fed_svd",
    "strategies.hetero.het_lora",
)
SVD_CLIENTS = 10
DENSE_UP_TO = 1024
"""The widest layer whose product is also formed and decomposed in full, for comparison."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a table each; return 0."""
    parser = argparse.ArgumentParser(prog="benchmarks/aggregation.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--small", action="store_true", help="everything in a minimal form: does it run?")
    parser.add_argument("--out", type=Path, help="also write everything as JSON")
    asked = parser.parse_args(arguments)
    from benchmarks.processes import quiet

    quiet()
    import flwr.serverapp.strategy  # noqa: F401 (what processes are forked from has the slow imports)
    from rich.console import Console

    from benchmarks.simulation import machine
    from benchmarks.tables import show
    from benchmarks.updates import Case

    logging.getLogger("flwr").setLevel(logging.ERROR)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    large = (Case(100, pairs=38, width=4096), Case(1000, pairs=15, width=1024))
    cases, repeats = ((Case(12, pairs=3, width=256),), 1) if asked.small else (large, REPEATS)

    def note(text: str) -> None:
        console.print(text, style="dim")

    sections = [rules(cases, repeats, note)]
    show(console, sections[0].to_json())
    sections.append(widths(WIDTHS[:2] if asked.small else WIDTHS, repeats, note))
    show(console, sections[1].to_json())
    if asked.out:
        found = {"small": asked.small, "machine": machine(), "sections": [section.to_json() for section in sections]}
        asked.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0


def build(rule: Rule) -> "Recipe":
    """Return the recipe of one of our rules."""
    module, _, function = rule.builder.rpartition(".")
    return getattr(importlib.import_module(module), function)(**dict(rule.keywords))


# Beside Flower


def rules(cases: Sequence["Case"], repeats: int, note: Callable[[str], None]) -> "Section":
    """Return the section of our rules beside Flower's."""
    from benchmarks.processes import fresh
    from benchmarks.samples import Aim, Section
    from benchmarks.tables import written

    rows, aims = [], []
    for case in cases:
        about = {"updates": case.updates, "MB each": case.megabytes}
        read = fresh(ours, case, None, repeats)
        rows.append({**about, "rule": "reading alone", "s": read["seconds"], "MiB": read["growth"]})
        for rule in RULES:
            mine = fresh(ours, case, rule, repeats)
            row = {
                **about,
                "rule": rule.name,
                "s": mine["seconds"],
                "reading s": mine["reading"],
                "MiB": mine["growth"],
            }
            if rule.stock:
                other = fresh(theirs, case, rule.stock, repeats)
                times = {"faster": other["seconds"] / mine["seconds"], "smaller": other["growth"] / mine["growth"]}
                row |= {"Flower s": other["seconds"], "Flower MiB": other["growth"], **times}
                label = f"{rule.name} beside {rule.stock}, {case.updates} updates of {case.megabytes:.2g} MB"
                aims.append(Aim(f"times as fast: {label}", times["faster"], at_least=1.0 if repeats > 1 else None))
            rows.append(row)
            note(", ".join(f"{key} {written(value)}" for key, value in row.items()))
    columns = ("updates", "MB each", "rule", "s", "reading s", "Flower s", "faster", "MiB", "Flower MiB", "smaller")
    return Section("Aggregation of updates that have come, CPU seconds", columns, rows, aims)


def ours(case: "Case", rule: Rule | None, repeats: int) -> dict[str, float]:
    """Return seconds and MiB of one of our rules, or of reading alone."""
    from benchmarks.updates import situation_of
    from strategies import aggregate

    recipe = build(rule) if rule else None

    def once(case: "Case", messages: list[Any]) -> dict[str, float]:
        situation = situation_of(case)
        spent: list[float] = []
        begin = time.process_time()
        updates = reading(messages, spent)
        if recipe is None:
            for _ in updates:
                pass
        else:
            aggregate(recipe, situation, updates)
        return {"seconds": time.process_time() - begin, "reading": sum(spent)}

    return measured(case, recipe.client(1).get("train_only", ("A", "B")) if recipe else ("A", "B"), once, repeats)


def reading(messages: list[Any], spent: list[float]) -> Iterator["ClientUpdate"]:
    """Yield the messages' updates, letting go of each message as a round does; note the seconds."""
    from fedpeat.wire import read_update

    messages.reverse()
    while messages:
        begin = time.process_time()
        update = read_update(messages.pop())
        spent.append(time.process_time() - begin)
        yield update


def theirs(case: "Case", name: str, repeats: int) -> dict[str, float]:
    """Return seconds and MiB of a strategy of Flower's."""
    from flwr.serverapp import strategy as stock

    def once(case: "Case", messages: list[Any]) -> dict[str, float]:
        keywords = {
            "FedTrimmedAvg": {"beta": 0.2},
            "Krum": {"num_malicious_nodes": HOSTILE},
            "MultiKrum": {"num_malicious_nodes": HOSTILE, "num_nodes_to_select": case.updates - HOSTILE},
        }
        strategy = getattr(stock, name)(**keywords.get(name, {}))
        begin = time.process_time()
        arrays, _ = strategy.aggregate_train(1, messages)
        if arrays is None:
            raise RuntimeError(f"{name} made nothing of the updates")
        return {"seconds": time.process_time() - begin}

    return measured(case, ("A", "B"), once, repeats)


def measured(
    case: "Case", parts: Sequence[str], once: Callable[["Case", list[Any]], dict[str, float]], repeats: int
) -> dict[str, float]:
    """Return the medians of what `once` returns, and MiB of growth the first time.

    Each time is on messages of its own: some of Flower's strategies take theirs apart. One on tiny messages comes
    before, so that nothing is cold.
    """
    from benchmarks.processes import peak, start_peak
    from benchmarks.updates import messages_of

    tiny = case._replace(updates=12, pairs=1, width=64)
    once(tiny, messages_of(tiny, parts))
    growth, found = [], []
    while len(found) < repeats and sum(one["seconds"] for one in found) < PATIENCE:
        messages = messages_of(case, parts)
        before = start_peak()
        found.append(once(case, messages))
        growth.append(peak() - before)
    # What a process has freed it may use again: only the first time tells what is needed.
    return {**{key: statistics.median(one[key] for one in found) for key in found[0]}, "growth": max(growth[0], 0.1)}


# By layer width


def widths(chosen: Sequence[int], repeats: int, note: Callable[[str], None]) -> "Section":
    """Return the section of the SVD rules by the width of one layer."""
    from benchmarks.processes import fresh
    from benchmarks.samples import Aim, Section

    rows = []
    for width in chosen:
        rows.append({"width": width, **fresh(of_width, width, repeats)})
        note(f"SVD rules, width {width}: done")
    names = [key for key in rows[0] if key not in {"width", "dense"}]
    slopes = {name: slope(chosen, [row[name] for row in rows]) for name in names}
    most = 1.2 if repeats > 1 else None
    aims = [Aim(f"slope of log seconds over log width, {name}", value, at_most=most) for name, value in slopes.items()]
    title = f"CPU seconds of SVD rules on one layer, {SVD_CLIENTS} clients of rank 8"
    facts = {"dense": "the mean product formed and decomposed in full"}
    return Section(title, ("width", *names, "dense"), rows, aims, facts)


def of_width(width: int, repeats: int) -> dict[str, float]:
    """Return the median seconds of each rule at a width, the updates being in memory."""
    from benchmarks.updates import Case, layout_of, situation_of, updates_of
    from strategies import aggregate

    case = Case(SVD_CLIENTS, 1, width)
    situation, updates, found = situation_of(case), updates_of(case), {}
    for builder in SVD_RULES:
        recipe = build(Rule(builder))
        sent = layout_of(case).names(recipe.client(1).get("train_only", ("A", "B")))
        some = [only(update, sent) for update in updates]
        found[recipe.name] = timed(lambda recipe=recipe, some=some: aggregate(recipe, situation, some), repeats)
    if width <= DENSE_UP_TO:
        found["dense"] = timed(lambda: dense(situation.state.tensors, updates), repeats)
    return found


def only(update: "ClientUpdate", names: frozenset[str]) -> "ClientUpdate":
    """Return the update with these tensors alone."""
    from dataclasses import replace

    return replace(update, delta={name: tensor for name, tensor in update.delta.items() if name in names})


def dense(state: Any, updates: Sequence["ClientUpdate"]) -> None:
    """Form the mean product of the one layer and decompose it in full."""
    import torch

    a, b = state
    total = sum((state[b] + update.delta[b]).double() @ (state[a] + update.delta[a]).double() for update in updates)
    torch.linalg.svd(total)


def timed(work: Callable[[], Any], repeats: int) -> float:
    """Return the median seconds of the work; done once before, so that nothing is cold."""
    work()
    seconds = []
    for _ in range(repeats):
        begin = time.process_time()
        work()
        seconds.append(time.process_time() - begin)
    return statistics.median(seconds)


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Return the slope of the line fitted to log y over log x.

    >>> round(slope([1, 10, 100], [3, 300, 30000]), 6)
    2.0
    """
    return statistics.linear_regression([math.log(value) for value in x], [math.log(value) for value in y]).slope


if __name__ == "__main__":
    sys.exit(main())
