import dataclasses
import io
import re

import pytest
from rich.console import Console

from fedpeat.core import ClientFailure, DevicePlan, Evaluation, RoundPlan, RoundReport
from simulations.progress import Progress
from simulations.report import summarise


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def plan(number, names):
    return RoundPlan(number, 0, 100, tuple(DevicePlan(name, 10) for name in names))


def play(progress, reports, *, clock=None, names=("sympy", "ray")):
    progress.round_finished(reports[0])
    for report in reports[1:]:
        progress.round_started(plan(report.round, names))
        for name in names:
            if clock:
                clock.now += 6.0
            progress.client_done(name, {"train_loss": 3.21})
        for failure in report.failures:
            progress.client_failed(failure)
        progress.round_finished(report)


def plain(width=80, **more):
    return Console(file=io.StringIO(), width=width, highlight=False, **more)


def terminal(**more):
    return plain(force_terminal=True, legacy_windows=False, **more)


def written(console):
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def picture(progress, width=80):
    console = plain(width=width)
    console.print(progress._picture())
    return written(console)


def test_plain_lines_one_an_event(make_reports):
    console, clock = plain(), Clock()
    reports = make_reports(2, failures={2: [("pandas", "timeout", "no reply within 60 s; " + "long " * 30)]})
    with Progress(console=console, clock=clock) as progress:
        progress.run_started(2)
        progress.message("preparing data")
        play(progress, reports, clock=clock)
        progress.run_finished(summarise_(reports), "runs/a")
    lines = written(console).splitlines()
    assert lines[0] == "[0:00] preparing data"
    assert re.fullmatch(
        r"\[0:00\] round 0/2  plug-in 46.5  emulated 57.4  full zero-shot 46.6  loss 3.50  [\d.]+ s", lines[1]
    )
    assert lines[2] == "[0:12] round 1/2: 2 of 2 participants"
    assert re.fullmatch(r"\[0:12\] round 1/2  plug-in 31.6 \(-32 %\)  emulated 34.0  loss 3.50  [\d.]+ s", lines[3])
    assert lines[5].startswith("[0:24] round 2: pandas timeout: no reply within 60 s; long long")
    assert lines[6].startswith("[0:24] round 2/2  plug-in 29.3 (-37 %)")
    assert " 1 failed " in lines[6]
    assert lines[8].startswith("Plug-in perplexity 29.3 is 37 % below the full model's 46.6")
    assert lines[9].startswith("finished after")
    assert lines[10] == "runs/a/report.html"
    assert len(lines) == 11
    assert "\x1b" not in written(console)


def test_right_answers_are_told(make_reports):
    console, report = plain(), make_reports(1)[1]
    found = {name: dataclasses.replace(one, choice_accuracy=0.614) for name, one in report.evaluations.items()}
    with Progress(console=console, clock=Clock()) as progress:
        progress.round_finished(dataclasses.replace(report, evaluations=found))
    assert "  answers 61 % right  " in written(console)


def summarise_(reports):
    return summarise(reports, config_hash="", versions={}, status="finished", bundle_bytes=0)


def test_a_log_tells_of_clients_now_and_then_only(make_reports):
    console, clock = plain(), Clock()
    with Progress(console=console, clock=clock) as progress:
        progress.run_started(1)
        progress.round_started(plan(1, [str(number) for number in range(100)]))
        for number in range(100):
            clock.now += 0.5
            progress.client_done(str(number), {})
    assert written(console).splitlines() == [
        f"[0:{seconds}] round 1/1: {2 * seconds} of 100 participants" for seconds in (10, 20, 30, 40, 50)
    ]


def test_the_live_picture_counts_estimates_and_fits_80_columns(make_reports):
    clock = Clock()
    with Progress(console=terminal(), clock=clock) as progress:
        assert "preparing" in picture(progress)
        progress.run_started(10, also=1)
        reports = make_reports(10)
        progress.round_finished(reports[0])
        for report in reports[1:4]:
            progress.round_started(plan(report.round, ("a", "b", "c")))
            progress.round_finished(RoundReport(report.round, {}, (), report.evaluations, 0, 0, {"total": 20.0}, {}))
        progress.round_started(plan(4, ("a", "b", "c")))
        clock.now += 5
        progress.client_done("a", {"train_loss": 3.21})
        progress.client_failed(ClientFailure("b", 4, "error", "no memory"))
        lines = picture(progress).splitlines()
    assert re.search(r"rounds .* 3/10 0:05 +2:15 left", lines[0])
    assert re.search(r"clients .* 2/4 a  loss 3.21", lines[1])
    assert re.search(r"plug-in perplexity [\d.]+, \d+ % below zero-shot 46.6  1 failed", lines[2])
    assert max(len(line.rstrip()) for line in lines) <= 80
    assert all(len(line) <= 40 for line in picture(progress, width=40).splitlines())


def test_a_resumed_run_goes_on_counting(make_reports):
    with Progress(console=plain(), clock=Clock()) as progress:
        progress.run_started(10)
        progress.resumed(6)
        assert "6/10" in picture(progress)


def test_without_a_total_nothing_is_made_up(make_reports):
    console = plain()
    with Progress(console=console, clock=Clock()) as progress:
        play(progress, make_reports(2))
        assert "left" not in picture(progress)
    assert "] round 2  plug-in" in written(console)


def test_the_cursor_comes_back_after_ctrl_c(make_reports):
    console = terminal()
    progress = Progress(console=console)

    def interrupted():
        with progress:
            progress.round_started(plan(1, ("a",)))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    shown = written(console)
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")
    assert progress.live is None


def test_lines_stay_above_the_live_picture(make_reports):
    console = terminal()
    reports = make_reports(2)
    with Progress(console=console) as progress:
        progress.run_started(2)
        play(progress, reports)
        progress.run_finished(summarise_(reports), "runs/a")
    shown = written(console)
    assert "plug-in 29.3 (-37 %)" in shown
    assert "runs/a/report.html" in shown


@pytest.mark.parametrize("make", [plain, terminal])
def test_hostile_names_do_no_harm(make_reports, hostile_names, make):
    console = make(color_system=None)
    reports = make_reports(1, clients=hostile_names, failures={1: [(name, "error", name) for name in hostile_names]})
    with Progress(console=console, clock=Clock()) as progress:
        progress.run_started(1)
        play(progress, reports, names=hostile_names)
        picture(progress)
    shown = written(console)
    assert "\x07" not in shown
    assert "\x1b[2J" not in shown
    assert "[bold red]markup[/b" in shown


def test_a_poor_terminal_encoding_ends_no_run(make_reports):
    raw = io.BytesIO()
    console = Console(file=io.TextIOWrapper(raw, encoding="ascii"), highlight=False)
    with Progress(console=console) as progress:
        progress.message("哈姆雷特 — ready")
        progress.run_finished(summarise_([]), "runs/哈")
    console.file.flush()
    assert b"???? ? ready" in raw.getvalue()


def test_numbers_that_are_not_finite(make_reports):
    broken = {"plug_in": Evaluation(float("nan"), 0.0, 1), "emulator_tuned": Evaluation(1e9, 0.0, 1)}
    console = plain()
    reports = make_reports(1)
    with Progress(console=console) as progress:
        progress.round_finished(reports[0])
        progress.round_finished(RoundReport(1, {}, (), broken, 0, 0, {}, {}))
        picture(progress)
    assert "plug-in ∞  emulated ∞" in written(console)
