"""Every Python block of the documentation runs, and prints what it says it prints."""

import subprocess
import sys
from pathlib import Path

import pytest
from pytest_examples import CodeExample, EvalExample, find_examples

from conftest import REPOSITORY

SKILL = REPOSITORY / "src" / "moai_flow" / "memory" / ".agents" / "skills" / "swarmdb" / "SKILL.md"
PAGES = [SKILL, REPOSITORY / "README.md", REPOSITORY / "CHANGELOG.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
# What a page takes from a file is run from there.
EXAMPLES = [example for example in find_examples(*PAGES) if "--8<--" not in example.source]
README_PROGRAM = next(example for example in EXAMPLES if example.path.name == "README.md")


def name(example: CodeExample) -> str:
    return f"{example.path.relative_to(REPOSITORY)}:{example.start_line}"


@pytest.mark.parametrize("example", EXAMPLES, ids=name)
def test_a_block_runs_and_prints_what_it_says(
    example: CodeExample, eval_example: EvalExample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    eval_example.set_config(line_length=120)

    eval_example.run_print_check(example, rewrite_assertions=False)


def test_the_first_program_of_the_readme_passes_mypy_in_strict_mode(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(README_PROGRAM.source)

    checked = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(REPOSITORY / ".mypy_cache"), str(program)],
        cwd=tmp_path,
        env={"MYPYPATH": str(REPOSITORY / "src"), "PATH": ""},
        capture_output=True,
        text=True,
    )

    assert checked.stdout.strip() == "Success: no issues found in 1 source file"


def test_the_first_program_of_the_readme_has_ten_lines_at_most() -> None:
    assert len([line for line in README_PROGRAM.source.splitlines() if line and "#>" not in line]) <= 10


def test_the_skill_for_coding_agents_is_short_and_says_what_it_is_for() -> None:
    lines = SKILL.read_text().splitlines()

    assert len(lines) < 150
    assert lines[:2] == ["---", "name: swarmdb"]
    assert lines[2].startswith("description: ")
    assert "moai_flow.memory" in lines[2]
