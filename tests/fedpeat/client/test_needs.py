"""What a visit needs: FLOP as torch counts them and as a formula has them, memory as terms have it."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from fedpeat.client import TrainingSpec
from fedpeat.client.footprint import footprint
from fedpeat.client.needs import HEAP_WASTE, PROCESS_BYTES, _Following, needs
from fedpeat.core import DataError, count_bytes
from fedpeat.data import Rows
from fedpeat.devices import BlockShape, step_flops

ROWS, TOKENS = 3, 12
SPEC = TrainingSpec(learning_rate=0.1, batch_size=ROWS)
LORA, FULL = {"kind": "lora", "rank": 4}, {"kind": "full"}
FIRST = ("c_attn", "q_proj", "k_proj", "v_proj")
"""Layers that are fed a block's input."""


def shapes_of(tuned, width):
    """The blocks of a tuned model as the formula wants them."""
    blocks = []
    for block in tuned.model.get_submodule(tuned.view.path).children():
        matrices = {name: one for name, one in block.named_parameters() if one.dim() == 2 and "embed" not in name}
        mine = {id(parameter) for parameter in tuned.parameters}
        lora = {name: one.numel() for name, one in matrices.items() if "lora_" in name}
        dense = {name: one for name, one in matrices.items() if name not in lora}
        fed = [name for name in matrices if any(f"{word}." in name for word in FIRST) and "mlp" not in name]
        blocks.append(
            BlockShape(
                weights=sum(one.numel() for one in dense.values()),
                trained=sum(one.numel() for one in dense.values() if id(one) in mine),
                added=sum(lora.values()),
                # Where whole blocks train, so does the norm that the gradient then goes down to.
                first=sum(dense[name].numel() for name in fed if name in dense and id(dense[name]) not in mine),
                first_added=sum(lora[name] for name in fed if "lora_A" in name),
                attention_width=width,
            )
        )
    return blocks


@pytest.mark.parametrize("method", [LORA, FULL], ids=lambda method: method["kind"])
@pytest.mark.parametrize("blocks", [(0, 3), (2, 3)])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen3", "mistral", "opt"])
def test_the_formula_counts_what_torch_counts(kind, method, blocks, make_tuned, rows):
    tuned = make_tuned(kind, method, blocks, attention="eager")
    head = tuned.model.get_output_embeddings().weight.numel()
    width = 4 * 8  # heads times their size
    expected = step_flops(ROWS, TOKENS, shapes_of(tuned, width), head)
    assert needs(tuned, rows, SPEC).step_flops == pytest.approx(expected, rel=0.02)


def test_fused_attention_counts_too(make_tuned, rows):
    eager, fused = (needs(make_tuned("llama", LORA, attention=kind), rows, SPEC) for kind in ("eager", "sdpa"))
    # On the way back the fused kernel makes the scores once more.
    assert 1 < fused.step_flops / eager.step_flops < 1.05


def test_more_work_is_more_flops(make_tuned, rows):
    tuned = make_tuned("gpt2", LORA)
    one = needs(tuned, rows, SPEC).step_flops
    assert needs(tuned, rows, replace(SPEC, accumulate=2)).step_flops == 2 * one
    assert needs(tuned, rows, replace(SPEC, batch_size=2 * ROWS)).step_flops == 2 * one
    assert needs(make_tuned("gpt2", LORA, (3,)), rows, SPEC).step_flops < one


@pytest.mark.parametrize("method", [LORA, FULL], ids=lambda method: method["kind"])
def test_memory_is_at_least_what_training_keeps(method, make_tuned, rows):
    tuned = make_tuned("gpt2", method)
    found, kept = needs(tuned, rows, SPEC), footprint(tuned, rows, SPEC)
    travelling = count_bytes(tuned.initial)
    assert found.weights == kept.weights
    # At the end of a forward pass: the tensors that came, as they were and as they stood at the start, two messages,
    # the optimiser's memory, and what autograd keeps; and for a moment the logits and their gradient.
    least = kept.activations + kept.optimizer + 5 * travelling
    assert least <= found.working < least + 3 * travelling + 3 * ROWS * TOKENS * 4 * tuned.model.config.vocab_size
    assert PROCESS_BYTES < found.overhead < PROCESS_BYTES + HEAP_WASTE * found.working
    assert found.memory_bytes == found.weights + found.working + found.overhead


def test_it_is_the_same_each_time_and_nothing_is_changed(make_tuned, rows):
    tuned = make_tuned("llama", LORA)
    before = {name: tensor.clone() for name, tensor in tuned.read().items()}
    assert needs(tuned, rows, SPEC) == needs(tuned, rows, SPEC)
    after = tuned.read()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(parameter.grad is None for parameter in tuned.parameters)


def test_what_cannot_be_measured_is_told(make_tuned, rows):
    tuned = make_tuned("gpt2", LORA)
    with pytest.raises(DataError):
        needs(tuned, Rows(rows.input_ids[:0], rows.labels[:0]), SPEC)


def test_a_peak_by_hand():
    weight = nn.Parameter(torch.zeros(1000))
    following = _Following()
    with following:
        a = torch.ones(1000)  # 4000 bytes
        b = a.view(10, 100)[2:]  # the same storage
        c = a + 1  # 8000
        del c
        d = (a * weight).sum()  # 8000 and 4 more; the product goes, what autograd keeps is there already
        e = torch.zeros(500)  # 6004
    assert following.peak() == 8004
    following.end()
    del a, b, d, e
    assert following.peak() == 8004


def test_what_outlives_a_step_is_not_wasted():
    weight = nn.Parameter(torch.zeros(1000))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    following = _Following()
    with following:
        lasting = torch.ones(1000)
        weight.grad = torch.zeros(1000)  # there at the step's end
        optimizer.step()
        passing = torch.ones(2000)
        del passing
    following.end()
    assert following.peak() == 4 * 4000
    assert following.peak(0.5) == 2 * 4000 + 1.5 * 8000
    del lasting
