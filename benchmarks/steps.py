"""Local training steps a second, beside a bare PyTorch loop over the same model, rows and steps.

Blocks of the bare loop alternate with rounds, so that a machine that is slower for a while is so for both. The first
round, which builds models (and compiles them), is left out.
"""

import importlib.util
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import flowertune
from benchmarks.bare import Block, bare_loop
from benchmarks.processes import Companion, fresh
from benchmarks.samples import Aim, Sample, Section, paired
from benchmarks.stage import Stage, Watch, run_folder, set_up, settings_of
from fedpeat.bundles import build_emulated, open_bundle
from fedpeat.client.app import app as client_app
from simulations import engines

WORKERS = 2
COLUMNS = ("what", "steps/s", "quartiles", "compared with", "ratio", "quartiles of the ratio", "rounds", "note")


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    clients: int
    local_steps: int
    rounds: int
    batch_size: int

    @property
    def steps(self) -> int:
        """Local steps of a round."""
        return self.clients * self.local_steps


def measure(folder: Path, *, smoke: bool) -> Section:
    """Measure every row; a row's own comparison ran in the same process, or beside it."""
    sizes = Sizes(2, 2, 3, 2) if smoke else Sizes(clients=8, local_steps=10, rounds=13, batch_size=8)
    serial = fresh(on_serial, folder, sizes, compiled=False)
    ray = fresh(on_ray, folder, sizes)
    template = fresh(on_flowertune, folder, sizes)
    rows = [serial["bare"], ray["bare"], serial["row"], ray["row"], template["row"], pfl_row()]
    facts = {"sizes": vars(sizes), "serial_cpu_ratio": serial["cpu_ratio"], "fedpeat_over_flowertune": None}
    times = ray["row"]["steps/s"] / template["row"]["steps/s"]
    facts["fedpeat_over_flowertune"] = times
    if not smoke:
        compiled = fresh(on_serial, folder, sizes, compiled=True)
        rows.append(compiled["row"])
        facts |= {"compile": compiled["compile"], "compiled_against_eager": fresh(compare_compiled, folder, sizes)}
    aims = [
        Aim("serial over the bare loop", serial["row"]["ratio"], at_least=0.97),
        Aim("ray with 2 workers over two bare loops", ray["row"]["ratio"], at_least=0.90),
    ]
    return Section("Local training steps a second, 1 torch thread a process", COLUMNS, rows, aims, facts)


def overrides(sizes: Sizes, *more: str) -> list[str]:
    """Return the settings of a run of these sizes, for `settings_of`."""
    return [
        f"rounds={sizes.rounds}",
        f"client.local_steps={sizes.local_steps}",
        f"client.batch_size={sizes.batch_size}",
        *more,
    ]


def stage_of(folder: Path, sizes: Sizes, engine: Any, run: Path, *more: str) -> Stage:
    """Compose a run of these sizes."""
    settings = settings_of(folder, *overrides(sizes, *more), clients=sizes.clients, rows=3 * sizes.batch_size)
    return set_up(settings, engine=engine, folder=run)


def on_serial(folder: Path, sizes: Sizes, *, compiled: bool) -> dict[str, Any]:
    """Measure the serial engine against a bare loop in the same process."""
    with run_folder(folder) as run:
        stage = stage_of(folder, sizes, engines.serial(), run, f"client.compile={str(compiled).lower()}")
        block = bare_loop(stage.job, local_steps=sizes.local_steps)
        graphs: list[int] = []
        bare, cpu = [], []

        def after(report: Any) -> None:
            if report.round:
                graphs.append(_graphs())
                begin = time.process_time()
                bare.append(block(stage.clients, (report.round - 1) * sizes.local_steps))
                cpu.append(time.process_time() - begin)

        watch = Watch(on_finish=after)
        stage.run(watch, client_app=client_app, folder=run)
    name = "serial engine, client.compile=true" if compiled else "serial engine"
    return {
        "row": row(name, watch.seconds, bare, sizes, "a bare loop"),
        "bare": bare_row("a bare PyTorch loop", bare, sizes),
        "cpu_ratio": vars(paired(cpu[1:], watch.cpu_seconds[1:])),
        "compile": {"first_round_seconds": watch.seconds[0], "graphs_after_each_round": graphs},
    }


def on_ray(folder: Path, sizes: Sizes) -> dict[str, Any]:
    """Measure Ray with 2 workers against two bare loops in two processes."""
    pair = Pair(sizes)
    with run_folder(folder) as run:
        stage = stage_of(folder, sizes, engines.ray(workers=WORKERS), run)
        bare: list[float] = []

        def after(report: Any) -> None:
            if report.round:
                bare.append(pair.seconds(stage.job, stage.clients, (report.round - 1) * sizes.local_steps))

        watch = Watch(on_finish=after)
        stage.run(watch, client_app=client_app, folder=run)
    pair.stop()
    busy = [
        sum(client["client_seconds"] for client in report.clients.values()) / WORKERS for report in watch.reports[1:]
    ]
    line = row("ray engine, 2 workers", watch.seconds, bare, sizes, "two bare loops")
    line["note"] = f"workers busy {Sample.of([b / s for b, s in zip(busy, watch.seconds, strict=True)][1:]).median:.0%}"
    return {"row": line, "bare": bare_row("two such loops in two processes", bare, sizes)}


def on_flowertune(folder: Path, sizes: Sizes) -> dict[str, Any]:
    """Measure the FlowerTune shape on 2 Ray workers against two bare loops."""
    pair = Pair(sizes)
    with run_folder(folder) as run:
        stage = stage_of(folder, sizes, engines.serial(), run)
        view = build_emulated(open_bundle(stage.job["bundle"]))
        view.model.save_pretrained(run / "model")
        job = {
            "model": str(run / "model"),
            "adapter_positions": list(view.adapter_positions),
            "rank": stage.job["method"]["rank"],
            "alpha": stage.job["method"]["alpha"],
            "data": stage.job["data"],
            "clients": list(stage.clients),
            "local_steps": sizes.local_steps,
            **{key: stage.job["spec"][key] for key in ("learning_rate", "batch_size", "clip_norm")},
        }
        seconds, bare = flowertune.run(
            job, rounds=sizes.rounds, workers=WORKERS, between=lambda: pair.seconds(stage.job, stage.clients, 0)
        )
    pair.stop()
    return {"row": row("FlowerTune shape, stock FedAvg, 2 workers", seconds, bare, sizes, "two bare loops")}


class Pair:
    """Two bare loops in two processes; both wait, without taking CPU, until they are asked for a block."""

    def __init__(self, sizes: Sizes) -> None:
        self._companions = [Companion(_bare_companion, sizes.local_steps) for _ in range(WORKERS)]

    def seconds(self, job: Mapping[str, Any], clients: Sequence[str], start_step: int) -> float:
        """Return the wall time of both, each with its half of the clients."""
        begin = time.perf_counter()
        for number, companion in enumerate(self._companions):
            companion.ask(job, list(clients[number::WORKERS]), start_step)
        for companion in self._companions:
            companion.answer()
        return time.perf_counter() - begin

    def stop(self) -> None:
        """End both processes."""
        for companion in self._companions:
            companion.stop()


def _bare_companion(local_steps: int) -> Callable[..., float]:
    blocks: list[Block] = []

    def work(job: Mapping[str, Any], clients: Sequence[str], start_step: int) -> float:
        if not blocks:
            blocks.append(bare_loop(job, local_steps=local_steps))
        return blocks[0](clients, start_step)

    return work


def _graphs() -> int:
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def compare_compiled(folder: Path, sizes: Sizes) -> dict[str, float]:
    """Return how far a compiled federation ends from an eager one, both serial and from the same seed."""
    ends = []
    for compiled in ("false", "true"):
        with run_folder(folder) as run:
            stage = stage_of(folder, sizes, engines.serial(), run, f"client.compile={compiled}", "rounds=3")
            watch = Watch()
            state = stage.run(watch, client_app=client_app, folder=run)
            start = stage.composed.federation.initial
        ends.append((state.shared.tensors, watch.reports))
    (eager, eager_reports), (compiled_, compiled_reports) = ends
    moved = sum(float((eager[name] - start[name]).double().square().sum()) for name in eager) ** 0.5
    apart = sum(float((eager[name] - compiled_[name]).double().square().sum()) for name in eager) ** 0.5
    losses = zip(eager_reports[1:], compiled_reports[1:], strict=True)
    return {
        "relative_distance_of_the_tuned_tensors": apart / moved,
        "largest_difference_of_an_entry": max(float((eager[n] - compiled_[n]).abs().max()) for n in eager),
        "largest_difference_of_a_round's_loss": max(
            abs(one.metrics["train_loss"] - other.metrics["train_loss"]) for one, other in losses
        ),
        "rounds": 3,
        "steps_of_a_client": 3 * sizes.local_steps,
    }


def row(what: str, seconds: Sequence[float], bare: Sequence[float], sizes: Sizes, against: str) -> dict[str, Any]:
    """Return a table row; `seconds` and `bare` are of the same rounds, and the first is left out."""
    ratio = paired(bare[1:], seconds[1:])
    return bare_row(what, seconds, sizes) | {
        "compared with": against,
        "ratio": ratio.median,
        "quartiles of the ratio": [ratio.low, ratio.high],
    }


def bare_row(what: str, seconds: Sequence[float], sizes: Sizes) -> dict[str, Any]:
    """Return a table row that is compared with nothing."""
    rate = Sample.of([sizes.steps / value for value in seconds[1:]])
    return {"what": what, "steps/s": rate.median, "quartiles": [rate.low, rate.high], "rounds": rate.count}


def pfl_row() -> dict[str, Any]:
    """Return the row of pfl-research."""
    installed = importlib.util.find_spec("pfl") is not None
    return {"what": "pfl-research", "note": "not measured here" if installed else "not installed"}
