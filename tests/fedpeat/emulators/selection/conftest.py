import re

import pytest
import torch

from fedpeat.emulators import Block, Blocks, BuildContext
from fedpeat.models import find_blocks, make_split

OUTPUTS = re.compile(r"(o_proj|out_proj|c_proj|down_proj|fc2)\.(weight|bias)$")


@pytest.fixture(autouse=True)
def quick(one_thread):
    """Models of this size lose most of their time to threads that wait for one another."""


@pytest.fixture
def make_context(make_ids):
    """A maker of contexts with random text: `make_context(loaded, rows=6, tokens=10, padded=False, split=..., **more)`.

    Padded rows have their last tokens (another number in each row) masked and unlabelled.
    """

    def make(loaded, *, rows=6, tokens=10, padded=False, split=None, seed=0, **more):
        ids = make_ids(rows, tokens, seed)
        text = {"input_ids": ids, "labels": ids.clone()}
        if padded:
            lengths = torch.tensor([tokens - row % 4 for row in range(rows)])
            text["attention_mask"] = (torch.arange(tokens) < lengths[:, None]).long()
            text["labels"][text["attention_mask"] == 0] = -100
        count = find_blocks(loaded.model).count
        split = split or make_split(count, first=1, last=1)
        return BuildContext(loaded.model, split, **{"rows": text, "batch_size": 4, **more})

    return make


@pytest.fixture
def middle_of():
    """The whole middle as a row of blocks, as `make_emulator` gives it to a builder: `middle_of(context)`."""

    def row(context):
        stack = find_blocks(context.model).of(context.model)
        return Blocks(tuple(Block(index, stack[index]) for index in context.split.middle), "a model", context)

    return row


@pytest.fixture
def kept_by(middle_of):
    """The places that a builder keeps, and its last note: `kept_by(builder, context)`."""

    def build(builder, context):
        emulator = builder(middle_of(context))
        return [block.place for block in emulator.blocks], emulator.notes[-1]

    return build


@pytest.fixture
def silence():
    """Make blocks of a model hand on what they receive, to the bit: their outputs' weights become zero."""

    def make_silent(loaded, indices):
        stack = find_blocks(loaded.model).of(loaded.model)
        with torch.no_grad():
            for index in indices:
                outputs = [one for name, one in stack[index].named_parameters() if OUTPUTS.search(name)]
                assert len(outputs) >= 2
                for parameter in outputs:
                    parameter.zero_()

    return make_silent


@pytest.fixture
def count_passes():
    """Count a model's forward passes: `passes = count_passes(model)`, then `len(passes)`."""
    handles = []

    def count(model):
        passes = []
        handles.append(model.register_forward_hook(lambda *_: passes.append(1)))
        return passes

    yield count
    for handle in handles:
        handle.remove()
