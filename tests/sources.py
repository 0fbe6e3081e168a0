"""The project's own sources, read for the tests that keep its map: imports, and code without its docstrings."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).parent.parent
LIBRARY = ROOT / "qat"
RECIPES = ROOT / "recipes"

When = Literal["module", "function", "type checking"]


@dataclass(frozen=True)
class Import:
    """One imported module, as the file `source` names it at `line`."""

    source: str
    target: str
    when: When
    line: int

    @property
    def package(self) -> str:
        return self.target.partition(".")[0]

    def __str__(self) -> str:
        return f"{self.source}, line {self.line} ({self.when}): imports {self.target}"


def part_of(module: str) -> str:
    """`qat.layers.linear` lies in `layers`; the facade `qat` itself in the part ''."""
    return module.removeprefix("qat").lstrip(".").partition(".")[0]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def library_modules() -> dict[str, Path]:
    return {module_name(path): path for path in sorted(LIBRARY.rglob("*.py"))}


@cache
def recipe_modules() -> dict[str, Path]:
    return {module_name(path): path for path in sorted(RECIPES.rglob("*.py"))}


def is_type_checking(test: ast.expr) -> bool:
    return getattr(test, "attr", getattr(test, "id", None)) == "TYPE_CHECKING"


def targets_of(node: ast.Import | ast.ImportFrom, module: str, is_package: bool) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
        return
    origin = node.module or ""
    if node.level:
        above = module.split(".")
        above = above[: len(above) - node.level + is_package]
        origin = ".".join([*above, *filter(None, [origin])])
    for alias in node.names:
        submodule = f"{origin}.{alias.name}"
        yield submodule if submodule in library_modules() else origin


def imports_below(node: ast.AST, module: str, is_package: bool, when: When = "module") -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            for target in targets_of(child, module, is_package):
                yield Import(module, target, when, child.lineno)
        elif isinstance(child, ast.If) and is_type_checking(child.test):
            for statement in child.body:
                wrapped = ast.Module(body=[statement], type_ignores=[])
                yield from imports_below(wrapped, module, is_package, "type checking")
            for statement in child.orelse:
                yield from imports_below(ast.Module(body=[statement], type_ignores=[]), module, is_package, when)
        else:
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and when == "module"
            yield from imports_below(child, module, is_package, "function" if inside else when)


def imports_of(modules: dict[str, Path]) -> Iterator[Import]:
    for module, path in modules.items():
        yield from imports_below(ast.parse(path.read_text()), module, path.name == "__init__.py")


@cache
def library_imports() -> tuple[Import, ...]:
    return tuple(imports_of(library_modules()))


def internal_imports() -> Iterator[Import]:
    """Imports from one module of qat to another; the facade may name them all."""
    return (found for found in library_imports() if found.package == "qat" and found.source != "qat")


@cache
def code_of(path: Path) -> str:
    """A module without its docstrings and comments."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [  # type: ignore[attr-defined]
                part
                for part in body
                if not (isinstance(part, ast.Expr) and isinstance(getattr(part.value, "value", None), str))
            ] or [ast.Pass()]
    return ast.unparse(tree)


def path_of(module: str) -> str:
    return library_modules()[module].relative_to(ROOT).as_posix()


def listing(violations: list[str] | list[Import]) -> str:
    return "\n" + "\n".join(map(str, violations))
