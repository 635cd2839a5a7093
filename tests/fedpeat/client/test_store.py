import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedpeat.client import Store
from fedpeat.core import StorageError, digest


def value(number):
    return {"w": torch.full((2,), float(number))}


def read(store):
    found = store.read("control")
    return float(found["w"][0]) if found else None


def files(folder):
    return sorted(path.name for path in folder.rglob("*.safetensors"))


def test_what_was_written_last_is_kept(tmp_path):
    store = Store(tmp_path, "a")
    assert store.keeps
    assert store.read("control") == {}
    store.write("control", value(1))
    store.write("control", {})  # nothing to keep is no reason to forget
    assert digest(Store(tmp_path, "a").read("control")) == digest(value(1))
    assert store.read("optimizer") == {}
    (path,) = tmp_path.rglob("control.*.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StorageError):
        store.read("control")


def test_without_a_folder_nothing_is_kept(tmp_path):
    store = Store(None, "a", 3)
    store.write("control", value(1))
    assert not store.keeps
    assert store.read("control") == {}
    assert list(tmp_path.iterdir()) == []


def test_a_round_that_is_done_again_finds_what_was_there_before_it(tmp_path):
    Store(tmp_path, "a", 3).write("control", value(3))
    Store(tmp_path, "a", 4, oldest=2).write("control", value(4))
    again = Store(tmp_path, "a", 4, resumed=[3], oldest=2)
    assert read(again) == 3
    again.write("control", value(-4))
    assert read(Store(tmp_path, "a", 5, resumed=[3], oldest=3)) == -4


def test_what_a_lost_attempt_left_never_counts(tmp_path):
    """The client trained in round 4, was not asked again after the run was resumed from round 3, and is now in 6."""
    Store(tmp_path, "a", 2).write("control", value(2))
    Store(tmp_path, "a", 4, oldest=2).write("control", value(4))
    assert read(Store(tmp_path, "a", 6, resumed=[3], oldest=4)) == 2
    assert read(Store(tmp_path, "a", resumed=[3])) == 2  # the newest that counts, too
    assert read(Store(tmp_path, "a", resumed=[4])) == 4


def test_old_files_go_once_no_run_can_be_resumed_from_before_them(tmp_path):
    for number in range(1, 6):
        Store(tmp_path, "a", number, oldest=max(0, number - 2)).write("control", value(number))
    assert files(tmp_path) == [f"control.round-{number}.attempt-0.safetensors" for number in (3, 4, 5)]


def test_names_that_begin_alike_do_not_mix(tmp_path):
    Store(tmp_path, "a", 1).write("codec", value(1))
    Store(tmp_path, "a", 2).write("codec.round-x", value(2))
    assert float(Store(tmp_path, "a", 3).read("codec")["w"][0]) == 1.0


@given(st.data())
def test_a_run_killed_anywhere_reads_what_an_uninterrupted_one_does(tmp_path_factory, data):
    """Rounds are counted by adding 1 to what is kept; the run is killed at random after the client wrote."""
    folder, keep = tmp_path_factory.mktemp("store"), data.draw(st.integers(1, 3))
    state, resumed, steps, want = 0, [], 0, {0: 0.0}
    takes_part = {number: data.draw(st.booleans()) for number in range(1, 6)}
    while state < 5 and steps < 12:
        steps += 1
        number = state + 1
        store = Store(folder, "a", number, resumed=resumed, oldest=max(0, number - keep))
        before = read(store) or 0.0
        assert before == want[state]
        if takes_part[number]:
            store.write("control", value(before + 1))
        if data.draw(st.booleans()) and steps < 10:
            state = max(0, state - data.draw(st.integers(0, min(keep - 1, state))))
            resumed.append(state)
        else:
            state = number
            want[state] = before + takes_part[number]
    assert len(files(folder)) <= keep + 2
