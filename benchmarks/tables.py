"""A section as a rich table, its aims below."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

_NUMBERS = (int, float)


def show(console: Console, section: Mapping[str, Any]) -> None:
    """Print one section, as `Section.to_json` gives it."""
    table = Table(title=section["title"], title_justify="left", title_style="bold")
    for column in section["columns"]:
        values = [row.get(column) for row in section["rows"]]
        table.add_column(column, justify="right" if any(isinstance(value, _NUMBERS) for value in values) else "left")
    for row in section["rows"]:
        table.add_row(*(written(row.get(column)) for column in section["columns"]))
    console.print(table)
    for aim in section["aims"]:
        console.print(f"  {verdict(aim)}")
    for name, value in section["facts"].items():
        console.print(f"  {name}: {_plain(value)}", style="dim")
    console.print()


def verdict(aim: Mapping[str, Any]) -> str:
    """Return an aim and whether it is met, in one line.

    >>> verdict({"name": "seconds a round", "measured": 0.25, "at_least": None, "at_most": 0.5, "met": True})
    'met: seconds a round 0.25 (at most 0.5)'
    """
    limits = [f"at least {written(aim['at_least'])}"] if aim["at_least"] is not None else []
    limits += [f"at most {written(aim['at_most'])}"] if aim["at_most"] is not None else []
    limit = f" ({', '.join(limits)})" if limits else ""
    state = {True: "met", False: "MISSED", None: "not measured"}[aim["met"]] if limits else "for the record"
    return f"{state}: {aim['name']} {written(aim['measured'])}{limit}"


def written(value: Any) -> str:
    """Return a cell: three significant digits, a range as `low to high`.

    >>> written(0.98765), written([1.0, 20.04]), written(1234.5), written(None)
    ('0.988', '1 to 20', '1234', '')
    """
    if value is None:
        return ""
    if isinstance(value, list | tuple):
        return " to ".join(written(item) for item in value)
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    return written(value)
