"""`fedpeat deploy status`: what is known of the newest run, from its folder."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from fedpeat.core import RoundReport, StorageError, read_json
from fedpeat.server import read_history
from simulations.deployment.delivery import DELIVERY
from simulations.deployment.layout import Deployment
from simulations.deployment.tally import state_of
from simulations.report.wording import number, printable, size


def status_table(deployment: Deployment, *, up: bool) -> Iterator[Table | Text]:
    """Yield the newest run in words, then its clients and its rounds as tables.

    Args:
        deployment: The deployment.
        up: Whether the server answers.
    """
    serves = f"server {deployment.address} {'is up' if up else 'does not answer'}"
    place = deployment.latest_run()
    if place is None:
        yield Text(f"{serves}; no run yet")
        return
    reports = read_history(place / "metrics.jsonl") if (place / "metrics.jsonl").exists() else []
    yield Text(f"{serves}; run {place.name}: {state_of(place)}")
    yield _clients(deployment, _read(place / DELIVERY), reports)
    if reports:
        yield _rounds(reports)


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except StorageError:
        return {}


def _clients(deployment: Deployment, delivered: dict[str, Any], reports: list[RoundReport]) -> Table:
    table = Table(title="clients")
    table.add_column("client")
    for heading in ("rows", "bundle", "rounds", "down", "up", "failures"):
        table.add_column(heading, justify="right")
    for name in deployment.names:
        known = delivered.get(name, {})
        taken = [report.clients[name] for report in reports if name in report.clients]
        failed = sum(failure.client == name for report in reports for failure in report.failures)
        bundle = "" if not known else "had it" if known["had"] else size(known["bytes_down"])
        down, up = (int(sum(metrics[key] for metrics in taken)) for key in ("bytes_down", "bytes_up"))
        table.add_row(name, str(known.get("rows", "")), bundle, str(len(taken)), size(down), size(up), str(failed))
    return table


def _rounds(reports: list[RoundReport]) -> Table:
    table = Table(title="rounds")
    for heading in ("round", "clients", "plug-in", "down", "up", "seconds", "failures"):
        table.add_column(heading, justify="right")
    for report in reports:
        plug_in = report.evaluations.get("plug_in")
        table.add_row(
            str(report.round),
            str(len(report.clients)),
            "" if plug_in is None else number(plug_in.perplexity),
            size(report.bytes_down),
            size(report.bytes_up),
            f"{report.seconds.get('total', 0.0):.1f}",
            "; ".join(f"{failure.client}: {printable(failure.reason, 60)}" for failure in report.failures),
        )
    return table
