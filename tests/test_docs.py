"""What the docs say is true: every command and Python block runs, generated pages are current, the tree is as drawn."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "bash")], ids=lambda page: page.name)
def test_every_command_runs(page, tmp_path):
    script = "set -euo pipefail\n" + "\n".join(blocks(page, "bash"))
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ["bash", "-c", script]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_every_python_block_runs(page, tmp_path):
    chosen = [block for block in blocks(page, "python") if "MyForCausalLM" not in block]
    result = subprocess.run(
        [sys.executable, "-c", "\n".join(chosen)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]


def test_generated_pages_are_current():
    from simulations.documentation import configuration_page, control_page, metrics_page, strategies_page

    assert (ROOT / "docs" / "metrics.md").read_text() == metrics_page(), "run make docs"
    assert (ROOT / "docs" / "configuration.md").read_text() == configuration_page(ROOT / "conf"), "run make docs"
    page = (ROOT / "docs" / "strategies.md").read_text()
    assert page == strategies_page(page, ROOT / "conf"), "run make docs"
    page = (ROOT / "docs" / "control.md").read_text()
    assert page == control_page(page), "run make docs"


def test_the_rooms_drawn_in_the_architecture_are_the_rooms_there_are():
    text = (ROOT / "docs" / "architecture.md").read_text()
    drawn = set(re.findall(r"^\| `(fedpeat/\w+)` \|", text, flags=re.MULTILINE))
    there = {f"fedpeat/{path.parent.name}" for path in (ROOT / "fedpeat").glob("*/__init__.py")}
    assert drawn == there


def test_a_rooms_question_is_its_first_line():
    text = (ROOT / "docs" / "architecture.md").read_text()
    for room, question in re.findall(r"^\| `(fedpeat/\w+)` \| (.+\?) \|$", text, flags=re.MULTILINE):
        first = (ROOT / room / "__init__.py").read_text().splitlines()[0].strip('"')
        assert first == question[0].upper() + question[1:], room


def test_links_lead_somewhere():
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_tests_that_are_named_are_there():
    named = {name for page in PAGES for name in re.findall(r"`(tests/[\w/]+\.py(?:::\w+)?)`", page.read_text())}
    assert named
    for name in sorted(named):
        path, _, test = name.partition("::")
        assert (ROOT / path).is_file(), name
        assert not test or f"def {test}(" in (ROOT / path).read_text(), name


def test_the_tree_in_the_readme_is_true():
    tree = re.search(r"^```\nfedpeat/.*?^```", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)[0]
    drawn, parent = set(), ""
    for line in tree.splitlines()[1:-1]:
        name = line.split()[0].rstrip("/")
        parent = name if not line.startswith(" ") else parent
        drawn.add(name if not line.startswith(" ") else f"{parent}/{name}")
    for path in drawn:
        assert (ROOT / path).is_dir(), path
    rooms = {f"fedpeat/{path.parent.name}" for path in (ROOT / "fedpeat").glob("*/__init__.py")}
    assert rooms <= drawn
