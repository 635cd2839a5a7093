"""Client-level differential privacy in whole runs."""

import pytest

from simulations.keeping import settings_to_resume
from simulations.run import simulate

CHOSEN = ("privacy=client_level", "privacy.noise_seed=4", "privacy.clip_norm=0.05", "client.learning_rate=0.05")


def test_epsilon_is_told_round_by_round_and_at_the_end(run):
    ran = run(*CHOSEN)
    spent = [line["metrics"].get("epsilon") for line in ran.rounds]
    assert spent[0] is None
    assert spent[1] == pytest.approx(4.3772, abs=1e-3)  # the Gaussian mechanism's, after one round and two
    assert spent[2] == pytest.approx(6.5730, abs=1e-3)
    assert ran.summary["privacy"]["epsilon"] == spent[2]
    assert ran.summary["privacy"]["sampling"] == "all"
    assert ran.rounds[1]["metrics"]["clip_norm"] == 0.05
    assert ran.rounds[1]["metrics"]["clipped_share"] == 1
    assert "privacy" not in run().summary


def test_a_round_that_was_given_away_twice_is_paid_for_twice(run):
    ran = run(*CHOSEN, "rounds=1", anew=True)
    max((ran.folder / "checkpoint").iterdir()).write_bytes(b"damaged")
    summary = simulate(settings_to_resume(ran.folder, []), ran.folder, resume=True)
    assert ran.rounds[1]["metrics"]["epsilon"] == pytest.approx(6.5730, abs=1e-3)  # as after two rounds
    assert summary["privacy"]["epsilon"] == ran.rounds[1]["metrics"]["epsilon"]


@pytest.mark.slow
def test_noise_repeats_itself_by_its_seed_only(run):
    first = run(*CHOSEN)
    assert run(*CHOSEN, anew=True).digest == first.digest
    assert run(*CHOSEN, "privacy.noise_seed=5").digest != first.digest
    secret = run(*CHOSEN, "privacy.noise_seed=null", anew=True)
    assert run(*CHOSEN, "privacy.noise_seed=null", anew=True).digest != secret.digest
    assert secret.summary["privacy"]["epsilon"] == first.summary["privacy"]["epsilon"]


def test_clipping_without_noise_bounds_the_step(run):
    ran = run(*CHOSEN, "privacy.noise_multiplier=0.0")
    assert ran.summary["privacy"]["epsilon"] is None
    assert all(line["metrics"]["update_norm"] <= 0.05 * (1 + 1e-6) for line in ran.rounds[1:])
    assert ran.of("ann", "delta_norm") > 0.05


@pytest.mark.slow
def test_clients_clip_if_asked_to_what_the_server_bounds_anyway(run):
    ran = run(*CHOSEN, "privacy.clip_on=client", "privacy.noise_multiplier=0.0", "codec=int8")
    there = run(*CHOSEN, "privacy.noise_multiplier=0.0")
    for name in ("ann", "bob", "eve"):
        assert ran.of(name, "delta_norm") == pytest.approx(0.05, rel=0.05)  # but for what the codec changes
        assert ran.of(name, "clipped") == 1
        assert "clipped" not in there.rounds[1]["clients"][name]
    assert all(line["metrics"]["update_norm"] <= 0.05 * (1 + 1e-6) for line in ran.rounds[1:])


def test_an_attacker_gets_no_further_than_the_bound(run):
    # Alone in its attack, with a delta a thousand times too large; at rounds=1 the others' start from the same state.
    harm = ("attack=scale", "attack.factor=-1000.0", "attack.clients=[ann]", "rounds=1", "privacy.noise_multiplier=0.0")
    ran = run(*CHOSEN, "privacy.clip_on=client", *harm)
    assert ran.of("ann", "delta_norm") > 1
    assert ran.rounds[1]["metrics"]["update_norm"] <= 0.05 * (1 + 1e-6)


@pytest.mark.parametrize("privacy", [(), CHOSEN], ids=["plain", "private"])
def test_a_round_with_nobody_in_it_goes_by(privacy, run):
    ran = run(*privacy, "control.sampling=poisson", "clients.per_round=1", "rounds=6", "evaluate_every=6")
    visits = [len(line["clients"]) for line in ran.rounds[1:]]
    assert 0 in visits
    assert max(visits) > 0
    assert ran.summary["rounds"] == 6
    empty = [line["metrics"] for line in ran.rounds[1:] if not line["clients"]]
    assert all((metrics["update_norm"] > 0) == bool(privacy) for metrics in empty)
    assert all("train_loss" not in metrics for metrics in empty)


def test_what_a_strategy_cannot_keep_private_is_told(command, tiny):
    code, _, told = command(*tiny("privacy=client_level", "strategy=scaffold"))
    assert code == 2
    assert "privacy=client_level does not go with strategy=scaffold" in told
