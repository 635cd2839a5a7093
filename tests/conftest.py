"""Fixtures for all tests: miniature models and random token ids.

`miniature(family, blocks=4, dtype="float32", attention=None, seed=0, **config)` gives a `LoadedModel` with random
weights and a tokenizer of one token a character. A test that takes an argument `family` runs for every family of
FAMILIES; `named_family` is for tests that need only those that users are promised by name.
"""

import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import hypothesis
import pytest

# Side by side, each with one thread: read by torch when it is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

if TYPE_CHECKING:
    import torch

    from fedpeat.models import LoadedModel

# A busy machine is no failure; nor does chance decide whether tests pass. New examples are searched for on purpose,
# with HYPOTHESIS_PROFILE=search.
hypothesis.settings.register_profile("patient", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.register_profile("search", deadline=None, derandomize=False, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "patient"))

NAMED = ("gpt2", "opt", "bloom", "llama", "mistral", "qwen3", "gemma2")
FAMILIES = (*NAMED, "gpt_neox", "falcon", "phi", "qwen2", "gemma3", "mixtral", "odd")


@pytest.fixture(scope="session")
def miniature() -> "Callable[..., LoadedModel]":
    """The maker of miniatures."""
    from tests.miniatures import make_miniature  # takes seconds to load: only for tests that need models

    return make_miniature


@pytest.fixture(scope="session")
def make_ids() -> "Callable[..., torch.Tensor]":
    """A maker of random token ids: `make_ids(rows=2, tokens=12, seed=0)`."""
    import torch

    def make(rows: int = 2, tokens: int = 12, seed: int = 0) -> torch.Tensor:
        return torch.randint(3, 99, (rows, tokens), generator=torch.Generator().manual_seed(seed))

    return make


@pytest.fixture(scope="module")
def one_thread() -> "Iterator[None]":
    """One torch thread: products and decompositions of tiny matrices lose most of their time to waiting threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test for every family, or every named one, if it asks for a family."""
    if "family" in metafunc.fixturenames:
        metafunc.parametrize("family", FAMILIES)
    if "named_family" in metafunc.fixturenames:
        metafunc.parametrize("named_family", NAMED)
