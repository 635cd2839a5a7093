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


def test_a_part_is_the_same_tensors_of_the_same_model(view, attached):
    tuned = attached(view(), kind="lora", rank=2)
    halves = {half: tuned.only(tuned.layout.names([half])) for half in "AB"}
    for half, part in halves.items():
        assert part.names == tuple(name for name in tuned.names if f".lora_{half}." in name)
        assert all(one is dict(zip(tuned.names, tuned.parameters, strict=True))[name] for name, one in part_of(part))
        assert part.model is tuned.model
        assert part.layout is tuned.layout
        assert set(part.read()) == set(part.names)
    assert len(halves["A"].names) + len(halves["B"].names) == len(tuned.names)
    halves["B"].write({name: tensor + 1 for name, tensor in halves["B"].read().items()})
    whole = tuned.read()
    for name in tuned.names:
        assert torch.equal(whole[name], tuned.initial[name] + (1 if ".lora_B." in name else 0))
    with pytest.raises(UpdateRefused, match="unknown"):
        halves["A"].write(whole)
    assert all(parameter.requires_grad for parameter in tuned.parameters)


def part_of(part):
    return zip(part.names, part.parameters, strict=True)


def test_a_part_and_the_whole_know_of_the_same_folds(view, attached):
    tuned = attached(view(), kind="lora", rank=2)
    part, pair = tuned.only(tuned.layout.names(["A"])), tuned.layout.pairs[0]
    weight = tuned.layers[pair.module].get_base_layer().weight
    before = weight.detach().clone()
    part.fold({pair.module: torch.ones(pair.shape)})
    assert tuned.folded
    tuned.fold({})
    assert not part.folded
    assert torch.equal(weight, before)


def test_what_a_method_started_from_is_kept_as_it_was(view, attached):
    tuned = attached(view(), kind="lora", rank=2)
    first = tuned.read()
    tuned.write({name: tensor + 1 for name, tensor in first.items()})
    assert all(torch.equal(tensor, tuned.initial[name]) for name, tensor in first.items())
