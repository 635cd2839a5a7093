import dataclasses
import math

import pytest
import yaml

from fedpeat.core import Evaluation, write_json, write_text
from fedpeat.server import History
from simulations.compare.collect import read_run
from simulations.compare.variants import Placed
from simulations.report import summarise


def _changed(report, *, loss, scale, aggregation_error, personal, choice):
    """Return a report with another loss after training, other traffic, and what some methods measure beside it."""
    evaluations = dict(report.evaluations)
    if evaluations:
        final = {"plug_in": loss} if report.round else {}
        final |= {"personal": personal} if report.round and personal is not None else {}
        evaluations |= {
            name: Evaluation(value, 1 / (1 + value), 900) for name, value in final.items() if value is not None
        }
    if choice is not None:
        evaluations["plug_in"] = dataclasses.replace(evaluations["plug_in"], choice_accuracy=choice)
    metrics = dict(report.metrics)
    if aggregation_error is not None and report.round:
        metrics["aggregation_error"] = aggregation_error * report.round
    down, up = int(report.bytes_down * scale), int(report.bytes_up * scale)
    return dataclasses.replace(report, evaluations=evaluations, metrics=metrics, bytes_down=down, bytes_up=up)


@pytest.fixture
def write_run(make_reports):
    """Return a writer of the folder of a finished run: `write_run(folder, settings, losses=[3.6, 3.5], ...)`.

    `losses` are the plug-in model's after each round and `choices` its shares of right answers; `personal` are the
    losses of clients' own models.
    """

    def write(
        folder, settings, *, losses=(3.6, 3.5), personal=None, choices=None, scale=1.0, aggregation_error=None, **more
    ):
        reports = [
            _changed(
                report,
                loss=losses[at - 1] if at else None,
                scale=scale,
                aggregation_error=aggregation_error,
                personal=personal[at - 1] if personal and at else None,
                choice=choices[at - 1] if choices and at else None,
            )
            for at, report in enumerate(make_reports(len(losses)))
        ]
        write_text(folder / "config.yaml", yaml.safe_dump(settings, allow_unicode=True))
        write_text(folder / "config.sha", "abc\n")
        history = History(folder)
        for report in reports:
            history.append(report)
        facts = {"config_hash": "abc", "versions": {"torch": "2"}, "status": "finished", "bundle_bytes": 7, **more}
        write_json(folder / "summary.json", summarise(reports, **facts))
        return folder

    return write


@pytest.fixture
def placed_runs(write_run, tmp_path):
    """Return a maker of placed runs from final losses: `placed_runs({"fed_avg": {0: 3.5, 1: 3.4}})`."""

    def make(losses, key="strategy", **more):
        placed = []
        for value, by_seed in losses.items():
            for seed, loss in by_seed.items():
                folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
                settings = {key: value, "seed": seed}
                write_run(folder, settings, losses=[(loss + 4) / 2 if math.isfinite(loss) else 9.0, loss], **more)
                placed.append(Placed({key: value}, seed, read_run(folder)))
        return placed

    return make
