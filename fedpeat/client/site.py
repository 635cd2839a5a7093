"""A device's own machine: its name, its data, and where it keeps what a server sends.

In a simulation a job names folders, all on one machine. In a real federation a server names none: a job holds the hash
of a bundle and that of a federation, and the device finds them in the folder that its own `site.json` sets.
"""

import os
import re
import shutil
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fedpeat.bundles import BundleCache, Piece, bundle_tokenizer, is_version, open_bundle
from fedpeat.core import ConfigError, StorageError, UpdateRefused, read_json, write_json
from fedpeat.data import DataSpec, prepare

SITE = "site"
"""The key of Flower's node config that holds the path of `site.json`."""

SITE_FILE = "site.json"
CACHE_MIB = 20 * 1024
KEPT_FEDERATIONS = 4
"""Federations whose prepared data and client state stay on a device; the least recently used go first."""

PREPARED = "prepared.json"
VERSIONS = ("fedpeat", "torch", "transformers", "peft", "numpy")

ASKED_OF_DATA = (
    "kind",
    "text_field",
    "prompt_field",
    "answer_field",
    "prompt_template",
    "choices",
    "block_size",
    "separator",
    "tail",
    "validation_share",
    "test_share",
    "test_blocks",
    "min_blocks",
    "too_small",
    "sample_by",
    "delimiter",
)
"""What a server may say of how a device's data is read; where it lies, only the device says."""

FILES = ("text", "jsonl", "csv", "parquet")
"""Kinds of data that a server may ask for: files. Any other kind a device has to set itself."""


@dataclass(frozen=True)
class Site:
    """What one machine of a real federation has.

    Attributes:
        name: The client's registered name, which its seeds and its place in the order of clients follow.
        folder: Where bundles, prepared rows and state are kept.
        data: Settings `data.*` of this machine, `path` among them; they win over what a server asks.
        cache_mib: Most MiB of bundles.
    """

    name: str
    folder: Path
    data: Mapping[str, Any] = field(default_factory=dict)
    cache_mib: int = CACHE_MIB

    @property
    def bundles(self) -> BundleCache:
        """The bundles that this machine keeps."""
        return BundleCache(self.folder / "bundles", self.cache_mib << 20)

    def federation(self, identity: object) -> Path:
        """Return the folder of one federation.

        Raises:
            UpdateRefused: If `identity` is no hash, and so might be a path.
        """
        if not isinstance(identity, str) or re.fullmatch(r"[0-9a-f]{32}", identity) is None:
            raise UpdateRefused("a federation is named by a hash", f"{str(identity)[:64]!r}", "use one fedpeat version")
        return self.folder / "federations" / identity


def read_site(path: str | Path) -> Site:
    """Return the site that a `site.json` describes; it keeps its things beside that file.

    Raises:
        StorageError: If the file cannot be read.
        ConfigError: If it lacks a name, or holds what it must not.
    """
    path = Path(path)
    plain = read_json(path)
    if not isinstance(plain, dict) or not isinstance(plain.get("name"), str) or not isinstance(plain.get("data"), dict):
        raise ConfigError(f"cannot use {path}", "it has no name or no data", "write it anew: fedpeat deploy init")
    return Site(plain["name"], path.absolute().parent, plain["data"], int(plain.get("cache_mib", CACHE_MIB)))


def place(job: Mapping[str, Any], node_config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a job with this machine's own paths; a simulation's job, whose paths are good here, unchanged.

    Raises:
        FedPeatError: If the job is another client's, or its bundle or federation is not here.
    """
    if SITE not in node_config:
        _check_shared(job)
        return dict(job)
    site = read_site(str(node_config[SITE]))
    if job.get("client") != site.name:
        asked = f"this machine works for {site.name!r} alone"
        raise UpdateRefused(
            asked, f"the job is for {str(job.get('client'))[:64]!r}", "check the names that are registered"
        )
    federation = site.federation(job.get("federation"))
    prepared = read_json(federation / PREPARED)
    os.utime(federation)
    return {
        **job,
        "bundle": str(site.bundles.folder_of(job.get("bundle"))),
        "data": str(site.folder / "data" / prepared["data"]),
        "state_folder": str(federation / "state"),
        "attack": None,
    }


def _check_shared(job: Mapping[str, Any]) -> None:
    """Check that the folders which a simulation's job names are on this machine: a Ray worker may be on another one.

    Raises:
        StorageError: If one is not.
    """
    folders = [Path(str(job[key])) for key in ("bundle", "data") if key in job]
    if "state_folder" in job:  # made by whoever comes first, in the run's folder
        folders.append(Path(str(job["state_folder"])).parent)
    for folder in folders:
        if not folder.is_dir():
            raise StorageError(
                f"cannot read {folder}",
                f"{socket.gethostname()} has no such folder",
                "workers on several machines need one file system: set cache and hydra.run.dir to folders in it",
            )


def without_paths(text: str, node_config: Mapping[str, Any]) -> str:
    """Return what went wrong without paths of this machine, which a server has no need to know."""
    if SITE not in node_config:
        return text
    path = Path(str(node_config[SITE]))
    own = [path.parent]
    try:
        given = read_site(path).data.get("path")
        own += [Path(str(one)) for one in (given if isinstance(given, list) else [given]) if one is not None]
    except (StorageError, ConfigError):
        pass  # that it cannot be read is what went wrong
    for one in sorted({*own, *(one.parent for one in own)}, key=lambda one: -len(str(one))):
        if len(one.parts) > 1:
            text = re.sub(re.escape(str(one)) + r"[^\s,;:'\"]*", "<a path of its own>", text)
    return text


def hello(site: Site) -> dict[str, Any]:
    """Return who this machine is and what it has, for a server that asks."""
    return {
        "name": site.name,
        "versions": {name: _version_of(name) for name in VERSIONS},
        "bundles": site.bundles.versions(),
    }


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def take_part(site: Site, asked: Mapping[str, Any], data: bytes) -> dict[str, Any]:
    """Take one part of a bundle: `asked` holds its version, pieces and number, the first one the manifest too.

    Raises:
        StorageError: If it does not fit, or the whole is not what the manifest says.
    """
    bundles, number, version_there = site.bundles, asked["part"], asked["version"]
    if number == 0:
        bundles.begin(asked["manifest"])
    bundles.write(
        version_there, [Piece(str(file), int(offset), int(size)) for file, offset, size in asked["pieces"]], data
    )
    if number + 1 == asked["parts"]:
        bundles.finish(version_there)
    return {"part": number}


def begin(site: Site, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Prepare this machine's own rows for a federation, and return how many there are.

    Args:
        site: This machine.
        asked: `federation` and `bundle` (hashes), `data` (how rows are made), `seed` and `batch_size`.

    Raises:
        FedPeatError: If the data cannot be had as asked, or is too little.
    """
    federation = site.federation(asked["federation"])
    bundle = open_bundle(site.bundles.folder_of(asked["bundle"]), verify=False)
    data = prepare(
        data_settings(site, asked["data"]),
        tokenizer=bundle_tokenizer(bundle),
        tokenizer_id=bundle.version,
        clients_count=None,
        seed=int(asked["seed"]),
        cache_folder=site.folder / "data",
        batch_size=int(asked["batch_size"]),
        owner=site.name,
    )
    write_json(federation / PREPARED, {"data": data.folder.name})
    _forget(site, keep=federation)
    (shard,) = data.clients
    return {key: getattr(shard, key) for key in ("rows", "tokens", "documents")}


def data_settings(site: Site, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of this machine's data: what the server asks, as far as it may, and what is set here.

    Raises:
        ConfigError: If the data's place is not set here, or its kind has to be.
    """
    settings = {key: asked[key] for key in ASKED_OF_DATA if asked.get(key) is not None}
    settings |= site.data
    if site.data.get("path") is None and settings.get("kind") in FILES:
        raise ConfigError(
            f"{site.name!r} has no data", "data.path is not set", "fedpeat deploy client FOLDER data.path=FILE"
        )
    if settings.get("kind") not in FILES and site.data.get("kind") is None:
        found = f"the server asks for data={settings.get('kind')}"
        raise ConfigError("only this machine says what it reads but files", found, "set data.kind in site.json")
    DataSpec.of(settings)
    return settings


def _forget(site: Site, *, keep: Path) -> None:
    """Remove the federations that were used longest ago, and the prepared rows that none of the others uses."""
    os.utime(keep)
    known = sorted((site.folder / "federations").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    for path in known[:-KEPT_FEDERATIONS]:
        shutil.rmtree(path, ignore_errors=True)
    used = {_data_of(path) for path in known[-KEPT_FEDERATIONS:]}
    for path in (site.folder / "data").iterdir():
        if is_version(path.name) and path.name not in used:
            shutil.rmtree(path, ignore_errors=True)


def _data_of(federation: Path) -> str:
    try:
        return str(read_json(federation / PREPARED)["data"])
    except (StorageError, KeyError, TypeError):
        return ""


def answer(action: str, node_config: Mapping[str, Any], asked: Mapping[str, Any], data: bytes) -> dict[str, Any]:
    """Answer a server's question: `hello`, `bundle` (a part of one) or `begin`.

    Raises:
        FedPeatError: If this machine cannot do what is asked.
    """
    if SITE not in node_config:
        raise ConfigError(
            "a device must have a site", "its node config names none", "start it by fedpeat deploy client"
        )
    site = read_site(str(node_config[SITE]))
    if action == "hello":
        return hello(site)
    return take_part(site, asked, data) if action == "bundle" else begin(site, asked)
