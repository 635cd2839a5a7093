"""What a server changed of its emulator since the bundle: sent once to a device, which keeps it on its disk."""

from pathlib import Path

from fedpeat.bundles import is_version
from fedpeat.client.store import Store
from fedpeat.core import StorageError, Tensors, UpdateRefused, digest, read_tensors, write_tensors

FOLDER = "emulator"
SPARE = 2
"""Versions kept beyond those that the rounds need which a run may yet be resumed from."""


def changes_for(store: Store, version: str, sent: Tensors, *, server_round: int, rounds: int) -> Tensors:
    """Return the changes of a version, as they were sent now or before; nothing where the emulator is the bundle's.

    Args:
        store: Of the client.
        version: Hash of the changes; empty for none.
        sent: What came with this message; empty if the server knows that this client has them.
        server_round: The round that is worked on.
        rounds: From how many rounds the run may yet be resumed: as many versions may be asked for again.

    Raises:
        UpdateRefused: If what came is not that version.
        StorageError: If they were not sent, and are not here or damaged; or if the disk is full.
    """
    if (sent and digest(sent) != version) or (version and not is_version(version)):
        found = f"these are not {version[:64]!r}"
        raise UpdateRefused("an emulator's changes are named by their hash", found, "use one fedpeat version")
    if not version:
        return {}
    if store.folder is None:
        return sent
    folder = store.folder / FOLDER
    if sent:
        write_tensors(folder / f"{server_round:06d}.{version}.safetensors", sent)
        _drop(folder, keep=rounds + SPARE)
        return sent
    found = next(iter(folder.glob(f"*.{version}.safetensors")), None)
    kept = {} if found is None else read_tensors(found)
    if digest(kept) != version:
        what = "they were not sent with this message, and are not on its disk"
        raise StorageError("a device needs the emulator's changes", what, "they come with its next message")
    return kept


def _drop(folder: Path, *, keep: int) -> None:
    """Drop the versions that came in the earliest rounds."""
    for path in sorted(folder.glob("*.safetensors"))[:-keep]:
        path.unlink(missing_ok=True)
