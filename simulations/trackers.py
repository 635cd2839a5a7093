"""Where else a run's numbers go: TensorBoard, Weights & Biases, MLflow, or nowhere.

`metrics.jsonl`, `summary.json` and `report.html` are written whatever the tracker. Each tracker's package is imported
when a run starts, and only then; nothing is sent anywhere unless the tracker's own settings say so.

To add one more: a class with `start`, `log` and `finish`, a builder that checks that its package is there, and a YAML
in `conf/tracker/`.
"""

import importlib
import importlib.util
import json
import logging
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from fedpeat.core import ConfigError, RoundReport


class Tracker(Protocol):
    """Something that is told of a run: once when it starts, of every round, and once when it ends."""

    def start(self, config: Mapping[str, Any], folder: Path) -> None:
        """Begin, with the resolved config (plain values) and the run's folder."""
        ...

    def log(self, report: RoundReport) -> None:
        """Take one round's numbers."""
        ...

    def finish(self, summary: Mapping[str, Any]) -> None:
        """End, with the run's summary; its `status` is finished, interrupted or failed."""
        ...


def none() -> Tracker:
    """Return a tracker that keeps nothing."""
    return _Nowhere()


def tensorboard() -> Tracker:
    """Return a tracker that writes event files to `tensorboard/` in the run's folder.

    Raises:
        ConfigError: If the package tensorboard is not installed.
    """
    _require("tensorboard", package="tensorboard")
    return _TensorBoard()


def wandb(*, project: str, entity: str | None, mode: str, tags: list[str]) -> Tracker:
    """Return a tracker for Weights & Biases.

    Args:
        project: The project the run belongs to.
        entity: User or team; the account's default if None.
        mode: "offline" writes to `wandb/` in the run's folder (`wandb sync` sends it later); "online" sends at once.
        tags: Words to find the run by.

    Raises:
        ConfigError: If the package wandb is not installed, or `mode` is unknown.
    """
    _require("wandb", package="wandb")
    if mode not in ("offline", "online", "disabled"):
        raise ConfigError(f"tracker.mode={mode}", "Weights & Biases knows other modes", "offline, online or disabled")
    return _WeightsAndBiases(project=project, entity=entity, mode=mode, tags=tuple(tags))


def mlflow(*, tracking_uri: str | None, experiment: str) -> Tracker:
    """Return a tracker for MLflow.

    Args:
        tracking_uri: A server or database; if None, `MLFLOW_TRACKING_URI`, else `mlflow.db` in the run's folder.
        experiment: The experiment the run belongs to; made where missing.

    Raises:
        ConfigError: If the package mlflow (or mlflow-skinny) is not installed.
    """
    _require("mlflow", package="mlflow")
    return _MLflow(tracking_uri=tracking_uri, experiment=experiment)


def quietly(tracker: Tracker, tell: Callable[[str], None]) -> Tracker:
    """Return `tracker` as one that ends no run: failures after its start are told of once, and then ignored.

    Where a run failed before the tracker's start, it is told of nothing.
    """
    return _Quiet(tracker, tell)


def scalars(report: RoundReport) -> dict[str, float]:
    """Return a round's finite numbers by name, grouped by `/`.

    >>> from fedpeat.core import Evaluation
    >>> report = RoundReport(3, {}, (), {"plug_in": Evaluation(0.0, 1.0, 9)}, 8, 4, {"train": 1.5}, {"train_loss": 2.0})
    >>> for name, value in scalars(report).items():
    ...     print(name, value)
    loss/plug_in 0.0
    perplexity/plug_in 1.0
    accuracy/plug_in 1.0
    seconds/train 1.5
    bytes/down 8.0
    bytes/up 4.0
    clients/counted 0.0
    clients/failed 0.0
    train_loss 2.0
    """
    found: dict[str, float] = {}
    for model, result in report.evaluations.items():
        found |= {f"{name}/{model}": value for name, value in result.to_json().items() if name != "tokens"}
    found |= {f"seconds/{part}": value for part, value in report.seconds.items()}
    found |= {"bytes/down": report.bytes_down, "bytes/up": report.bytes_up}
    found |= {"clients/counted": len(report.clients), "clients/failed": len(report.failures)}
    found |= report.metrics
    return {name: float(value) for name, value in found.items() if math.isfinite(value)}


def _require(module: str, *, package: str) -> None:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:  # a mere folder of that name, such as these trackers write, has no origin
        raise ConfigError(
            f"tracker={module} needs the package {package}",
            "it is not installed here",
            f'pip install "fedpeat[{package}]", or choose tracker=none',
        )


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the settings in a nested config by dotted name."""
    if isinstance(value, Mapping) and value:
        for name, item in value.items():
            yield from _leaves(item, f"{prefix}.{name}" if prefix else str(name))
    else:
        yield prefix, value


def _final(summary: Mapping[str, Any]) -> dict[str, float]:
    """Return the summary's finite numbers by dotted name."""
    numbers = {name: value for name, value in _leaves(summary) if isinstance(value, int | float)}
    return {name: float(value) for name, value in numbers.items() if math.isfinite(value)}


class _Nowhere:
    def start(self, config: Mapping[str, Any], folder: Path) -> None: ...

    def log(self, report: RoundReport) -> None: ...

    def finish(self, summary: Mapping[str, Any]) -> None: ...


class _TensorBoard:
    def start(self, config: Mapping[str, Any], folder: Path) -> None:
        writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        self._writer = writer(log_dir=str(folder / "tensorboard"))
        self._text("config", config)

    def _text(self, name: str, value: Mapping[str, Any]) -> None:
        """Show JSON as code: TensorBoard reads text as Markdown, where four blanks begin code."""
        lines = json.dumps(value, indent=2, ensure_ascii=False, default=str).splitlines()
        self._writer.add_text(name, "\n".join(f"    {line}" for line in lines), 0)

    def log(self, report: RoundReport) -> None:
        for name, value in scalars(report).items():
            self._writer.add_scalar(name, value, report.round)
        self._writer.flush()

    def finish(self, summary: Mapping[str, Any]) -> None:
        self._text("summary", summary)
        self._writer.close()


class _WeightsAndBiases:
    def __init__(self, *, project: str, entity: str | None, mode: str, tags: tuple[str, ...]) -> None:
        self._options = {"project": project, "entity": entity, "mode": mode, "tags": tags}

    def start(self, config: Mapping[str, Any], folder: Path) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        library = importlib.import_module("wandb")
        folder.mkdir(parents=True, exist_ok=True)
        # Its own console capture would fight with our live display.
        settings = library.Settings(console="off", silent=True)
        self._run = library.init(
            dir=str(folder), config=dict(config), name=folder.resolve().name, settings=settings, **self._options
        )

    def log(self, report: RoundReport) -> None:
        self._run.log(scalars(report), step=report.round)

    def finish(self, summary: Mapping[str, Any]) -> None:
        self._run.summary.update(_final(summary) | {"status": summary["status"]})
        self._run.finish(exit_code=0 if summary["status"] == "finished" else 1)


_MLFLOW_STATUS = {"finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}


class _MLflow:
    """MLflow by its client, which keeps no run of its own in a global variable."""

    def __init__(self, *, tracking_uri: str | None, experiment: str) -> None:
        self._uri, self._experiment = tracking_uri, experiment

    def start(self, config: Mapping[str, Any], folder: Path) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        self._entities = importlib.import_module("mlflow.entities")
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        folder = folder.resolve()
        folder.mkdir(parents=True, exist_ok=True)
        uri = self._uri or os.environ.get("MLFLOW_TRACKING_URI")
        artifacts = None if uri else (folder / "mlflow").as_uri()  # by default they'd go to the working directory
        uri = uri or f"sqlite:///{folder / 'mlflow.db'}"
        self._client = importlib.import_module("mlflow.tracking").MlflowClient(tracking_uri=uri)
        known = self._client.get_experiment_by_name(self._experiment)
        number = (
            known.experiment_id
            if known
            else self._client.create_experiment(self._experiment, artifact_location=artifacts)
        )
        self._run = self._client.create_run(number, run_name=folder.name).info.run_id
        settings = [self._entities.Param(_mlflow_name(name), str(value)[:500]) for name, value in _leaves(config)]
        for start in range(0, len(settings), 100):  # the most it takes at once
            self._client.log_batch(self._run, params=settings[start : start + 100])

    def _log(self, values: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        metrics = [self._entities.Metric(_mlflow_name(name), value, now, step) for name, value in values.items()]
        self._client.log_batch(self._run, metrics=metrics)

    def log(self, report: RoundReport) -> None:
        self._log(scalars(report), report.round)

    def finish(self, summary: Mapping[str, Any]) -> None:
        self._log({f"summary/{name}": value for name, value in _final(summary).items()}, summary["rounds"])
        self._client.set_terminated(self._run, status=_MLFLOW_STATUS[summary["status"]])


def _mlflow_name(name: str) -> str:
    """Replace the characters that MLflow refuses in names."""
    return re.sub(r"[^\w\-. /]", "_", name, flags=re.ASCII)[:250] or "_"


class _Quiet:
    def __init__(self, tracker: Tracker, tell: Callable[[str], None]) -> None:
        self._tracker, self._tell = tracker, tell
        self._started = self._broken = False

    def start(self, config: Mapping[str, Any], folder: Path) -> None:
        self._tracker.start(config, folder)
        self._started = True

    def log(self, report: RoundReport) -> None:
        self._attempt(self._tracker.log, report)

    def finish(self, summary: Mapping[str, Any]) -> None:
        self._attempt(self._tracker.finish, summary)

    def _attempt(self, action: Callable[[Any], None], value: object) -> None:
        if not self._started:
            return
        try:
            action(value)
        except Exception as error:  # whatever a tracker's package raises
            if not self._broken:
                self._tell(
                    f"the tracker failed ({type(error).__name__}: {error}); the run goes on, metrics.jsonl has all"
                )
            self._broken = True
