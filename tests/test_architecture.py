"""The package's shape: what imports what, and what is public."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import moai_flow.memory

PACKAGE = Path(moai_flow.memory.__file__).parent
PREFIX = "moai_flow.memory."

# From the bottom to the top: a module imports only what stands before it. Operations never import each other.
LAYERS = [
    ["enums", "errors"],
    ["files", "patience", "types", "workers"],
    ["aggregates", "forks", "inputs", "models"],
    ["backends", "engine"],
    ["catalogue", "statements"],
    ["connections"],
    ["migrations", "quarantine"],
    ["scope"],
    [
        "operations.agents",
        "operations.events",
        "operations.maintenance",
        "operations.memory",
        "operations.metrics",
        "operations.retention",
        "operations.summaries",
    ],
    ["tracking"],
    ["db"],
    ["aio"],
    ["reading"],
    ["restoring", "transfer"],
]
LEVEL = {module: level for level, modules in enumerate(LAYERS) for module in modules}
ON_TOP = {"__init__", "__main__", "cli", "demo"}


def imported_at_run_time(module: Path) -> set[str]:
    tree = ast.parse(module.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
    return {name.removeprefix(PREFIX) for name in found if name.startswith(PREFIX)} & LEVEL.keys()


@pytest.mark.parametrize("module", LEVEL)
def test_imports_run_downwards_only(module: str) -> None:
    source = PACKAGE / f"{module.replace('.', '/')}.py"

    assert {name for name in imported_at_run_time(source) if LEVEL[name] >= LEVEL[module]} == set()


def test_every_module_has_its_layer() -> None:
    modules = {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        for path in PACKAGE.rglob("*.py")
        if path.stem != "__init__"
    }

    assert {module for module in modules if module.split(".")[0] not in ON_TOP} == set(LEVEL)


def test_what_is_exported_is_what_is_promised() -> None:
    public = {
        name
        for name, value in vars(moai_flow.memory).items()
        if not name.startswith("_") and type(value).__name__ != "module"
    }

    assert set(moai_flow.memory.__all__) == public
    assert moai_flow.memory.__all__ == sorted(moai_flow.memory.__all__)


def test_importing_the_library_imports_neither_the_command_lines_libraries_nor_alembic() -> None:
    program = "import sys, moai_flow.memory; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    imported = {module.partition(".")[0] for module in modules}

    assert "sqlmodel" in imported
    assert not {"typer", "rich", "alembic", "psycopg", "click"} & imported
    assert "sqlalchemy.dialects.postgresql" not in modules


def test_importing_the_library_makes_nothing(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", "import moai_flow.memory"], cwd=tmp_path, check=True)

    assert list(tmp_path.iterdir()) == []
