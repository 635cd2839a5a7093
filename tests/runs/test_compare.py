import io
import json

import pytest
from rich.console import Console

from simulations.compare.command import compare


@pytest.fixture
def terminal():
    return Console(file=io.StringIO(), width=200)


@pytest.mark.slow
def test_a_cell_is_the_run_that_its_settings_give_alone(tiny, run, open_run, tmp_path, terminal):
    words = [*tiny("rounds=2"), "strategy=fed_avg,ffa_lora", "seeds=[0,3]", "jobs=1", f"folder={tmp_path}"]
    assert compare(words, console=terminal) == 0
    plain = json.loads((tmp_path / "comparison.json").read_text())
    assert {each["values"]["strategy"] for each in plain["variants"]} == {"fed_avg", "ffa_lora"}
    assert len(plain["runs"]) == 4
    for each in plain["runs"]:
        alone = run(f"strategy={each['strategy']}", f"seed={each['seed']}")
        cell = open_run(tmp_path / each["folder"])
        assert cell.losses == alone.losses
        assert cell.digest == alone.digest
        assert cell.summary["config_hash"] == alone.summary["config_hash"]
        assert not (cell.folder / "report.html").exists()
    halved = {each["values"]["strategy"]: each["up"] for each in plain["variants"]}
    assert halved["ffa_lora"] < halved["fed_avg"]
    assert "rounds to" in terminal.file.getvalue()


@pytest.mark.slow
def test_what_only_a_builder_refuses_is_a_failed_cell(tiny, tmp_path, terminal):
    words = [*tiny("rounds=1", "emulator.kept_blocks=2,99"), "seeds=1", f"folder={tmp_path}"]
    assert compare(words, console=terminal) == 1
    runs = json.loads((tmp_path / "comparison.json").read_text())["runs"]
    assert [(each["emulator.kept_blocks"], each["status"]) for each in runs] == [("2", "finished"), ("99", "failed")]
    assert "99" in runs[1]["reason"]
    assert "failed: kept_blocks 99, seed 0" in terminal.file.getvalue()


@pytest.mark.slow
def test_a_dry_run_measures_the_bytes_of_each_variant(tiny, run, tmp_path, terminal):
    words = [*tiny("rounds=3"), "peft.rank=2,4", "seeds=1", f"folder={tmp_path / 'new'}", "--dry-run"]
    assert compare(words, console=terminal) == 0
    text = terminal.file.getvalue()
    assert "measured in" in text
    assert not (tmp_path / "new").exists()
    from simulations.report.wording import size

    for rank in (2, 4):
        moved = run(f"peft.rank={rank}", "rounds=3").summary["bytes"]
        assert f"~ {size(moved['down'] + moved['up'])}" in text
