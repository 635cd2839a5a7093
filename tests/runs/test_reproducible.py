"""The same settings give the same bytes; another seed gives others; who watches changes nothing."""

import random

import numpy as np
import pytest
import torch

CHANGES = ("seconds", "process", "peak_rss_mib", "peak_gpu_mib", "tokens_per_second")


def outcome(ran):
    """All of a run's history but what a clock and the machine say."""
    lines = [{name: line[name] for name in ("round", "evaluations", "bytes_down", "bytes_up")} for line in ran.rounds]
    clients = [
        {
            name: {key: value for key, value in metrics.items() if not key.endswith(CHANGES)}
            for name, metrics in one.items()
        }
        for one in (line["clients"] for line in ran.rounds)
    ]
    return ran.digest, lines, clients


CHOSEN = ("peft.dropout=0.1", "clients.per_round=2", "server.train=emulator", "data.server_share=0.5")


def test_the_same_seed_gives_the_same_run(run, tmp_path):
    """With nothing in the caches, and whatever other code made of the global generators."""
    first = run(*CHOSEN)
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(7)
    second = run(*CHOSEN, f"cache={tmp_path}", anew=True)
    assert outcome(second) == outcome(first)
    assert second.summary["config_hash"] == first.summary["config_hash"]


def test_another_seed_gives_another_run(run):
    first, second = run(*CHOSEN), run(*CHOSEN, "seed=1")
    assert first.digest != second.digest
    assert first.losses["full_zero_shot"] == second.losses["full_zero_shot"]
    assert first.losses["plug_in"] != second.losses["plug_in"]
    assert first.summary["config_hash"] != second.summary["config_hash"]


def test_the_order_of_the_text_of_others_does_not_matter(run, notes, tmp_path):
    path = tmp_path / "sorted.jsonl"
    path.write_text("".join(sorted(notes.read_text().splitlines(keepends=True), key=lambda line: line[:16])))
    assert run(f"data.path={path}").digest == run().digest


def test_runs_one_after_the_other_in_a_process_do_not_mix(run):
    """They share bundles, and so what a worker keeps: models, indices of data."""
    first = run(*CHOSEN)
    run(*CHOSEN, "peft.alpha=4", "peft.dropout=0.0", "seed=1")
    assert outcome(run(*CHOSEN, anew=True)) == outcome(first)


def test_a_tracker_is_told_and_changes_nothing(run):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    ran = run("tracker=tensorboard")
    plain = run()
    assert outcome(ran) == outcome(plain)
    assert ran.summary["config_hash"] == plain.summary["config_hash"]
    events = EventAccumulator(str(ran.folder / "tensorboard")).Reload()
    for model in ("plug_in", "emulator_tuned", "full_zero_shot"):
        told = events.Scalars(f"loss/{model}")
        assert [event.step for event in told] == [0, 1, 2]
        losses = [line["evaluations"][model]["loss"] for line in ran.rounds]
        assert [event.value for event in told] == pytest.approx(losses, rel=1e-6)
    assert [event.value for event in events.Scalars("bytes/up")] == [line["bytes_up"] for line in ran.rounds]
    assert not (plain.folder / "tensorboard").exists()
