"""Docstrings of installed libraries: real text on every machine, without a network.

Files are found and parsed, never imported. One row is one docstring, cleaned; a library is a natural client, or a group
of clients by module.
"""

import ast
import hashlib
import importlib.util
import inspect
import sys
import sysconfig
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import cache as remember
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path

from fedpeat.core import DataError, StorageError, content_hash, nearest, read_json, write_json

STANDARD_LIBRARY = "stdlib"
"""The name under which Python's own modules are read, as if they were one package."""

CLIENT_LIBRARIES = ("sympy", "ray", "pandas", "sqlalchemy", "networkx", "matplotlib", "fontTools", "flwr")
"""Clients by default: libraries with much text that a plain install brings, and that pretraining never saw."""

PRETRAIN_LIBRARIES = (
    *(STANDARD_LIBRARY, "torch", "numpy", "transformers", "huggingface_hub", "datasets", "peft", "accelerate"),
    *("mpmath", "pydantic", "PIL", "rich", "click", "fsspec", "jinja2"),
)
"""What the embedded model is pretrained on; a plain install brings these too, so anyone can do it again."""

MINIMUM_CHARACTERS = 100
HELD_OUT_PERCENT = 10
# Raised when the reading below changes, so that rows cached by an older reader are not used.
_READER = 2
# Tests say little in docstrings; vendored copies belong to another library, which may be another client.
_LEFT_OUT = {"test", "tests", "testing", "_vendor", "vendor", "vendored", "extern", "externals", "thirdparty"}
_DEFINITIONS = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
_ADDERS = {"add_docstr", "add_newdoc", "_add_docstr"}
_LEFT_OUT |= {
    "thirdparty_files",
    "_pytest_plugins",
    "site-packages",
    "dist-packages",
    "idlelib",
    "lib2to3",
    "__pycache__",
}


def read_docstrings(packages: Sequence[str], *, cache: str | Path | None = None) -> list[dict[str, str]]:
    """Read the docstrings of installed packages.

    Docstrings shorter than `MINIMUM_CHARACTERS` and repeated texts (the first of them stays) are left out, as are test
    and vendored modules. The order is that of `packages`, then of module names, then of the source text.

    Args:
        packages: Import names of top-level packages; `"stdlib"` is the standard library.
        cache: Folder where rows are kept by library, version and file list; None reads the sources every time.

    Returns:
        Rows `{"library", "module", "name", "object", "text"}`; `name` is the dotted name of what is documented, and
        `object` what that is: module, class, method (defined in a class) or function.

    Raises:
        DataError: If a package is not installed, or holds no Python sources.
        StorageError: If the cache cannot be written.
    """
    rows, seen = [], set()
    for package in packages:
        for row in _read_library(package, Path(cache) if cache is not None else None):
            if row["text"] not in seen:
                seen.add(row["text"])
                rows.append(row)
    return rows


def held_out(row: Mapping[str, str]) -> bool:
    """Tell whether the row's module is held out for test: a hash of library and module, about one in ten.

    >>> held_out({"library": "sympy", "module": "sympy.core.add"})
    False
    """
    name = f"{row['library']}\x1f{row['module']}"
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") % 100 < HELD_OUT_PERCENT


def _read_library(package: str, cache: Path | None) -> list[dict[str, str]]:
    files = _find_sources(package)
    if not files:
        remedy = "name a package that ships Python sources"
        raise DataError(f"cannot read the docstrings of {package!r}", "no Python sources found", remedy)
    if cache is None:
        return _parse_library(package, files)
    sizes = [(module, path.stat().st_size) for module, path in files.items()]
    key = content_hash([_READER, MINIMUM_CHARACTERS, package, _versions(package), sizes])
    path = cache / "docstrings" / f"{package}-{key}.json"
    if path.is_file():
        try:
            return read_json(path)
        except StorageError:
            path.unlink()  # truncated, by a full disk or a copy cut short: read the sources again
    rows = _parse_library(package, files)
    write_json(path, rows)
    return rows


def _find_sources(package: str) -> dict[str, Path]:
    """Return the package's source files by module name, sorted, without importing anything.

    Raises:
        DataError: If the package is not installed.
    """
    if package == STANDARD_LIBRARY:
        root = Path(sysconfig.get_path("stdlib"))
        names = sorted(sys.stdlib_module_names)
        found = [pair for name in names for pair in _under(root / name, name)]
        found += [(name, root / f"{name}.py") for name in names if (root / f"{name}.py").is_file()]
        return dict(sorted(found))
    # find_spec of a dotted name would import its parents.
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None:
        known = [*CLIENT_LIBRARIES, *PRETRAIN_LIBRARIES]
        remedy = f"install it, or leave it out; {nearest(package, known)}"
        raise DataError(f"cannot read the docstrings of {package!r}", "no such package is installed", remedy)
    if spec.submodule_search_locations:
        found = [pair for folder in spec.submodule_search_locations for pair in _under(Path(folder), package)]
        return dict(sorted(found))
    path = Path(spec.origin or "")
    return {package: path} if path.suffix == ".py" and path.is_file() else {}


def _under(folder: Path, package: str) -> Iterator[tuple[str, Path]]:
    for path in folder.rglob("*.py"):
        parts = path.relative_to(folder).with_suffix("").parts
        if _LEFT_OUT.isdisjoint(parts) and not parts[-1].startswith("test_") and all(map(str.isidentifier, parts)):
            yield ".".join([package, *(part for part in parts if part != "__init__")]), path


@remember
def _distributions() -> Mapping[str, list[str]]:
    return packages_distributions()


def _versions(package: str) -> list[str]:
    if package == STANDARD_LIBRARY:
        return [sys.version]
    try:
        return [f"{name} {version(name)}" for name in sorted(set(_distributions().get(package, ())))]
    except PackageNotFoundError:
        return []


def _parse_library(package: str, files: Mapping[str, Path]) -> list[dict[str, str]]:
    rows, seen = [], set()
    for module, path in files.items():
        for name, kind, text in _parse_file(path):
            if text not in seen:
                seen.add(text)
                full = f"{module}.{name}" if name else module
                rows.append({"library": package, "module": module, "name": full, "object": kind, "text": text})
    return rows


def _parse_file(path: Path) -> Iterator[tuple[str, str, str]]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # others' invalid escapes are no concern of ours
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError):
        return  # a template, or a file for another Python
    for name, kind, text in _documented(tree, "", "module"):
        clean = inspect.cleandoc(text).strip()
        if len(clean) >= MINIMUM_CHARACTERS:
            yield name, kind, clean


def _documented(node: ast.AST, name: str, kind: str) -> Iterator[tuple[str, str, str]]:
    """Yield dotted names, what has them, and raw docstrings; only statements are visited: expressions document none."""
    if isinstance(node, ast.Module | _DEFINITIONS):
        yield name, kind, ast.get_docstring(node, clean=False) or ""
    for field in ("body", "orelse", "handlers", "finalbody", "cases"):
        for child in getattr(node, field, ()):
            if isinstance(child, _DEFINITIONS):
                inner = "class" if isinstance(child, ast.ClassDef) else "method" if kind == "class" else "function"
                yield from _documented(child, f"{name}.{child.name}" if name else child.name, inner)
            elif isinstance(child, ast.Expr):
                yield from _added(child.value)
            elif hasattr(child, "body") or hasattr(child, "cases"):
                yield from _documented(child, name, kind)


def _added(call: ast.expr) -> Iterator[tuple[str, str, str]]:
    """Yield what `add_docstr(torch.abs, "...")` and its like document: compiled functions."""
    if isinstance(call, ast.Call) and ast.unparse(call.func).rpartition(".")[2] in _ADDERS and call.args:
        texts = [
            node.value for node in ast.walk(call) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
        yield ast.unparse(call.args[0]).strip("'"), "function", max(texts, key=len, default="")
