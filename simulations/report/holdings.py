"""What a device holds and what it costs, as rows of a table beside the full model."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from simulations.report import wording
from simulations.report.wording import NOTHING, number, printable

PARTS = {"weights": "weights", "gradients": "gradients", "optimizer": "optimiser", "activations": "activations"}


class Row(NamedTuple):
    """A line: what is told, text and share of the full model's for each column, and if it is part of the one above."""

    name: str
    remark: str
    cells: Sequence[tuple[str, str]]
    part: bool = False


class Holdings(NamedTuple):
    """The table: its columns' names, the full model last, and its rows."""

    columns: Sequence[str]
    rows: Sequence[Row]


_ROWS = (
    ("between the adapter's blocks", "parameters", "emulator_parameters", "middle_parameters", wording.count),
    ("fetched once", "tensors of the bundle", "bundle_bytes", "full_bytes", wording.size),
    (
        "memory to train",
        "batch, optimiser and PEFT of this run",
        "client_memory_bytes",
        "full_memory_bytes",
        wording.size,
    ),
)
_TIME = ("one training step", "on this machine, before round 1", "step_seconds", "full_step_seconds", wording.duration)


def holdings(summary: Mapping[str, Any]) -> Holdings | None:
    """Return the table of what devices hold; None where nothing is known of it.

    Args:
        summary: From `summarise`.
    """
    emulators = summary.get("emulators") or {"default": summary.get("emulator") or {}}
    emulators = {key: costs for key, costs in emulators.items() if costs}
    if not emulators:
        return None
    rows = [_row(emulators, *row) for row in _ROWS]
    rows += [
        _row(emulators, name, "", f"client_memory/{part}", f"full_memory/{part}", wording.size)._replace(part=True)
        for part, name in PARTS.items()
    ]
    rows += [_row(emulators, *_TIME), _perplexities(emulators, summary["metrics"])]
    columns = [_name(key, several=len(emulators) > 1) for key in emulators]
    shown = [row for row in rows if any(text != NOTHING for text, _ in row.cells)]
    return Holdings([*columns, "the full model"], shown)


def _name(key: str, *, several: bool) -> str:
    if not several:
        return "a device"
    return "most devices" if key == "default" else f"devices with {printable(key, 20)}"


def _row(emulators: Mapping[str, Mapping[str, Any]], name: str, remark: str, own: str, full: str, shown: Any) -> Row:
    cells = [(shown(_at(costs, own)), _share(_at(costs, own), _at(costs, full))) for costs in emulators.values()]
    whole = _at(next(iter(emulators.values())), full)
    return Row(name, remark, [*cells, (shown(whole), "")])


def _perplexities(emulators: Mapping[str, Mapping[str, Any]], metrics: Mapping[str, Mapping[str, Any]]) -> Row:
    full = metrics["full_zero_shot"]["perplexity"]
    cells = []
    for key, costs in emulators.items():
        name = "emulator_zero_shot" if key == "default" else f"emulator_zero_shot/{key}"
        ratio = costs.get("zero_shot_ratio")
        told = "" if ratio is None else f"{number(ratio)} times"
        cells.append((number(metrics.get(name, {}).get("perplexity")), told))
    return Row("perplexity before tuning", "on held-out text", [*cells, (number(full), "")])


def _at(costs: Mapping[str, Any], path: str) -> float | None:
    value: Any = costs
    for key in path.split("/"):
        value = None if value is None else value.get(key)
    return value


def _share(own: float | None, full: float | None) -> str:
    if own is None or not full:
        return ""
    share = 100 * own / full
    return f"{share:.0f} %" if share >= 9.95 or share == 0 else f"{number(share)} %"
