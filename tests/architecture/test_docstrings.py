"""Every public module, class and function says what it is."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import kairos

ROOT = Path(kairos.__file__).parents[2]
MODULES = sorted(
    path
    for folder in ("adapters", "migrations", "policies", "predictors", "scheduler_core")
    for path in (ROOT / folder).rglob("*.py")
    if path.read_text().strip()
)
POLICIES_AND_CORE = [path for path in MODULES if path.parts[len(ROOT.parts)] in ("policies", "scheduler_core")]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_every_module_begins_with_a_docstring(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text()))


@pytest.mark.parametrize("path", POLICIES_AND_CORE, ids=name)
def test_every_public_class_and_function_of_policies_and_core_has_a_docstring(path: Path) -> None:
    silent = [f"{where}" for where, node in public(ast.parse(path.read_text())) if not ast.get_docstring(node)]

    assert silent == []


def public(
    tree: ast.Module | ast.ClassDef, prefix: str = ""
) -> Iterator[tuple[str, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Public classes and functions, and the public methods of public classes."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            yield f"{prefix}{node.name}", node
            if isinstance(node, ast.ClassDef):
                yield from public(node, f"{node.name}.")
