import pytest
import torch

from fedpeat.client.attack import KINDS, attacked, check_kind, poisoned
from fedpeat.core import ClientUpdate, ConfigError, digest
from fedpeat.data import Rows

GENERATOR = torch.Generator().manual_seed(0)
DELTA = {"b": torch.randn(40, 50, generator=GENERATOR), "a": 3 * torch.randn(60, 70, generator=GENERATOR)}


def job(kind, factor=2.0, seed=1):
    return {"seed": seed, "attack": {"kind": kind, "factor": factor}}


def update(client="eve", number=4, delta=None):
    return ClientUpdate(client, number, delta or DELTA, 7.0, {"train_loss": 1.0}, extras={"c": torch.ones(2)})


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_is_sent_is_changed(kind):
    before = digest(DELTA)
    found = attacked(update(), job(kind))
    assert (found.client, found.round, found.weight, found.metrics) == ("eve", 4, 7.0, {"train_loss": 1.0})
    assert torch.equal(found.extras["c"], torch.ones(2)) == (kind == "shuffle_labels"), "extras are sent too"
    assert set(found.delta) == set(DELTA)
    for name, tensor in found.delta.items():
        assert tensor.shape == DELTA[name].shape
        assert tensor.dtype is torch.float32
    assert digest(DELTA) == before


def test_what_each_sends():
    for name, tensor in DELTA.items():
        assert torch.equal(attacked(update(), job("scale", 3.0)).delta[name], 3 * tensor)
        assert torch.equal(attacked(update(), job("sign_flip", 3.0)).delta[name], -3 * tensor)
        assert torch.isnan(attacked(update(), job("nans")).delta[name]).all()
        assert torch.equal(attacked(update(), job("shuffle_labels")).delta[name], tensor)


def test_noise_has_the_size_asked_for_and_nothing_of_the_delta():
    found = attacked(update(), job("gaussian", 5.0)).delta
    for name, tensor in DELTA.items():
        size = float(tensor.square().mean().sqrt())
        # 2,000 entries and more: the standard deviation of a share is under 1.6 %, that of a correlation under 2.3 %.
        assert float(found[name].square().mean().sqrt()) == pytest.approx(5 * size, rel=0.1)
        assert abs(float(torch.corrcoef(torch.stack((found[name].flatten(), tensor.flatten())))[0, 1])) < 0.15
    zeros = {"a": torch.zeros(3), "none": torch.zeros(0, 4)}
    for name, tensor in attacked(update(delta=zeros), job("gaussian")).delta.items():
        assert torch.equal(tensor, zeros[name])


def test_noise_follows_seed_client_and_round_and_not_the_order_of_names():
    def noise(client="eve", number=4, seed=1, delta=None):
        return digest(attacked(update(client, number, delta), job("gaussian", seed=seed)).delta)

    assert noise() == noise() == noise(delta=dict(reversed(DELTA.items())))
    assert len({noise(), noise("bob"), noise(number=5), noise(seed=2)}) == 4


def test_without_an_attack_the_honest_update_goes_out():
    honest = update()
    assert attacked(honest, {"seed": 1}) is honest
    assert attacked(honest, {"seed": 1, "attack": None}) is honest


def test_an_unknown_attack_is_told():
    with pytest.raises(ConfigError, match="did you mean 'sign_flip'"):
        attacked(update(), job("sign_flop"))
    with pytest.raises(ConfigError, match="did you mean 'nans'"):
        check_kind("nan")
    assert [check_kind(kind) for kind in KINDS] == list(KINDS)


def test_shuffled_labels_are_the_same_labels_elsewhere_and_prompts_stay_unscored(answers, rows):
    for given in (answers, rows):
        before = given.labels.clone()
        found = poisoned(given, job("shuffle_labels"), "eve")
        assert found.input_ids is given.input_ids
        assert found.attention_mask is given.attention_mask
        assert torch.equal(found.labels == -100, before == -100)
        assert torch.equal(found.labels.flatten().sort().values, before.flatten().sort().values)
        assert float((found.labels != before).float().mean()) > 0.4
        assert torch.equal(given.labels, before)  # which may be the very tensor of the inputs


def test_labels_are_shuffled_alike_in_every_round_and_otherwise_for_others(rows):
    def labels(client="eve", seed=1):
        return digest({"labels": poisoned(rows, job("shuffle_labels", seed=seed), client).labels})

    assert labels() == labels()
    assert len({labels(), labels("bob"), labels(seed=2)}) == 3


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "shuffle_labels"])
def test_other_attackers_train_on_their_own_rows(kind, rows):
    assert poisoned(rows, job(kind), "eve") is rows
    assert poisoned(rows, {"seed": 1}, "eve") is rows
    assert poisoned(rows, {"seed": 1, "attack": None}, "eve") is rows


def test_rows_without_a_scored_label_stay_as_they_are(rows):
    silent = Rows(rows.input_ids, torch.full_like(rows.labels, -100))
    assert torch.equal(poisoned(silent, job("shuffle_labels"), "eve").labels, silent.labels)
