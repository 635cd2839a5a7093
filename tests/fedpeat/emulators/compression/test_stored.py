import copy

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from fedpeat.emulators import chain, int4, int8, low_rank, magnitude_pruning
from fedpeat.emulators.compression import StoredLinear
from fedpeat.emulators.compression.formats import INT4, INT8, SPARSE

pytestmark = pytest.mark.usefixtures("one_thread")

FORMS = {"int8": (INT8, {"block_size": 8}), "int4": (INT4, {"block_size": 8}), "sparse": (SPARSE, {"kept": 240})}


@pytest.fixture(params=list(FORMS))
def layer(request, matrices):
    """A stored layer of 20 inputs and 12 outputs."""
    layer_format, settings = FORMS[request.param]
    weight, bias = matrices(12, 20), nn.Parameter(matrices(1, 12)[0], requires_grad=False)
    stored = StoredLinear(layer_format, (12, 20), settings, bias=bias, like=weight)
    for name, tensor in layer_format.encode(weight, settings).items():
        stored.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    return stored


def dense_twin(layer, dtype=torch.float32):
    twin = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    twin.weight.data = layer.dense(dtype)
    if layer.bias is not None:
        twin.bias.data = layer.bias.detach().to(dtype)
    return twin.requires_grad_(False)


def with_twins(model):
    """A copy whose stored layers are plain ones with the same weights."""
    model = copy.deepcopy(model)
    for path, module in list(model.named_modules()):
        if isinstance(module, StoredLinear):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, dense_twin(module, model.dtype))
    return model


@pytest.mark.parametrize("shape", [(20,), (3, 20), (2, 3, 20)])
def test_output_and_gradient_are_the_dense_layers(layer, shape):
    results = []
    for module in (layer, dense_twin(layer)):
        inputs = torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
        outputs = module(inputs)
        (outputs * torch.arange(12.0)).sum().backward()
        results.append((outputs.detach(), inputs.grad))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], atol=1e-4, rtol=1e-5)


def test_gradients_by_differences(layer):
    inputs = torch.randn(2, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    assert torch.autograd.gradcheck(layer, (inputs,))


def saved_bytes(module):
    saved = []
    inputs = torch.randn(3, 20, requires_grad=True)
    with saved_tensors_hooks(lambda tensor: saved.append(tensor.nbytes) or tensor, lambda tensor: tensor):
        module(inputs).sum().backward()
    return sum(saved)


def test_nothing_is_kept_between_the_passes(layer):
    assert saved_bytes(dense_twin(layer)) == 12 * 20 * 4
    assert saved_bytes(layer) == 0
    mlp = nn.Sequential(layer, nn.Tanh())
    assert saved_bytes(mlp) == 3 * 12 * 4  # what tanh keeps


def test_a_bias_can_train(layer):
    layer.bias.requires_grad_()
    twin = dense_twin(layer)
    twin.bias.requires_grad_()
    inputs = torch.randn(2, 3, 20, generator=torch.Generator().manual_seed(1))
    for module in (layer, twin):
        module(inputs).square().sum().backward()
    torch.testing.assert_close(layer.bias.grad, twin.bias.grad, atol=1e-4, rtol=1e-5)


def test_under_autocast(layer):
    results = []
    for module in (layer, dense_twin(layer)):
        inputs = torch.randn(3, 20, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = module(inputs)
        outputs.float().square().sum().backward()
        results.append((outputs.detach(), inputs.grad))
    assert [result[0].dtype for result in results] == [torch.bfloat16, torch.bfloat16]
    assert [result[1].dtype for result in results] == [torch.float32, torch.float32]
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], atol=0.1, rtol=0.02)


def test_copies_modes_and_dtypes(layer):
    inputs = torch.randn(3, 20, generator=torch.Generator().manual_seed(1))
    expected = layer(inputs)
    twin = copy.deepcopy(layer).train()
    assert torch.equal(twin(inputs), expected)
    for (name, one), other in zip(layer.named_parameters(), twin.parameters(), strict=True):
        assert one.data_ptr() != other.data_ptr(), name
    assert torch.equal(twin.weight, layer.dense(torch.float32))
    assert "in_features=20, out_features=12" in repr(layer)
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert half(inputs.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(half(inputs.bfloat16()).float(), expected, atol=0.3, rtol=0.05)


# Dynamo itself makes an instance of every function that it traces.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("layer", ["int4"], indirect=True)
def test_compiled(layer):
    torch._dynamo.reset()
    inputs = torch.randn(3, 20, generator=torch.Generator().manual_seed(1)).requires_grad_()
    outputs = torch.compile(layer, backend="aot_eager")(inputs)
    outputs.sum().backward()
    torch.testing.assert_close(outputs, layer(inputs))
    torch.testing.assert_close(inputs.grad, layer.dense(torch.float32).sum(dim=0).expand(3, 20))


BUILDERS = [int8(), int4(), magnitude_pruning(), chain(stages={"shrink": low_rank(), "store": int8()})]


@pytest.mark.parametrize("builder", BUILDERS, ids=lambda builder: builder.name)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_reach_the_adapters_first_block(builder, dtype, emulate, make_ids):
    made = emulate("llama", builder, dtype=dtype)
    gradients = []
    for model in (made.view.model, with_twins(made.view.model)):
        weight = model.model.layers[0].mlp.up_proj.weight.requires_grad_()
        model(input_ids=make_ids(), labels=make_ids()).loss.backward()
        gradients.append(weight.grad.float())
        assert [name for name, parameter in model.named_parameters() if parameter.grad is not None] == [
            "model.layers.0.mlp.up_proj.weight"
        ]
    assert float(gradients[0].norm()) > 0
    slack = 1e-5 if dtype == "float32" else 0.02
    assert float((gradients[0] - gradients[1]).norm()) <= slack * float(gradients[1].norm())


def test_no_dense_weight_is_kept_in_a_whole_model(emulate, make_ids):
    made = emulate("gpt2", int4())
    model = made.view.model
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def dense_ones(model):
        shapes = {(32, 32), (96, 32), (128, 32), (32, 128)} | {(32, 96), (32, 128)}
        saved = []

        def keep(tensor):
            if tensor.untyped_storage().data_ptr() not in own and tuple(tensor.shape) in shapes:
                saved.append(tuple(tensor.shape))
            return tensor

        model.transformer.h[0].mlp.c_fc.weight.requires_grad_()
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            model(input_ids=make_ids(tokens=10), labels=make_ids(tokens=10)).loss.backward()
        return saved

    assert len(dense_ones(with_twins(model))) >= 8
    assert dense_ones(model) == []
