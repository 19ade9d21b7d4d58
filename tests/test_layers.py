"""Who may import whom: the table of ARCHITECTURE.md, read off the imports of every module."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.session import PROJECT


def imports(path: Path) -> Iterator[str]:
    """Full names of what a module imports at its top level or inside functions, type-checking blocks apart."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module


RULES: dict[str, tuple[str, ...]] = {  # folder: what none of its modules may import
    "references": ("harness", "kernels", "pytest", "rich", "triton"),
    "kernels": ("references", "harness.oracle", "harness.run", "harness.problem", "harness.triage", "pytest"),
    "harness/problem": ("harness.cache", "harness.oracle", "harness.run", "pytest", "rich"),
    "harness/cache": ("harness.oracle", "harness.run", "harness.kernel", "pytest", "rich"),
    "harness/oracle": ("harness.run", "harness.report", "pytest", "rich"),
    "harness/access": ("harness.run", "harness.report", "harness.triage", "references", "pytest", "rich"),
    "harness/report": ("torch", "harness.oracle", "harness.problem", "harness.cache", "harness.kernel", "pytest"),
    "harness/store": ("torch", "harness.oracle", "harness.report", "pytest", "rich"),
    "harness/interpreter": ("harness.kernel", "harness.oracle", "harness.run", "pytest", "rich"),
    "harness/isolation": ("torch", "triton", "rich", "harness.oracle", "harness.problem", "harness.cache"),
    "harness/matrix": ("torch", "triton", "harness.run", "harness.oracle", "harness.cache", "pytest", "rich"),
}


@pytest.mark.parametrize("folder", RULES)
def test_no_room_imports_what_it_must_not(folder: str) -> None:
    modules = sorted((PROJECT / folder).rglob("*.py"))
    assert modules
    for module in modules:
        for name in imports(module):
            wrong = [rule for rule in RULES[folder] if name == rule or name.startswith(rule + ".")]
            assert not wrong, f"{module.relative_to(PROJECT)} imports {name}"


def test_nothing_imports_kernels_by_name() -> None:
    for folder in ("harness", "references", "kernels", "benchmarks"):
        for module in (PROJECT / folder).rglob("*.py"):
            assert not [name for name in imports(module) if name.split(".")[0] == "kernels"], module


def test_the_reading_of_imports_sees_a_planted_one(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text("def f():\n    from harness.oracle.judge import judge\n    return judge\n")
    assert list(imports(module)) == ["harness.oracle.judge"]


def test_collecting_imports_neither_torch_nor_triton() -> None:
    code = "import sys, harness.plugin, harness.items; print(sorted({'torch', 'triton', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
