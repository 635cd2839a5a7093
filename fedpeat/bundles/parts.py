"""A bundle in parts: cut on the server, put together and checked on a device, kept in a cache of bounded size."""

import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fedpeat.bundles.bundle import Bundle, open_bundle
from fedpeat.bundles.manifest import MANIFEST, check_files, read_manifest
from fedpeat.core import StorageError, write_json

PART_BYTES = 64 * 2**20
"""Most bytes of a part: Flower holds a whole message in memory on each machine that it passes."""

_PARTIAL = ".partial-"
_REMEDY = "let the server send it again"


class Piece(NamedTuple):
    """Bytes of one of a bundle's files: `size` of them from `offset` on."""

    file: str
    offset: int
    size: int


def parts_of(bundle: Bundle, limit: int = PART_BYTES) -> list[tuple[Piece, ...]]:
    """Return the pieces of each part: all of a bundle's files but the manifest, end to end, cut every `limit` bytes."""
    parts: list[list[Piece]] = [[]]
    room = limit
    for file, entry in sorted(bundle.manifest["files"].items()):
        offset = 0
        while offset < entry["bytes"] or not entry["bytes"]:
            if not room:
                parts.append([])
                room = limit
            size = min(room, entry["bytes"] - offset)
            parts[-1].append(Piece(file, offset, size))
            offset, room = offset + size, room - size
            if not entry["bytes"]:
                break
    return [tuple(part) for part in parts]


def read_part(bundle: Bundle, part: Sequence[Piece]) -> bytes:
    """Return the bytes of one part.

    Raises:
        StorageError: If a file cannot be read.
    """
    try:
        return b"".join(_read(bundle.folder / piece.file, piece) for piece in part)
    except OSError as error:
        raise StorageError(f"cannot read bundle {bundle.folder}", str(error), "start the run again") from error


def _read(path: Path, piece: Piece) -> bytes:
    with path.open("rb") as file:
        file.seek(piece.offset)
        return file.read(piece.size)


def is_version(text: object) -> bool:
    """Return whether `text` can be a bundle's version: a hash, and so never a path.

    >>> is_version("00" * 16), is_version("../" * 10 + "00")
    (True, False)
    """
    return isinstance(text, str) and re.fullmatch(r"[0-9a-f]{32}", text) is not None


class BundleCache:
    """The bundles that a device keeps, by version; the least recently used go when there is no more room.

    Args:
        folder: Where; nothing else may be in it.
        limit_bytes: Most bytes of all bundles together.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self._folder = folder
        self._limit = limit_bytes

    def versions(self) -> list[str]:
        """Return the versions that are here and whole, the least recently used first."""
        if not self._folder.is_dir():
            return []
        found = [path for path in self._folder.iterdir() if is_version(path.name) and _is_whole(path)]
        return [path.name for path in sorted(found, key=lambda path: (path.stat().st_mtime_ns, path.name))]

    def folder_of(self, version: object) -> Path:
        """Return the folder of a bundle, which counts as used now.

        Raises:
            StorageError: If `version` is none, or not here.
        """
        if not is_version(version) or not (self._folder / str(version)).is_dir():
            raise StorageError(
                f"no bundle {str(version)[:64]!r}", "it was never sent, or made room for others", _REMEDY
            )
        folder = self._folder / str(version)
        os.utime(folder)
        return folder

    def begin(self, manifest: Mapping[str, Any]) -> None:
        """Make ready for a bundle's parts, and room for them.

        Raises:
            StorageError: If the manifest is not sound, or the bundle is larger than the cache.
        """
        version = manifest.get("version")
        if not is_version(version):
            raise StorageError("cannot take a bundle", "its version is no hash", _REMEDY)
        partial = self._partial(version)
        for left in self._folder.glob(f"{_PARTIAL}*"):
            shutil.rmtree(left, ignore_errors=True)
        write_json(partial / MANIFEST, manifest)
        needed = sum(entry["bytes"] for entry in read_manifest(partial)["files"].values())
        if needed > self._limit:
            shutil.rmtree(partial)
            found = f"it has {needed >> 20} MiB, and at most {self._limit >> 20} MiB are kept here"
            raise StorageError(f"cannot take bundle {version}", found, "raise cache_mib in this machine's site.json")
        self._make_room(needed)

    def write(self, version: object, part: Sequence[Piece], data: bytes) -> None:
        """Write one part, anywhere in the bundle.

        Raises:
            StorageError: If the part does not fit the manifest, or cannot be written.
        """
        partial = self._partial(version)
        files = read_manifest(partial)["files"]
        if sum(piece.size for piece in part) != len(data):
            raise StorageError(f"cannot take a part of bundle {version}", "it is truncated", _REMEDY)
        for piece, raw in _cut(part, data):
            entry = files.get(piece.file)
            if entry is None or piece.offset < 0 or piece.size < 0 or piece.offset + piece.size > entry["bytes"]:
                raise StorageError(f"cannot take a part of bundle {version}", f"{piece} is not of it", _REMEDY)
            try:
                _write(partial / piece.file, piece.offset, raw)
            except OSError as error:
                raise StorageError(f"cannot keep bundle {version}", str(error), "free some space") from error

    def finish(self, version: object) -> Path:
        """Check a bundle of which all parts have come, and keep it.

        Raises:
            StorageError: If anything is missing or altered; what came is removed then.
        """
        partial = self._partial(version)
        try:
            check_files(partial, read_manifest(partial), verify=True)
        except StorageError:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        final = self._folder / str(version)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        return final

    def _partial(self, version: object) -> Path:
        if not is_version(version):
            raise StorageError("cannot take a bundle", "its version is no hash", _REMEDY)
        return self._folder / f"{_PARTIAL}{version}"

    def _make_room(self, needed: int) -> None:
        kept = {version: _size(self._folder / version) for version in self.versions()}
        for version in list(kept):
            if sum(kept.values()) + needed <= self._limit:
                return
            shutil.rmtree(self._folder / version, ignore_errors=True)
            del kept[version]


def _cut(part: Sequence[Piece], data: bytes) -> Iterator[tuple[Piece, memoryview]]:
    at, whole = 0, memoryview(data)
    for piece in part:
        yield piece, whole[at : at + piece.size]
        at += piece.size


def _write(path: Path, offset: int, raw: memoryview) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(raw)


def _is_whole(folder: Path) -> bool:
    try:
        open_bundle(folder, verify=False)
    except StorageError:
        return False
    return True


def _size(folder: Path) -> int:
    return sum(entry["bytes"] for entry in read_manifest(folder)["files"].values())
