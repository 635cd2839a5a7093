import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeat.bundles import BundleCache, Piece, open_bundle, parts_of, read_part
from fedpeat.core import StorageError
from fedpeat.emulators import uniform
from fedpeat.models import make_split
from tests.bundles import bundled

PLENTY = 1 << 30


@pytest.fixture(scope="module")
def bundles(miniature, tmp_path_factory):
    """Bundles of one model with 1, 2 and 3 middle blocks."""
    loaded, folder = miniature("llama", blocks=5), tmp_path_factory.mktemp("bundles")
    split = make_split(5, first=1, last=1)
    return [bundled(loaded, split=split, builder=uniform(kept_blocks=kept), folder=folder) for kept in (1, 2, 3)]


@pytest.fixture(scope="module")
def bundle(bundles):
    return bundles[0]


def send(bundle, cache, limit=PLENTY):
    cache.begin(bundle.manifest)
    for part in parts_of(bundle, limit):
        cache.write(bundle.version, part, read_part(bundle, part))
    return cache.finish(bundle.version)


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@settings(max_examples=40)
@given(st.integers(1, 400_000))
def test_parts_are_small_enough_and_cover_every_byte_once(bundle, limit):
    limit = max(limit, bundle.file_bytes // 200)  # more than 200 parts take long and show nothing new
    parts = parts_of(bundle, limit)
    sizes = [sum(piece.size for piece in part) for part in parts]
    assert max(sizes) <= limit
    assert all(size == limit for size in sizes[:-1])
    covered = {}
    for piece in (piece for part in parts for piece in part):
        assert piece.offset == covered.get(piece.file, 0)
        covered[piece.file] = piece.offset + piece.size
    assert covered == {file: entry["bytes"] for file, entry in bundle.manifest["files"].items()}


@settings(max_examples=10)
@given(st.integers(20_000, 400_000), st.randoms(use_true_random=False))
def test_what_is_put_together_is_what_was_cut_whatever_the_order(bundle, tmp_path_factory, limit, draw):
    cache = BundleCache(tmp_path_factory.mktemp("cache"), PLENTY)
    cache.begin(bundle.manifest)
    parts = parts_of(bundle, limit)
    draw.shuffle(parts)
    for part in parts:
        cache.write(bundle.version, part, read_part(bundle, part))
    there, here = contents(bundle.folder), contents(cache.finish(bundle.version))
    assert json.loads(here.pop("manifest.json")) == json.loads(there.pop("manifest.json"))
    assert here == there
    assert open_bundle(cache.folder_of(bundle.version)).version == bundle.version
    assert cache.versions() == [bundle.version]


def test_an_empty_file_is_a_piece_too(bundle):
    manifest = {
        **bundle.manifest,
        "files": {"tokenizer/a": {"bytes": 0, "sha256": ""}, "b": {"bytes": 3, "sha256": ""}},
    }
    parts = parts_of(type(bundle)(bundle.folder, bundle.version, manifest, 3), 2)
    assert parts == [(Piece("b", 0, 2),), (Piece("b", 2, 1), Piece("tokenizer/a", 0, 0))]


@pytest.mark.parametrize("harm", ["altered", "missing", "truncated"])
def test_a_bundle_that_is_not_what_its_manifest_says_is_refused_and_removed(bundle, tmp_path, harm):
    cache = BundleCache(tmp_path, PLENTY)
    cache.begin(bundle.manifest)
    first, *others = parts_of(bundle, 50_000)
    data = bytearray(read_part(bundle, first))
    if harm == "altered":
        data[len(data) // 2] ^= 1
    if harm == "truncated":
        with pytest.raises(StorageError, match="truncated"):
            cache.write(bundle.version, first, bytes(data[:-1]))
    elif harm == "altered":
        cache.write(bundle.version, first, bytes(data))
    for part in others:
        cache.write(bundle.version, part, read_part(bundle, part))
    with pytest.raises(StorageError):
        cache.finish(bundle.version)
    assert cache.versions() == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "piece",
    [
        Piece("../outside", 0, 3),
        Piece("/tmp/outside", 0, 3),
        Piece("manifest.json", 0, 3),
        Piece("adapter.safetensors", -1, 3),
        Piece("adapter.safetensors", 1 << 40, 3),
    ],
)
def test_bytes_that_are_not_of_the_bundle_are_refused(bundle, tmp_path, piece):
    cache = BundleCache(tmp_path / "cache", PLENTY)
    cache.begin(bundle.manifest)
    with pytest.raises(StorageError, match="not of it"):
        cache.write(bundle.version, [piece], b"abc")
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"manifest.json"}


@pytest.mark.parametrize("version", ["../../etc", "", None, 3, "A" * 32, "0" * 31, "0" * 32 + "/"])
def test_what_is_no_hash_is_no_version(tmp_path, bundle, version):
    cache = BundleCache(tmp_path, PLENTY)
    for use in (
        lambda: cache.folder_of(version),
        lambda: cache.finish(version),
        lambda: cache.write(version, [], b""),
        lambda: cache.begin({**bundle.manifest, "version": version}),
    ):
        with pytest.raises(StorageError):
            use()
    assert list(tmp_path.iterdir()) == []


def test_a_manifest_that_was_altered_is_refused(tmp_path, bundle):
    with pytest.raises(StorageError, match="altered"):
        BundleCache(tmp_path, PLENTY).begin({**bundle.manifest, "aliases": {"a": "b"}})


def test_the_least_recently_used_makes_room(tmp_path, bundles):
    first, second, third = bundles
    cache = BundleCache(tmp_path, first.file_bytes + third.file_bytes + 10)
    send(first, cache)
    send(second, cache)
    cache.folder_of(first.version)
    send(third, cache)
    assert cache.versions() == [first.version, third.version]
    with pytest.raises(StorageError, match="made room"):
        cache.folder_of(second.version)


def test_a_bundle_larger_than_the_cache_is_refused_and_the_others_stay(tmp_path, bundles):
    first, _, third = bundles
    cache = BundleCache(tmp_path, third.file_bytes - 1)
    send(first, cache)
    with pytest.raises(StorageError, match="cache_mib"):
        cache.begin(third.manifest)
    assert cache.versions() == [first.version]


def test_what_is_half_there_is_no_version_and_can_be_sent_again(tmp_path, bundle):
    cache = BundleCache(tmp_path, PLENTY)
    cache.begin(bundle.manifest)
    part = parts_of(bundle, 50_000)[0]
    cache.write(bundle.version, part, read_part(bundle, part))
    assert cache.versions() == []
    send(bundle, cache, 100_000)
    assert cache.versions() == [bundle.version]
    shutil.rmtree(Path(cache.folder_of(bundle.version)) / "tokenizer")
    assert cache.versions() == []
    send(bundle, cache)
    assert cache.versions() == [bundle.version]
