"""What a user installs: the wheel has the package and nothing else, and works by itself."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from conftest import REPOSITORY

PACKAGE = REPOSITORY / "src" / "moai_flow" / "memory"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with wheel and sdist, built as an installer would, but with the build tool that is there."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-d", str(folder)], cwd=REPOSITORY, check=True)
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (wheel,) = built.glob("*.whl")
    return wheel


def test_the_wheel_has_the_package_its_types_and_the_skill_and_nothing_else(wheel: Path) -> None:
    files = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    ours = {path.relative_to(REPOSITORY / "src").as_posix() for path in PACKAGE.rglob("*") if path.is_file()}

    assert files == {name for name in ours if "__pycache__" not in name}
    assert {"moai_flow/memory/py.typed", "moai_flow/memory/.agents/skills/swarmdb/SKILL.md"} <= files
    # moai_flow is a namespace, which other distributions may share.
    assert "moai_flow/__init__.py" not in files


def test_the_sdist_has_what_the_tests_need(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}

    for needed in ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "mkdocs.yml", "docs/index.md"):
        assert needed in names
    assert {f"tests/{path.name}" for path in (REPOSITORY / "tests").glob("*.py")} <= names
    assert not [name for name in names if name.startswith((".venv", ".git/"))]


def test_the_first_program_runs_and_type_checks_with_the_wheel(wheel: Path, tmp_path: Path) -> None:
    installed, folder = tmp_path / "installed", tmp_path / "new"
    folder.mkdir()
    zipfile.ZipFile(wheel).extractall(installed)  # A pure wheel is laid out as it is installed.
    readme = (REPOSITORY / "README.md").read_text()
    program = readme.partition("[start:program]")[2].partition("```python\n")[2].partition("```")[0]
    (folder / "program.py").write_text(f"{program}\nimport moai_flow.memory\nprint(moai_flow.memory.__file__)\n")

    environment = {**os.environ, "PYTHONPATH": str(installed), "MYPYPATH": str(installed)}

    def output(*command: str) -> str:
        return subprocess.run(
            [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True
        ).stdout

    assert output("program.py").splitlines() == [
        "complete 3000",
        "python",
        str(installed / "moai_flow/memory/__init__.py"),
    ]
    assert output("-m", "mypy", "--strict", "program.py") == "Success: no issues found in 1 source file\n"
