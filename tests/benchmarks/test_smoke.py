"""Every benchmark runs, in its smallest form; what it measures there says nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECTIONS = ("steps", "visits", "overhead", "population", "memory", "shared")


def measured(tmp_path, script, *arguments):
    out = tmp_path / "out.json"
    command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments, "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return json.loads(out.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("section", SECTIONS)
def test_a_section_of_the_simulation_benchmark_runs(section, tmp_path):
    found = measured(tmp_path, "simulation.py", "--smoke", section)
    assert set(found["sections"]) == {section}
    assert found["sections"][section]["seconds"] > 0


@pytest.mark.slow
def test_the_aggregation_benchmark_runs(tmp_path):
    assert measured(tmp_path, "aggregation.py", "--small")
