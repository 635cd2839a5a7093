import pytest
import torch

from fedpeat.core import PeftError
from fedpeat.peft.names import View
from fedpeat.peft.selection import pick


def picked(view, *, base=(), ends=()):
    places = View(view.path, view.sources, view.adapter_positions)
    return pick(view.model, wrapper=None, view=places, ends=ends, base=base, identity=True)


def test_nothing_to_train_is_told(view):
    seen = view()
    with pytest.raises(PeftError, match="nothing would train"):
        picked(seen, base=[*seen.model.parameters(), *seen.model.buffers()])


def test_a_tensor_of_the_emulator_may_not_train(view):
    seen = view()
    seen.model.model.layers[2].mlp.up_proj.weight.requires_grad_(True)
    with pytest.raises(PeftError, match=r"trains model\.layers\.2\.mlp\.up_proj\.weight"):
        picked(seen, base=seen.model.parameters())


def test_the_methods_own_frozen_tensors_are_hashed(view):
    digests = set()
    for value in (1.0, 1.0, 2.0):
        seen = view()
        base = [*seen.model.parameters(), *seen.model.buffers()]
        seen.model.model.layers[0].requires_grad_(True)
        seen.model.model.layers[0].register_buffer("projection", torch.full((3,), value), persistent=False)
        digests.add(picked(seen, base=base).frozen_digest)
    assert len(digests) == 2
    assert "" not in digests
