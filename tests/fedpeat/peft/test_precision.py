import pytest
import torch
from torch import nn

from fedpeat.peft.precision import make_uniform, run_in_own_precision


def test_fp32_neighbours_fit_into_a_bf16_model():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).to(torch.bfloat16)
    model[1].float()
    run_in_own_precision(model)
    assert model(torch.ones(2, 4, dtype=torch.bfloat16)).dtype is torch.bfloat16


def test_an_fp32_model_is_left_alone():
    model = nn.Linear(4, 4)
    run_in_own_precision(model)
    assert not model._forward_pre_hooks


def test_a_model_is_uniform_again():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).to(torch.bfloat16)
    run_in_own_precision(model)
    model[1].float()
    make_uniform(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
    model(torch.ones(2, 4, dtype=torch.bfloat16))


def test_autocast_ends_with_the_call_even_if_it_fails():
    model = nn.Linear(4, 4).to(torch.bfloat16)
    run_in_own_precision(model)
    with pytest.raises(RuntimeError):
        model(torch.ones(2, 5))
    assert not torch.is_autocast_enabled("cpu")
    model(torch.ones(2, 4))
    assert not torch.is_autocast_enabled("cpu")
