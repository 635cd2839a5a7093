"""A bundle's manifest: what it says, and how it is checked before anything is built from it."""

import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from fedpeat.bundles.tensor_file import sha256_of
from fedpeat.core import StorageError, content_hash, read_json

FORMAT = 2
MANIFEST = "manifest.json"
ADAPTER_FILE, EMULATOR_FILE = "adapter.safetensors", "emulator.safetensors"
TOKENIZER_FOLDER = "tokenizer"
ROLES = ("adapter", "emulator")

_SHAPE: dict[str, type] = {
    "format": int,
    "version": str,
    "model": dict,
    "blocks": dict,
    "positions": list,
    "builder": dict,
    "aliases": dict,
    "files": dict,
    "payload_bytes": int,
}
_REMEDY = "fetch the bundle again, or write it anew"


def version_of(manifest: Mapping[str, Any]) -> str:
    """Return the hash that names a bundle: of all its manifest says, and so of every file's bytes."""
    return content_hash({key: value for key, value in manifest.items() if key != "version"})


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read and check a manifest; nothing in it is trusted.

    Raises:
        StorageError: If it is missing, altered, of another format, or names files outside the bundle.
    """
    manifest = read_json(folder / MANIFEST)
    asked = f"cannot open bundle {folder}"
    if not isinstance(manifest, dict) or not isinstance(manifest.get("format"), int):
        raise StorageError(asked, f"its {MANIFEST} is not a bundle's", _REMEDY)
    if manifest["format"] != FORMAT:
        found = f"its format is {manifest['format']}, this version of fedpeat reads {FORMAT}"
        raise StorageError(asked, found, "use the same fedpeat version at both ends")
    wrong = [key for key, kind in _SHAPE.items() if type(manifest.get(key)) is not kind]
    if wrong or not _parts_are_sound(manifest):
        raise StorageError(asked, f"its {MANIFEST} is damaged ({', '.join(wrong) or 'blocks or files'})", _REMEDY)
    for name in manifest["files"]:
        if not _is_inside(folder, name):
            raise StorageError(asked, f"its {MANIFEST} names {name!r}, outside the bundle", "do not trust its sender")
    if version_of(manifest) != manifest["version"]:
        raise StorageError(asked, f"its {MANIFEST} was altered: it does not match its version", _REMEDY)
    return manifest


def _parts_are_sound(manifest: Mapping[str, Any]) -> bool:
    blocks, positions, model = manifest["blocks"], manifest["positions"], manifest["model"]
    count = blocks.get("count")
    return (
        all(isinstance(model.get(key), str) for key in ("class", "dtype", "attention"))
        and isinstance(model.get("config"), dict)
        and isinstance(blocks.get("path"), str)
        and isinstance(blocks.get("beside"), list)
        and type(count) is int
        and len(positions) > 0
        and all(_is_position(position, count) for position in positions)
        and all(isinstance(name, str) for name in manifest["aliases"].values())
        and all(_is_file_entry(entry) for entry in manifest["files"].values())
    )


def _is_position(position: object, count: int) -> bool:
    if not isinstance(position, dict) or position.get("role") not in ROLES:
        return False
    changes = position.get("changes")
    indices = [position.get("source"), position.get("place", position.get("source"))]
    within = all(type(index) is int and 0 <= index < count for index in indices)
    return within and isinstance(changes, list) and all(isinstance(change, dict) for change in changes)


def _is_file_entry(entry: object) -> bool:
    if not isinstance(entry, dict) or type(entry.get("bytes")) is not int:
        return False
    return isinstance(entry.get("sha256"), str) and re.fullmatch(r"[0-9a-f]{64}", entry["sha256"]) is not None


def _is_inside(folder: Path, name: str) -> bool:
    path = PurePosixPath(name)
    plain = not path.is_absolute() and ".." not in path.parts and "\\" not in name and ":" not in name
    expected = name in {ADAPTER_FILE, EMULATOR_FILE} or (len(path.parts) > 1 and path.parts[0] == TOKENIZER_FOLDER)
    return plain and expected and (folder / path).resolve().is_relative_to(folder.resolve())


def check_files(folder: Path, manifest: Mapping[str, Any], *, verify: bool) -> None:
    """Check that every file is there and has its size, and with `verify` its SHA-256.

    Raises:
        StorageError: With the first file that is missing, truncated or altered.
    """
    asked = f"cannot open bundle {folder}"
    for name, entry in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise StorageError(asked, f"{name} is missing", _REMEDY)
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise StorageError(asked, f"{name} has {size} bytes instead of {entry['bytes']}", _REMEDY)
        if verify and sha256_of(path) != entry["sha256"]:
            raise StorageError(asked, f"{name} was altered: its SHA-256 differs from the manifest's", _REMEDY)
