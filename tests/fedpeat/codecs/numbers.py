"""Lists of finite fp32 numbers for hypothesis: subnormal, huge, zero, equal ones.

Long ones come from a seed, all bit patterns alike: drawing them one at a time takes seconds.
"""

import numpy as np
from hypothesis import strategies as st

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


def from_seed(count, seed):
    bits = np.random.default_rng(seed).integers(0, 2**32, size=count, dtype=np.uint32)
    values = bits.view(np.float32)
    return np.where(np.isfinite(values), values, np.float32(1)).tolist()


LISTS = st.lists(FLOATS, max_size=12) | st.builds(from_seed, st.integers(0, 150), st.integers(0, 2**32))
