"""Curves are fitted to runs; the twin of the fast prediction is written out one device and round at a time."""

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest

from fedpeat.control import Curves, read_fit
from fedpeat.control.fit import BOUNDS, Trial, fit, foretold, spearman
from fedpeat.core import ConfigError

TRUE = Curves(start=3.2, least=2.9, gap=0.12, pace=0.25, unit_steps=2, steps=0.7, rank=0.2, apart=0.03)


def trial(curves, *, kept=0.5, rank=1.0, steps=2.0, into=None, start=3.2, rounds=6, seed=0):
    """A run that went just as curves foretell; who takes part changes from round to round."""
    draw = np.random.default_rng(seed)
    shape = (rounds, 5)
    held = draw.dirichlet(np.ones(5))
    there = np.ones(shape, bool) if into is None else draw.permuted(np.arange(5) < into * np.ones(shape), axis=1)
    made = Trial(
        name="run",
        losses=np.full(rounds + 1, start),
        share=held * there,
        kept=np.broadcast_to(kept, shape) * np.ones(shape),
        rank=np.broadcast_to(rank, shape) * np.ones(shape),
        steps=np.broadcast_to(steps, shape) * np.ones(shape),
        seconds=np.arange(rounds + 1.0),
    )
    return made._replace(losses=twin(curves, made))


def twin(curves, run):
    losses = [run.losses[0]]
    factor = run.losses[0] / curves.start
    for share, kept, rank, steps in zip(run.share, run.kept, run.rank, run.steps, strict=True):
        covered = math.fsum(share)
        if covered == 0:
            losses.append(losses[-1])
            continue
        did = [(t / curves.unit_steps) ** curves.steps * r**curves.rank for t, r in zip(steps, rank, strict=True)]
        mean = sum(d * s for d, s in zip(share, did, strict=True)) / covered
        left = 1 - sum(d * k for d, k in zip(share, kept, strict=True)) / covered
        floor = factor * (curves.least + curves.gap * left + curves.apart * math.log(1 / covered))
        goes = 1 - math.exp(-curves.pace * mean)
        losses.append(losses[-1] + goes * (floor - losses[-1]))
    return np.array(losses)


def design(curves, **more):
    """Runs that excite everything: plans that stay, and plans that change from device to device."""
    grid = [(k, r, t, n) for k in (0.125, 0.5, 1.0) for r in (0.25, 1.0) for t in (1, 4) for n in (2, 5)]
    runs = [trial(curves, kept=k, rank=r, steps=t, into=n, seed=at, **more) for at, (k, r, t, n) in enumerate(grid)]
    draw = np.random.default_rng(9)
    mixed = [
        {"kept": draw.choice([0.125, 0.5, 1.0], (6, 5)), "steps": draw.choice([1, 2, 4], (6, 5)), "into": 3}
        for _ in range(6)
    ]
    return runs + [trial(curves, seed=100 + at, **one, **more) for at, one in enumerate(mixed)]


def test_known_parameters_are_found_again():
    found = fit(design(TRUE), unit_steps=2)
    for name in BOUNDS:
        assert getattr(found.curves, name) == pytest.approx(getattr(TRUE, name), rel=1e-3), name
    assert found.residual < 1e-6 < found.spread
    assert found.curves.start == pytest.approx(3.2)


def test_a_fit_is_the_same_each_time_and_noise_moves_it_by_about_its_deviations():
    draw = np.random.default_rng(3)
    noisy = [one._replace(losses=one.losses + np.r_[0, draw.normal(0, 0.002, 6)]) for one in design(TRUE)]
    found = fit(noisy, unit_steps=2)
    assert found == fit(noisy, unit_steps=2)
    assert found.residual == pytest.approx(0.002, rel=0.2)
    for name, off in found.deviations.items():
        assert abs(getattr(found.curves, name) - getattr(TRUE, name)) < 5 * off, name
        assert off < 0.3 * getattr(TRUE, name), name


def test_what_no_run_tells_has_no_bounds_to_its_error():
    same = [trial(TRUE, into=3, seed=at) for at in range(4)]
    found = fit(same, unit_steps=2)
    assert math.isinf(found.deviations["rank"])
    assert math.isinf(found.deviations["steps"])
    assert all(math.isfinite(off) for off in fit(design(TRUE), unit_steps=2).deviations.values())


def test_shorter_runs_and_fewer_devices_go_with_longer_ones():
    runs = design(TRUE)
    cut = runs[0]
    cut = cut._replace(
        **{name: getattr(cut, name)[:2, :] for name in ("share", "kept", "rank", "steps")}, losses=cut.losses[:3]
    )
    found = fit([cut, *runs[1:]], unit_steps=2)
    assert found.curves.pace == pytest.approx(TRUE.pace, rel=1e-3)


def test_foretold_is_the_slow_twin():
    run = design(TRUE)[-1]
    run = run._replace(share=np.where(np.arange(6)[:, None] == 3, 0.0, run.share))  # a round of nobody
    other = replace(TRUE, start=5.0, least=4.0, gap=0.9)
    assert foretold(other, run) == pytest.approx(twin(other, run), rel=1e-12)
    assert foretold(other, run)[3] == foretold(other, run)[4]


def test_too_few_rounds_are_refused():
    with pytest.raises(ConfigError, match="measured rounds"):
        fit([trial(TRUE, rounds=2)], unit_steps=2)


def test_ranks_by_hand():
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    # Ranks 1, 2.5, 2.5, 4 and 1, 2, 3, 4: covariance 4.5, variances 4.5 and 5.
    assert spearman([0, 5, 5, 9], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert math.isnan(spearman([1, 1, 1], [1, 2, 3]))
    assert math.isnan(spearman([], []))


def test_files_of_curves(tmp_path):
    path = tmp_path / "curves.json"
    path.write_text(json.dumps({"curves": TRUE.to_json(), "runs": 40}))
    whole = read_fit(path)
    assert (whole.curves, whole.facts) == (TRUE, {"runs": 40})
    path.write_text(json.dumps(TRUE.to_json()))
    assert read_fit(path) == (whole.name, TRUE, {})
    path.write_text(json.dumps({**TRUE.to_json(), "pace": 0.26}))
    assert read_fit(path).name != whole.name


@pytest.mark.parametrize("text", ["{", "[1]", '{"curves": 3}', '{"pce": 1}', '{"pace": -1}', '{"pace": "1"}'])
def test_bad_files_are_told(tmp_path, text):
    path = tmp_path / "curves.json"
    path.write_text(text)
    with pytest.raises(ConfigError):
        read_fit(path)
    with pytest.raises(ConfigError, match="cannot read"):
        read_fit(tmp_path / "none.json")


def test_the_package_has_a_fit_that_says_what_of():
    packaged = read_fit()
    assert set(asdict(packaged.curves)) == set(packaged.facts["deviations"]) | {
        "start",
        "unit_steps",
        "ageing",
    }
    assert packaged.facts["runs"] >= 40
    assert packaged.facts["held_out"]["runs"] >= 10
    assert packaged.facts["fitted_to"]["model"] == "tiny_docs"
