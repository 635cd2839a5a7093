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


@pytest.mark.slow
def test_the_benchmark_of_devices_runs(tmp_path):
    costs, brings, memory = measured(tmp_path, "devices.py", "--small", "--device", "cpu")["sections"]
    bare, full, lora, adapter, emulated, gradients, last, kept, int8 = costs["rows"]
    assert all(row["s/step"] > 0 and row["peak MiB"] > 0 for row in costs["rows"])
    # A device's bytes and what is counted do not depend on the machine.
    assert full["sends MiB/round"] == full["receives MiB"] == bare["receives MiB"]
    assert full["sends MiB/round"] > adapter["sends MiB/round"] > lora["sends MiB/round"] > emulated["sends MiB/round"]
    assert lora["receives MiB"] > emulated["receives MiB"] == last["receives MiB"] > int8["receives MiB"]
    assert full["counted MiB"] > gradients["counted MiB"] > emulated["counted MiB"] > last["counted MiB"]
    assert brings["facts"]["hidden states kept, MiB"] * 2**20 == 128 + 2 * 16 * 64 * 4  # a batch of 2 rows, fp32
    assert len(memory["rows"]) == len(costs["rows"]) - 1
    assert kept["counted MiB"] == last["counted MiB"]


@pytest.mark.slow
def test_the_benchmark_of_four_systems_runs(tmp_path):
    plot = tmp_path / "plot.png"
    systems = ("--systems", "fed_ft", "fed_peft", "fixed", "capability")
    found = measured(tmp_path, "four_systems.py", "--small", "--jobs", "1", *systems, "--plot", str(plot))
    (section,) = found["sections"]
    full, peft, fixed, capable = section["rows"][-4:]
    assert full["times as fast"] == full["times less traffic"] == 1
    assert full["MB"] > peft["MB"] > fixed["MB"] > 0
    assert capable["perplexity"] == fixed["perplexity"] == full["perplexity"]
    assert len(section["rows"]) == 3 * 4
    assert plot.stat().st_size > 0
    for points in (points for seeds in found["runs"].values() for points in seeds.values()):
        assert [point["round"] for point in points] == [0, 1, 2]
        assert points[0]["seconds"] == points[0]["bytes"] == 0 < points[1]["seconds"] < points[2]["seconds"]


@pytest.mark.slow
def test_the_benchmark_of_modelled_memory_runs(tmp_path):
    (section,) = measured(tmp_path, "modelled.py", "--small")["sections"]
    emulated, lora, full = section["rows"]
    assert emulated["modelled MiB"] < lora["modelled MiB"] < full["modelled MiB"]
    assert all(row["measured MiB"] > row["weights MiB"] > 0 for row in section["rows"])


@pytest.mark.slow
def test_the_benchmark_of_control_runs(tmp_path):
    played, chosen, trained = measured(tmp_path, "control.py", "--small")["sections"]
    assert len(played["rows"]) == 4
    assert all(row["steps/s"] > 0 for row in played["rows"])
    assert [row["controller"] for row in chosen["rows"]] == ["sabppo", "capability", "random", "greedy"]
    assert trained["rows"][0]["rounds played"] >= 200
