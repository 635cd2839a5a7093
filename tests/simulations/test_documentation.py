import pytest

from fedpeat.core import METRICS, ConfigError
from simulations.documentation import (
    BEGIN,
    END,
    Setting,
    configuration_page,
    control_page,
    metrics_page,
    read_page,
    strategies_page,
    write_pages,
)

MAIN = """\
# What can be chosen.
#   run group=option
defaults:
  - emulator: uniform
  - data: null
  - _self_
  - override hydra/job_logging: none

rounds: 5  # rounds of the federation
path: ???
server:
  train: "off"  # off | on
  # Peak, in steps <= 3.
  # Null: as a client's.
  rate: null
  options: {a: 1, b: [2]}  # keywords

  # Both above
  nested:
    deep: ','  # and beside
  list:  # several
    - a
    - b
  text: |-
    more
    lines
hydra:
  run:
    dir: outputs/${now:%Y}  # folder of a run
  job:
    chdir: false
"""


def write(folder, **files):
    for name, text in files.items():
        path = folder / (name.replace("__", "/") + ".yaml")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder


def test_metrics_page_is_up_to_date(pytestconfig):
    page = (pytestconfig.rootpath / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert page == metrics_page(), "run `make docs`"


def test_metrics_page_has_every_metric():
    lines = metrics_page().splitlines()
    for metric in METRICS:
        row = next(line for line in lines if line.startswith(f"| `{metric.name}` |"))
        assert f"| {metric.unit} |" in row
        assert f"`{metric.where}`" in row


def test_a_file_is_read_with_its_comments(tmp_path):
    write(tmp_path, config=MAIN)
    page = read_page(tmp_path / "config.yaml")
    assert page.heading == ("What can be chosen.", "  run group=option")
    assert page.choices == {"emulator": "uniform", "data": "null", "hydra/job_logging": "none"}
    assert page.settings == (
        Setting("rounds", "5", "rounds of the federation"),
        Setting("path", "???", ""),
        Setting("server.train", "off", "off | on"),
        Setting("server.rate", "null", "Peak, in steps <= 3. Null: as a client's."),
        Setting("server.options", "{a: 1, b: [2]}", "keywords"),
        Setting("server.nested.deep", "','", "and beside"),
        Setting("server.list", "- a …", "several"),
        Setting("server.text", "|- …", ""),
        Setting("hydra.run.dir", "outputs/${now:%Y}", "folder of a run"),
    )


def test_the_page_lists_groups_options_keys_defaults_and_comments(tmp_path):
    write(
        tmp_path,
        config=MAIN,
        emulator__uniform="# Even distances.\n_target_: x.y\nkept_blocks: 4  # how many\n",
        emulator__first="# The first ones.\n_target_: x.z\nkept_blocks: 4  # how many\nshare: 0.5  # of each\n",
        experiment__demo="# @package _global_\n# The main job:\n#   run experiment=demo\ndefaults:\n"
        "  - override /engine: ray\n\nrounds: 7\nserver:\n  train: full\n",
        other="# Another command.\nsteps: 9\n",
    )
    page = configuration_page(tmp_path)
    for text in (
        "| `rounds` | `5` | rounds of the federation |",
        "| `server.train` | `off` | off \\| on |",
        "### `emulator=uniform` (the default)\n\nEven distances.",
        "| `emulator.kept_blocks` | all | `4` | how many |",
        "| `emulator.share` | `first` | `0.5` | of each |",
        "### `experiment=demo`\n\nThe main job:\n\n    run experiment=demo\n\n"
        "Sets `engine=ray`, `rounds=7`, `server.train=full`.",
        "## `fedpeat other`\n\nAnother command.\n\n| key | default | meaning |",
    ):
        assert text in page
    assert "_target_" not in page
    assert "chdir" not in page


def test_every_row_of_a_table_has_as_many_cells_as_its_head(pytestconfig):
    columns = None
    for line in configuration_page(pytestconfig.rootpath / "conf").splitlines():
        bars = line.replace("\\|", "").count("|") if line.startswith("|") else None
        assert bars is None or columns is None or bars == columns
        columns = bars


def test_what_cannot_be_described_is_told(tmp_path):
    with pytest.raises(ConfigError, match=r"no config\.yaml"):
        configuration_page(tmp_path)
    for text in ("a: [", "- a\n- b\n"):
        write(tmp_path, config=text)
        with pytest.raises(ConfigError, match="cannot read"):
            configuration_page(tmp_path)


def test_an_empty_option_is_an_option(tmp_path):
    write(tmp_path, config=MAIN, emulator__nothing="# Chooses nothing.\n")
    assert "### `emulator=nothing`\n\nChooses nothing." in configuration_page(tmp_path)


def strategies_in(folder):
    rule = "_target_: strategies.general.fed_avg\nserver_learning_rate: 1.0  # eta\n"
    return write(folder, config=MAIN, strategy__fed_avg=f"# A mean.\n{rule}", strategy__twice=f"# Another.\n{rule}")


def test_pages_are_written(tmp_path):
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "strategies.md"
    page.write_text(f"# Kept\n\n{BEGIN}old table\n{END}\nKept too.\n", encoding="utf-8")
    (tmp_path / "docs" / "control.md").write_text(f"# Devices\n\n{BEGIN}old\n{END}", encoding="utf-8")
    write_pages(tmp_path / "docs", strategies_in(tmp_path / "conf"))
    assert "\n| `joules` | `float64` | " in (tmp_path / "docs" / "control.md").read_text(encoding="utf-8")
    assert (tmp_path / "docs" / "metrics.md").read_text(encoding="utf-8") == metrics_page()
    assert (tmp_path / "docs" / "configuration.md").read_text(encoding="utf-8").startswith("<!-- Written by")
    written = page.read_text(encoding="utf-8")
    assert written.startswith(f"# Kept\n\n{BEGIN}")
    assert written.endswith(f"{END}\nKept too.\n")
    assert "old table" not in written
    rows = [line for line in written.splitlines() if line.startswith("| `")]
    assert [row.split("|")[1].strip() for row in rows] == ["`fed_avg`", "`twice`"]
    assert all("| 1.00 / 1.00 |" in row for row in rows)


def test_a_page_without_a_place_for_the_table_is_told(tmp_path):
    for text in ("# Strategies\n", BEGIN, END):
        with pytest.raises(ConfigError, match="no marks for it"):
            strategies_page(text, tmp_path)
        with pytest.raises(ConfigError, match="no marks for them"):
            control_page(text)
