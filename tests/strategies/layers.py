"""LoRA layers of random federations as plain numpy fp64, for the twins; and factors of any values."""

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

# Subnormal numbers are out of scope: torch may flush them to zero. Squares of the smallest normal ones fit in fp64.
numbers = st.floats(-1e3, 1e3, width=32, allow_subnormal=False)


@st.composite
def factors(draw):
    """Factors b (out, r) and a (r, in) of any shapes and values."""
    out, inner, width = (draw(st.integers(1, 6)) for _ in range(3))
    b = draw(arrays(np.float32, (out, inner), elements=numbers))
    a = draw(arrays(np.float32, (inner, width), elements=numbers))
    return b.astype(np.float64), a.astype(np.float64)


def scale_of(b, a):
    """What rounding errors of the product are relative to."""
    return float((np.linalg.norm(b, axis=0) * np.linalg.norm(a, axis=1)).sum())


def plain(tensor):
    return tensor.double().numpy().copy()


def layer_of(state, pair):
    """The layer's b and a in a global state."""
    return plain(state.tensors[pair.b]), plain(state.tensors[pair.a])


def changes_of(updates, pair):
    """The clients' changes of the layer's b and a, the second None where it is not sent."""
    return [(plain(u.delta[pair.b]), plain(u.delta[pair.a]) if pair.a in u.delta else None) for u in updates]


def close(found, wanted):
    """Check that both are equal to 1e-5 of the largest entry."""
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * max(np.abs(wanted).max(), 1e-30))
