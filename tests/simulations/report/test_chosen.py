"""What the summary and the page say of a controller's choices."""

import dataclasses
import json

import pytest

from fedpeat.core import Evaluation, RoundReport
from simulations.report import summarise
from simulations.report.chosen import choices_in, control_facts, refreshed, terms
from simulations.report.chosen_figures import DEVICES, chosen, objective_terms
from simulations.report.html import write_report
from simulations.report.style import house_style

OBJECTIVE = {"time": 2.0, "quality": 1.0, "bytes": 1.0, "energy": 0.0, "time_unit": 10.0, "bytes_unit": 100.0}
SETTINGS = {"control": {"kind": "greedy", "objective": OBJECTIVE}}
FACTS = {"summary": {"config_hash": "", "versions": {}, "status": "finished", "bundle_bytes": 0}}


def device(emulator="default", rank=8, steps=5, **more):
    facts = {"status": "counted", "emulator": emulator, "rank": rank, "local_steps": steps, "bundle_bytes": 0}
    return {**facts, "joules": 3.0, "bytes_down": 20, **more}


def report(number, devices, loss=None, clock=0.0):
    evaluations = {} if loss is None else {"plug_in": Evaluation(loss, 0.3, 9)}
    return RoundReport(number, {}, (), evaluations, 40, 10, {}, {"simulated_seconds": clock}, devices)


@pytest.fixture
def reports():
    return [
        report(0, {}, loss=4.0),
        report(1, {"ann": device(bundle_bytes=50), "bob": {"status": "unavailable"}}, loss=3.0, clock=20.0),
        report(2, {"ann": device("small", 2, 1, changes="v1"), "bob": device(status="late")}, clock=30.0),
        report(3, {"bob": device(rank=None, changes="v1")}, loss=2.0, clock=30.0),
        report(4, {"bob": device(rank=None, changes="v2")}, loss=2.5, clock=35.0),
    ]


def summary_of(reports, settings=SETTINGS):
    return summarise(reports, **FACTS["summary"], settings=settings)


def test_nothing_is_said_of_a_fixed_plan(reports):
    assert control_facts(reports, {"control": {"sampling": "fixed"}}) == {}
    assert "control" not in summarise(reports, **FACTS["summary"])
    assert chosen(reports, summary_of(reports, {})) is None
    assert objective_terms(summary_of(reports, {})) is None


def test_the_summary_counts_choices(reports):
    found = summary_of(reports)["control"]
    assert json.loads(json.dumps(found)) == found
    assert found["kind"] == "greedy"
    assert {(one["emulator"], one["rank"], one["local_steps"], one["visits"]) for one in named(found)} == {
        ("default", 8, 5, 2),
        ("small", 2, 1, 1),
        ("default", None, 5, 2),
    }
    # Of two devices in four rounds, five visits and one that could not be asked.
    assert found["left_out"] == 8 - 5 - 1
    assert found["refreshed"] == [2, 4]


def named(found):
    return [{"local_steps": one["steps"], **one} for one in found["choices"]]


def test_the_terms_are_those_of_the_ledger(reports):
    first, second, third, fourth = summary_of(reports)["control"]["objective"]
    assert first == {"round": 1, "quality": 3.0, "time": 4.0, "bytes": 1.0, "energy": 0.0}
    assert second == {"round": 2, "quality": None, "time": 2.0, "bytes": 0.5, "energy": 0.0}
    assert (third["quality"], third["time"]) == (2.0, 0.0)
    assert fourth["time"] == 1.0


def test_what_a_round_adds_goes_on_from_the_last_evaluation(reports):
    from fedpeat.control import Objective

    rows = terms(reports, Objective(quality_of="change", quality=2.0))
    assert [row["quality"] for row in rows] == [-2.0, None, -2.0, 1.0]


def test_who_could_not_be_asked_chose_nothing(reports):
    assert set(choices_in(reports[1])) == {"ann"}
    assert refreshed(reports[:2]) == []


def test_the_picture_has_a_field_a_visit(reports):
    with house_style():
        figure = chosen(reports, summary_of(reports))
    (axes,) = figure.axes
    assert len(axes.patches) == 5
    assert [label.get_text() for label in axes.get_yticklabels()] == ["ann", "bob"]
    assert sorted(text.get_text() for text in axes.texts if text.get_text().isdigit()) == ["1", "5", "5", "5", "5"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "default",
        "default, rank 8",
        "small, rank 2",
        "re-aligned",
    ]


def test_many_devices_and_rounds_are_cut(reports):
    many = {f"c{number:03}": device() for number in range(DEVICES + 5)}
    long = [reports[0], *(report(number, many, loss=3.0) for number in range(1, 40))]
    with house_style():
        (axes,) = chosen(long, summary_of(long)).axes
    assert len(axes.get_yticks()) == DEVICES
    assert any(text.get_text() == "and 5 more devices" for text in axes.texts)
    assert not any(text.get_text().isdigit() for text in axes.texts)


def test_terms_of_no_weight_are_not_drawn(reports):
    with house_style():
        (axes,) = objective_terms(summary_of(reports)).axes
    assert {text.get_text().split()[0] for text in axes.texts if text.get_text()[0] in "qtbe"} >= {"quality", "time"}
    assert not any(text.get_text().startswith("energy") for text in axes.texts)


def test_both_come_onto_the_page(reports, tmp_path):
    odd = [dataclasses.replace(one, devices={f"<{name}>": own for name, own in one.devices.items()}) for one in reports]
    page = write_report(tmp_path, odd, summary_of(odd), settings=SETTINGS).read_text(encoding="utf-8")
    assert "What control=greedy chose" in page
    assert "The objective" in page
    assert ">&lt;bob&gt;</text>" in page
    assert "<bob>" not in page
    assert (tmp_path / "figures" / "chosen.png").is_file()
