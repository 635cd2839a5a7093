import torch
from torch import nn

from fedpeat.models import model_tensors, tied_names


class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(3, 2)
        self.head = nn.Linear(2, 3, bias=False)
        self.head.weight = self.table.weight
        self.waves = nn.Buffer(torch.ones(2), persistent=False)
        self.mask = torch.zeros(2)


def test_all_that_a_model_computes_with():
    found = {name: kind for name, _, kind in model_tensors(Holder())}
    expected = {"table.weight": "parameter", "head.weight": "parameter", "waves": "buffer", "mask": "attribute"}
    assert found == expected


def test_ties_are_known_by_memory_not_by_value():
    model = Holder()
    tensors = {name: tensor.detach() for name, tensor, _ in model_tensors(model)}
    assert tied_names(tensors) == {"head.weight": "table.weight"}
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    assert tied_names(copies) == {}
    assert tied_names({"a": torch.empty(0), "b": torch.empty(0), "c": torch.empty(2, device="meta")}) == {}


def test_views_of_other_shapes_are_no_ties():
    weight = torch.arange(6.0).reshape(2, 3)
    assert tied_names({"whole": weight, "row": weight[0], "turned": weight.t(), "cast": weight.view(torch.int32)}) == {}
