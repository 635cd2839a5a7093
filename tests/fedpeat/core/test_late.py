"""What needs no torch is had without it; all else is there when it is asked for."""

import subprocess
import sys

import pytest

import fedpeat.core


def test_errors_and_files_are_had_without_torch():
    code = """
import sys
from fedpeat.core import ConfigError, locked, nearest, read_json, write_json
assert "torch" not in sys.modules
from fedpeat.core import RoundReport, digest
assert "torch" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", fedpeat.core.__all__)
def test_all_that_is_named_is_there(name):
    assert getattr(fedpeat.core, name) is not None


def test_what_is_not_named_is_not_there():
    with pytest.raises(AttributeError, match="no attribute 'torch'"):
        fedpeat.core.torch  # noqa: B018
    with pytest.raises(ImportError):
        from fedpeat.core import nothing  # noqa: F401
