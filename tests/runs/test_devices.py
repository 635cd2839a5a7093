"""Devices that differ, the server among them, sampling, and clients that fail."""

import pytest

from fedpeat.core import ConfigError, EngineError

ALL = ("ann", "bob", "eve")


def each(value):
    return "{" + ", ".join(f"{name}: {value}" for name in ALL) + "}"


def test_devices_with_different_emulators(run):
    """Each client trains as it would where all have its emulator; the aggregate is of both."""
    chosen = ("rounds=1", "emulator.kept_blocks=3")
    mixed = run(*chosen, "control.kept_blocks={ann: 1}")
    large, small = run(*chosen), run("rounds=1", "emulator.kept_blocks=1")
    for metric in ("train_loss_first", "train_loss_last", "delta_norm"):
        assert mixed.of("ann", metric) == small.of("ann", metric) != large.of("ann", metric)
        assert mixed.of("bob", metric) == large.of("bob", metric) != small.of("bob", metric)
    assert len({mixed.digest, large.digest, small.digest}) == 3
    found = mixed.rounds[-1]["evaluations"]
    assert found["emulator_zero_shot"] == large.rounds[-1]["evaluations"]["emulator_zero_shot"]
    own = {name: result for name, result in found.items() if name.endswith("/kept_1")}
    assert set(own) == {"emulator_zero_shot/kept_1", "emulator_tuned/kept_1"}
    assert own["emulator_zero_shot/kept_1"] == small.rounds[-1]["evaluations"]["emulator_zero_shot"]


def test_an_emulator_of_every_device_is_the_runs_emulator(run):
    chosen = ("rounds=2", "emulator.kept_blocks=3", f"control.kept_blocks={each(1)}")
    assert run(*chosen).digest == run("rounds=2", "emulator.kept_blocks=1").digest


def test_devices_with_different_local_steps(run):
    ran = run("control.local_steps={ann: 5}")
    for number in (1, 2):
        done = {name: ran.of(name, "train_examples", number) for name in ALL}
        assert done == {"ann": 5 * 2, "bob": 2 * 2, "eve": 2 * 2}
        assert ran.of("ann", "weight", number) == 2.5 * ran.of("bob", "weight", number)
    equal = run("control.local_steps={ann: 5}", "strategy.weight_by=equal")
    assert {equal.of(name, "weight") for name in ALL} == {1}
    assert equal.digest != ran.digest


SERVER = ("data.server_share=0.5", "rounds=1")


@pytest.fixture
def serving(run):
    return {mode: run(*SERVER, f"server.train={mode}") for mode in ("off", "emulator", "full")}


def test_the_server_takes_part(serving, run):
    assert len({ran.digest for ran in serving.values()}) == 3
    assert "server" not in serving["off"].rounds[1]["clients"]
    for mode in ("emulator", "full"):
        ran = serving[mode]
        assert set(ran.rounds[1]["clients"]) == {*ALL, "server"}
        assert ran.of("server", "train_examples") == 2 * 2
        assert ran.of("server", "weight") == ran.of("ann", "weight")
        assert ran.of("server", "bytes_up") == ran.of("server", "bytes_down") == 0
        assert ran.summary["bytes"] == serving["off"].summary["bytes"]
        assert ran.of("ann", "delta_norm") == serving["off"].of("ann", "delta_norm")
    # What it trains on is not held out: both see the same rows, and the full model sees them as itself.
    whole = run(*SERVER, "server.train=emulator", "emulator.kept_blocks=4")
    first = {mode: serving[mode].of("server", "train_loss_first") for mode in ("emulator", "full")}
    assert first["full"] == pytest.approx(whole.of("server", "train_loss_first"), rel=1e-6)
    assert first["emulator"] != pytest.approx(first["full"], rel=1e-3)


def test_the_servers_own_settings(run):
    own = ("server.local_steps=5", "server.batch_size=3", "server.weight=2.0", "server.learning_rate=0.0")
    ran = run(*SERVER, "server.train=full", *own)
    assert ran.of("server", "train_examples") == 5 * 3
    assert ran.of("server", "weight") == 2 * 5 * 3 * 16
    assert ran.of("server", "delta_norm") == 0
    assert ran.of("ann", "delta_norm") > 0


def test_a_server_without_weight_changes_nothing(run, serving):
    ran = run(*SERVER, "server.train=full", "server.weight=0.0")
    assert ran.digest == serving["off"].digest


SAMPLED = ("clients.per_round=2", "rounds=6", "client.local_steps=1", "evaluate_every=6")


def sampled(ran):
    return [tuple(line["clients"]) for line in ran.rounds[1:]]


@pytest.fixture
def five(write_notes):
    return f"data.path={write_notes(('ann', 'bob', 'eve', 'ian', 'zoe'), documents=4)}"


def test_sampling_is_reproducible(run, five):
    first = run(five, *SAMPLED)
    rounds = sampled(first)
    assert all(len(set(names)) == 2 for names in rounds)
    assert len(set(rounds)) > 1
    assert first.summary["participants"] == len({name for names in rounds for name in names})
    assert sampled(run(five, *SAMPLED, "client.learning_rate=0.001")) == rounds
    assert sampled(run(five, *SAMPLED, "seed=1")) != rounds


def test_everyone_takes_part_where_no_number_is_given(run):
    assert sampled(run("rounds=2", "client.local_steps=1")) == [ALL, ALL]


@pytest.fixture
def mute(write_notes):
    """One author wrote a single letter: there is no token to predict."""
    path = write_notes(("ann", "bob"))
    path.write_text(path.read_text() + '{"author": "mum", "text": "m"}\n')
    return (f"data.path={path}", "data.separator=none", "data.too_small=keep")


def test_a_client_that_fails_is_told_of_and_left_out(run, mute):
    ran = run(*mute)
    without = run(*mute[:2])
    assert ran.summary["status"] == "finished"
    assert ran.summary["clients_failed"] == 2
    for line in ran.rounds[1:]:
        (failure,) = line["failures"]
        assert failure["client"] == "mum"
        assert "token to score" in failure["reason"]
        assert set(line["clients"]) == {"ann", "bob"}
    assert ran.digest == without.digest
    assert without.summary["clients_failed"] == 0


def test_too_few_replies_end_the_run(run, mute, tmp_path, read_json):
    with pytest.raises(EngineError, match="min_replies=3") as caught:
        run(*mute, "round.min_replies=3", folder=tmp_path / "few")
    assert "mum" in caught.value.found
    assert "token to score" in caught.value.found
    summary = read_json(tmp_path / "few" / "summary.json")
    assert summary["status"] == "failed"
    assert summary["rounds"] == 0
    assert run(*mute, "round.min_replies=2").summary["status"] == "finished"


def test_clients_that_come_too_late_count_as_failed(run, tmp_path, read_json):
    with pytest.raises(EngineError, match="min_replies=1") as caught:
        run("round.timeout_seconds=1e-9", folder=tmp_path / "late")
    assert "timeout" in caught.value.found
    assert read_json(tmp_path / "late" / "summary.json")["status"] == "failed"


def test_a_ladder_by_memory(run):
    """A device that is too small for the run's emulator gets the largest that fits, and trains on it."""
    ladder = ("rounds=1", "emulator.kept_blocks=4", "control.emulators={small: {kept_blocks: 1}}")
    roomy = run(*ladder, "control.memory_mib={ann: 1000}")
    tight = run(*ladder, "control.memory_mib={ann: 0.5}")
    by_name = run(*ladder, "control.emulator={ann: small}")
    assert tight.digest == by_name.digest != roomy.digest
    assert tight.of("ann", "train_loss_first") == by_name.of("ann", "train_loss_first")
    assert tight.of("bob", "train_loss_first") == roomy.of("bob", "train_loss_first")
    with pytest.raises(ConfigError, match=r"client 'ann' has 0.001 MiB .* the smallest emulator, 'small', needs"):
        run(*ladder, "control.memory_mib={ann: 0.001}")
