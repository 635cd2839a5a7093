"""Where documents come from: files, a hub dataset, or the docstrings of installed libraries.

Each source returns a `datasets.Dataset` with its columns as found, one row a document.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpeat.core import DataError, StorageError, content_hash, nearest, shorten
from fedpeat.data.spec import DataSpec

if TYPE_CHECKING:
    from datasets import Dataset

FILE_FIELD = "file"
"""A column that local files offer to `data.client_field` and `data.answer_field`: the name of the file a document is
in, without endings."""
HELD_OUT_FIELD = "held_out"
"""A boolean column by which a source itself says which documents are for test."""

_READ_WHOLE_BYTES = 256 << 20
_ENDINGS = {
    "text": (".txt", ".text", ".md"),
    "jsonl": (".jsonl", ".json", ".ndjson"),
    "csv": (".csv", ".tsv"),
    "parquet": (".parquet",),
}
_COMPRESSED = ("", ".gz", ".bz2", ".xz", ".zst")


@dataclass(frozen=True)
class Place:
    """Where one owner's documents are: the paths as asked, a hub dataset's split, and folders to work in.

    Attributes:
        paths: Files, folders, globs, or one hub id; empty for a source that needs none.
        split: Of a hub dataset.
        scratch: A folder for files that only reading needs; the caller removes it.
        cache: A folder for what a source keeps between runs.
    """

    paths: tuple[str, ...]
    split: str | None
    scratch: Path
    cache: Path


@dataclass(frozen=True)
class Source:
    """A kind of source.

    Attributes:
        load: Reads all documents of a place.
        identify: Tells, without parsing, what a place holds now: equal JSON values mean equal documents.
    """

    load: Callable[[DataSpec, Place], Dataset]
    identify: Callable[[DataSpec, Place], Any]


def load(spec: DataSpec, *, server: bool, scratch: Path, cache: Path) -> Dataset:
    """Read the clients' documents, or (`server`) those of the server's own source.

    Raises:
        DataError: If there is nothing there, or it cannot be read.
        StorageError: If there is no room to convert it.
    """
    place = _place(spec, server=server, scratch=scratch, cache=cache)
    with _quiet():
        dataset = _source(spec).load(spec, place)
    if dataset.num_rows == 0:
        raise DataError(f"cannot read documents from {_shown(place)}", "there are none", "check data.path")
    return dataset


def fingerprint(spec: DataSpec, *, cache: Path) -> str:
    """Hash what the sources of `spec` hold now: equal hashes mean equal documents.

    Raises:
        DataError: If a file is missing.
    """
    owners = [server for server, there in ((False, has_clients(spec)), (True, spec.has_server_source)) if there]
    places = [_place(spec, server=server, scratch=cache, cache=cache) for server in owners]
    return content_hash([_source(spec).identify(spec, place) for place in places])


def has_clients(spec: DataSpec) -> bool:
    """Return whether there is a source for clients (a real federation's server has only its own)."""
    return spec.path is not None or spec.kind == "docstrings"


def _source(spec: DataSpec) -> Source:
    if spec.kind not in SOURCES:
        raise DataError(f"no data source {spec.kind!r}", "", nearest(spec.kind, SOURCES))
    return SOURCES[spec.kind]


def _place(spec: DataSpec, *, server: bool, scratch: Path, cache: Path) -> Place:
    own = spec.server_path if server else None
    asked = own if own is not None else spec.path
    paths = () if asked is None else (asked,) if isinstance(asked, str) else tuple(asked)
    split = spec.server_split if server and spec.server_split is not None else spec.split
    return Place(paths, split, scratch, cache)


def _shown(place: Place) -> str:
    return shorten(place.paths, 3) or "the source"


def _files(spec: DataSpec, place: Place) -> list[Path]:
    """Return the files meant by paths, folders (all files of the kind in them) and globs, in order of name."""
    endings = tuple(ending + packed for ending in _ENDINGS[spec.kind] for packed in _COMPRESSED)
    found: list[Path] = []
    for asked in place.paths:
        path = Path(asked).expanduser()
        if path.is_dir():
            matches = sorted(file for file in path.rglob("*") if file.name.lower().endswith(endings) and file.is_file())
        elif path.is_file():
            matches = [path]
        else:
            matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True) if Path(match).is_file())  # noqa: PTH207
        if not matches:
            raise DataError(f"cannot read data.path={asked}", _nothing_at(path, endings), "check data.path")
        found += matches
    return list(dict.fromkeys(found))


def _nothing_at(path: Path, endings: tuple[str, ...]) -> str:
    if path.is_dir():
        return f"the folder holds no file ending in {shorten(endings[:: len(_COMPRESSED)])} (or those compressed)"
    if glob.has_magic(str(path)):
        return "no file matches"
    if path.parent.is_dir():
        hint = nearest(path.name, os.listdir(path.parent))  # noqa: PTH208
        return f"no such file; {hint}" if hint.startswith("did") else "no such file"
    return f"no such file, nor its folder {path.parent}"


def _identify_files(spec: DataSpec, place: Place) -> Any:
    return [_identify_file(path) for path in _files(spec, place)]


def _identify_file(path: Path) -> Any:
    """Know a file by its name and content; one too large to read at each start by its place, size and time."""
    status = path.stat()
    if status.st_size > _READ_WHOLE_BYTES:
        return [str(path.resolve()), status.st_size, status.st_mtime_ns]
    return [path.name, hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()]


def _load_files(builder: str, **options: Any) -> Callable[[DataSpec, Place], Dataset]:
    """Return a reader of local files by one of the builders of the `datasets` library."""

    def load_local(spec: DataSpec, place: Place) -> Dataset:
        files = _files(spec, place)
        if not any(file.stat().st_size for file in files):
            raise DataError(f"cannot read documents from {_shown(place)}", "it is empty", "check data.path")
        keywords = {name: getattr(spec, key) for name, key in options.items() if getattr(spec, key) is not None}

        def read(names: list[str]) -> Dataset:
            return _load_dataset(place, builder, data_files=names, split="train", **keywords)

        if FILE_FIELD in (*spec.client_fields, spec.label_field, spec.answer_field):
            return _with_file_names(files, read)
        return read([str(file) for file in files])

    return load_local


def _with_file_names(files: list[Path], read: Callable[[list[str]], Dataset]) -> Dataset:
    from datasets import concatenate_datasets

    parts = []
    for file in files:
        if file.stat().st_size:
            part = read([str(file)])
            if FILE_FIELD not in part.column_names:
                part = part.add_column(FILE_FIELD, [file.name.split(".")[0]] * part.num_rows)
            parts.append(part)
    try:
        return concatenate_datasets(parts)
    except ValueError as error:
        raise DataError(f"cannot join {len(files)} files", str(error), "give them the same columns") from error


def _identify_hub(spec: DataSpec, place: Place) -> Any:
    settings = [spec.name, place.split, spec.revision]
    path = Path(_hub_path(place)).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        return [settings, [[str(file.relative_to(path)), _identify_file(file)] for file in files]]
    return [settings, place.paths]


def _hub_path(place: Place) -> str:
    if len(place.paths) != 1:
        raise DataError("data=hub reads one dataset", f"data.path names {len(place.paths)}", "name one id or folder")
    path = place.paths[0]
    if path.startswith(("/", ".", "~")) and not Path(path).expanduser().is_dir():
        remedy = "name a hub id, or a folder laid out like one"
        raise DataError(f"cannot read data.path={path}", "no such folder", remedy)
    return path


def _load_hub(spec: DataSpec, place: Place) -> Dataset:
    path = _hub_path(place)
    local = Path(path).expanduser().is_dir()
    split = place.split or "train"
    return _load_dataset(
        place if local else None,
        str(Path(path).expanduser()) if local else path,
        name=spec.name,
        split=split,
        revision=None if local else spec.revision,
    )


def _load_dataset(place: Place | None, path: str, **keywords: Any) -> Dataset:
    """Call `datasets.load_dataset`; local files are converted in `place.scratch`, hub ones in the user's own cache."""
    from datasets import Dataset, load_dataset

    shown = keywords.get("data_files", path)
    shown = shorten(shown, 3) if isinstance(shown, list) else shown
    scratch = None if place is None else str(place.scratch)
    try:
        dataset = load_dataset(path, cache_dir=scratch, **keywords)
    except StopIteration as error:
        raise DataError(f"cannot read documents from {shown}", "it is empty", "check data.path") from error
    except Exception as error:
        # The builders raise whatever their parsers do; the innermost reason is the one that says something.
        reason = str(error.__cause__ or error).strip() or type(error).__name__
        if "space" in reason.lower():
            raise StorageError(f"cannot convert {shown}", reason, "free some space, or choose another cache") from error
        if "features" in reason or "corresponds to no data" in reason or "No columns" in reason:
            raise DataError(f"cannot read documents from {shown}", "it is empty", "check data.path") from error
        remedy = (
            "check the file, and that data= names its kind" if "data_files" in keywords else "check data.path, .split"
        )
        raise DataError(f"cannot read {shown}", reason.splitlines()[0], remedy) from error
    if not isinstance(dataset, Dataset):
        raise DataError(f"cannot read {shown}", f"it gave {type(dataset).__name__}, no rows", "name one split")
    return dataset


def _docstring_rows(spec: DataSpec, place: Place) -> list[dict[str, Any]]:
    from fedpeat.data.docstrings import CLIENT_LIBRARIES, read_docstrings

    libraries = tuple(spec.libraries) if spec.libraries else tuple(CLIENT_LIBRARIES)
    return read_docstrings(libraries, cache=place.cache)


def _load_docstrings(spec: DataSpec, place: Place) -> Dataset:
    from datasets import Dataset

    from fedpeat.data.docstrings import held_out

    rows = _docstring_rows(spec, place)
    for row in rows:
        # "sympy.solvers" of sympy.solvers.ode.single: a finer natural client than the library.
        row["package"] = ".".join(row["module"].split(".")[:2])
        row["summary"] = row["text"].partition("\n\n")[0]
    return Dataset.from_list([{**row, HELD_OUT_FIELD: bool(held_out(row))} for row in rows])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back progress bars and the log of `datasets`: what goes wrong is told by our own errors."""
    import datasets

    bars = not datasets.are_progress_bars_disabled()
    log = logging.getLogger("datasets")
    level = log.level
    datasets.disable_progress_bars()
    log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", ResourceWarning
            )  # their CSV reader leaves the file to the garbage collector
            yield
    finally:
        log.setLevel(level)
        if bars:
            datasets.enable_progress_bars()


SOURCES: dict[str, Source] = {
    "docstrings": Source(_load_docstrings, _docstring_rows),
    "text": Source(_load_files("text", sample_by="sample_by"), _identify_files),
    "jsonl": Source(_load_files("json"), _identify_files),
    "csv": Source(_load_files("csv", sep="delimiter"), _identify_files),
    "parquet": Source(_load_files("parquet"), _identify_files),
    "hub": Source(_load_hub, _identify_hub),
}
"""Each source by the name of its `conf/data` option."""
