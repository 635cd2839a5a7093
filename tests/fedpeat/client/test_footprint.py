import importlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fedpeat.client import TrainingSpec, optimizer_names
from fedpeat.client.footprint import Footprint, footprint, step_seconds
from fedpeat.core import DataError, UpdateRefused, digest
from fedpeat.data import Rows
from fedpeat.emulators import full_view
from fedpeat.models import LoadedModel, find_blocks, keep_blocks, make_split, model_tensors
from fedpeat.peft import Tuned, attach
from fedpeat.peft.names import View
from tests.oracles.memory import kept_for_backward, stored_bytes

ROWS, TOKENS, WIDTH, VOCABULARY = 3, 5, 4, 7
SPEC = TrainingSpec(learning_rate=0.1, batch_size=ROWS)


class Tiny(nn.Module):
    """Embeds, mixes, squashes, scales, and predicts each token itself with the tied embedding."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH).requires_grad_(False)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Buffer(torch.full((WIDTH,), 2.0))

    def forward(self, input_ids, labels, use_cache):
        states = self.mix(self.embed(input_ids)).tanh() * self.scale
        return SimpleNamespace(loss=nn.functional.cross_entropy(self.head(states).flatten(0, 1), labels.flatten()))


@pytest.fixture
def tiny():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Tiny()
    return Tuned(model, ("bias", "weight"), (model.mix.bias, model.mix.weight), "", True, View("blocks", (), ()))


@pytest.fixture
def few():
    ids = torch.arange(8 * TOKENS).reshape(8, TOKENS) % VOCABULARY
    return Rows(ids, ids)


TRAINED = WIDTH * WIDTH + WIDTH
SAVED = ROWS * TOKENS * (4 * WIDTH + 4 * WIDTH + 4 * VOCABULARY + 8) + 4
"""Into the layer, out of the squashing, log-probabilities, targets; and the loss's total weight. No parameter, and not
the scale, though autograd keeps them too."""


@pytest.mark.parametrize(
    ("optimizer", "options", "remembered"),
    [
        ("AdamW", {}, 2 * 4 * TRAINED + 2 * 4),
        ("AdamW", {"amsgrad": True}, 3 * 4 * TRAINED + 2 * 4),
        ("SGD", {}, 0),
        ("SGD", {"momentum": 0.9}, 4 * TRAINED),
    ],
)
def test_equals_the_closed_form(optimizer, options, remembered, tiny, few):
    found = footprint(tiny, few, replace(SPEC, optimizer=optimizer, optimizer_options=options))
    weights = 4 * (VOCABULARY * WIDTH + TRAINED + WIDTH)
    assert found == Footprint(weights, gradients=4 * TRAINED, optimizer=remembered, activations=SAVED)
    assert found.total == weights + 4 * TRAINED + remembered + SAVED


def test_activations_grow_with_the_batch_alone(tiny, few):
    one = footprint(tiny, few, SPEC)
    assert footprint(tiny, few, replace(SPEC, batch_size=2 * ROWS)).activations == 2 * SAVED - 4
    # More rows than there are: some come again.
    assert footprint(tiny, few, replace(SPEC, batch_size=4 * ROWS)).activations == 4 * SAVED - 12
    for same in ({"accumulate": 3}, {"clip_norm": 0.1}, {"optimizer_state": "keep"}, {"learning_rate": 9.0}):
        assert footprint(tiny, few, replace(SPEC, **same)) == one


@pytest.mark.parametrize("optimizer", [name for name in optimizer_names() if name != "Muon"])  # it takes matrices only
def test_the_optimisers_state_is_what_a_real_step_leaves(optimizer, tiny, few):
    tensors = [nn.Parameter(parameter.detach().clone()) for parameter in tiny.parameters]
    made = getattr(torch.optim, optimizer)(tensors, lr=0.1)
    for tensor in tensors:
        tensor.grad = torch.ones_like(tensor)
    made.step()
    kept = [value for state in made.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    found = footprint(tiny, few, replace(SPEC, optimizer=optimizer))
    assert found.optimizer == sum(tensor.numel() * tensor.element_size() for tensor in kept)


METHODS = [{"kind": "lora", "rank": 4, "dropout": 0.1}, {"kind": "full"}]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method["kind"])
def test_activations_are_what_the_graph_holds(named_family, method, make_tuned, rows):
    tuned = make_tuned(named_family, method)
    found = footprint(tuned, rows, SPEC)
    batch = rows.batch(range(ROWS))
    tuned.model.train()
    assert found.activations == kept_for_backward(tuned.model(**batch, use_cache=False).loss, tuned.model)
    assert found.weights == stored_bytes(tuned.model)
    assert found.gradients == sum(4 * parameter.numel() for parameter in tuned.parameters)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method["kind"])
def test_fewer_blocks_take_less(method, miniature, rows):
    found = []
    for sources in ((0, 1, 2, 3, 4, 5), (0, 2, 3, 5), (0, 5)):
        model = miniature("llama", blocks=6).model
        keep_blocks(model, find_blocks(model), sources)
        view = full_view(LoadedModel(model, None, ""), make_split(len(sources), first=1, last=1))
        places = {"path": view.path, "sources": sources, "adapter_positions": view.adapter_positions}
        found.append(footprint(attach(model, method=method, seed=7, **places), rows, SPEC))
    for part in ("weights", "activations", "total"):
        sizes = [getattr(one, part) for one in found]
        assert sizes == sorted(set(sizes), reverse=True), part
    assert len({(one.gradients, one.optimizer) for one in found}) == 1


def state_of(tuned):
    modes = [module.training for module in tuned.model.modules()]
    flags = [(parameter.requires_grad, parameter.grad) for parameter in tuned.model.parameters()]
    tensors = {f"{number}": tensor for number, (_, tensor, _) in enumerate(model_tensors(tuned.model))}
    random = torch.get_rng_state().tolist()
    return digest(tensors), modes, flags, random, torch.get_num_threads(), dict(tuned.compiled)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method["kind"])
def test_nothing_is_changed(method, make_tuned, rows):
    tuned = make_tuned("gpt2", method)
    spec = replace(SPEC, threads=2, optimizer_options={"weight_decay": 0.5}, optimizer_state="keep")
    before = state_of(tuned)
    first = footprint(tuned, rows, spec)
    assert state_of(tuned) == before
    assert footprint(tuned, rows, spec) == first
    assert step_seconds(tuned, rows, spec, steps=1) > 0
    assert state_of(tuned) == before


def test_a_step_is_timed_by_the_median_and_the_first_does_not_count(tiny, few, monkeypatch):
    seconds = iter([9.0, 1.0, 5.0, 3.0])
    seen = []

    def train(tuned, rows, **asked):
        seen.append((asked["steps"], asked["start_step"], asked["spec"].accumulate))
        return SimpleNamespace(metrics={"train_seconds": next(seconds)})

    monkeypatch.setattr(importlib.import_module("fedpeat.client.footprint"), "train", train)
    assert step_seconds(tiny, few, replace(SPEC, accumulate=2)) == 3.0
    assert seen == [(1, 0, 2), (1, 1, 2), (1, 2, 2), (1, 3, 2)]


@pytest.mark.parametrize("measure", [footprint, step_seconds])
def test_what_cannot_be_measured_is_told(measure, tiny, few):
    with pytest.raises(DataError):
        measure(tiny, Rows(few.input_ids[:0], few.labels[:0]), SPEC)
    with pytest.raises(DataError, match="score"):
        measure(tiny, Rows(few.input_ids, torch.full_like(few.labels, -100)), SPEC)
    with torch.no_grad():
        tiny.model.embed.weight.fill_(torch.inf)
    with pytest.raises(UpdateRefused):
        measure(tiny, few, SPEC)
