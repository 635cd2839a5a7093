import copy
import io
import math
import random

import pytest
from rich.console import Console

from fedpeat.core import ClientFailure, Evaluation, RoundReport

HOSTILE_NAMES = (
    "<script>alert(1)</script>",
    "$\\frac{1}{0$ & 'quoted' \"name\"",
    "\x1b[2J\x07bell\nline\ttab",
    "[bold red]markup[/bold red] [/]",
    "哈姆雷特 \u202e reversed \udc80",
    "x" * 300,
    "",
    "{{ 7 * 7 }} {% raw %} | `code` | --",
)


def _evaluations(number, rounds, models):
    tuned = 3.40 + 0.44 * math.exp(-3 * number / max(rounds, 1))
    losses = {
        "full_zero_shot": 3.842,
        "emulator_zero_shot": 4.05,
        "emulator_tuned": tuned + 0.21 * math.exp(-4 * number / max(rounds, 1)),
        "plug_in": tuned - 0.045 * min(number, 1),
    }
    return {name: Evaluation(losses[name], math.exp(-losses[name] / 3.1), 48_000) for name in models}


def _clients(names, number, rng):
    clients = {}
    for name in names:
        size = 200 + 37 * (sum(map(ord, name)) % 23)
        clients[name] = {
            "weight": float(size),
            "train_loss": 3.1 + 0.6 * math.exp(-0.4 * number) + (sum(map(ord, name)) % 7) / 10 + rng.gauss(0, 0.03),
            "train_tokens": 10 * 8 * 128.0,
            "train_rows": float(size),
            "train_seconds": 1.3 + rng.random() / 5,
            "bytes_down": 1_179_648.0,
            "bytes_up": 1_179_648.0,
            "delta_norm": 0.8,
            "peak_rss_mib": 512.0 + rng.random(),
        }
    return clients


def _report(number, *, rounds, sampled, models, evaluate_every, failures, rng):
    evaluated = number in (0, rounds) or number % evaluate_every == 0
    clients = _clients(sampled if number else (), number, rng)
    failed = tuple(ClientFailure(name, number, kind, reason) for name, kind, reason in failures.get(number, ()))
    seconds = {
        "train": 6.2 + rng.random() if number else 0.0,
        "evaluate": 2.1 * evaluated,
        "wire": 0.11,
        "overhead": 0.05,
    }
    moved = sum(int(metrics["bytes_up"]) for metrics in clients.values())
    return RoundReport(
        round=number,
        clients=clients,
        failures=failed,
        evaluations=_evaluations(number, rounds, models) if evaluated else {},
        bytes_down=moved,
        bytes_up=moved,
        seconds={"total": sum(seconds.values()), **seconds},
        metrics={"train_loss": 3.5, "update_norm": 0.9, "tokens_per_second": 8123.0, "peak_rss_mib": 801.5},
    )


def _make_reports(
    rounds=5,
    *,
    clients=("sympy", "networkx", "sqlalchemy", "pandas", "ray", "matplotlib", "aiohttp", "fsspec"),
    per_round=None,
    models=("full_zero_shot", "emulator_zero_shot", "emulator_tuned", "plug_in"),
    evaluate_every=1,
    failures=None,
    seed=0,
):
    rng = random.Random(seed)
    return [
        _report(
            number,
            rounds=rounds,
            sampled=sorted(rng.sample(list(clients), per_round or len(clients))),
            models=models,
            evaluate_every=evaluate_every,
            failures=failures or {},
            rng=rng,
        )
        for number in range(rounds + 1)
    ]


@pytest.fixture
def terminal():
    """Where a command writes: `terminal.file.getvalue()` is what a person would read."""
    return Console(file=io.StringIO(), width=200)


@pytest.fixture
def make_reports():
    """Return a generator of the reports of a believable run."""
    return _make_reports


@pytest.fixture
def hostile_names():
    """Return client names that break careless software."""
    return HOSTILE_NAMES


@pytest.fixture(scope="module")
def base():
    """The settings that nobody changed."""
    from simulations.settings import load_settings

    return load_settings()


@pytest.fixture
def settings(base):
    """Settings with single keys changed: `settings(peft={"kind": "full"})`."""

    def make(**groups):
        made = copy.deepcopy(base)
        for group, keys in groups.items():
            made[group].update(keys)
        return made

    return make
