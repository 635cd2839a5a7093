import io
import json

import pytest
from rich.console import Console

from simulations.study.command import study


@pytest.fixture
def terminal():
    return Console(file=io.StringIO(), width=200)


@pytest.mark.slow
def test_a_whole_study_with_every_axis(tiny, run, open_run, tmp_path, terminal):
    measured = ("rounds=1", "evaluation.costs=true")
    words = [*tiny(*measured, without=("emulator.kept_blocks", "export", "report")), "data.public_share=0.2"]
    axes = ["selection=uniform,cka", "kept=2,0.75", "compression=none,low_rank+int8", "distillation=0,2"]
    more = ["distilled.batch_size=2", "unfreeze=none,norm", "cka.rows=8", "extraction=true", "federated=false"]
    command = ["emulator", *axes, *more, *words, "seeds=1", "jobs=2", f"folder={tmp_path}"]
    assert study(command, console=terminal) == 0, terminal.file.getvalue()
    plain = json.loads((tmp_path / "study.json").read_text())
    # Blocks of cka's emulator stand at several places: there is nowhere to map back to what they learnt.
    assert len(plain["setups"]) == 2 * 2 * 2 * 2 + 2 * 2 * 2
    assert len(plain["references"]) == 2
    for setup in plain["setups"]:
        known = {
            "plug_in",
            "emulated",
            "privacy_margin",
            "transfer_gap",
            "extraction",
            "client_memory_bytes",
            "kept_share",
        }
        assert known <= {name for name, found in setup["measures"].items() if found}, setup["label"]
    assert {path.stem for path in (tmp_path / "figures").glob("*.png")} == {
        *("quality", "heat_unfreeze", "heat_compression", "heat_distillation", "memory", "margin"),
    }
    assert (tmp_path / "study.html").read_text().count("<svg") == 6


@pytest.mark.slow
def test_a_setup_is_the_run_that_its_settings_give_alone(tiny, run, open_run, tmp_path, terminal):
    words = tiny("rounds=1", without=("emulator.kept_blocks", "export", "report"))
    command = ["emulator", "selection=uniform", "kept=1", "unfreeze=none,mlp", "policy=discard", *words]
    assert study([*command, "seeds=[3]", "jobs=1", f"folder={tmp_path}"], console=terminal) == 0
    plain = json.loads((tmp_path / "study.json").read_text())
    found = {each["unfreeze"]: each for each in plain["runs"] if each["role"] == "setup"}
    given = ("rounds=1", "emulator.kept_blocks=1", "client.unfreeze_policy=discard", "seed=3")
    for text, also in (("none", ()), ("mlp", ("client.unfreeze=[mlp]",))):
        alone = run(*given, *also)
        cell = open_run(tmp_path / found[text]["folder"])
        assert cell.losses == alone.losses
        assert cell.digest == alone.digest
    whole = next(each for each in plain["runs"] if each["role"] == "whole")
    own = run("rounds=1", "emulator.kept_blocks=0", "model.split.blocks=all", "seed=3")
    assert open_run(tmp_path / whole["folder"]).losses["plug_in"] == own.losses["plug_in"]
    gap = found["none"]["loss"] - whole["loss"]
    assert found["none"]["transfer_gap"] == pytest.approx(gap)
