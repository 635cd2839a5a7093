import math
import re

import pytest
from matplotlib.patches import Rectangle

from simulations.report.emulator_figures import LABELLED_BLOCKS, LOOKS, NAMES, draw_emulators, fates_of
from simulations.report.style import PALETTE, to_svg, write_png

MIDDLE = (2, 3, 4, 5)


def block(place, source=None, *changes):
    return {"source": place if source is None else source, "place": place, "changes": list(changes)}


def emulator(*blocks, notes=(), count=8, adapter=(0, 1, 6, 7)):
    return {"builder": {}, "count": count, "adapter": list(adapter), "blocks": list(blocks), "notes": list(notes)}


def score(scores, **more):
    note = {"builder": "ablation", "what": "score", "unit": "nats/token", "higher_stays": True, "kept": [3]}
    return {**note, "scores": scores, **more}


def distilled(*curve, **more):
    return {"what": "distillation", "loss": [list(point) for point in curve], **more}


ALL = emulator(block(2), block(3, 2), block(4, None, "int8", "distilled"))


def cells(axes):
    return [patch for patch in axes.patches if isinstance(patch, Rectangle)]


def words(figure):
    shown = [text.get_text() for axes in figure.axes for text in [*axes.texts, axes.xaxis.label]]
    shown += [axes.get_title(loc="left") for axes in figure.axes]
    legends = [axes.get_legend() for axes in figure.axes if axes.get_legend()]
    return " | ".join(shown + [text.get_text() for legend in legends for text in legend.get_texts()])


def test_each_block_has_its_fate():
    assert fates_of(ALL) == ["adapter", "adapter", "kept", "shared", "changed", "dropped", "adapter", "adapter"]
    assert set(fates_of(ALL)) == set(LOOKS) == set(NAMES)
    assert fates_of({}) == []


def test_the_strip_has_a_cell_for_every_block_of_the_full_model():
    figure = draw_emulators({"default": ALL})["emulator"]
    drawn = cells(figure.axes[0])
    assert [round(cell.get_x() + cell.get_width() / 2) for cell in drawn] == list(range(8))
    assert len({cell.get_height() for cell in drawn[:4]}) == 1
    assert drawn[4].get_height() < drawn[3].get_height()
    assert "2" in [text.get_text() for text in figure.axes[0].texts]  # who fills block 3
    for told in ("4 of the adapter", "1 kept", "1 kept, but changed", "1 filled by another", "1 dropped"):
        assert told in words(figure).split(" | ")


def test_scores_stand_under_their_blocks_and_those_of_kept_ones_are_filled():
    notes = [score({"2": 0.1, "3": 0.4, "4": -0.2, "5": None}), {"what": "compression", "error": 0.1}]
    figure = draw_emulators({"default": emulator(block(3), notes=notes)})["emulator"]
    assert len(figure.axes) == 2
    bars = {round(bar.get_x() + bar.get_width() / 2): bar for bar in cells(figure.axes[1])}
    assert {place: bar.get_height() for place, bar in bars.items()} == {2: 0.1, 3: 0.4, 4: -0.2}
    assert {place for place, bar in bars.items() if bar.get_facecolor()[3] > 0} == {3}
    assert "ablation, nats/token of each block; the higher stay" in words(figure)
    assert figure.axes[0].get_xlim() == figure.axes[1].get_xlim()


def test_of_runs_the_least_went():
    run = score({"2": 0.3, "3": 0.1, "4": 0.2}, what="run", length=2, builder="angular", unit="half turns")
    figure = draw_emulators({"default": emulator(block(2), block(5), notes=[run])})["emulator"]
    empty = [bar.get_x() for bar in cells(figure.axes[1]) if bar.get_facecolor()[3] == 0]
    assert [round(left + 0.31) for left in empty] == [3]
    assert "of the 2 blocks from each on" in words(figure)


def test_training_is_a_curve():
    note = distilled((0, 4.0), (10, 1.0), (20, None), (30, 0.5), held_out_before=5.0, held_out_after=0.75)
    figure = draw_emulators({"small": emulator(block(2), notes=[note])})["distillation_small"]
    assert list(figure.axes[0].lines[0].get_xdata()) == [0, 10, 30]
    for told in ("Training of the emulator (small)", "step", "loss 0.500", "5.00 before and 0.750 after"):
        assert told in words(figure)


@pytest.mark.parametrize(
    "plain",
    [{}, emulator(count=4, adapter=(0, 1, 2, 3)), emulator(block(2), notes=[distilled()], count=0)],
    ids=["nothing", "adapter alone", "no blocks"],
)
def test_nothing_to_draw_is_no_figure(plain):
    assert draw_emulators({"default": plain}) == {}
    assert draw_emulators({}) == {}


def test_figures_of_several_emulators_are_told_apart():
    assert set(draw_emulators({"default": ALL, "kept_2": ALL})) == {"emulator", "emulator_kept_2"}


@pytest.mark.parametrize("count", [6, LABELLED_BLOCKS, 120])
def test_drawings_are_for_paper_and_page(count, tmp_path, hostile_names):
    notes = [
        score({str(place): math.sin(place) for place in range(1, count - 1)}, builder=hostile_names[0], unit="$x$"),
        score({"3": 1e-9, "4": 1e9}),
        distilled((0, 1.0), (1, 1e-6)),
    ]
    blocks = [block(place, min(place, 4), "int8") for place in range(1, count - 1)]
    figures = draw_emulators({hostile_names[1]: emulator(*blocks, count=count, adapter=(0, count - 1), notes=notes)})
    assert len(figures) == 2
    for figure in figures.values():
        svg = to_svg(figure, name="any")
        assert not re.search(r"#[0-9a-f]{6}|<script", svg)
        assert set(re.findall(r"var\(--(\w+)\)", svg)) <= set(PALETTE)
        write_png(figure, tmp_path / "one.png")
        assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")
