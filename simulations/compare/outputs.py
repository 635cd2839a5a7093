"""A comparison as files for scripts and papers: CSV, JSON, Markdown, LaTeX, figures."""

import csv
import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedpeat.core import write_json, write_text
from simulations.compare.html import page
from simulations.compare.statistics import Interval, Point, first_reaching
from simulations.compare.table import Told, failed_words
from simulations.compare.variants import Comparison, Placed, Variant
from simulations.compare.words import told_of
from simulations.report import printable

FIGURES = "figures"
LONG = 500


def write_outputs(comparison: Comparison, folder: Path) -> Path:
    """Write `comparison.{html,csv,json,md,tex}` and `figures/*.png`.

    Returns:
        The page's path.

    Raises:
        StorageError: If the folder cannot be written.
    """
    from simulations.compare import figures  # matplotlib takes half a second to import

    drawn = {name: (it, figures.caption(name, comparison, it)) for name, it in figures.draw(comparison).items()}
    write_text(folder / "comparison.csv", to_csv(comparison, folder))
    write_json(folder / "comparison.json", encodable(to_json(comparison, folder)))
    return write_readable(comparison, told_of(comparison), drawn, folder)


def write_readable(comparison: Comparison, told: Told, drawn: Mapping[str, tuple[Any, str]], folder: Path) -> Path:
    """Write what people read: `<stem>.{html,md,tex}` and `figures/*.png`; return the page's path.

    Args:
        comparison: The runs.
        told: What is told of them.
        drawn: Figures with their captions, by name.
        folder: Where everything goes.
    """
    from simulations.report import style

    for name, (figure, _) in drawn.items():
        style.write_png(figure, folder / FIGURES / f"{name}.png")
    pictures = [(name, style.to_svg(figure, name=name), caption) for name, (figure, caption) in drawn.items()]
    write_text(folder / f"{told.stem}.md", _clean(to_markdown(comparison, told)))
    write_text(folder / f"{told.stem}.tex", _clean(to_latex(comparison, told)))
    path = folder / f"{told.stem}.html"
    write_text(path, _clean(page(comparison, told, pictures, folder=folder, palette=style.PALETTE)))
    return path


def _clean(text: str) -> str:
    """Return text that can be encoded: names may hold lone surrogates."""
    return text.encode("utf-8", "replace").decode()


def encodable(value: Any) -> Any:
    """Return a JSON-like value whose texts can all be encoded."""
    if isinstance(value, str):
        return _clean(value)
    if isinstance(value, Mapping):
        return {_clean(str(key)): encodable(inner) for key, inner in value.items()}
    return [encodable(inner) for inner in value] if isinstance(value, list | tuple) else value


def row(placed: Placed, comparison: Comparison, target: float | None, folder: Path) -> dict[str, Any]:
    """Return a run as plain numbers and text, by column."""
    run = placed.run
    summary: Mapping[str, Any] = run.summary or {"metrics": {}, "bytes": {}, "seconds": {}}
    found = summary["metrics"].get(run.model) or {}
    zero_shot = summary["metrics"].get("full_zero_shot") or {}
    reached: Point | None = None
    if target is not None and run.status == "finished":
        curve = run.curve(comparison.metric)
        reached = first_reaching(curve, target, lower_is_better=comparison.lower_is_better)
    return {
        "folder": below(run.folder, folder),
        **placed.values,
        "seed": placed.seed,
        "status": run.status,
        "reason": run.reason,
        "judged_by": run.model,
        **{name: found.get(name) for name in ("loss", "perplexity", "accuracy", "choice_accuracy")},
        "zero_shot_perplexity": zero_shot.get("perplexity"),
        "privacy_margin": summary.get("privacy_margin"),
        "rounds_done": summary.get("rounds"),
        "target": target,
        "rounds_to_target": reached.round if reached else None,
        "bytes_to_target": reached.bytes if reached else None,
        **{f"bytes_{name}": summary["bytes"].get(name) for name in ("down", "up", "bundle")},
        **{f"seconds_{name}": summary["seconds"].get(name) for name in ("total", "train", "evaluate")},
        "tokens_per_second": summary.get("tokens_per_second"),
        "peak_rss_mib": summary.get("peak_rss_mib"),
        "peak_gpu_mib": summary.get("peak_gpu_mib"),
        "aggregation_error": run.aggregation_error,
        "clients_failed": summary.get("clients_failed"),
        "config_hash": summary.get("config_hash"),
    }


def below(path: Path, folder: Path) -> str:
    """Return a path as seen from a folder; whole where it is not below it."""
    try:
        return path.absolute().relative_to(folder.absolute()).as_posix()
    except ValueError:
        return str(path)


def rows(comparison: Comparison, folder: Path) -> list[dict[str, Any]]:
    """Return all runs, the best variants' first."""
    return [
        row(placed, comparison, variant.target, folder) for variant in comparison.variants for placed in variant.placed
    ]


def to_csv(comparison: Comparison, folder: Path) -> str:
    """Return a row a run. Text that a spreadsheet would take for a formula begins with an apostrophe."""
    return csv_of(rows(comparison, folder))


def csv_of(table: Sequence[Mapping[str, Any]]) -> str:
    """Return rows of equal keys as text."""
    names = list(table[0]) if table else []
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([_cell(name) for name in names])
    for each in table:
        writer.writerow([_cell(each[name]) for name in names])
    return _clean(buffer.getvalue())


def _cell(value: object) -> object:
    if not isinstance(value, str) or not value or _is_number(value):
        return "" if value is None else value
    text = printable(value, LONG)
    return f"'{text}" if text[0] in "=+-@" else text


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", text, re.IGNORECASE) is not None


def to_json(comparison: Comparison, folder: Path) -> dict[str, Any]:
    """Return everything, at full precision."""
    return {
        "title": comparison.title,
        "metric": comparison.metric,
        "lower_is_better": comparison.lower_is_better,
        "keys": list(comparison.keys),
        "baseline": comparison.baseline,
        "target": comparison.target,
        "notes": list(comparison.notes),
        "variants": [_variant(variant) for variant in comparison.variants],
        "runs": rows(comparison, folder),
    }


def _variant(variant: Variant) -> dict[str, Any]:
    return {
        "values": dict(variant.values),
        "label": variant.label,
        "model": variant.model,
        "seeds": sorted(variant.finals),
        "diverged": variant.diverged,
        "result": plain_interval(variant.result),
        "difference": plain_interval(variant.difference),
        "verdict": variant.verdict,
        "target": variant.target,
        "rounds_to_target": variant.rounds_to_target,
        "bytes_to_target": variant.bytes_to_target,
        **variant.costs,
    }


def plain_interval(found: Interval | None) -> dict[str, Any] | None:
    """Return an interval as JSON knows it."""
    return None if found is None else {"mean": found.mean, "half_width_95": found.half, "seeds": found.seeds}


def to_markdown(comparison: Comparison, told: Told | None = None) -> str:
    """Return the table, a line for each failed run, and the notes."""
    told = told or told_of(comparison)
    shown = told.columns
    lines = [f"# {_markdown(comparison.title)}", ""]
    lines.append("| " + " | ".join(_markdown(column.heading) for column in shown) + " |")
    lines.append("| " + " | ".join("---" if column.left else "---:" for column in shown) + " |")
    lines += ["| " + " | ".join(map(_markdown, words)) + " |" for words in _cells(told)]
    if comparison.failures:
        lines += ["", "Failed runs:", ""]
        lines += [
            f"- {_markdown(failed_words(label, seeds))}: {_markdown(reason)}"
            for label, seeds, reason in comparison.failures
        ]
    lines += ["", *(f"{_markdown(note)}\n" for note in comparison.notes)]
    return "\n".join(lines).rstrip() + "\n"


def _cells(told: Told) -> list[list[str]]:
    return [[column.words(row) for column in told.columns] for row in told.rows]


def _markdown(text: str) -> str:
    r"""Escape what Markdown or HTML in it would act on.

    >>> print(_markdown("a|b <c> *d*"))
    a\|b \<c\> \*d\*
    """
    return re.sub(r"([\\`*_{}\[\]<>|#~$&])", r"\\\1", printable(text, LONG)) if text else ""


TEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "''",
    "±": r"$\pm$",
    "\u2212": "$-$",
    "∞": r"$\infty$",
    "—": "---",
    "…": r"\dots{}",
    "\ufffd": "?",
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
}


def _latex(text: str) -> str:
    r"""Escape what LaTeX would act on.

    >>> print(_latex("50 % of $x_1$ ± 2"))
    50 \% of \$x\_1\$ $\pm$ 2
    """
    return "".join(TEX.get(letter, letter) for letter in printable(text, LONG)) if text else ""


def to_latex(comparison: Comparison, told: Told | None = None) -> str:
    """Return a table for a paper; it needs the package booktabs."""
    told = told or told_of(comparison)
    shown = told.columns
    escape: Callable[[str], str] = _latex
    kinds = "".join("l" if column.left else "r" for column in shown)
    lines = ["% \\usepackage{booktabs}", f"\\begin{{tabular}}{{{kinds}}}", "\\toprule"]
    lines.append(" & ".join(escape(column.heading) for column in shown) + r" \\")
    lines.append("\\midrule")
    lines += [" & ".join(map(escape, words)) + r" \\" for words in _cells(told)]
    lines += ["\\bottomrule", "\\end{tabular}"]
    return "\n".join([*lines, *(f"% {printable(note, LONG)}" for note in comparison.notes)]) + "\n"
