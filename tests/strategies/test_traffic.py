import dataclasses

import pytest
import torch

from fedpeat.codecs import bf16, int8, none, top_k
from fedpeat.core import ClientUpdate, GlobalState, Layout, LoraPair, UpdateRefused, digest
from strategies import Recipe, weighted_mean
from strategies.recipe import every_round
from strategies.traffic import checked, tensors_down, tensors_up
from tests.federations import make_layout, make_situation, make_state

LAYOUT = make_layout(rank=3, head=True)
STATE = make_state(LAYOUT)
A, B = LAYOUT.names("A"), LAYOUT.names("B")
ALL = {*A, *B, "head.weight"}
HALVES = [
    ({}, ALL, ALL),
    ({"train_only": ["B", "other"]}, ALL, B | {"head.weight"}),
    ({"train_only": ["B", "other"], "fixed": ["A"]}, B | {"head.weight"}, B | {"head.weight"}),
    ({"personal": ["B"]}, A | {"head.weight"}, A | {"head.weight"}),
    ({"train_only": ["A", "B"], "personal": ["B"], "fixed": ["other"]}, A, A),
    ({"train_only": ["A"], "personal": ["B"]}, A | {"head.weight"}, A),
    ({"train_only": []}, ALL, set()),
    ({"fixed": ["R"], "personal": ["R"]}, ALL, ALL),
    ({"proximal_mu": 0.1, "probe_rows": 3}, ALL, ALL),
]


def recipe(half=None, sends=None):
    more = {} if sends is None else {"sends": sends}
    return Recipe("test", weighted_mean(), client=every_round(**(half or {})), **more)


@pytest.mark.parametrize(("half", "down", "up"), HALVES)
@pytest.mark.parametrize("rank", [None, 3, 1])
def test_what_travels_each_way(half, down, up, rank):
    situation = make_situation(STATE, LAYOUT)
    sent, awaited = tensors_down(recipe(half), situation, half, rank), tensors_up(STATE.tensors, LAYOUT, half, rank)
    assert (set(sent), set(awaited)) == (down, up)
    cut = slice(None) if rank is None else slice(rank)
    for found in (sent, awaited):
        for name, tensor in found.items():
            whole = STATE.tensors[name]
            part = {"A": whole[cut], "B": whole[:, cut], "other": whole}[LAYOUT.part_of(name)]
            assert torch.equal(tensor, part)


def test_square_cores_travel_alone():
    pair = LoraPair("m", "m.lora_A.basis", "m.lora_B.weight", 1.0, (5, 4), r="m.lora_A.core")
    layout, state = Layout((pair,), ("head.weight",), 2), {"m.lora_A.core": torch.eye(2), "head.weight": torch.ones(3)}
    situation = make_situation(GlobalState(state), layout)
    half = {"train_only": ["R"]}
    assert set(tensors_down(recipe(half), situation, half, None)) == set(state)
    assert set(tensors_up(state, layout, half, None)) == {"m.lora_A.core"}


def test_folds_and_extras_go_down_under_names_of_their_own():
    folds, memory = {"m.0": torch.ones(6, 5)}, {"c": torch.full((2,), 3.0)}
    situation = make_situation(GlobalState(STATE.tensors, folds, memory), LAYOUT)
    made = recipe({"fixed": ["A"]}, sends=lambda seen: {"head.weight": seen.state.memory["c"] + seen.round})
    sent = tensors_down(made, situation, {"fixed": ["A"]}, 2)
    assert set(sent) == B | {"head.weight", "fold|m.0", "extra|head.weight"}
    assert torch.equal(sent["fold|m.0"], folds["m.0"])  # whole, whatever the rank
    assert sent["extra|head.weight"].tolist() == [4.0, 4.0]
    assert torch.equal(sent["head.weight"], STATE.tensors["head.weight"])


LIKE = {"w": torch.zeros(2, 3), "b": torch.zeros(4)}


def good(**more):
    generator = torch.Generator().manual_seed(0)
    delta = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in LIKE.items()}
    plain = {"client": "ann", "round": 3, "delta": delta, "weight": 2.0, "metrics": {"train_loss": 1.0}}
    return ClientUpdate(**{**plain, "encoding": {"name": "none"}, "payload_bytes": 40, **more})


def check(update, codec=None, **half):
    return checked(update, client="ann", server_round=3, like=LIKE, half=half, codec=codec or none())


def test_a_sound_update_passes_and_is_plain_again():
    found = check(good())
    assert found == dataclasses.replace(good(), encoding={}, delta=found.delta)
    assert digest(found.delta) == digest(good().delta)


@pytest.mark.parametrize("codec", [bf16(), int8(), top_k(share=0.5)])
def test_what_was_encoded_is_decoded(codec):
    delta = good().delta
    sent, _ = codec.encode(delta, codec.start(delta), 0)
    found = check(good(delta=sent, encoding=dict(codec.description)), codec)
    wanted = codec.decode(sent, {name: tensor.shape for name, tensor in LIKE.items()})
    assert digest(found.delta) == digest(wanted) != digest(delta)
    assert found.encoding == {}
    assert found.payload_bytes == 40


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"round": 2}, "it is of round 2"),
        ({"client": "bob"}, "signed 'bob'"),
        ({"bundle": "other"}, "made with bundle ''; it says 'other'"),
        ({"encoding": {}}, "encoded by {'name': 'none'}; it says {}"),
        ({"encoding": {"name": "bf16"}}, "it says {'name': 'bf16'}"),
        ({"encoding": {"name": "none", "more": 1}}, "'more': 1"),
        ({"delta": {"w": torch.zeros(2, 3)}}, "missing: b"),
        ({"delta": {**LIKE, "x": torch.zeros(1)}}, "unknown: x"),
        ({"delta": {**LIKE, "w": torch.zeros(3, 2)}}, r"\(3, 2\)"),
        ({"delta": {**LIKE, "w": torch.zeros(2, 3, dtype=torch.float64)}}, "float64"),
        ({"delta": {**LIKE, "b": torch.tensor([0.0, 1.0, torch.nan, 2.0])}}, "NaN or infinite"),
        ({"delta": {**LIKE, "b": torch.tensor([0.0, 1.0, -torch.inf, 2.0])}}, "NaN or infinite"),
        ({"extras": {"w": torch.zeros(2, 3)}}, "its extras.*unknown: w"),
    ],
)
def test_what_is_not_what_was_to_be_sent_is_refused(changes, told):
    with pytest.raises(UpdateRefused, match=told):
        check(good(**changes))


@pytest.mark.parametrize(
    ("extras", "told"),
    [
        ({}, "its extras.*missing: b, w"),
        ({"w": LIKE["w"]}, "missing: b"),
        ({**LIKE, "x": torch.zeros(1)}, "unknown: x"),
        ({**LIKE, "b": torch.zeros(5)}, r"its extras: 'b' must be \(4,\)"),
        ({**LIKE, "b": torch.full((4,), torch.nan)}, "NaN or infinite"),
    ],
)
def test_variates_must_be_like_the_delta(extras, told):
    assert digest(check(good(extras=LIKE), control_variates=True).extras) == digest(LIKE)
    with pytest.raises(UpdateRefused, match=told):
        check(good(extras=extras), control_variates=True)


def test_a_hostile_encoded_update_is_refused_too():
    codec = int8()
    delta = good().delta
    sent, _ = codec.encode(delta, {}, 0)
    for changes in ({"w": sent["w"][:-1]}, {"w": sent["w"].float()}, {"more": torch.ones(1)}):
        with pytest.raises(UpdateRefused, match="codec=int8"):
            check(good(delta={**sent, **changes}, encoding=dict(codec.description)), codec)
    plain = good(encoding=dict(codec.description))  # said to be encoded, but is not
    with pytest.raises(UpdateRefused):
        check(plain, codec)
