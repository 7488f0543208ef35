"""Modules import one another in one direction: what one needs can be read without it."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent


def test_no_imports_go_in_a_circle():
    files = [
        file
        for top in ("guilomo_serve", "guilomo_train")
        for file in (REPOSITORY / top).rglob("*.py")
    ]
    _check({_name(file.relative_to(REPOSITORY)): file.read_text() for file in files})


@pytest.mark.parametrize(
    "sources",
    [
        {"a": "import b", "b": "from a import x"},
        {"a": "", "a.one": "from a import two", "a.two": "if True:\n    from a.one import x"},
        {"a": "from a.one import x", "a.one": "from a import x"},
        {"a": "import b.one", "b": "import a", "b.one": ""},
    ],
)
def test_a_circle_is_seen(sources):
    with pytest.raises(AssertionError, match="a"):
        _check(sources)


@pytest.mark.parametrize(
    "sources",
    [
        {"a": "from a.one import x", "a.one": "import a.two", "a.two": ""},
        {"a": "import b", "b": "def late():\n    import a"},
        {"a": "import b", "b": "if TYPE_CHECKING:\n    import a"},
    ],
)
def test_what_is_no_circle_is_none(sources):
    _check(sources)


def _check(sources: Mapping[str, str]) -> None:
    """Args: sources: module -> its text."""
    graph = {name: set(_imported(name, text, sources)) for name, text in sources.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as e:
        raise AssertionError(" <- ".join(e.args[1])) from None


def _name(file: Path) -> str:
    parts = file.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imported(name: str, text: str, modules: Mapping[str, str]) -> Iterator[str]:
    """The modules of `modules` that run before what follows their import."""
    inside = {*_packages(name), name}
    for node in _at_import(ast.parse(text)):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        else:
            assert node.module is not None, f"{name}: imports are absolute here"
            members = [f"{node.module}.{alias.name}" for alias in node.names]
            found = [member if member in modules else node.module for member in members]
        for module in found:
            # Of a package that a module is in, the beginning has run before it.
            yield from (p for p in _packages(module) if p in modules and p not in inside)
            if module in modules and module != name:
                yield module


def _packages(module: str) -> list[str]:
    """Those that a module is in."""
    parts = module.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _at_import(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """The imports that run as a module is imported."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for other in node.orelse:
                yield from _at_import(other)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from _at_import(node)
