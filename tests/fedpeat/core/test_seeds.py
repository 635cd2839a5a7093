from hypothesis import given
from hypothesis import strategies as st

from fedpeat.core import seed_for


@given(st.integers(0, 2**40), st.text(max_size=8), st.text(max_size=8))
def test_seeds_fit_generators_and_parts_do_not_run_together(seed, left, right):
    assert 0 <= seed_for(seed, "batches", left, right) < 2**63
    assert seed_for(seed, "x", "a", "bc") != seed_for(seed, "x", "ab", "c")
    assert seed_for(seed, "x", left) != seed_for(seed + 1, "x", left)
