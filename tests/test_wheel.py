"""The wheel, installed in a clean environment, runs from another folder."""

import json
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", folder, ROOT]
    subprocess.run(command, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_holds_three_packages_the_conf_and_the_model(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"fedpeat", "strategies", "simulations"}
    assert "simulations/conf/config.yaml" in names
    assert "fedpeat/models/tiny_docs/model.safetensors" in names
    assert "fedpeat/control/packaged/policy.safetensors" in names
    assert "fedpeat/control/curves.json" in names
    assert not [name for name in names if name.rsplit("/", 1)[-1].startswith(("test_", "conftest"))]


@pytest.mark.slow
def test_the_installed_wheel_runs_from_another_folder(wheel, tmp_path):
    """Dependencies come from this environment by a path file: what is tested is our own wheel."""
    home = tmp_path / "env"
    venv.create(home, with_pip=True)
    site = next((home / "lib").glob("python*")) / "site-packages"
    python = home / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", wheel], check=True, capture_output=True)
    ours = next(Path(path) for path in sys.path if path.endswith("site-packages"))
    # Plain entries after the new environment's own, without this checkout's editable hook.
    (site / "dependencies.pth").write_text(f"{ours}\n")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    where = subprocess.run(
        [python, "-c", "import simulations, fedpeat; print(simulations.__file__, fedpeat.__file__)"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert all(str(home) in path for path in where)
    run = subprocess.run(
        [home / "bin" / "fedpeat", "simulate", "experiment=smoke", "hydra.run.dir=out"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["status"] == "finished"
