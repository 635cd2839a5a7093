from dataclasses import dataclass
from typing import Any

import pytest
import torch

from fedpeat.core import digest
from fedpeat.emulators import BuildContext, Builder, chain, make_emulator
from fedpeat.models import find_blocks, make_split, model_tensors


@pytest.fixture(autouse=True)
def quick(one_thread):
    """One torch thread."""


def keeping(*sources):
    """A builder that keeps these blocks."""

    def build(blocks):
        return blocks.having(tuple(block for block in blocks.blocks if block.source in sources))

    return Builder("keeping", {"sources": list(sources)}, build)


@dataclass
class Workshop:
    """A full model, public text for it, and what a builder makes of them."""

    loaded: Any
    context: BuildContext

    @property
    def split(self):
        return self.context.split

    def make(self, kept, *builders, context=None):
        stages = {"select": keeping(*kept), **{str(number): builder for number, builder in enumerate(builders)}}
        return make_emulator(
            self.loaded, split=self.split, builder=chain(stages=stages), context=context or self.context
        )

    @property
    def fingerprint(self):
        return digest({name: tensor for name, tensor, _ in model_tensors(self.loaded.model)})


@pytest.fixture
def workshop(miniature, make_ids):
    """A maker: `workshop(family, blocks=6, rows=20, tokens=12, padded=False, split=None, **context)`."""

    def make(family="llama", *, blocks=6, rows=20, tokens=12, padded=False, split=None, dtype="float32", **more):
        loaded = miniature(family, blocks=blocks, dtype=dtype)
        ids = make_ids(rows, tokens)
        text = {"input_ids": ids, "labels": ids.clone()}
        if padded:
            lengths = torch.tensor([tokens - row % 4 for row in range(rows)])
            text["attention_mask"] = (torch.arange(tokens) < lengths[:, None]).long()
            text["labels"][text["attention_mask"] == 0] = -100
        split = split or make_split(find_blocks(loaded.model).count, first=1, last=1)
        return Workshop(loaded, BuildContext(loaded.model, split, text, **more))

    return make


def state(emulator):
    """All tensors of an emulator's blocks."""
    return {
        f"{block.place}.{name}": tensor.clone()
        for block in emulator.blocks
        for name, tensor, _ in model_tensors(block.module)
    }
