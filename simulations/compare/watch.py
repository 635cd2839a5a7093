"""What a person sees while a comparison goes on, and its table at the end."""

from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from simulations import progress
from simulations.compare.collect import read_run, rounds_done
from simulations.compare.table import Told, failed_words, precise
from simulations.compare.variants import Comparison
from simulations.compare.words import status_of, told_of
from simulations.compare.workers import Outcome, Task
from simulations.report.wording import duration, printable, size

SPARE = (
    *("memory", "GPU memory", "time", "failed visits", "up", "down", "aggregation error", "seeds"),
    *("bytes to", "target", "rounds to"),
)
"""Columns that a narrow terminal can do without, the first ones first; the page has them all."""


class Watch:
    """Tell how a comparison goes on: a line a finished cell, and on a terminal a bar with the time left.

    Args:
        tasks: The cells to run.
        labels: What each cell is called, by its name.
        metric: The metric that is told of a finished cell.
        console: Where to write; standard output by default.
    """

    def __init__(
        self, tasks: Sequence[Task], *, labels: dict[str, str], metric: str, console: Console | None = None
    ) -> None:
        self.console = console or Console(highlight=False)
        self.lines = progress.Progress(console=self.console)
        self.labels, self.metric = labels, metric
        self.steps = {task.name: task.settings.get("rounds", 0) + 1 for task in tasks}
        self.ended = self.failed = self.steps_done = 0
        self.bar: Progress | None = None
        if self.console.is_terminal and not self.console.is_dumb_terminal:
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=32),
                TextColumn("{task.fields[cells]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
                speed_estimate_period=1e9,  # cells take minutes: all of the past says when the rest is done
            )
            self.task = self.bar.add_task("cells", total=sum(self.steps.values()), cells=self._counts())

    def __enter__(self) -> Self:
        """Start the bar, on a terminal."""
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the bar away; the lines stay."""
        if self.bar is not None:
            self.bar.stop()

    def message(self, text: str) -> None:
        """Tell anything, in one line."""
        self.lines.message(text)

    def ended_with(self, outcome: Outcome) -> None:
        """Tell how a cell ended."""
        self.ended += 1
        self.failed += outcome.status == "failed"
        self.steps_done += self.steps[outcome.task.name]
        place = f"{self.ended:>{len(str(len(self.steps)))}}/{len(self.steps)}"
        self.message(f"{place}  {self.labels[outcome.task.name]}: {self._result(outcome)}")
        self.tick(())

    def tick(self, running: Iterable[Task]) -> None:
        """Move the bar by the rounds that running cells have finished."""
        if self.bar is None:
            return
        partial = sum(min(rounds_done(task.folder), self.steps[task.name]) for task in list(running))
        self.bar.update(self.task, completed=self.steps_done + partial, cells=self._counts())

    def _counts(self) -> str:
        failed = f", {self.failed} failed" if self.failed else ""
        return f"{self.ended}/{len(self.steps)}{failed}"

    def _result(self, outcome: Outcome) -> str:
        if outcome.status != "finished":
            return f"{outcome.status}; {outcome.reason}".rstrip("; ")
        run = read_run(outcome.task.folder)
        parts = [f"{self.metric} {precise(run.final(self.metric))}"]
        if run.summary:
            parts.append(f"{size(run.summary['bytes']['down'] + run.summary['bytes']['up'])} moved")
        return ", ".join([*parts, duration(outcome.seconds)])


def show(
    comparison: Comparison,
    *,
    console: Console | None = None,
    told: Told | None = None,
    spare: Sequence[str] = SPARE,
) -> None:
    """Print the table, the failures, and what they say; a narrow terminal does without the `spare` columns."""
    console = console or Console(highlight=False)
    told = told or told_of(comparison)
    if console.is_terminal:
        for name in spare:
            if _width(console, told) <= console.width:
                break
            left = [column for column in told.columns if column.left or not f"{column.heading} ".startswith(f"{name} ")]
            told = told._replace(columns=left)
    else:
        console.width = max(console.width, _width(console, told))  # nobody's screen: no line is broken
    console.print()
    console.print(_table(told, console))
    for label, seeds, reason in comparison.failures:
        line = f"failed: {failed_words(label, seeds)}: {printable(reason, 300)}"
        console.print(Text(fit(line, console), style="yellow"), soft_wrap=True)
    for note in comparison.notes:
        console.print(Text(fit(note, console), style="dim"), soft_wrap=not console.is_terminal)
    for sentence in told.sentences:
        console.print(Text(fit(sentence, console), style="bold"), soft_wrap=not console.is_terminal)
    console.print(Text(status_of(comparison)[1]))


def _width(console: Console, told: Told) -> int:
    wide = console.options.update(width=10_000)
    return Measurement.get(console, wide, _table(told, console)).maximum


def _table(told: Told, console: Console) -> Table:
    table = Table(header_style="bold", pad_edge=False)
    for column in told.columns:
        table.add_column(
            Text(fit(column.heading, console)), justify="left" if column.left else "right", overflow="fold"
        )
    styles = {"better": "green", "worse": "red"}
    for row in told.rows:
        words = [Text(fit(column.words(row), console)) for column in told.columns]
        table.add_row(*words, style=styles.get(row.verdict, "" if row.result else "dim"))
    return table


def fit(text: str, console: Console) -> str:
    """Replace what the terminal's encoding lacks: a letter is no reason to end."""
    return text.encode(console.encoding, "replace").decode(console.encoding)
