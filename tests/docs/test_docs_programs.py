"""The programs in docs/examples run, print what their page says, and pass a type checker."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import REPOSITORY
from moai_flow.memory import SwarmDB

PROGRAMS = REPOSITORY / "docs" / "examples"
PAGE = (REPOSITORY / "docs" / "guides" / "examples.md").read_text()
PRINTED = dict(re.findall(r'```text title="(\S+) prints"\n(.*?)```', PAGE, re.DOTALL))


def run(program: str, folder: Path, given: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(PROGRAMS / program)], cwd=folder, input=given, capture_output=True, text=True, check=True
    )


@pytest.mark.parametrize("program", PRINTED)
def test_a_program_prints_what_the_page_says(program: str, tmp_path: Path) -> None:
    assert run(program, tmp_path).stdout == PRINTED[program]


def test_every_program_is_on_the_page() -> None:
    programs = {path.name for path in PROGRAMS.glob("*.py")}

    assert {program for program in programs if f'--8<-- "docs/examples/{program}"' not in PAGE} == set()
    assert programs - PRINTED.keys() == {"hook.py"}


def test_the_hook_records_a_subagent_from_its_start_to_its_stop(tmp_path: Path) -> None:
    hook = {"session_id": "s1", "agent_id": "a1", "agent_type": "Explore"}
    run("hook.py", tmp_path, json.dumps({**hook, "hook_event_name": "SubagentStart"}))
    with SwarmDB(tmp_path / ".moai" / "memory" / "swarm.db") as db:
        assert [agent.agent_id for agent in db.get_active_agents()] == ["a1"]

        run("hook.py", tmp_path, json.dumps({**hook, "hook_event_name": "SubagentStop"}))
        run("hook.py", tmp_path, json.dumps({"agent_id": "unknown", "hook_event_name": "SubagentStop"}))
        assert {agent.agent_id: agent.status.value for agent in db.list_agents()} == {
            "a1": "complete",
            "unknown": "complete",
        }
        assert [event.event_type.value for event in db.iter_events("a1")] == ["spawn", "complete"]


def test_the_image_on_the_page_is_what_the_report_draws(tmp_path: Path) -> None:
    run("report.py", tmp_path)

    assert (tmp_path / "report.svg").read_text() == (REPOSITORY / "docs" / "assets" / "report.svg").read_text()


def test_the_programs_pass_mypy_in_strict_mode() -> None:
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", str(PROGRAMS)], cwd=REPOSITORY, capture_output=True, text=True
    )

    assert checked.stdout.startswith("Success"), checked.stdout
