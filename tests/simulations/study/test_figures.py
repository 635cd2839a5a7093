import csv
import io
import itertools
import json
import math

import pytest
from matplotlib.patches import Rectangle

from simulations.study.figures import NAMED, draw, lines_of
from simulations.study.outputs import rows, to_json, write_outputs


def lines(figure, width):
    """Points of the lines of some width that are drawn in data's units, level ones apart."""
    axes = figure.axes[0]
    found = [line for line in axes.get_lines() if line.get_transform() is axes.transData]
    return [line.get_xydata().tolist() for line in found if line.get_linewidth() == pytest.approx(width)]


def points(figure):
    """The points that stand alone."""
    axes = figure.axes[0]
    found = [line.get_xydata() for line in axes.get_lines() if line.get_marker() == "o"]
    return [tuple(each[0]) for each in found if len(each) == 1]


def words(figure):
    texts = [text for axes in figure.axes for text in axes.texts]
    return [text.get_text() for text in texts]


@pytest.fixture
def swept(study_folder, read, tmp_path):
    """All axes but distillation swept, one cell missing, one seed."""
    cells = []
    options = (("uniform", "cka"), ("1", "2", "4"), ("none", "int8"), ("none", "norm", "mlp"))
    for selection, kept, compression, unfreeze in itertools.product(*options):
        if compression == "int8" and unfreeze == "mlp":
            continue
        values = {"selection": selection, "kept": kept, "compression": compression, "unfreeze": unfreeze}
        loss = (
            3.5
            - int(kept) / 20
            + (selection == "cka") / 10
            + (compression == "int8") / 15
            - len(unfreeze) / 80
            + (unfreeze == "norm") / 40
        )
        share = int(kept) / 8
        cells.append((values, "setup", {0: loss}, {"share": share, "memory": (1 + share) * 2**20}))
    names = ("selection", "kept", "compression", "unfreeze")
    axes = dict(zip(names, map(list, options), strict=True))
    return read(study_folder(cells, axes, folder=tmp_path / "swept"))


def test_there_is_a_figure_for_what_was_swept(made, swept, read):
    assert set(draw(read(made))) == {"quality", "memory", "margin"}
    assert set(draw(swept)) == {"quality", "heat_unfreeze", "heat_compression", "memory", "margin"}


def test_quality_has_a_line_a_selection_and_a_point_a_depth(made, read):
    study = read(made, metric="loss")
    figure, _ = draw(study)["quality"]
    means = {each.label: each.mean("plug_in") for each in study.setups}
    thick = lines(figure, 1.8)
    assert [[0.25, means["uniform, kept 2"]], [0.5, means["uniform, kept 4"]]] in thick
    assert [[0.25, means["cka, kept 2"]], [0.5, means["cka, kept 4"]]] in thick
    assert len(thick) == 2
    thin = lines(figure, 0.9)
    assert [y for _, y in thin[0]] == pytest.approx([means["uniform, kept 2"] - 0.02, means["uniform, kept 4"] + 0.05])
    drawn = [line for line in figure.axes[0].get_lines() if line.get_linewidth() == pytest.approx(1.1)]
    levels = sorted(line.get_ydata()[0] for line in drawn)
    assert levels == pytest.approx([3.3, 3.4, 4.0])
    assert {"uniform", "cka", "whole model, LoRA", "whole model, full", "full model before tuning"} <= set(
        words(figure)
    )


def test_memory_and_margin_have_a_point_a_setup(made, read):
    study = read(made)
    found = draw(study)
    assert len(points(found["memory"][0])) == 6
    assert (1.5, pytest.approx(study.setups[0].mean("plug_in"))) in points(found["memory"][0])
    margins = points(found["margin"][0])
    assert len(margins) == 4
    assert sorted(round(y, 6) for _, y in margins) == [-0.02, -0.02, 0.05, 0.05]


def test_a_heat_map_has_a_cell_for_each_pair_at_each_depth(swept):
    figure, caption = draw(swept)["heat_unfreeze"]
    assert len(figure.axes) == 3
    for axes in figure.axes:
        assert len([patch for patch in axes.patches if isinstance(patch, Rectangle)]) == 2 * 3
    assert "best over compression" in caption
    deepest = [text.get_text() for text in figure.axes[2].texts]
    # The best over compression is the uncompressed one.
    assert "3.250" in deepest
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["uniform", "cka"]
    bold = [text.get_text() for axes in figure.axes for text in axes.texts if text.get_fontweight() == "bold"]
    assert bold == ["3.250"]


def test_a_pair_that_was_not_run_is_an_empty_cell(study_folder, read):
    cells = [
        ({"selection": name, "kept": "2", "unfreeze": part}, "setup", {0: 3.0 + at / 10}, {})
        for at, (name, part) in enumerate([("uniform", "none"), ("uniform", "mlp"), ("cka", "none")])
    ]
    axes = {"selection": ["uniform", "cka"], "kept": ["2"], "unfreeze": ["none", "mlp"]}
    figure, _ = draw(read(study_folder(cells, axes)))["heat_unfreeze"]
    assert words(figure).count("—") == 1


def test_many_lines_are_grey_beyond_a_limit(study_folder, read):
    names = [f"s{at:02d}" for at in range(NAMED + 2)]
    cells = [
        ({"selection": name, "kept": kept}, "setup", {0: 3 + at / 100 - int(kept) / 10}, {"share": int(kept) / 4})
        for at, name in enumerate(names)
        for kept in "12"
    ]
    study = read(study_folder(cells, {"selection": names, "kept": ["1", "2"]}))
    assert len(lines_of(study)) == NAMED + 2
    figure, caption = draw(study)["quality"]
    assert "2 are grey" in caption
    assert set(names[:NAMED]) <= set(words(figure))
    assert not set(names[NAMED:]) & set(words(figure))


def test_figures_are_left_out_where_they_show_nothing(study_folder, read):
    boom = read(study_folder([({"selection": "uniform", "kept": "2"}, "setup", {0: "boom"}, {})], {"kept": ["2"]}))
    assert draw(boom) == {}


def test_each_text_has_figures_of_its_own(study_folder, read):
    cells = [
        ({"selection": "uniform", "kept": kept, "data": data}, "setup", {0: 3.0}, {"share": int(kept) / 4})
        for kept in "12"
        for data in ("text", "jsonl")
    ]
    found = draw(read(study_folder(cells, {"selection": ["uniform"], "kept": ["1", "2"]})))
    assert set(found) == {f"{name}_{at}" for name in ("quality", "memory", "margin") for at in (1, 2)}
    assert found["quality_2"][1].startswith("jsonl: ")


def test_divergence_is_no_reason_to_fail(study_folder, read, tmp_path):
    cells = [
        ({"selection": "uniform", "kept": "1"}, "setup", {0: math.nan, 1: 3.0}, {"emulated": 3.0}),
        ({"selection": "uniform", "kept": "2"}, "setup", {0: 3.0, 1: 3.1}, {"share": 0.25}),
        ({"selection": "uniform", "kept": "4"}, "setup", {0: 2.9, 1: 3.1}, {"share": 0.5}),
    ]
    study = read(study_folder(cells, {"selection": ["uniform"], "kept": ["1", "2", "4"]}))
    assert len(lines(draw(study)["quality"][0], 1.8)[0]) == 2
    assert write_outputs(study, tmp_path / "out").is_file()


def test_all_outputs_are_written_and_complete(made, read, tmp_path):
    study = read(made)
    page = write_outputs(study, tmp_path)
    names = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    figures = {f"figures/{name}.png" for name in ("quality", "memory", "margin")}
    assert names - {path for path in names if path.startswith("made/")} == {
        *(f"study.{kind}" for kind in ("html", "csv", "json", "md", "tex")),
        *figures,
    }
    text = page.read_text()
    assert text.count("<svg") == 3
    assert "uniform, kept 4 is best" in text
    assert "study.csv" in text
    table = [line for line in (tmp_path / "study.md").read_text().splitlines() if line.startswith("|")]
    assert len(table) == 2 + 6
    assert (tmp_path / "study.tex").read_text().count(r"\\") == 1 + 6
    plain = json.loads((tmp_path / "study.json").read_text(), parse_constant=pytest.fail)
    assert plain["setups"][0]["measures"]["plug_in"]["mean"] == pytest.approx(study.setups[0].mean("plug_in"))
    assert len(plain["runs"]) == 18


def test_a_row_of_the_csv_is_a_run(made, read, tmp_path):
    study = read(made)
    write_outputs(study, tmp_path)
    found = list(csv.DictReader(io.StringIO((tmp_path / "study.csv").read_text())))
    assert len(found) == len(rows(study, tmp_path)) == 18
    first = found[0]
    assert (first["selection"], first["kept"], first["role"], first["seed"]) == ("uniform", "4", "setup", "0")
    assert float(first["plug_in"]) == pytest.approx(3.4)
    assert float(first["transfer_gap"]) == pytest.approx(0.1)
    assert float(first["client_memory_bytes"]) == 1.5 * 2**20
    assert first["folder"] == "made/cells/cell1-0"


def test_the_json_names_the_axes(made, read, tmp_path):
    plain = to_json(read(made), tmp_path)
    assert plain["axes"] == {"selection": ["uniform", "cka"], "kept": ["2", "4"]}
    assert [each["role"] for each in plain["references"]] == ["whole", "full"]
