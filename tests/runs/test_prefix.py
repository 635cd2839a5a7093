"""Hidden states that clients keep instead of computing them again."""

import pytest

from fedpeat.core import ConfigError
from tests.oracles import whole_run as oracle

AT_THE_END = ("model.split.first=0", "model.split.last=1", "rounds=3", "client.local_steps=4")


def test_a_run_with_kept_states_is_the_same(run):
    plain, kept = run(*AT_THE_END), run(*AT_THE_END, "client.prefix_mib=5")
    assert oracle.largest_difference(kept.tensors, plain.tensors) <= 1e-6
    assert len(list((kept.folder / "clients").rglob("*.states.npy"))) == 3
    assert not list((plain.folder / "clients").rglob("*.npy"))


@pytest.mark.parametrize(
    ("overrides", "told"),
    [(["model.split.first=1"], "the first block trains"), (["client.prefix_mib=-1"], "it must be 0 or more")],
)
def test_nothing_to_keep_is_told(overrides, told, run):
    with pytest.raises(ConfigError, match=told):
        run(*AT_THE_END, "client.prefix_mib=5", *overrides)
