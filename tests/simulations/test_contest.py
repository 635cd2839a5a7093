import io
import json

import numpy as np
import pytest
from rich.console import Console

from fedpeat.control import CapabilityControl, Objective, SabppoControl
from fedpeat.control.learner import Seen
from fedpeat.control.world import play
from simulations import control_figures
from simulations.contest import MEASURES, Spread, contest, held_out, rows, spread, the_runs_own, words
from simulations.control_command import show
from simulations.report.style import write_png
from tests.fedpeat.control.problems import CELL, problem, scene
from tests.fedpeat.control.test_policy import by_chance

SETTINGS = {"client": {"local_steps": 5}, "clients": {"per_round": None}, "seed": 3}
GIVEN = scene(problem(3, radio=CELL, refresh=True, memory=[4, 2, 0]), objective=Objective(time=0.3), availability=0.8)


@pytest.fixture(scope="module")
def found():
    return contest(GIVEN, by_chance(GIVEN.problem), SETTINGS, 5)


def test_controllers_play_the_same_runs(found):
    assert [entry.name for entry in found.entries] == [
        "sabppo",
        "best fixed",
        "greedy",
        "capability",
        "fixed",
        "random",
    ]
    assert list(found.seeds) == held_out(3, 5)
    for place, seed in enumerate(found.seeds):
        total, done = play(CapabilityControl(GIVEN.problem, 3, 5, seed), GIVEN, seed)
        values = dict(zip(MEASURES, found.entries[3].values[place], strict=True))
        assert values["objective"] == pytest.approx(-total)
        for name in ("seconds", "bytes", "joules"):
            assert values[name] == pytest.approx(sum(one[name] for one in done))
        assert values["loss"] == pytest.approx(done[-1]["loss"])


def test_the_best_fixed_plan_comes_to_what_it_was_chosen_for(found):
    assert found.entries[1].of("objective").mean() == pytest.approx(found.hindsight.cost)
    assert found.entries[1].of("objective").mean() <= found.entries[4].of("objective").mean() + 1e-9


def test_differences_are_run_by_run(found):
    first, last = found.entries[0], found.entries[-1]
    assert found.beside(first).tolist() == [0.0] * 5
    assert found.beside(last, "loss") == pytest.approx(last.of("loss") - first.of("loss"))
    plain = json.loads(json.dumps(found.to_json()))
    told = plain["controllers"]["random"]
    assert told["more_than_first"]["objective"]["mean"] == pytest.approx(found.beside(last).mean())
    assert told["runs_that_cost_more"] == (found.beside(last) > 0).sum()
    assert plain["best_fixed"]["plan"]


def test_an_interval_is_around_its_mean():
    values = np.random.default_rng(0).normal(3.0, 1.0, 400)
    found = spread(values)
    assert found.mean == pytest.approx(values.mean())
    assert found.low < found.mean < found.high
    assert found.high - found.low == pytest.approx(2 * 1.96 / 20, rel=0.15)
    assert words(Spread(-1.0, -1.5, -0.5)) == "\u22121.0 [\u22121.5, \u22120.5]"


def test_the_runs_own_plan_leaves_out_whom_it_does_not_fit():
    levels = the_runs_own(GIVEN.problem, 5)
    assert levels[:, 0].tolist() == [2, 2, 0]
    assert levels[0, 1:].tolist() == [0, 0]


def test_the_table_has_a_row_a_controller(found):
    console = Console(record=True, width=200, file=io.StringIO())
    show(found, console)
    text = console.export_text()
    assert all(entry.name in text for entry in found.entries)
    assert "best fixed plan in hindsight" in text
    assert len(rows(found)) == 6


def test_pictures_are_drawn_of_what_was_chosen(found, tmp_path):
    levels, refreshes = found.first["sabppo"]
    policy = SabppoControl(GIVEN.problem, by_chance(GIVEN.problem), 5)
    _, done = play(policy, GIVEN, found.seeds[0])
    assert [len(one["plan"].devices) for one in done] == (levels[..., 0] > 0).sum(-1).tolist()
    drawn = {
        "learning": control_figures.learning([Seen(0, 5.0), Seen(10, 4.0), Seen(20, 4.5)]),
        "controllers": control_figures.controllers(found),
        "choices": control_figures.choices(GIVEN.problem, levels, refreshes, title="What was chosen"),
    }
    for name, figure in drawn.items():
        write_png(figure, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
    words_in = [text.get_text() for text in drawn["choices"].axes[0].texts]
    assert len(words_in) == (levels[..., 0] > 0).sum()
    assert [len(axes.containers) for axes in drawn["controllers"].axes] == [6] * 5
