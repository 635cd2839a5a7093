import csv
import io
import json
import math
import re
from html.parser import HTMLParser
from itertools import combinations, pairwise

import pytest
from rich.console import Console

from simulations.compare.collect import Run, read_run
from simulations.compare.drawing import Box, Name, inside, place_names, wide_axes
from simulations.compare.figures import NAMED, caption, draw, mean_line, named
from simulations.compare.outputs import to_csv, to_latex, to_markdown, write_outputs
from simulations.compare.statistics import Interval, Point
from simulations.compare.table import columns, common_places, with_error
from simulations.compare.variants import Placed, compare
from simulations.compare.watch import show
from simulations.report.style import house_style

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Checks that tags match, and collects what a page shows and asks for."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.words, self.attributes = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture
def comparison(placed_runs):
    placed = placed_runs({"fed_avg": {0: 3.5, 1: 3.6}, "fed_adam": {0: 3.3, 1: 3.41}, "wild": {0: math.nan, 1: 3.0}})
    failed = Run(placed[0].run.folder.parent / "x", {}, "failed", "strategy=flora adds & <mixes>")
    return compare([*placed, Placed({"strategy": "flora"}, 0, failed)], title="which one")


@pytest.fixture
def hostile(write_run, hostile_names, tmp_path):
    placed = []
    names = [*hostile_names, "=cmd()", "+1+cmd|' /C'!A0", "-2", "1e5", "a\nb", "%&_#{}~^\\$ ± — …"]
    for at, name in enumerate(names):
        folder = write_run(tmp_path / "runs" / str(at), {"seed": 0, "name": at}, losses=[3.6, 3.5 + at / 100])
        placed.append(Placed({"data.<b>": name, "k|e`y": "x & y"}, 0, read_run(folder)))
    failed = Run(tmp_path / "<i>", {}, "failed", "</td><script>alert(1)</script> | {{ 7 * 7 }} \\input{x}")
    placed.append(Placed({"data.<b>": "gone", "k|e`y": ""}, 0, failed))
    return compare(placed, title="<script>alert(2)</script> \x1b[31m", baseline=names[0])


def test_all_outputs_are_written(comparison, tmp_path):
    folder = tmp_path / "out"
    page = write_outputs(comparison, folder)
    assert page == folder / "comparison.html"
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    figures = {f"figures/{name}.png" for name in ("rounds", "bytes", "differences", "pareto")}
    assert names == {f"comparison.{kind}" for kind in ("html", "csv", "json", "md", "tex")} | figures


def test_the_page_stands_alone_and_tells_everything(comparison, tmp_path):
    text = write_outputs(comparison, tmp_path / "out").read_text()
    page = Page(text)
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert page.tags.count("svg") == 4
    assert "default-src 'none'" in text
    for name, value in page.attributes:
        assert name not in {"src", "onload"}
        assert not str(value).startswith(("http", "//"))
    shown = " ".join(page.words)
    for words in ("fed_adam is best", "yes, better", "diverged in 1 of 2", "adds & <mixes>", "6 of 7 runs finished"):
        assert words in shown


def test_a_row_of_the_csv_is_a_run(comparison, tmp_path):
    rows = list(csv.DictReader(io.StringIO(to_csv(comparison, tmp_path))))
    assert len(rows) == 7
    best = rows[0]
    assert best["strategy"] == "fed_adam"
    assert float(best["perplexity"]) == pytest.approx(math.exp(3.3))
    assert best["folder"].startswith("run")
    assert (best["status"], best["judged_by"], best["rounds_to_target"]) == ("finished", "plug_in", "2")
    failed = next(row for row in rows if row["status"] == "failed")
    assert failed["reason"] == "strategy=flora adds & <mixes>"
    assert failed["perplexity"] == failed["bytes_down"] == ""


def test_the_json_is_plain_and_complete(comparison, tmp_path):
    write_outputs(comparison, tmp_path / "out")
    plain = json.loads((tmp_path / "out" / "comparison.json").read_text(), parse_constant=pytest.fail)
    best = plain["variants"][0]
    assert best["difference"]["mean"] == pytest.approx(comparison.variants[0].difference.mean)
    assert best["verdict"] == "better"
    assert [each["diverged"] for each in plain["variants"]] == [0, 0, 1, 0]
    assert len(plain["runs"]) == 7


def test_markdown_and_latex_have_a_row_a_variant(comparison):
    markdown = to_markdown(comparison)
    table = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(comparison.variants)
    assert {line.count("|") for line in table} == {len(columns(comparison)) + 1}
    assert "flora, seed 0" in markdown
    latex = to_latex(comparison)
    assert latex.count(r"\\") == 1 + len(comparison.variants)
    assert r"$\pm$" in latex
    assert "fed\\_adam" in latex


def test_hostile_names_stay_text_on_the_page(hostile, tmp_path):
    text = write_outputs(hostile, tmp_path / "out").read_text()
    page = Page(text)
    assert not {"script", "b", "i"} & set(page.tags)
    assert "<script>alert(1)</script>" in " ".join(page.words)
    assert "{{ 7 * 7 }}" in " ".join(page.words)
    assert "\x1b" not in text


def test_hostile_names_stay_cells_of_markdown(hostile):
    table = [line for line in to_markdown(hostile).splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(hostile.variants)
    for line in table:
        assert len(re.findall(r"(?<!\\)\|", line)) == len(columns(hostile)) + 1
        assert not re.search(r"(?<!\\)<", line)


def test_hostile_names_stay_words_of_latex(hostile):
    text = to_latex(hostile)
    body = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
    assert "\\input" not in body
    bare = re.sub(r"\\text[a-z]+\{\}|\\dots\{\}|\\[&%$#_{}]|\$(\\pm|\\infty|-)\$|\\\\", "", body)
    bare = re.sub(r"\\(begin|end)\{tabular\}(\{[lr]+\})?|\\(top|mid|bottom)rule", "", bare)
    assert not set("\\%$#_{}~^<>|") & set(bare)
    assert {line.count("&") for line in bare.splitlines() if "&" in line} == {len(columns(hostile)) - 1}


def test_no_cell_of_the_csv_is_a_formula(hostile, tmp_path):
    rows = list(csv.reader(io.StringIO(to_csv(hostile, tmp_path))))
    assert len(rows) == 1 + len(hostile.runs)
    assert len({len(row) for row in rows}) == 1
    found = [cell for row in rows for cell in row]
    assert {"'=cmd()", "'+1+cmd|' /C'!A0", "-2", "1e5"} <= set(found)
    for cell in found:
        assert "\n" not in cell
        assert not cell.startswith(("=", "@"))
        assert not cell.startswith(("+", "-")) or re.fullmatch(r"[-+]?[\d.e-]+", cell)


def test_the_terminal_survives_hostile_names(hostile, comparison):
    for encoding, width in (("utf-8", 200), ("ascii", 60)):
        raw = io.BytesIO()
        file = io.TextIOWrapper(raw, encoding=encoding)
        for shown in (hostile, comparison):
            show(shown, console=Console(file=file, width=width, force_terminal=True, color_system=None))
        file.flush()
        text = raw.getvalue().decode(encoding)
        assert "[2J" in text
        assert "\x1b[2J" not in text
        assert "fed_adam is best" in text


def test_a_narrow_terminal_loses_columns_not_words(comparison):
    file = io.StringIO()
    show(comparison, console=Console(file=file, width=90, force_terminal=True, color_system=None))
    table = [line for line in file.getvalue().splitlines() if "│" in line]
    assert len(table) == len(comparison.variants)
    assert all("…" not in line for line in table)
    assert "memory" not in file.getvalue().split("└")[0]


def test_a_file_gets_the_whole_table(comparison):
    file = io.StringIO()
    show(comparison, console=Console(file=file, width=40))
    assert "memory" in file.getvalue()
    assert max(map(len, file.getvalue().splitlines())) > 100


def test_columns_keep_one_number_of_places():
    found = [Interval(28.66, 1.04, 3), Interval(28.88, 0.75, 3), Interval(28.9, 0.0003, 3)]
    places = common_places(found)
    assert [with_error(each, places=places) for each in found] == ["28.66 ± 1.04", "28.88 ± 0.75", "28.90 ± 0.00"]
    assert common_places([]) is None


def test_many_variants_are_named_up_to_a_limit(placed_runs):
    losses = {f"v{at:02d}": {0: 3 + at / 100} for at in range(NAMED + 4)}
    found = compare(placed_runs(losses), title="x", baseline=f"v{NAMED + 3:02d}")
    shown = [variant.label for variant, _, _ in named(found)]
    assert len(shown) == NAMED
    assert shown[0] == "v00"
    assert shown[-1] == f"v{NAMED + 3:02d}"  # the baseline, though it is the worst
    assert len({(role, str(dash)) for _, role, dash in named(found)}) == NAMED


def test_a_line_is_the_mean_of_what_is_finite():
    curves = [[Point(1, 10, 4.0), Point(2, 20, math.nan)], [Point(1, 30, 2.0), Point(2, 40, 1.0)]]
    assert mean_line(curves, lambda point: point.bytes) == [(20.0, 3.0, 2.0, 4.0), (40.0, 1.0, 1.0, 1.0)]


def test_figures_are_left_out_where_they_show_nothing(placed_runs, tmp_path):
    one_seed = compare(placed_runs({"a": {0: 3.5}, "b": {0: 3.4}}), title="x")
    assert set(draw(one_seed)) == {"rounds", "bytes", "pareto"}
    nothing = compare([Placed({"a": "b"}, 0, read_run(tmp_path / "nowhere"))], title="x")
    assert draw(nothing) == {}
    assert write_outputs(nothing, tmp_path / "out").is_file()


def test_a_wild_run_does_not_flatten_the_others(placed_runs):
    found = compare(placed_runs({"a": {0: 3.5, 1: 3.5}, "b": {0: 3.4, 1: 3.4}, "c": {0: 9.0, 1: 9.0}}), title="x")
    figure = draw(found)["rounds"]
    assert figure.axes[0].get_ylim()[1] < 200 < math.exp(9)
    assert "from outside" in caption("rounds", found, figure)


def test_captions_tell_what_is_grey(placed_runs):
    found = compare(placed_runs({f"v{at}": {0: 3.5} for at in range(NAMED + 1)}), title="x")
    figures = draw(found)
    assert "1 more variant is grey" in caption("rounds", found, figures["rounds"])
    assert "has a name" in caption("pareto", found, figures["pareto"])
    few = compare(placed_runs({"a": {0: 3.5}, "b": {0: 3.4}}), title="x")
    assert "grey" not in caption("rounds", few, draw(few)["rounds"])
    assert "from outside" not in caption("rounds", few, draw(few)["rounds"])


def test_names_stay_on_the_page():
    for count in (1, 5, 12):
        for at in (0.0, 0.5, 1.0):
            places = inside([at] * count, 0.08)
            assert min(places) >= 0
            assert max(places) <= 1.0 + 1e-9
            assert all(high - low >= 0.08 - 1e-9 for low, high in pairwise(places))


@pytest.fixture
def spots():
    """Axes with points close to one another, and their names."""
    with house_style():
        figure, axes = wide_axes("x", unit="y")
        places = [(at / 10, at % 3 / 20) for at in range(8)]
        axes.plot(*zip(*places, strict=True), "o")
        axes.margins(x=0.1, y=0.3)
        names = [Name(x, y, f"a name of some length {at}", "ink") for at, (x, y) in enumerate(places)]
        yield figure, axes, names, [Box(x, x, y, y) for x, y in places]


def test_names_near_points_hide_nothing(spots):
    figure, axes, names, marks = spots
    assert place_names(axes, names, marks) == 0
    boxes = [text.get_window_extent() for text in axes.texts if text.get_text().startswith("a name")]
    assert len(boxes) == len(names)
    for one, other in combinations(boxes, 2):
        assert not one.overlaps(other)
    for box in boxes:
        assert figure.bbox.x0 <= box.x0
        assert box.x1 <= figure.bbox.x1
        for mark in marks:
            assert not box.contains(*axes.transData.transform((mark.left, mark.bottom)))


def test_a_name_without_room_is_left_out(spots):
    _, axes, names, marks = spots
    wall = Box(-100, 100, -100, 100)
    assert place_names(axes, names, [*marks, wall]) == len(names)


def test_what_is_scored_on_other_text_is_in_no_figure(write_run, tmp_path):
    placed = []
    for name, personal in (("a", None), ("b", None), ("p", [3.3, 3.1])):
        write_run(tmp_path / name, {"strategy": name, "seed": 0}, losses=[3.6, 3.5], personal=personal)
        placed.append(Placed({"strategy": name}, 0, read_run(tmp_path / name)))
    found = compare(placed, title="x")
    assert [variant.label for variant, _, _ in named(found)] == ["a", "b"]
    for figure in draw(found).values():
        words = [text.get_text() for text in figure.axes[0].texts]
        assert "a" in words
        assert "p" not in words
