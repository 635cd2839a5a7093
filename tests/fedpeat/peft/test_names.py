import pytest

from fedpeat.peft.names import View

VIEW = View("h", sources=(0, 1, 12, 23), adapter_positions=(0, 3))


@pytest.mark.parametrize(
    ("local", "canonical"),
    [("h.0.a", "h.0.a"), ("h.3.a.0.b", "h.23.a.0.b"), ("h.2", "h.12"), ("ln.3.h.3", "ln.3.h.3"), ("hh.3.a", "hh.3.a")],
)
def test_block_positions_become_indices(local, canonical):
    assert VIEW.canonical(local) == canonical


def test_what_is_in_the_adapter():
    assert [VIEW.in_adapter(name) for name in ("h.0.a", "h.1.a", "h.3.a", "wte")] == [True, False, True, False]
