import pytest
import torch


@pytest.fixture
def send():
    """Encode a delta and decode it again: `send(codec, delta, state=None, seed=0)` gives (decoded, encoded, state)."""

    def send(codec, delta, state=None, seed=0):
        encoded, after = codec.encode(delta, codec.start(delta) if state is None else state, seed)
        return codec.decode(encoded, {name: tensor.shape for name, tensor in delta.items()}), encoded, after

    return send


@pytest.fixture
def make_delta():
    """A delta of tensors of all awkward shapes, with entries of many magnitudes: `make_delta(seed=0)`."""

    shapes = {"scalar": (), "empty": (0,), "flat": (3, 0), "one": (1,), "row": (130,), "cube": (2, 3, 11), "b": (64,)}

    def make(seed=0):
        random = torch.Generator().manual_seed(seed)
        return {
            name: torch.randn(shape, generator=random) * 10.0 ** torch.randint(-6, 3, shape, generator=random)
            for name, shape in shapes.items()
        }

    return make
