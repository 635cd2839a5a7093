"""A small tuned model, and rows to train it on."""

from collections.abc import Callable, Iterator

import pytest
import torch

from fedpeat.data import Rows
from fedpeat.emulators import full_view
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
def make_tuned(miniature) -> Callable[..., Tuned]:
    """A maker of tuned models of 4 blocks, of which the first and the last are the adapter, or those listed."""

    def make(family: str = "llama", method: dict | None = None, blocks: tuple[int, ...] = (0, 3), **config) -> Tuned:
        view = full_view(miniature(family, blocks=4, **config), make_split(4, blocks=list(blocks)))
        return attach(
            view.model,
            method=method or {"kind": "lora", "rank": 4},
            path=view.path,
            sources=view.sources,
            adapter_positions=view.adapter_positions,
            seed=7,
        )

    return make


@pytest.fixture
def rows(make_ids) -> Rows:
    """21 rows of 12 tokens, all scored."""
    ids = make_ids(21, 12)
    return Rows(ids, ids)


@pytest.fixture
def answers(make_ids) -> Rows:
    """10 rows of 12 tokens: prompts of differing length are not scored, and ends are padding."""
    ids, position = make_ids(10, 12), torch.arange(12)
    prompt, length = torch.arange(10)[:, None] % 7, 12 - torch.arange(10)[:, None] % 4
    labels = ids.masked_fill((position < prompt) | (position >= length), -100)
    return Rows(ids, labels, (position < length).long())
