import pytest
import torch

from fedpeat.client.optimizers import build_optimizer, optimizer_names, read_state, write_state
from fedpeat.core import ConfigError, read_tensors, write_tensors

OPTIONS = {
    "SGD with momentum": {"momentum": 0.9},
    "RMSprop centered": {"centered": True, "momentum": 0.5},
    "AdamW fused": {"fused": True, "amsgrad": True},
}


def build(tuned, name, options=None):
    return build_optimizer(tuned, name=name, options=options or {}, learning_rate=0.01)


def push(tuned, optimizer, number):
    generator = torch.Generator().manual_seed(number)
    for parameter in tuned.parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


def test_all_of_torch_optim_that_fit_a_plain_loop():
    assert set(optimizer_names()) >= {"AdamW", "Adam", "SGD", "RMSprop", "Adagrad", "Adafactor", "NAdam", "Muon"}
    assert not {"LBFGS", "SparseAdam", "Optimizer"} & set(optimizer_names())


@pytest.mark.parametrize("name", [*optimizer_names(), *OPTIONS])
def test_state_goes_to_disk_and_comes_back_to_the_bit(name, make_tuned, tmp_path):
    kind = name.split()[0]
    tuned, twin = make_tuned(), make_tuned()
    optimizer = build(tuned, kind, OPTIONS.get(name))
    for number in range(3):
        push(tuned, optimizer, number)
    twin.write(tuned.read())
    state = read_state(optimizer, tuned)
    assert bool(state) == (name != "SGD")
    if state:
        write_tensors(tmp_path / "state.safetensors", state)
        state = read_tensors(tmp_path / "state.safetensors")
    resumed = build(twin, kind, OPTIONS.get(name))
    write_state(resumed, twin, state)
    for number in range(3, 5):
        push(tuned, optimizer, number)
        push(twin, resumed, number)
    assert all(torch.equal(tensor, twin.read()[name]) for name, tensor in tuned.read().items())


def test_state_is_a_copy(make_tuned):
    tuned = make_tuned()
    optimizer = build(tuned, "AdamW")
    push(tuned, optimizer, 0)
    state = read_state(optimizer, tuned)
    kept = {name: tensor.clone() for name, tensor in state.items()}
    resumed = build(tuned, "AdamW")
    write_state(resumed, tuned, state)
    push(tuned, optimizer, 1)
    push(tuned, resumed, 1)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in state.items())
    assert f"AdamW/{tuned.names[0]}/exp_avg" in state


def test_another_optimisers_state_is_refused(make_tuned):
    tuned = make_tuned()
    optimizer = build(tuned, "AdamW")
    push(tuned, optimizer, 0)
    with pytest.raises(ConfigError, match="optimizer_state=reset"):
        write_state(build(tuned, "Adam"), tuned, read_state(optimizer, tuned))
    with pytest.raises(ConfigError, match="does not train"):
        write_state(build(tuned, "AdamW"), tuned, {"AdamW/no.such.weight/step": torch.ones(())})


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("AdamV", {}, "did you mean 'Adam"),
        ("LBFGS", {}, "torch.optim has no such"),
        ("AdamW", {"beta": 1}, "did you mean 'betas'"),
        ("AdamW", {"lr": 1}, "set client.learning_rate"),
        ("AdamW", {"betas": [2.0, 0.9]}, "Invalid beta"),
        ("SGD", {"nesterov": True}, "Nesterov"),
    ],
)
def test_what_cannot_be_built_is_told(name, options, told, make_tuned):
    with pytest.raises(ConfigError, match=told):
        build(make_tuned(), name, options)


def test_an_optimiser_for_matrices_alone_says_so(make_tuned):
    with pytest.raises(ConfigError, match="2D"):
        build(make_tuned(method={"kind": "full"}), "Muon")
