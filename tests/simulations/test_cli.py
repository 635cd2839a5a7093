import os
import subprocess
import sys

import pytest

from fedpeat.core import ConfigError, EngineError
from simulations import cli


def run(*arguments, cwd=None, **environment):
    return subprocess.run(
        [sys.executable, "-m", "simulations.cli", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env={**os.environ, **environment},
    )


def test_an_error_is_told_on_one_screen_with_an_exit_code(capsys):
    def fail():
        raise ConfigError("cannot do x", "it is y", "do z")

    assert cli.guarded(fail) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.strip() for line in lines] == ["error: cannot do x", "found: it is y", "do: do z"]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (EngineError("a", "b", "c"), 1),
        (MemoryError(), 1),
        (OSError(28, "No space left on device"), 1),
        (ZeroDivisionError("boom"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_other_ends_have_their_codes(error, code, capsys):
    def fail():
        raise error

    assert cli.guarded(fail) == code
    assert "Traceback" not in capsys.readouterr().err


def test_a_traceback_is_shown_when_asked_for(capsys, monkeypatch):
    monkeypatch.setenv("FEDPEAT_DEBUG", "1")
    assert cli.guarded(lambda: 1 // 0) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_usage_needs_nothing(capsys):
    cli.main(["--help"])
    assert "fedpeat simulate" in capsys.readouterr().out


def test_unknown_commands_are_told():
    result = run("simulat")
    assert result.returncode == 2
    assert "did you mean 'simulate'" in result.stderr


def test_help_lists_groups_and_keys(tmp_path):
    result = run("simulate", "--help", cwd=tmp_path)
    assert result.returncode == 0
    for word in ("peft: full, hf, lora", "engine: ray, serial", "learning_rate", "experiment"):
        assert word in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_cfg_job_prints_the_config_and_makes_nothing(tmp_path):
    result = run("simulate", "--cfg", "job", "peft.rank=3", cwd=tmp_path)
    assert result.returncode == 0
    assert "rank: 3" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_misspelt_key_is_told_before_anything_runs(tmp_path):
    result = run("simulate", "client.lerning_rate=0.1", cwd=tmp_path)
    assert result.returncode == 2
    assert "did you mean 'client.learning_rate'" in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []
