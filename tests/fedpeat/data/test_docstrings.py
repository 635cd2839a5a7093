import sys

import pytest

from fedpeat.core import DataError
from fedpeat.data import docstrings
from fedpeat.data.docstrings import CLIENT_LIBRARIES, PRETRAIN_LIBRARIES, held_out, read_docstrings

LONG = "It says enough about itself to be worth a row of its own, and is not said twice anywhere in this package. "


def source(*lines: str) -> str:
    return "\n".join(lines) + "\n"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package whose import would fail, so that reading it proves that nothing is imported."""
    root = tmp_path / "site" / "tiny_library"
    (root / "inner" / "tests").mkdir(parents=True)
    (root / "__init__.py").write_text(source(f'"""Zero. {LONG}"""', "raise RuntimeError('imported')"))
    (root / "inner" / "__init__.py").write_text("")
    (root / "inner" / "deep.py").write_text(
        source(
            "class Thing:",
            f'    """First. {LONG}',
            "",
            "    Then:",
            "        indented",
            '    """',
            "    if True:",
            "        async def method(self):",
            f"            'Second. {LONG}'",
            "def short():",
            '    "Too short."',
            "def again():",
            f'    """Zero. {LONG}"""',
            "def outer():",
            "    def nested():",
            f'        """Third. {LONG}"""',
            f'add_docstr(torch.abs, """Fourth. {LONG}""".format(**common))',
        )
    )
    (root / "inner" / "tests" / "test_deep.py").write_text(f'"""Never. {LONG}"""\n')
    (root / "broken.py").write_text("def (:\n")
    (root / "not-a-module.py").write_text(f'"""Never. {LONG}"""\n')
    monkeypatch.syspath_prepend(str(root.parent))
    return root


def test_reads_each_docstring_once_cleaned_and_in_order(package):
    rows = read_docstrings(["tiny_library"])

    assert [row["name"] for row in rows] == [
        "tiny_library",
        "tiny_library.inner.deep.Thing",
        "tiny_library.inner.deep.Thing.method",
        "tiny_library.inner.deep.outer.nested",
        "tiny_library.inner.deep.torch.abs",
    ]
    assert [row["object"] for row in rows] == ["module", "class", "method", "function", "function"]
    assert [row["text"].split(".")[0] for row in rows] == ["Zero", "First", "Second", "Third", "Fourth"]
    assert rows[1]["text"].endswith("\n\nThen:\n    indented")
    assert {row["library"] for row in rows} == {"tiny_library"}
    assert {row["module"] for row in rows} == {"tiny_library", "tiny_library.inner.deep"}
    assert "tiny_library" not in sys.modules
    assert rows == read_docstrings(["tiny_library", "tiny_library"])


def test_cache_is_used_and_follows_the_sources(package, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    first = read_docstrings(["tiny_library"], cache=cache)
    (kept,) = (cache / "docstrings").iterdir()

    with monkeypatch.context() as patch:
        patch.setattr(docstrings, "_parse_file", lambda path: pytest.fail(f"{path} read again"))
        assert read_docstrings(["tiny_library"], cache=cache) == first

    kept.write_text(kept.read_text()[:50])
    assert read_docstrings(["tiny_library"], cache=cache) == first

    (package / "more.py").write_text(f'"""Fifth. {LONG}"""\n')
    assert len(read_docstrings(["tiny_library"], cache=cache)) == len(first) + 1


def test_reads_a_single_file_module_and_the_standard_library(tmp_path, monkeypatch):
    (tmp_path / "lonely_module.py").write_text(f'"""Alone. {LONG}"""\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "stdlib_module_names", frozenset({"json", "textwrap"}))

    assert [row["module"] for row in read_docstrings(["lonely_module"])] == ["lonely_module"]
    modules = {row["module"] for row in read_docstrings(["stdlib"])}
    assert {"json", "json.decoder", "textwrap"} <= modules
    assert all(module.split(".")[0] in {"json", "textwrap"} for module in modules)


@pytest.mark.parametrize("name", ["no_such_library", "os.path", "../etc"])
def test_missing_package_is_told(name):
    with pytest.raises(DataError, match="no such package is installed"):
        read_docstrings([name])


def test_package_without_sources_is_told():
    with pytest.raises(DataError, match="no Python sources"):
        read_docstrings(["_struct" if "_struct" not in sys.builtin_module_names else "math"])


def test_held_out_share():
    rows = [{"library": "sympy", "module": f"sympy.m{index}"} for index in range(2000)]
    assert 0.08 < sum(map(held_out, rows)) / len(rows) < 0.12
    assert held_out(rows[0]) == held_out(dict(rows[0], text="anything"))


def test_clients_and_pretraining_share_no_library():
    assert not set(CLIENT_LIBRARIES) & set(PRETRAIN_LIBRARIES)
    assert len(CLIENT_LIBRARIES) >= 8
