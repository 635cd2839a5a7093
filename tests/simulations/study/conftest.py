import json

import pytest

from simulations.compare.grid import known_names
from simulations.study.again import read_planned
from simulations.study.axes import read_study
from simulations.study.cells import title_of

AXES = ("selection", "kept", "compression", "distillation", "unfreeze")


@pytest.fixture(scope="session")
def asked():
    """What words ask for: `asked("selection=uniform", "kept=2")`."""
    known = known_names()
    return lambda *words: read_study(words, known=known)


def _summary(loss, *, emulated, memory, share, seed, status="finished", full=4.0, **also):
    import math

    def of(value):
        good = value is not None and math.isfinite(value)
        right = 1 / (1 + value) if good else None
        return {"loss": value if good else None, "perplexity": math.exp(value) if good else None, "accuracy": right}

    models = {"plug_in": loss, "emulator_tuned": emulated, "full_zero_shot": full, "emulator_zero_shot": full + share}
    costs = {
        "emulator_parameters": 1000 * share,
        "middle_parameters": 1000,
        "kept_share": share,
        "bundle_bytes": 4096 + 4096 * share,
        "full_bytes": 8192,
        "client_memory_bytes": memory,
        "full_memory_bytes": 4 * 2**20,
        "step_seconds": 0.1 + seed / 100,
        "full_step_seconds": 0.5,
        "zero_shot_ratio": 2.0,
    }
    margin = {"privacy_margin": emulated - loss} if loss is not None and math.isfinite(loss) else {}
    return {
        "status": status,
        "rounds": 2,
        "evaluated_round": 2,
        "metrics": {name: of(value) for name, value in models.items()},
        "baselines": {},
        "emulator": costs,
        "bytes": {"down": 10, "up": 10, "bundle": 4096},
        "seconds": {"total": 5.0, "train": 1.0, "evaluate": 1.0},
        "peak_rss_mib": 500.0,
        "peak_gpu_mib": 0.0,
        "clients_failed": 0,
        "versions": {"torch": "2"},
        "config_hash": "abc",
        **margin,
        **also,
    }


@pytest.fixture
def study_folder(tmp_path):
    """A maker of the folder of a study that ran: `study_folder(cells, axes)` gives a folder.

    A cell is `(values, role, {seed: loss})` and more keywords of a run's summary: `emulated`, `memory`, `share`, ...
    """

    def make(cells, axes, *, folder=tmp_path / "made", metric="loss", notes=()):
        plan = {"kind": "study", "title": "made up", "words": [], "metric": metric, "axes": axes, "notes": list(notes)}
        plan |= {"roles": {}, "cells": []}
        for at, (values, role, losses, more) in enumerate(cells):
            for seed, loss in losses.items():
                name = f"cell{at}-{seed}"
                plan["roles"][name] = role
                label = title_of(values)
                plan["cells"].append({"name": name, "values": values, "seed": seed, "label": label})
                place = folder / "cells" / name
                place.mkdir(parents=True)
                (place / "config.yaml").write_text(json.dumps({"seed": seed, "emulator": {"kept_blocks": at}}))
                if isinstance(loss, str):
                    (place / "failure.json").write_text(json.dumps({"kind": "died", "reason": loss}))
                    continue
                own = {"emulated": loss + 0.1, "memory": 2**20, "share": 0.5, **more}
                own["emulated"] = loss + own.pop("margin") if "margin" in own else own["emulated"]
                (place / "summary.json").write_text(json.dumps(_summary(loss, seed=seed, **own)))
        (folder / "plan.json").write_text(json.dumps(plan))
        return folder

    return make


@pytest.fixture
def made(study_folder):
    """Two selections at two depths with three seeds, and the whole model: made up, so that numbers are known."""
    cells = []
    for selection, step in (("uniform", 0.0), ("cka", 0.1)):
        for kept, share in (("2", 0.25), ("4", 0.5)):
            losses = {seed: 3.5 + step - share / 5 + seed / 10 + (seed % 2) * share / 50 for seed in range(3)}
            more = {"share": share, "memory": (1 + share + step) * 2**20, "margin": -0.02 if kept == "2" else 0.05}
            cells.append(({"selection": selection, "kept": kept}, "setup", losses, more))
    for name, role, step in (("whole model, LoRA", "whole", 0.2), ("whole model, full", "full", 0.3)):
        losses = {seed: 3.5 - step + seed / 10 for seed in range(3)}
        cells.append(({"selection": name, "kept": "—"}, role, losses, {"memory": 4 * 2**20, "margin": 0.0}))
    return study_folder(cells, {"selection": ["uniform", "cka"], "kept": ["2", "4"]})


@pytest.fixture
def read():
    return read_planned
