import pytest
import torch

from fedpeat.core import UpdateRefused


def test_what_is_read_is_a_copy_and_can_be_written_back(view, attached):
    tuned = attached(view(), kind="lora")
    first = tuned.read()
    assert list(first) == list(tuned.names) == sorted(tuned.names)
    tuned.write({name: tensor + 1 for name, tensor in first.items()})
    for name, parameter in zip(tuned.names, tuned.parameters, strict=True):
        assert torch.equal(parameter, first[name] + 1)
        assert parameter.requires_grad


def test_what_does_not_fit_is_refused_and_nothing_is_written(view, attached):
    tuned = attached(view(), kind="lora")
    before = tuned.read()
    good = {name: tensor + 1 for name, tensor in before.items()}
    name = tuned.names[-1]
    for bad in (
        {other: tensor for other, tensor in good.items() if other != name},
        {**good, "more": torch.zeros(1)},
        {**good, name: good[name][:1]},
        {**good, name: good[name].double()},
    ):
        with pytest.raises(UpdateRefused):
            tuned.write(bad)
        assert all(torch.equal(tensor, before[name]) for name, tensor in tuned.read().items())
