"""Speed and memory of simulated federations, side by side with the bare PyTorch loop.

usage: python benchmarks/simulation.py [--smoke] [--out FILE] [--folder FOLDER] [section ...]
"""

import argparse
import importlib
import json
import os
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Run as a file, Python would look for our modules in this folder: look in the one above, where workers look too.
_ROOT = str(Path(__file__).resolve().parent.parent)
sys.path[:] = [_ROOT, *(entry for entry in sys.path if entry not in {_ROOT, str(Path(__file__).resolve().parent)})]

SECTIONS = {
    "steps": "local training steps a second, beside a bare PyTorch loop",
    "visits": "the same with one step a visit, beside the FlowerTune shape",
    "overhead": "framework time of a round with clients that do nothing",
    "population": "10,000 clients with 10 sampled, beside 100",
    "memory": "the driver's peak memory with 100 and 1,000 updates of 10 MB",
    "shared": "memory of two workers with one large emulator",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the sections asked for, print a table each; return 0."""
    asked = _parse(arguments)
    from benchmarks.processes import quiet

    quiet()
    from rich.console import Console

    from benchmarks.tables import show

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    result = {"command": _command(arguments), "smoke": asked.smoke, "machine": machine(), "sections": {}}
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="fedpeat-benchmark-", dir=asked.folder, ignore_cleanup_errors=True) as name:
        for section in asked.sections or SECTIONS:
            console.print(f"{section}: {SECTIONS[section]} ...", style="dim")
            started = time.perf_counter()
            measured = importlib.import_module(f"benchmarks.{section}").measure(Path(name), smoke=asked.smoke)
            plain = {**measured.to_json(), "seconds": time.perf_counter() - started, "load_after": os.getloadavg()}
            result["sections"][section] = plain
            show(console, plain)
    result["seconds"] = time.perf_counter() - began
    console.print(f"{result['seconds']:.0f} s on {result['machine']['cpu']}, {result['machine']['cores']} cores")
    if asked.out:
        asked.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks/simulation.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sections", nargs="*", metavar="section", help=f"any of {', '.join(SECTIONS)}; all by default")
    parser.add_argument("--smoke", action="store_true", help="every section in a minimal form: does it run?")
    parser.add_argument("--out", type=Path, help="also write everything as JSON")
    parser.add_argument("--folder", type=Path, help="where scratch files go; a temporary folder by default")
    asked = parser.parse_args(arguments)
    for section in asked.sections:
        if section not in SECTIONS:
            parser.error(f"no section {section!r}; choose from {', '.join(SECTIONS)}")
    return asked


def _command(arguments: Sequence[str] | None) -> str:
    return shlex.join(["python", "benchmarks/simulation.py", *(sys.argv[1:] if arguments is None else arguments)])


def machine() -> dict[str, Any]:
    """Return what the figures depend on: hardware, versions, and how busy the machine was."""
    import psutil

    from simulations.run import versions

    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {
        "cpu": name,
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.system(),
        "versions": versions(),
        "load_before": os.getloadavg(),
    }


if __name__ == "__main__":
    sys.exit(main())
