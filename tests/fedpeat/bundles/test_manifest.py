import json

import pytest

from fedpeat.bundles import open_bundle
from fedpeat.bundles.manifest import version_of
from fedpeat.core import StorageError
from fedpeat.emulators import uniform
from fedpeat.models import make_split
from tests.bundles import bundled


@pytest.fixture(scope="module")
def written(miniature, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles")
    split = make_split(4, first=1, last=1)
    return bundled(miniature("llama"), split=split, builder=uniform(kept_blocks=1), folder=folder)


@pytest.fixture
def forge(written, tmp_path):
    """Open a bundle whose manifest was changed by someone who knows how to compute its version."""

    def opening(sign=True, **changes):
        manifest = {**written.manifest, **changes}
        if sign:
            manifest["version"] = version_of(manifest)
        for path in written.folder.rglob("*"):
            if path.is_file() and path.name != "manifest.json":
                target = tmp_path / path.relative_to(written.folder)
                target.parent.mkdir(exist_ok=True)
                target.write_bytes(path.read_bytes())
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
        return open_bundle(tmp_path)

    return opening


def test_an_untouched_copy_opens(forge, written):
    assert forge().version == written.version


def test_a_manifest_without_its_own_version(forge):
    with pytest.raises(StorageError, match="was altered"):
        forge(sign=False, builder={"name": "another"})


@pytest.mark.parametrize(
    "name",
    ["../secret.safetensors", "/etc/passwd", "tokenizer/../../x", "tokenizer\\..\\x", "C:x", "script.py"],
)
def test_files_outside_the_bundle(name, forge, written):
    entry = written.manifest["files"]["adapter.safetensors"]
    with pytest.raises(StorageError, match="outside the bundle"):
        forge(files={**written.manifest["files"], name: entry})


def test_a_link_out_of_the_bundle(forge, written, tmp_path):
    forge()
    (tmp_path / "outside").mkdir()
    inside = tmp_path / "tokenizer" / "link"
    inside.symlink_to("/etc/hostname")
    entry = written.manifest["files"]["adapter.safetensors"]
    with pytest.raises(StorageError, match="outside the bundle"):
        forge(files={**written.manifest["files"], "tokenizer/link": entry})


def test_another_format(forge):
    with pytest.raises(StorageError, match="its format is 99, this version of fedpeat reads 2"):
        forge(format=99)


@pytest.mark.parametrize(
    "changes",
    [
        {"positions": []},
        {"positions": [{"source": 9, "role": "adapter", "changes": []}]},
        {"positions": [{"source": 0, "role": "boss", "changes": []}]},
        {"positions": [{"source": True, "role": "adapter", "changes": []}]},
        {"positions": ["x"]},
        {"blocks": {}},
        {"blocks": {"path": 3, "count": 4, "beside": []}},
        {"files": {"adapter.safetensors": {"bytes": 3}}},
        {"files": {"adapter.safetensors": {"bytes": 3, "sha256": "short"}}},
        {"aliases": {"a": 1}},
        {"model": {}},
        {"model": []},
        {"payload_bytes": "many"},
        {"payload_bytes": True},
    ],
)
def test_a_damaged_manifest(changes, forge):
    with pytest.raises(StorageError, match="is damaged"):
        forge(**changes)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"format": "1"}'])
def test_something_else_in_its_place(text, tmp_path):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(StorageError, match=r"manifest\.json"):
        open_bundle(tmp_path)


def test_no_manifest(tmp_path):
    with pytest.raises(StorageError, match=r"cannot read .*manifest\.json"):
        open_bundle(tmp_path)
