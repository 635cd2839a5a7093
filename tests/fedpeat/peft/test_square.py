import copy

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from fedpeat.core import digest
from fedpeat.emulators import full_view
from fedpeat.models import make_split
from fedpeat.peft import merged_model


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids, use_cache=False).logits


def moved(tuned, size=0.5):
    generator = torch.Generator().manual_seed(1)
    tuned.write({name: size * torch.randn(tensor.shape, generator=generator) for name, tensor in tuned.read().items()})
    return tuned


def bases(tuned):
    """A and B of each layer, by layer."""
    return {
        name: (layer.lora_A["default"].basis, layer.lora_B["default"].weight.detach())
        for name, layer in tuned.layers.items()
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_output_is_unchanged_at_the_start(kind, dtype, view, attached, make_ids):
    seen = view(kind, dtype=dtype)
    before = logits(seen.model, make_ids())
    tuned = attached(seen, kind="lora_sb", rank=3)
    assert torch.equal(logits(tuned.model, make_ids()), before)
    assert tuned.identity_at_start
    assert all(not tensor.any() for tensor in tuned.read().values())
    assert not torch.equal(logits(moved(tuned).model, make_ids()), before)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_only_the_cores_train_and_travel(kind, view, attached, make_ids):
    tuned, ids = attached(view(kind), kind="lora_sb", rank=3, alpha=6), make_ids()
    layout = tuned.layout
    assert tuned.names == tuple(sorted(f"{name}.lora_A.core" for name in tuned.layers))
    assert {tuple(tensor.shape) for tensor in tuned.read().values()} == {(3, 3)}
    assert layout.names(["R"]) == set(tuned.names)
    assert (layout.others, layout.rank) == ((), 3)
    assert {(pair.r, pair.scaling) for pair in layout.pairs} == {(name, 2.0) for name in tuned.names}
    assert not {pair.a for pair in layout.pairs} & set(tuned.names)
    training = {name for name, parameter in tuned.model.named_parameters() if parameter.requires_grad}
    assert len(training) == len(tuned.names)

    others = {name: tensor for name, tensor in tuned.model.state_dict().items() if not name.endswith(".core")}
    kept = digest(others)
    tuned.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in tuned.parameters)
    torch.optim.SGD(tuned.parameters, lr=1.0).step()
    assert digest(others) == kept
    assert all(tensor.any() for tensor in tuned.read().values())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_fixed_factors_span_the_principal_directions_of_the_layers_own_weight(kind, view, attached):
    tuned = attached(view(kind), kind="lora_sb", rank=3)
    for name, (a, b) in bases(tuned).items():
        module = tuned.layers[name].get_base_layer()
        weight = (module.weight.T if isinstance(module, Conv1D) else module.weight).double()
        left, sizes, right = torch.linalg.svd(weight, full_matrices=False)
        best = left[:, :3] @ torch.diag(sizes[:3] / sizes[0]) @ right[:3]
        torch.testing.assert_close(b.double() @ a.double(), best, atol=1e-5, rtol=1e-4)
        share = torch.diag(sizes[:3] / sizes[0])
        torch.testing.assert_close(a.double() @ a.double().T, share, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(b.double().T @ b.double(), share, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_fixed_factors_are_the_same_wherever_they_are_made(kind, view, full, attached):
    device, server = attached(view(kind), kind="lora_sb", rank=3), attached(full(kind), kind="lora_sb", rank=3)
    assert device.frozen_digest == server.frozen_digest != ""
    assert device.layout == server.layout
    for name, (a, b) in bases(device).items():
        assert torch.equal(a, bases(server)[name][0])
        assert torch.equal(b, bases(server)[name][1])
    assert attached(view(kind), kind="lora_sb", rank=2).frozen_digest != device.frozen_digest


@pytest.mark.parametrize(
    "method",
    [
        {"kind": "lora_sb", "rank": 8},
        {
            "kind": "hf",
            "type": "LORA",
            "options": {"r": 8, "init_lora_weights": "pissa", "target_modules": ["up_proj"]},
        },
    ],
    ids=["cores", "PiSSA"],
)
def test_the_number_of_threads_does_not_count(method, miniature, attached):
    """A server's process has as many as the machine has cores, a worker of Ray one."""
    torch.set_num_threads(1)
    found = []
    for threads in (1, 2):
        loaded = miniature("llama", blocks=2, hidden_size=64, intermediate_size=256)
        torch.set_num_threads(threads)
        tuned = attached(full_view(loaded, make_split(2, first=1, last=0)), **method)
        assert torch.get_num_threads() == threads
        found.append((tuned.frozen_digest, digest(tuned.initial)))
    assert found[0] == found[1]


def test_a_rank_above_the_layers_own_is_filled_up(view, attached, make_ids):
    seen = view()
    before = logits(seen.model, make_ids())
    tuned = attached(seen, kind="lora_sb", rank=20, targets=["k_proj"])  # (16, 32)
    assert {tuple(tensor.shape) for tensor in tuned.read().values()} == {(20, 20)}
    assert torch.equal(logits(tuned.model, make_ids()), before)
    for a, b in bases(tuned).values():
        assert (a.shape, b.shape) == ((20, 32), (16, 20))
        assert not a[16:].any()
        assert not b[:, 16:].any()
        assert a[:16].any(dim=1).all()
    assert not torch.equal(logits(moved(tuned).model, make_ids()), before)


@pytest.mark.parametrize("folded", [False, True], ids=["", "folded"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_merged_model_is_the_tuned_one(kind, folded, full, attached, make_ids):
    tuned = moved(attached(full(kind), kind="lora_sb", rank=3))
    if folded:
        tuned.fold({pair.module: torch.full(pair.shape, 0.01) for pair in tuned.layout.pairs[::2]})
    before = logits(tuned.model, make_ids())
    plain = merged_model(tuned)
    assert set(dict(plain.named_parameters())) == set(dict(full(kind).model.named_parameters()))
    torch.testing.assert_close(logits(plain, make_ids()), before, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits(full(kind).model, make_ids()), before, atol=1e-2)
    assert torch.equal(logits(tuned.model, make_ids()), before)


def test_a_deep_copy_is_on_its_own(view, attached, make_ids):
    tuned = moved(attached(view(), kind="lora_sb", rank=2))
    before, other = logits(tuned.model, make_ids()), copy.deepcopy(tuned)
    assert torch.equal(logits(other.model, make_ids()), before)
    other.write({name: torch.zeros_like(tensor) for name, tensor in other.read().items()})
    assert not torch.equal(logits(other.model, make_ids()), before)
    assert torch.equal(logits(tuned.model, make_ids()), before)
