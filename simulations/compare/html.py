"""The page of a comparison or a study: one that needs no other file, no network and no script."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from simulations.compare.collect import Run
from simulations.compare.differences import varying
from simulations.compare.table import Told, failed_words, precise
from simulations.compare.variants import Comparison, Placed
from simulations.compare.words import status_of
from simulations.report import wording
from simulations.report.html import ROWS

HERE = Path(__file__).parent
REPORT = HERE.parent / "report"


def page(
    comparison: Comparison,
    told: Told,
    pictures: Sequence[tuple[str, str, str]],
    *,
    folder: Path,
    palette: Mapping[str, tuple[str, str]],
) -> str:
    """Return the page. Everything but our own drawings is escaped: names and settings come from users.

    Args:
        comparison: The runs.
        told: What is told of them.
        pictures: Name, `<svg>` and caption of each figure.
        folder: Where the page goes, for links to runs.
        palette: Colours on light and on dark, by role.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([HERE, REPORT]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update({name: getattr(wording, name) for name in ("number", "count", "size", "printable")})
    environment.filters.update({"duration": wording.duration, "precise": precise})
    status, words = status_of(comparison)
    runs = comparison.runs
    return environment.get_template("comparison.html.j2").render(
        comparison=comparison,
        title=comparison.title,
        stem=told.stem,
        sentences=told.sentences,
        status=status,
        status_words=words,
        columns=told.columns,
        rows=[_row(row, told.columns) for row in told.rows],
        figures=[(name, Markup(svg), caption) for name, svg, caption in pictures],
        failures=[(failed_words(label, seeds), reason) for label, seeds, reason in comparison.failures[:ROWS]],
        more_failed=len(comparison.failures[ROWS:]),
        runs=[_run(placed, comparison, folder) for placed in runs[:ROWS]],
        more_runs=len(runs[ROWS:]),
        config_text=_common([placed.run for placed in runs]),
        versions=next((placed.run.summary["versions"] for placed in runs if "versions" in placed.run.summary), {}),
        palette=palette,
    )


def _row(row: Any, shown: Sequence[Any]) -> dict[str, Any]:
    return {"verdict": row.verdict, "failed": row.result is None, "words": [column.words(row) for column in shown]}


def _run(placed: Placed, comparison: Comparison, folder: Path) -> dict[str, Any]:
    run = placed.run
    path = run.folder / "report.html"
    inside = path.is_file() and path.absolute().is_relative_to(folder.absolute())
    return {
        "name": run.folder.name,
        "link": path.absolute().relative_to(folder.absolute()).as_posix() if inside else "",
        "values": list(placed.values.values()),
        "seed": placed.seed,
        "status": "not run" if run.status == "missing" else run.status,
        "final": run.final(comparison.metric) if run.status == "finished" else None,
        "seconds": run.summary.get("seconds", {}).get("total"),
    }


def _common(runs: Sequence[Run]) -> str:
    """Return the settings of the first run as text, without those that differ between runs."""
    known = [run for run in runs if run.settings]
    if not known:
        return ""
    keys = set(varying(known)) | {"seed"}
    return yaml.safe_dump(_without(known[0].settings, keys), sort_keys=False, allow_unicode=True, width=100)


def _without(node: Mapping[str, Any], keys: set[str], prefix: str = "") -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for key, value in node.items():
        name = f"{prefix}{key}"
        if name in keys:
            continue
        kept[key] = _without(value, keys, f"{name}.") if isinstance(value, Mapping) else value
    return kept
