import pytest
import torch
from torch import nn

from fedpeat.bundles import build_emulated
from fedpeat.bundles.bundle import Bundle
from fedpeat.core import ModelError
from fedpeat.emulators import int8, low_rank
from fedpeat.emulators.changes import rebuild
from fedpeat.emulators.compression import LowRank, StoredLinear
from fedpeat.emulators.compression.layers import matrix_of
from fedpeat.models import build_skeleton, describe, make_split
from tests.bundles import bundled

UP = "mlp.up_proj"  # 48 x 32
NOT_A_COUNT = [0, -1, True, 1.0, "3", None, [2]]

ABSURD = [
    *({"kind": "low_rank", "modules": {UP: {"rank": value}}} for value in [*NOT_A_COUNT, 33, 10**30]),
    *({"kind": "int8", "modules": {UP: {"block_size": value}}} for value in [*NOT_A_COUNT, 33, 10**30]),
    *({"kind": "int4", "modules": {UP: {"block_size": value}}} for value in [*NOT_A_COUNT, 33]),
    *({"kind": "sparse", "modules": {UP: {"kept": value}}} for value in [*NOT_A_COUNT, 48 * 32 + 1]),
    *({"kind": "ffn_channels", "modules": {UP: {"inputs": value}}} for value in [*NOT_A_COUNT, 33]),
    *({"kind": "ffn_channels", "modules": {UP: {"outputs": value}}} for value in [*NOT_A_COUNT, 49]),
    *(
        {"kind": "low_rank", "modules": {path: {"rank": 2}}}
        for path in ["", "mlp", "mlp.sideways", "mlp.up_proj.weight", "..", "input_layernorm"]
    ),
    *({"kind": "low_rank", "modules": modules} for modules in [None, [UP], UP, 3, {UP: None}, {UP: 2}, {UP: {}}]),
    {"kind": "low_rank"},
    {"kind": "low_ranks", "modules": {}},
]


@pytest.fixture
def skeleton(miniature):
    return build_skeleton(describe(miniature("llama").model)).model.layers[1]


@pytest.mark.parametrize("change", ABSURD, ids=str)
def test_absurd_changes_are_refused(change, skeleton):
    with pytest.raises(ModelError, match="cannot rebuild a block with the change"):
        rebuild(skeleton, [change])


def test_a_manifest_with_an_absurd_change(miniature, tmp_path):
    loaded = miniature("llama")
    bundle = bundled(loaded, split=make_split(4, first=1, last=1), builder=int8(), folder=tmp_path)
    for changes in ([{"kind": "int8", "modules": {UP: {"block_size": 10**9}}}], []):
        positions = [{**position, "changes": changes} for position in bundle.manifest["positions"]]
        damaged = Bundle(bundle.folder, bundle.version, {**bundle.manifest, "positions": positions}, 0)
        with pytest.raises(ModelError):
            build_emulated(damaged)


@pytest.mark.parametrize(
    ("change", "parameters"),
    [
        ({"kind": "low_rank", "modules": {UP: {"rank": 3}}}, {"down.weight": (3, 32), "up.weight": (48, 3)}),
        ({"kind": "int8", "modules": {UP: {"block_size": 10}}}, {"codes": (48, 32), "scale": (48, 4)}),
        ({"kind": "int4", "modules": {UP: {"block_size": 32}}}, {"codes": (48, 16), "scale": (48, 1)}),
        ({"kind": "sparse", "modules": {UP: {"kept": 5}}}, {"kept": (5,), "mask": (192,)}),
        ({"kind": "ffn_channels", "modules": {UP: {"outputs": 7}}}, {"weight": (7, 32)}),
    ],
    ids=lambda value: value.get("kind"),
)
def test_structure_takes_no_memory_on_the_meta_device(change, parameters, skeleton):
    rebuild(skeleton, [change])
    found = dict(skeleton.mlp.up_proj.named_parameters())
    assert {name: tuple(parameter.shape) for name, parameter in found.items()} == parameters
    assert {parameter.device.type for parameter in found.values()} == {"meta"}
    assert isinstance(skeleton.mlp.down_proj, nn.Linear)


def test_changes_build_on_one_another(skeleton):
    changes = [
        {"kind": "ffn_channels", "modules": {UP: {"outputs": 20}}},
        {"kind": "low_rank", "modules": {UP: {"rank": 4}}},
        {"kind": "int8", "modules": {f"{UP}.down": {"block_size": 32}, f"{UP}.up": {"block_size": 4}}},
    ]
    rebuild(skeleton, changes)
    assert isinstance(skeleton.mlp.up_proj, LowRank)
    assert skeleton.mlp.up_proj.up.shape == (20, 4)
    with pytest.raises(ModelError, match=r"is a StoredLinear, no linear layer"):
        rebuild(skeleton, [{"kind": "int8", "modules": {f"{UP}.down": {"block_size": 32}}}])


def test_new_layers_leave_the_random_state_alone(emulate):
    before = torch.random.get_rng_state()
    emulate("gpt2", low_rank())
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_weight_of_every_kind_of_layer(emulate):
    original = emulate("gpt2", int8()).loaded.model.transformer.h[1].attn.c_attn
    assert torch.equal(matrix_of(original), original.weight.T)
    stored = emulate("gpt2", int8()).blocks.blocks[0].module.attn.c_attn
    assert isinstance(stored, StoredLinear)
    assert torch.equal(stored.weight, matrix_of(stored))
    product = emulate("gpt2", low_rank()).blocks.blocks[0].module.attn.c_attn
    assert torch.equal(product.weight, matrix_of(product))
    with pytest.raises(ModelError, match="cannot use the weight of a GELU"):
        matrix_of(nn.GELU())
