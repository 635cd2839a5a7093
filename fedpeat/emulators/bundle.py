"""The bundle: all that a device needs to build its emulated model, and nothing of a dropped block."""

import contextlib
import errno
import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedpeat.core import ModelError, StorageError, write_json
from fedpeat.emulators.blocks import Block, Blocks, Builder
from fedpeat.emulators.manifest import (
    ADAPTER_FILE,
    EMULATOR_FILE,
    FORMAT,
    MANIFEST,
    TOKENIZER_FOLDER,
    check_files,
    read_manifest,
    version_of,
)
from fedpeat.emulators.tensor_file import sha256_of, write_tensor_file
from fedpeat.models import (
    BlockStack,
    LoadedModel,
    Split,
    check_plain,
    describe,
    find_blocks,
    model_tensors,
    source_of,
    tied_names,
)


@dataclass(frozen=True)
class Bundle:
    """A checked bundle on disk.

    Attributes:
        folder: Where it is: `<folder given to write_bundle>/<version>`.
        version: Hash of its content: of every tensor, the config, the tokenizer and the blocks' sources.
        manifest: What `manifest.json` says.
        payload_bytes: Bytes of tensors that a device fetches once.
    """

    folder: Path
    version: str
    manifest: dict[str, Any]
    payload_bytes: int

    @property
    def sources(self) -> tuple[int, ...]:
        """For each block position of the emulated model, its block's index in the full model."""
        return tuple(position["source"] for position in self.manifest["positions"])

    @property
    def adapter_positions(self) -> tuple[int, ...]:
        """Positions that the adapter's blocks have in the emulated model."""
        positions = self.manifest["positions"]
        return tuple(index for index, position in enumerate(positions) if position["role"] == "adapter")

    @property
    def stack(self) -> BlockStack:
        """Where the full model's blocks are."""
        blocks = self.manifest["blocks"]
        return BlockStack(blocks["path"], blocks["count"], tuple(blocks["beside"]))

    @property
    def file_bytes(self) -> int:
        """Size of all files but the manifest, headers and tokenizer included."""
        return sum(entry["bytes"] for entry in self.manifest["files"].values())


def write_bundle(loaded: LoadedModel, *, split: Split, builder: Builder, folder: str | Path) -> Bundle:
    """Write what devices need, into `<folder>/<version>/`; equal content gives the same version and is written once.

    Tensors stand under canonical names in two files: the adapter's blocks with everything outside the blocks, which
    bundles with the same split share, and the emulator's blocks. Tied tensors and equal buffers are stored once.

    Args:
        loaded: The full model; only read. It may be on any device.
        split: Which blocks are the adapter.
        builder: How the middle becomes the emulator.
        folder: Where bundles are kept.

    Raises:
        ConfigError: If the builder cannot be applied (more kept blocks than the middle has).
        ModelError: If the model has no blocks, has layers attached, or could not be rebuilt from a description.
        StorageError: If the disk is full or the folder cannot be written.
    """
    stack = find_blocks(loaded.model)
    if stack.count != split.count:
        found = f"{type(loaded.model).__name__} has {stack.count} blocks"
        raise ModelError(f"cannot write a bundle with a {split}", found, "make the split for this model")
    description = describe(loaded.model)
    check_plain(loaded.model, description, what="write a bundle")
    middle = tuple(Block(index, stack.of(loaded.model)[index]) for index in split.middle)
    emulator = builder(Blocks(middle, f"{type(loaded.model).__name__}, {split}"))
    _check_emulator(emulator, split)
    files, aliases = _choose_tensors(loaded.model, stack, split, emulator)
    manifest = {
        "format": FORMAT,
        "model": description,
        "blocks": {"path": stack.path, "beside": list(stack.beside), "count": stack.count},
        "positions": _positions(split, emulator),
        "builder": builder.describe(),
        "aliases": aliases,
    }
    with _told(folder):
        return _write(Path(folder), manifest, files, loaded)


def open_bundle(folder: str | Path, *, verify: bool = True) -> Bundle:
    """Open a bundle after checking it; nothing is loaded yet.

    Args:
        folder: The bundle's own folder (`Bundle.folder`).
        verify: Hash every file; without it, only the manifest's hash and the files' sizes are checked.

    Raises:
        StorageError: If a file is missing, truncated or altered, or the manifest names files outside the folder.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    check_files(folder, manifest, verify=verify)
    return Bundle(folder, manifest["version"], manifest, manifest["payload_bytes"])


def _check_emulator(emulator: Blocks, split: Split) -> None:
    strangers = [block.source for block in emulator.blocks if block.source not in split.middle]
    if strangers:
        raise ModelError("cannot write a bundle", f"the builder gave block {strangers[0]}, not of the middle")
    changed = [block for block in emulator.blocks if block.changes]
    if changed:
        found = f"block {changed[0].source} was changed: {dict(changed[0].changes[0])}"
        raise ModelError("cannot write a bundle", found, f"bundles of format {FORMAT} hold unchanged blocks")


def _positions(split: Split, emulator: Blocks) -> list[dict[str, Any]]:
    adapter = [{"source": index, "role": "adapter", "changes": []} for index in split.adapter]
    kept = [
        {"source": block.source, "role": "emulator", "changes": [dict(change) for change in block.changes]}
        for block in emulator.blocks
    ]
    # Stable: adapter blocks take their places among the emulator's, whose own order the builder decided.
    merged: list[dict[str, Any]] = []
    for position in kept:
        while adapter and adapter[0]["source"] < position["source"]:
            merged.append(adapter.pop(0))
        merged.append(position)
    return merged + adapter


def _choose_tensors(
    model: nn.Module, stack: BlockStack, split: Split, emulator: Blocks
) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, str]]:
    """Return the tensors of each file by canonical name, stored once each, and the names that refer to others."""
    kept = {block.source for block in emulator.blocks}
    groups: dict[str, dict[str, torch.Tensor]] = {ADAPTER_FILE: {}, EMULATOR_FILE: {}}
    buffers = set()
    for name, tensor, kind in model_tensors(model):
        source = source_of(name, stack)
        if source is None or source in split.adapter:
            groups[ADAPTER_FILE][name] = tensor.detach()
        elif source in kept:
            groups[EMULATOR_FILE][name] = tensor.detach()
        else:
            continue
        if kind != "parameter":
            buffers.add(name)
    # The adapter's file first: what it holds must not depend on the emulator.
    chosen = {**groups[ADAPTER_FILE], **groups[EMULATOR_FILE]}
    aliases = tied_names({name: tensor for name, tensor in chosen.items() if name not in buffers})
    aliases |= _equal_names({name: tensor for name, tensor in chosen.items() if name in buffers})
    stored = {
        file: {name: tensor for name, tensor in group.items() if name not in aliases} for file, group in groups.items()
    }
    return {file: group for file, group in stored.items() if group}, aliases


def _equal_names(buffers: dict[str, torch.Tensor]) -> dict[str, str]:
    first: dict[tuple[Any, ...], str] = {}
    equal = {}
    for name, buffer in buffers.items():
        raw = buffer.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        content = (buffer.dtype, buffer.shape, hashlib.sha256(raw).digest())
        if first.setdefault(content, name) != name:
            equal[name] = first[content]
    return equal


def _write(
    folder: Path, manifest: dict[str, Any], files: dict[str, dict[str, torch.Tensor]], loaded: LoadedModel
) -> Bundle:
    folder.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".writing-", dir=folder))
    try:
        entries, payload = {}, 0
        for name, tensors in files.items():
            written = write_tensor_file(partial / name, tensors)
            entries[name] = {"bytes": written.size, "sha256": written.sha256}
            payload += written.payload_bytes
        if loaded.tokenizer is not None:
            loaded.tokenizer.save_pretrained(partial / TOKENIZER_FOLDER)
            for path in sorted(p for p in (partial / TOKENIZER_FOLDER).rglob("*") if p.is_file()):
                entry = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
                entries[path.relative_to(partial).as_posix()] = entry
        manifest = {**manifest, "files": entries, "payload_bytes": payload}
        manifest["version"] = version_of(manifest)
        write_json(partial / MANIFEST, manifest)
        return _settle(partial, folder / manifest["version"])
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _settle(partial: Path, final: Path) -> Bundle:
    """Move a finished bundle to its place; a sound one that is already there is kept, a damaged one replaced."""
    with contextlib.suppress(StorageError):
        return open_bundle(final)
    shutil.rmtree(final, ignore_errors=True)
    try:
        partial.chmod(0o755)
        partial.rename(final)
    except OSError:
        # Another process may have written the same bundle in the meantime: then that one serves.
        if not final.is_dir():
            raise
    return open_bundle(final)


@contextlib.contextmanager
def _told(folder: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno == errno.ENOSPC
        found = "the disk is full" if full else str(error)
        remedy = "free some space or choose another folder" if full else "check the folder and its permissions"
        raise StorageError(f"cannot write a bundle to {folder}", found, remedy) from error
