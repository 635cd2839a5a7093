"""The socket of a client's folder: for its owner alone, for one worker, whatever the folder is called."""

import stat

import pytest

from simulations.deployment import local_socket
from simulations.deployment.local_socket import NoWorker, Taken, alone, connect, listening, listens


@pytest.fixture(params=["short", "long"])
def folder(request, tmp_path):
    """A client's folder; a socket's path in one of them is too long for its address."""
    found = tmp_path / ("x" * 100 if request.param == "long" else "x")
    found.mkdir()
    return found


def test_a_worker_is_found_while_it_listens(folder):
    assert not listens(folder)
    with alone(folder) as place, listening(place) as listener:
        assert listens(folder)
        listener.accept()[0].close()
        with connect(folder, 0) as here:
            there, _ = listener.accept()
            with there:
                here.sendall(b"word")
                assert there.recv(10) == b"word"
    assert not listens(folder)
    with pytest.raises(NoWorker):
        connect(folder, 0.2)


def test_only_its_owner_may_connect(folder):
    (folder / local_socket.PLACE).mkdir(mode=0o777)
    (folder / local_socket.PLACE).chmod(0o777)
    with alone(folder) as place, listening(place):
        assert stat.S_IMODE(place.stat().st_mode) == 0o700
        found = (place / local_socket.NAME).stat().st_mode
        assert stat.S_ISSOCK(found)
        assert stat.S_IMODE(found) == 0o600
        assert stat.S_IMODE((place / local_socket.LOCK).stat().st_mode) == 0o600


def test_what_a_dead_worker_left_is_no_hindrance(folder):
    with alone(folder) as place:
        with listening(place):
            (place / local_socket.NAME).rename(place / "left")
        (place / "left").rename(place / local_socket.NAME)
        assert not listens(folder)
        with listening(place):
            assert listens(folder)


def test_a_folder_has_one_worker(folder):
    with alone(folder), pytest.raises(Taken), alone(folder):
        pytest.fail("two hold it")
    with alone(folder):
        pass


def test_what_is_no_matter_of_waiting_is_told_at_once(tmp_path):
    (tmp_path / local_socket.PLACE).write_text("no folder")
    with pytest.raises(NotADirectoryError):
        connect(tmp_path, 600)
