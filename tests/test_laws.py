"""Each import law is held: a planted violation is caught."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LINT = Path(sys.executable).parent / "lint-imports"

VIOLATIONS = {
    "a peer is no stranger": ("fedpeat/wire/planted.py", "import fedpeat.data.rows", "floors"),
    "an import points up": ("fedpeat/core/planted.py", "import fedpeat.models.blocks", "floors"),
    "the library sees the application": ("fedpeat/server/planted.py", "import strategies.recipes", "floors"),
    "a strategy sees models": ("strategies/planted.py", "import fedpeat.models.blocks", "strategies see values"),
    "Flower in the core": ("fedpeat/core/planted.py", "import flwr.app", "Flower stays"),
    "Hydra in the library": ("fedpeat/data/planted.py", "import hydra", "Hydra, OmegaConf and Ray"),
    "Ray in a strategy": ("strategies/planted.py", "import ray", "Hydra, OmegaConf and Ray"),
    "a second door to peft": ("fedpeat/client/planted.py", "import peft", "one door"),
    "wire sees devices": ("fedpeat/wire/planted.py", "import fedpeat.devices.costs", "only control sees devices"),
    "peft sees models": ("fedpeat/peft/planted.py", "import fedpeat.models.blocks", "see models"),
}


def lint(folder):
    return subprocess.run([LINT, "--no-cache"], cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("laws")
    for name in ("fedpeat", "strategies", "simulations"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.safetensors", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


@pytest.mark.slow
def test_the_tree_keeps_its_laws(copy):
    result = lint(copy)
    assert result.returncode == 0, result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", VIOLATIONS)
def test_a_planted_violation_is_caught(copy, name):
    path, line, law = VIOLATIONS[name]
    planted = copy / path
    planted.write_text(f"{line}\n")
    try:
        result = lint(copy)
    finally:
        planted.unlink()
    broken = [row for row in result.stdout.splitlines() if "BROKEN" in row]
    assert result.returncode == 1, result.stdout
    assert any(law in row for row in broken), broken
