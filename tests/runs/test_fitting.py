"""Response curves fitted to real runs of a miniature model."""

import pytest

from fedpeat.control import read_fit
from simulations.control_command import control

MENU = ("control.menu.kept_blocks=[1]", "control.menu.ranks=[2,8]", "control.menu.steps=[1,2]")


@pytest.mark.slow
def test_fitted_to_runs_and_used_by_another(run, tiny, tmp_path, capsys):
    given = tiny("strategy=flex_lora", *MENU)
    words = ["fit", f"folder={tmp_path}", "runs=5", "held_out=2", *given]
    assert control(words) == 0
    assert "7/7" in capsys.readouterr().out
    found = read_fit(tmp_path / "curves.json")
    assert found.facts["runs"] == 5
    assert found.facts["fitted_to"]["clients"] == 3
    assert found.facts["residual"] < found.curves.start
    assert control(words) == 0
    assert "7 finished before" in capsys.readouterr().out
    ran = run("control=greedy", "devices=cell", "strategy=flex_lora", *MENU, f"control.curves={tmp_path}/curves.json")
    assert len(ran.rounds) == 3
