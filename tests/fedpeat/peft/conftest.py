"""Miniatures seen as a device sees them: `view(family)` has three adapter blocks of six, and one block between them."""

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from fedpeat.emulators import EmulatedModel, full_view
from fedpeat.models import make_split
from fedpeat.peft import Tuned, attach


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Miniatures have nothing to share out, and threads that wait for each other on a busy machine take seconds."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def full(miniature) -> Callable[..., EmulatedModel]:
    """A maker of full models, split 2-3-1."""

    def make(family: str = "llama", **config) -> EmulatedModel:
        return full_view(miniature(family, blocks=6, **config), make_split(6, first=2, last=1))

    return make


@pytest.fixture(scope="session")
def view(full) -> Callable[..., EmulatedModel]:
    """A maker of models that hold blocks 0, 1, 3 and 5 of six."""

    def make(family: str = "llama", **config) -> EmulatedModel:
        whole, sources = full(family, **config), (0, 1, 3, 5)
        model = copy.deepcopy(whole.model)
        owner, _, name = whole.path.rpartition(".")
        blocks = model.get_submodule(whole.path)
        setattr(model.get_submodule(owner), name, nn.ModuleList([blocks.get_submodule(str(i)) for i in sources]))
        return EmulatedModel(model, whole.path, sources, (0, 1, 3))

    return make


@pytest.fixture(scope="session")
def attached() -> Callable[..., Tuned]:
    """A caller of `attach`: `attached(view, kind="lora", rank=2)`."""

    def call(view: EmulatedModel, seed: int = 7, **method) -> Tuned:
        places = {"path": view.path, "sources": view.sources, "adapter_positions": view.adapter_positions}
        return attach(view.model, method=method, seed=seed, **places)

    return call
