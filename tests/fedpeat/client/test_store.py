import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedpeat.client import Store
from fedpeat.core import StorageError, digest
from fedpeat.server import counted_after


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
    Store(tmp_path, "a", 3, []).write("control", value(3))
    Store(tmp_path, "a", 4, [3]).write("control", value(4))
    again = Store(tmp_path, "a", 4, [3])
    assert read(again) == 3
    again.write("control", value(-4))
    assert read(Store(tmp_path, "a", 5, [3, 4])) == -4


def test_what_did_not_count_is_not_gone_on_from(tmp_path):
    """It trained in round 4, but too late; or the server was killed in that round, and did not ask it again."""
    Store(tmp_path, "a", 2, []).write("control", value(2))
    Store(tmp_path, "a", 4, [2]).write("control", value(4))
    assert read(Store(tmp_path, "a", 6, [2])) == 2
    assert read(Store(tmp_path, "a", counted=[2])) == 2
    assert read(Store(tmp_path, "a", 6, [2, 4])) == 4
    assert read(Store(tmp_path, "a", 6, [])) is None
    assert read(Store(tmp_path, "a")) == 4  # whatever was written last


def test_files_that_nobody_can_ask_for_go(tmp_path):
    Store(tmp_path, "a", 1, []).write("control", value(1))
    Store(tmp_path, "a", 3, [1]).write("control", value(3))
    Store(tmp_path, "a", 4, [1, 3]).write("control", value(4))
    assert files(tmp_path) == [f"control.round-{number}.safetensors" for number in (1, 3, 4)]
    Store(tmp_path, "a", 5, [3]).write("control", value(5))
    assert files(tmp_path) == [f"control.round-{number}.safetensors" for number in (3, 5)]


def test_a_disk_that_was_emptied_is_noticed(tmp_path):
    store = Store(tmp_path, "a", 5, [2, 4])
    assert store.lost("control")
    assert store.read("control") == {}
    Store(tmp_path, "a", 4, [2]).write("control", value(4))
    assert not store.lost("control")
    assert not Store(tmp_path, "a", 5, []).lost("control")
    assert not Store(tmp_path, "a", 5).lost("control")


def test_names_that_begin_alike_do_not_mix(tmp_path):
    Store(tmp_path, "a", 1).write("codec", value(1))
    Store(tmp_path, "a", 2).write("codec.round-9", value(2))
    assert float(Store(tmp_path, "a", 3).read("codec")["w"][0]) == 1.0


@given(st.data())
def test_a_run_killed_anywhere_reads_what_an_uninterrupted_one_does(tmp_path_factory, data):
    """Rounds are counted by adding 1 to what is kept; the server is killed at random after the client wrote."""
    folder, keep = tmp_path_factory.mktemp("store"), data.draw(st.integers(1, 3))
    takes_part = {number: data.draw(st.booleans()) for number in range(1, 7)}
    checkpoints, want, steps = {0: ()}, {0: 0.0}, 0  # the server's index by round, and what must be kept then
    while max(checkpoints) < 6:
        steps += 1
        number = max(checkpoints) + 1
        counted = checkpoints[number - 1]
        store = Store(folder, "a", number, counted)
        assert (read(store) or 0.0) == want[number - 1]
        if takes_part[number]:
            store.write("control", value(want[number - 1] + 1))
        if steps < 12 and data.draw(st.booleans()):  # killed, and perhaps its newest checkpoints are damaged
            for newest in sorted(checkpoints)[1:][::-1][: data.draw(st.integers(0, len(checkpoints) - 1))]:
                del checkpoints[newest]
            continue
        after = counted_after({"a": counted}, ["a"] if takes_part[number] else [], number, keep=keep)
        checkpoints[number] = after["a"]
        checkpoints = dict(sorted(checkpoints.items())[-keep:])
        want[number] = want[number - 1] + takes_part[number]
    assert len(files(folder)) <= keep + 1
