"""A client from Python: what it keeps of its data, and that its process lives as long as the block."""

import json
import sys

import pytest

from fedpeat.core import ConfigError, EngineError
from simulations.deployment import joining
from simulations.deployment.joining import joined


@pytest.fixture
def folder(tmp_path):
    plain = {"name": "ann", "superlink": "127.0.0.1:1", "insecure": False, "data": {"path": None}, "cache_mib": 1}
    (tmp_path / "site.json").write_text(json.dumps(plain))
    return tmp_path


@pytest.fixture
def program(monkeypatch):
    """Have the client's program be some Python code; its folder is `sys.argv[1]`."""
    return lambda code: monkeypatch.setattr(joining, "PROGRAM", (sys.executable, "-c", code))


READY = "import sys, time; print('hello'); print('ready:', sys.argv[1], flush=True); time.sleep(600)"


def test_a_client_is_there_in_the_block_and_gone_after_it(folder, program):
    program(READY)
    with joined(folder) as client:
        assert client.poll() is None
    assert client.returncode not in {None, 0}


def test_it_is_gone_after_an_error_too(folder, program):
    program(READY)
    seen = []

    def work():
        with joined(folder) as client:
            seen.append(client)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    assert seen[0].poll() is not None


def test_one_that_ends_by_itself_can_be_waited_for(folder, program):
    program("print('ready', flush=True)")
    with joined(folder) as client:
        assert client.wait(60) == 0


def test_one_that_is_not_let_in_is_told_in_its_own_words(folder, program):
    program("import sys; print(' error: it did not start'); print(' found: no key'); sys.exit(1)")
    with pytest.raises(EngineError, match=r"cannot take part.*error: it did not start found: no key"), joined(folder):
        pytest.fail("it was not let in")


def test_what_is_said_of_the_data_is_kept(folder, program, monkeypatch):
    program(READY)
    monkeypatch.chdir(folder)
    (folder / "a b.jsonl").write_text("{}\n")
    with joined(folder, data={"path": "a b.jsonl", "text_field": "body"}):
        pass
    assert json.loads((folder / "site.json").read_text())["data"] == {
        "path": [str(folder / "a b.jsonl")],
        "text_field": "body",
    }
    with joined(folder, data={"path": ["*.jsonl", folder]}):
        pass
    kept = json.loads((folder / "site.json").read_text())["data"]
    assert kept == {"path": [str(folder / "*.jsonl"), str(folder)], "text_field": "body"}


def test_mistakes_are_told_before_anything_starts(folder, program):
    program("import sys; sys.exit('started')")
    before = (folder / "site.json").read_text()
    for data, words in (({"pth": "x"}, "did you mean 'path'"), ({"path": "nowhere.jsonl"}, "no such file")):
        with pytest.raises(ConfigError, match=words), joined(folder, data=data):
            pass
    assert (folder / "site.json").read_text() == before
    with pytest.raises(ConfigError, match="no client's folder"), joined(folder / "other"):
        pass
