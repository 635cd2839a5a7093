"""Emulators of miniatures: `emulate(family, builder, ...)` gives the model, the blocks, and the emulated model."""

from typing import NamedTuple

import pytest
import torch

from fedpeat.emulators import Blocks, BuildContext, EmulatedModel, make_emulator, stand_in
from fedpeat.models import LoadedModel, Split, make_split


class Made(NamedTuple):
    loaded: LoadedModel
    split: Split
    context: BuildContext
    blocks: Blocks
    view: EmulatedModel


@pytest.fixture
def emulate(miniature, make_ids):
    def make(family, builder, *, dtype="float32", rows=None, blocks=4, **config):
        loaded = miniature(family, dtype=dtype, blocks=blocks, **config)
        split = make_split(blocks, first=1, last=1)
        ids = make_ids(rows=4)
        context = BuildContext(loaded.model, split, rows=rows or {"input_ids": ids, "labels": ids}, batch_size=3)
        emulator = make_emulator(loaded, split=split, builder=builder, context=context)
        return Made(loaded, split, context, emulator, stand_in(loaded.model, split, emulator))

    return make


@pytest.fixture
def matrices():
    """A maker of random matrices `(out, in)`."""

    def make(outputs, inputs, seed=0):
        return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))

    return make
