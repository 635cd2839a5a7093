"""What a person sees while a run goes on: live bars on a terminal, plain lines elsewhere."""

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedpeat.core import ClientFailure, RoundPlan, RoundReport
from simulations.report import in_words
from simulations.report.wording import change, duration, number, percent, printable, size

QUIET_SECONDS = 10.0
"""Plain lines tell of single clients at most this often: a log is read, not watched."""


class Progress:
    """Tell how a run goes on. Use it as a context manager; the cursor comes back after an error or Ctrl-C too.

    Args:
        console: Where to write; standard output by default.
        clock: Seconds, for the times shown.
    """

    def __init__(self, *, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.console = console or Console(highlight=False)
        self.clock = clock
        self.rounds: int | None = None
        self.also = self.round = self.done = self.participants = self.finished = self.failures = 0
        self.latest = self.at_work = ""
        self.started = self.round_start = self.told = clock()
        self.round_seconds: list[float] = []
        self.zero_shot: float | None = None
        self.plug_in: float | None = None
        self.live: Live | None = None

    def __enter__(self) -> Self:
        """Start the live display, on a terminal."""
        if self.console.is_terminal and not self.console.is_dumb_terminal:
            self.live = Live(get_renderable=self._picture, console=self.console, refresh_per_second=4, transient=True)
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the live display away; what was written above it stays."""
        if self.live is not None:
            self.live.stop()
            self.live = None

    def run_started(self, rounds: int, *, also: int = 0) -> None:
        """Tell how much there is to do; without it, neither a total nor the time left is shown.

        Args:
            rounds: Rounds of the whole run.
            also: Participants of a round beside the plan's devices (1 where the server trains).
        """
        self.rounds, self.done, self.round, self.also = rounds, 0, 0, also

    def resumed(self, done: int) -> None:
        """Tell that a run goes on after its round `done`."""
        self.done = self.round = done
        self.message(f"going on after round {done}")

    def bundle_delivered(self, version: str, clients: int, sent: int) -> None:
        """Tell nothing: each part of a bundle was told of when it was sent."""

    def round_started(self, plan: RoundPlan) -> None:
        """Tell that clients are at work on a round."""
        self.round, self.participants = plan.round, len(plan.devices) + self.also
        self.finished, self.latest = 0, ""
        self.round_start = self.told = self.clock()

    def client_done(self, name: str, metrics: Mapping[str, float]) -> None:
        """Tell that a participant's update counted."""
        self.finished += 1
        loss = metrics.get("train_loss")
        self.latest = self._fit(printable(name, 20)) + ("" if loss is None else f"  loss {number(loss)}")
        if self.live is None and self.clock() - self.told >= QUIET_SECONDS:
            self.told = self.clock()
            self._line(f"{self._where()}: {self.finished} of {self.participants} participants")

    def client_failed(self, failure: ClientFailure) -> None:
        """Tell that a participant's work did not count, and why."""
        self.finished += 1
        self.failures += 1
        who = f"round {failure.round}: {printable(failure.client, 24)} {printable(failure.kind, 12)}"
        self._line(f"{who}: {printable(failure.reason, 300)}", style="yellow")

    def round_finished(self, report: RoundReport) -> None:
        """Tell what came of a round; round 0 is the state before training."""
        self.done = self.round = report.round
        if report.round > 0:
            self.round_seconds.append(report.seconds.get("total", self.clock() - self.round_start))
        self.participants = self.finished = 0
        found = {name: result.perplexity for name, result in report.evaluations.items()}
        self.zero_shot = found.get("full_zero_shot", self.zero_shot)
        self.plug_in = found.get("plug_in", self.plug_in)
        self._line(_sentence(report, self.zero_shot), place=self._where())

    def message(self, text: str) -> None:
        """Tell anything else, in one line."""
        self._line(printable(text, 500))

    def working(self, text: str, share: float | None) -> None:
        """Tell of something long that is not a round: what, and how much of it is done (0 to 1, or None)."""
        shown = printable(text, 200) + ("" if share is None else f" {100 * share:.0f} %")
        done = share is not None and share >= 1
        if self.live is not None:
            self.latest = "" if done else self._fit(shown)
        elif text != self.at_work or done or self.clock() - self.told >= QUIET_SECONDS:
            self.told = self.clock()
            self._line(shown)
        self.at_work = "" if done else text

    def run_finished(self, summary: Mapping[str, Any], folder: str | Path, *, report: bool = True) -> None:
        """Tell what came of the run and where it stands (its report, if one was written); the live display goes."""
        self.__exit__(None, None, None)
        self.console.print()
        self.console.print(Text(self._fit(in_words(summary)), style="bold"), soft_wrap=not self.console.is_terminal)
        seconds, moved = summary["seconds"]["total"], summary["bytes"]
        facts = f"{summary['status']} after {duration(seconds)}; {size(moved['down'])} down, {size(moved['up'])} up"
        self.console.print(Text(self._fit(facts)))
        # Never broken, so that a terminal can open it.
        self.console.print(Text(self._fit(str(Path(folder) / "report.html" if report else folder))), soft_wrap=True)

    def _where(self) -> str:
        return (
            f"round {self.round}"
            if self.rounds is None
            else f"round {self.round:>{len(str(self.rounds))}}/{self.rounds}"
        )

    def _line(self, text: str, *, style: str = "", place: str = "") -> None:
        """Write a line that stays: with the time since the start where nobody watches the clock."""
        parts = [Text(f"{place}  " if place else "", style="bold"), Text(self._fit(text), style=style)]
        if self.live is None:
            parts.insert(0, Text(f"[{_clock_text(self.clock() - self.started)}] "))
        # Lines wrap on a terminal; in a file they must not be broken.
        self.console.print(Text.assemble(*parts), soft_wrap=self.live is None)

    def _fit(self, text: str) -> str:
        """Replace what the terminal's encoding lacks: a letter in a name is no reason to end a run."""
        return text.encode(self.console.encoding, "replace").decode(self.console.encoding)

    def _remaining(self) -> str:
        """Estimate the time to the end from the rounds so far and the share of the current one that is done."""
        if not self.round_seconds or self.rounds is None or self.done >= self.rounds:
            return ""
        each = sum(self.round_seconds[-5:]) / len(self.round_seconds[-5:])
        current = min(self.clock() - self.round_start, each) if self.participants else 0.0
        return f"{_clock_text((self.rounds - self.done) * each - current)} left"

    def _picture(self) -> Group:
        """Draw the lines that live at the bottom of the terminal.

        Another thread calls this, without a lock: one held while a line is written would wait for rich's own for ever.
        """
        finished, participants = self.finished, self.participants
        table = Table.grid(padding=(0, 1))
        table.add_column(min_width=7)
        table.add_column(width=24)
        table.add_column(justify="right", min_width=7)
        table.add_column(no_wrap=True, overflow="ellipsis")
        shown = self.done + (finished / participants if participants else 0.0)
        elapsed = _clock_text(self.clock() - self.started)
        times = Text(f"{elapsed}  {self._remaining()}", style="dim")
        total = "" if self.rounds is None else f"{self.done}/{self.rounds}"
        table.add_row("rounds", _bar(shown, self.rounds or 0), total, times)
        work = Text(self.latest or ("training" if participants else "preparing, evaluating"), style="dim")
        counts = f"{finished}/{participants}" if participants else ""
        table.add_row("clients", _bar(finished, participants), counts, work)
        return Group(table, self._news())

    def _news(self) -> Text:
        news = Text(no_wrap=True, overflow="ellipsis")
        if self.plug_in is not None:
            news.append(f"plug-in perplexity {number(self.plug_in)}", style="bold")
            if self.zero_shot is not None and self.zero_shot != self.plug_in:
                news.append(f", {change(self.plug_in, self.zero_shot)} zero-shot {number(self.zero_shot)}")
        if self.failures:
            news.append("  " if news.plain else "")
            news.append(f"{self.failures} failed", style="yellow")
        return news


def _bar(done: float, total: int) -> ProgressBar:
    return ProgressBar(total=max(total, 1), completed=done, width=24)


def _clock_text(seconds: float) -> str:
    """Return hours (where there are any), minutes and seconds.

    >>> _clock_text(65), _clock_text(3725)
    ('1:05', '1:02:05')
    """
    whole = max(int(seconds), 0)
    hours = f"{whole // 3600}:" if whole >= 3600 else ""
    return f"{hours}{whole // 60 % 60:0{2 if hours else 1}d}:{whole % 60:02d}"


def _sentence(report: RoundReport, zero_shot: float | None) -> str:
    """Say in one line of a terminal what came of a round."""
    found = {name: result.perplexity for name, result in report.evaluations.items()}
    parts = []
    if "plug_in" in found:
        parts.append(f"plug-in {number(found['plug_in'])}")
        if zero_shot and report.round and math.isfinite(found["plug_in"]):
            parts[0] += f" ({100 * (found['plug_in'] / zero_shot - 1):+.0f} %)"
    if "personal" in found:
        parts.append(f"personal {number(found['personal'])}")
    if "emulator_tuned" in found:
        parts.append(f"emulated {number(found['emulator_tuned'])}")
    if "full_zero_shot" in found and report.round == 0:
        parts.append(f"full zero-shot {number(found['full_zero_shot'])}")
    answers = report.evaluations["plug_in"].choice_accuracy if "plug_in" in report.evaluations else None
    if answers is not None:
        parts.append(f"answers {percent(answers)} right")
    told = {"train_loss": "loss", "epsilon": "epsilon"}
    parts += [f"{word} {number(report.metrics[name])}" for name, word in told.items() if name in report.metrics]
    if report.failures:
        parts.append(f"{len(report.failures)} failed")
    if "total" in report.seconds:
        parts.append(duration(report.seconds["total"]))
    return "  ".join(parts) or "done"
