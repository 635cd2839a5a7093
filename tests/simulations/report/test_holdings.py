from fedpeat.core import write_json
from simulations.report import in_words, summarise, write_report
from simulations.report.figures import draw
from simulations.report.holdings import holdings

PARTS = {"weights": 6, "gradients": 1, "optimizer": 2, "activations": 11}
COSTS = {
    "emulator_parameters": 791_552,
    "middle_parameters": 1_583_104,
    "kept_share": 0.5,
    "bundle_bytes": 7 * 2**20,
    "full_bytes": 10 * 2**20,
    "zero_shot_ratio": 1.11,
    "client_memory_bytes": 20 * 2**20,
    "client_memory": {name: part * 2**20 for name, part in PARTS.items()},
    "full_memory_bytes": 40 * 2**20,
    "full_memory": {name: 2 * part * 2**20 for name, part in PARTS.items()},
    "step_seconds": 0.158,
    "full_step_seconds": 0.2,
}
CURIOUS = {"loss": 3.5, "perplexity": 33.1, "accuracy": 0.3, "tokens": 9, "client": "<b>ann</b>", "steps": 40}


def summary_of(reports, emulators, **more):
    facts = {"config_hash": "", "versions": {}, "status": "finished", "bundle_bytes": 0}
    return summarise(reports, emulators=emulators, **facts, **more)


def cells_of(table):
    return {row.name: row.cells for row in table.rows}


def test_a_device_stands_beside_the_full_model(make_reports):
    table = holdings(summary_of(make_reports(1), {"default": COSTS}))
    assert table.columns == ["a device", "the full model"]
    cells = cells_of(table)
    assert cells["between the adapter's blocks"] == [("791,552", "50 %"), ("1,583,104", "")]
    assert cells["fetched once"] == [("7.00 MiB", "70 %"), ("10.0 MiB", "")]
    assert cells["memory to train"] == [("20.0 MiB", "50 %"), ("40.0 MiB", "")]
    assert cells["activations"] == [("11.0 MiB", "50 %"), ("22.0 MiB", "")]
    assert cells["one training step"] == [("0.158 s", "79 %"), ("0.200 s", "")]
    assert cells["perplexity before tuning"] == [("57.4", "1.11 times"), ("46.6", "")]
    assert [row.name for row in table.rows if row.part] == ["weights", "gradients", "optimiser", "activations"]


def test_several_emulators_are_columns(make_reports):
    small = {**COSTS, "emulator_parameters": 15_831, "step_seconds": None}
    table = holdings(summary_of(make_reports(1), {"default": COSTS, "kept_1": small}))
    assert table.columns == ["most devices", "devices with kept_1", "the full model"]
    cells = cells_of(table)
    assert cells["between the adapter's blocks"][1] == ("15,831", "1.00 %")
    assert cells["one training step"][1] == ("—", "")


def test_what_was_not_measured_has_no_row(make_reports):
    measured = ("client_memory_bytes", "client_memory", "full_memory_bytes", "full_memory", "step_seconds")
    without = {**COSTS, **dict.fromkeys((*measured, "full_step_seconds"))}
    rows = [row.name for row in holdings(summary_of(make_reports(1), {"default": without})).rows]
    assert rows == ["between the adapter's blocks", "fetched once", "perplexity before tuning"]
    assert holdings(summary_of(make_reports(1), {})) is None
    assert holdings(summary_of([], {"default": without})).rows[-1].name == "fetched once"


def test_the_summary_has_one_emulator_or_several(make_reports):
    reports = make_reports(1)
    one = summary_of(reports, {"default": COSTS})
    assert one["emulator"] == COSTS
    assert "emulators" not in one
    several = summary_of(reports, {"default": COSTS, "kept_1": {**COSTS, "kept_share": 0.25}})
    assert several["emulator"] == several["emulators"]["default"] == COSTS
    assert several["emulators"]["kept_1"]["kept_share"] == 0.25
    assert summary_of(reports, None)["emulator"] == {}


def test_a_curious_client_is_told_in_words_numbers_and_curves(make_reports):
    reports = make_reports(3)
    summary = summary_of(reports, {"default": COSTS}, baselines={"extraction": CURIOUS})
    plug_in = summary["metrics"]["plug_in"]["loss"]
    assert summary["extraction_margin"] == 3.5 - plug_in
    words = in_words(summary)
    assert words.endswith(
        "An honest-but-curious client that fine-tunes all it holds reaches 33.1 (the plug-in is 12 % below)."
    )
    level = [line for line in draw(reports, summary)["learning_curves"].axes[0].lines if 33.1 in line.get_ydata()]
    assert len(level) == 1
    lost = {**CURIOUS, **dict.fromkeys(("loss", "perplexity", "accuracy", "tokens"))}
    summary = summary_of(reports, {"default": COSTS}, baselines={"extraction": lost})
    assert "extraction_margin" not in summary
    assert "curious" not in in_words(summary)
    draw(reports, summary)


def test_the_page_shows_the_table_the_emulator_and_the_probe(make_reports, tmp_path):
    blocks = [{"source": 1, "place": 1, "changes": []}]
    plain = {"builder": {}, "count": 4, "adapter": [0, 3], "blocks": blocks, "notes": []}
    write_json(tmp_path / "emulator.json", {"default": plain, "kept_1": plain})
    reports = make_reports(1)
    summary = summary_of(reports, {"default": COSTS}, baselines={"extraction": CURIOUS})
    page = write_report(tmp_path, reports, summary, settings={}).read_text()
    for told in (
        "What a device holds, and what it costs",
        "791,552",
        "extraction margin",
        "zero-shot ratio",
        "&lt;b&gt;ann&lt;/b&gt;, 40 steps",
        "What stands in for each block (kept_1)",
    ):
        assert told in page
    assert "<b>ann" not in page
    assert {"emulator", "emulator_kept_1"} <= {path.stem for path in (tmp_path / "figures").glob("*.png")}


def test_a_page_is_made_whatever_stands_in_the_emulators_file(tmp_path):
    for text in ("", "[1]", "{"):
        (tmp_path / "emulator.json").write_text(text)
        page = write_report(tmp_path, [], summary_of([], None), settings={}).read_text()
        assert "What a device holds" not in page
        assert "What stands in" not in page
