"""What is measured: a federation on the embedded model, composed as a run composes it, and someone who watches it."""

import contextlib
import random
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.clientapp import ClientApp

from fedpeat.core import ClientFailure, RoundPlan, RoundReport, RunState, write_text
from simulations.compose import Composed, compose
from simulations.corpus import cache_folder, prepare_data
from simulations.rounds import run_rounds
from simulations.settings import load_settings

ROW_TOKENS = 128
_TEXT = (
    "the model owner keeps a full model and many devices keep their data each device trains its own copy of the "
    "adapter against an emulator then sends what changed the server adds up all changes and plugs the result in"
)


def write_corpus(folder: Path, *, clients: int, rows: int) -> Path:
    """Write random words of `clients` clients, each with at least `rows` rows for training and one for test.

    The speed of training does not depend on what is learnt, and no network is needed.
    """
    path = folder / f"corpus-{clients}-{rows}.jsonl"
    if not path.exists():
        draw = random.Random(clients)
        words = [" ".join(draw.choices(_TEXT.split(), k=(rows + 1) * ROW_TOKENS)) for _ in range(clients)]
        lines = (f'{{"client": "client-{number:05d}", "text": "{text}"}}\n' for number, text in enumerate(words))
        write_text(path, "".join(lines))
    return path


def settings_of(folder: Path, *overrides: str, clients: int, rows: int, per_round: int | None = None) -> dict[str, Any]:
    """Return a run's settings on such a corpus; what is prepared is kept in `folder`.

    Evaluation is on 8 rows, before the first round and after the last: it is not what is measured here.
    """
    return load_settings(
        [
            "data=jsonl",
            f"data.path={write_corpus(folder, clients=clients, rows=rows)}",
            "data.client_field=client",
            "data.test_blocks=1",
            f"clients.per_round={per_round or clients}",
            "evaluation.max_rows=8",
            "evaluate_every=1000000",
            "evaluation.costs=false",
            f"cache={folder / 'cache'}",
            "client.device=cpu",
            *overrides,
        ]
    )


@dataclass
class Watch:
    """An observer that times rounds from the end of the one before, and may do something else in between.

    Attributes:
        on_start: Called before each round.
        on_finish: Called after each round, outside its time; `run_rounds` gives a report of round 0 too.
        seconds: Each round's wall time, evaluation left out, from round 1.
        cpu_seconds: The same in CPU time of this process.
        reports: All reports, from round 0.
        failures: All failures.
    """

    on_start: Callable[[RoundPlan], None] = lambda _: None
    on_finish: Callable[[RoundReport], None] = lambda _: None
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    reports: list[RoundReport] = field(default_factory=list)
    failures: list[ClientFailure] = field(default_factory=list)
    _wall: float = 0.0
    _cpu: float = 0.0

    def round_started(self, plan: RoundPlan) -> None:
        """Hand over."""
        self.on_start(plan)

    def client_done(self, name: str, metrics: Mapping[str, float]) -> None:
        """See nothing."""

    def client_failed(self, failure: ClientFailure) -> None:
        """Keep it."""
        self.failures.append(failure)

    def message(self, text: str) -> None:
        """See nothing."""

    def working(self, text: str, share: float | None) -> None:
        """See nothing."""

    def round_finished(self, report: RoundReport) -> None:
        """Take the time, hand over, start the clock again."""
        if report.round:
            evaluation = report.seconds["evaluate"]
            self.seconds.append(time.perf_counter() - self._wall - evaluation)
            self.cpu_seconds.append(time.process_time() - self._cpu - evaluation)
        self.reports.append(report)
        self.on_finish(report)
        self._wall, self._cpu = time.perf_counter(), time.process_time()


@dataclass(frozen=True)
class Stage:
    """A composed federation and the engine it runs on."""

    settings: Mapping[str, Any]
    composed: Composed
    engine: Any

    @property
    def job(self) -> dict[str, Any]:
        """What a client is told beside its plan."""
        bundle = self.composed.federation.bundles["default"]
        return {**self.composed.federation.job, "bundle": str(bundle)}

    @property
    def clients(self) -> Sequence[str]:
        """Names of all clients."""
        return [client.name for client in self.composed.data.clients]

    def run(self, watch: Watch, *, client_app: ClientApp, folder: Path) -> RunState:
        """Run all rounds as `fedpeat simulate` does: history and checkpoint are written too."""
        stop = threading.Event()
        federation = self.composed.federation

        def main(grid: Any, nodes: Sequence[int]) -> RunState:
            return run_rounds(federation, grid, nodes, observer=watch, folder=folder, stop=stop)[1]

        state = self.engine.run(main, client_app=client_app, slots=federation.slots, stop=stop)
        if watch.failures:
            raise RuntimeError(f"{len(watch.failures)} clients failed; the first: {watch.failures[0]}")
        return state


def set_up(settings: Mapping[str, Any], *, engine: Any, folder: Path) -> Stage:
    """Compose the federation that `settings` describe."""
    data = prepare_data(settings)
    composed = compose(
        settings, data, folder=folder, cache=cache_folder(settings), workers=engine.workers, observer=Watch()
    )
    return Stage(settings, composed, engine)


@contextlib.contextmanager
def run_folder(folder: Path) -> Any:
    """Give a folder for one run, gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="run-", dir=folder, ignore_cleanup_errors=True) as name:
        yield Path(name)
