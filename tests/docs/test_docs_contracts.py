"""What the documentation promises of commands, and the type contracts of calls."""

import inspect
import os
import re
import subprocess
from pathlib import Path

import pytest

import moai_flow.memory
from conftest import REPOSITORY
from moai_flow.memory import SwarmDB

CONTRACTS = "\n".join(path.read_text() for path in sorted((REPOSITORY / "typings").glob("*.py")))
METHODS = [name for name, _ in inspect.getmembers(SwarmDB) if not name.startswith("_")]


def readme_commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    return [block.strip() for block in blocks]


def test_the_readme_has_two_commands_of_one_line() -> None:
    demo, tests = readme_commands()

    assert demo.endswith("swarmdb demo")
    assert tests.endswith("python -m pytest")
    assert "\n" not in demo + tests


def test_ci_runs_the_readmes_test_command() -> None:
    _, tests = readme_commands()

    assert tests in (REPOSITORY / ".ci" / "run").read_text()


def run_ci(checkout: Path, *, failing: str = "") -> tuple[int, list[str]]:
    """Run the script with tools that only say their names, and return its status and what they said."""
    script, tools = checkout / ".ci" / "run", checkout / "tools"
    for folder in (script.parent, checkout / ".venv" / "bin", tools):
        folder.mkdir(parents=True)
    script.write_text((REPOSITORY / ".ci" / "run").read_text())
    names = ["python", "pip", "ruff", "mypy", "pyright", "mkdocs"]
    for tool in [tools / "python3", *(checkout / ".venv" / "bin" / name for name in names)]:
        tool.write_text(f"#!/bin/sh\necho {tool.name}\nexit {int(tool.name == failing)}\n")
        tool.chmod(0o755)
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    ran = subprocess.run(
        ["bash", str(script)], env={"PATH": path}, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    return ran.returncode, ran.stdout.splitlines()


def test_ci_runs_every_check(tmp_path: Path) -> None:
    status, ran = run_ci(tmp_path)

    assert status == 0
    assert ran == ["python3", "pip", "python", "ruff", "ruff", "mypy", "mypy", "pyright", "mkdocs"]


@pytest.mark.parametrize("failing", ["python3", "pip", "python", "ruff", "mypy", "pyright", "mkdocs"])
def test_ci_ends_where_a_check_fails(tmp_path: Path, failing: str) -> None:
    status, ran = run_ci(tmp_path, failing=failing)

    assert status == 1
    assert ran[-1] == failing


def test_the_type_contracts_use_every_public_method() -> None:
    assert {name for name in METHODS if f"db.{name}" not in CONTRACTS} == set()


def test_the_type_contracts_use_every_public_name() -> None:
    assert {name for name in moai_flow.memory.__all__ if not re.search(rf"\b{name}\b", CONTRACTS)} == set()
