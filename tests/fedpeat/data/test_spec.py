import inspect
from pathlib import Path

import pytest
import yaml

from fedpeat.core import ConfigError
from fedpeat.data import SOURCES, DataSpec

BASE = {"kind": "jsonl", "path": "x.jsonl", "block_size": 8}
OPTIONS = sorted((Path(__file__).parents[3] / "conf" / "data").glob("*.yaml"))


def test_there_is_an_option_for_every_source():
    kinds = {path.stem: yaml.safe_load(path.read_text())["kind"] for path in OPTIONS}
    assert set(kinds.values()) == set(SOURCES)
    assert all(kinds[kind] == kind for kind in SOURCES)


@pytest.mark.parametrize("path", OPTIONS, ids=lambda path: path.stem)
def test_every_option_binds_and_explains_each_key(path):
    settings = yaml.safe_load(path.read_text())
    inspect.signature(DataSpec).bind(**settings)
    if "path" in settings:
        settings["path"] = "somewhere"
    spec = DataSpec.of(settings)
    assert "choices" in settings
    keys = [line for line in path.read_text().splitlines() if line and not line.startswith(("#", "kind:"))]
    assert all("  # " in line for line in keys)
    assert DataSpec.of(spec.to_json()) == spec


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"test_shar": 0.1}, "did you mean 'test_share'"),
        ({"path": None}, "needs data.path"),
        ({"block_size": None}, "data.block_size must be set"),
        ({"block_size": 1}, "block_size"),
        ({"block_size": True}, "block_size"),
        ({"min_blocks": -1}, "min_blocks"),
        ({"test_share": 1.0}, "test_share"),
        ({"test_share": -0.1}, "test_share"),
        ({"test_share": "10%"}, "test_share"),
        ({"test_share": 0.5, "validation_share": 0.5}, "nothing is left"),
        ({"server_share": 0.5, "public_share": 0.5}, "nothing is left"),
        ({"tail": "dorp"}, "did you mean 'drop'"),
        ({"too_small": "ignore"}, "choose from: drop, error, keep"),
        ({"split": "train"}, "data=jsonl has no use for it"),
        ({"sample_by": "line"}, "data=jsonl has no use for it"),
        ({"answer_field": "a"}, "set data.prompt_field"),
        ({"prompt_field": "p"}, "set data.answer_field"),
        ({"kind": "docstrings"}, "data.libraries"),
        ({"kind": "docstrings", "path": None, "server_path": "x"}, "data.libraries"),
    ],
)
def test_settings_that_make_no_sense_are_told(change, message):
    with pytest.raises(ConfigError, match=message):
        DataSpec.of({**BASE, **change})


def test_test_blocks_take_the_place_of_a_share():
    spec = DataSpec.of({**BASE, "test_share": 0.1, "test_blocks": 2})
    assert (spec.test_share, spec.test_blocks) == (0.0, 2)


def test_client_field_is_one_or_more():
    assert DataSpec.of(BASE).client_fields == ()
    assert DataSpec.of({**BASE, "client_field": "who"}).client_fields == ("who",)
    assert DataSpec.of({**BASE, "client_field": ["play", "who"]}).client_fields == ("play", "who")
