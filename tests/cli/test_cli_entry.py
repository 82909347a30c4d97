"""The command as an installed program."""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from cli.running import Command
from moai_flow.memory import SwarmDB
from moai_flow.memory.cli import app

MODULE = [sys.executable, "-m", "moai_flow.memory"]
COMMANDS = [
    "demo",
    "status",
    "agents",
    "events",
    "metrics",
    "top",
    "memory",
    "cleanup",
    "migrate",
    "vacuum",
    "backup",
    "restore",
    "copy",
    "export",
    "check",
]


def without(module: str) -> subprocess.CompletedProcess[str]:
    program = f"import sys; sys.modules[{module!r}] = None; from moai_flow.memory.__main__ import main; main()"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("module", ["typer", "rich", "rich.table"])
def test_without_the_extra_it_says_in_one_line_what_to_install(module: str) -> None:
    ran = without(module)

    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr == "swarmdb: the command needs typer and rich: pip install 'moai-flow-memory[cli]'\n"


def test_a_module_that_the_extra_would_not_bring_is_named() -> None:
    ran = without("moai_flow.memory.cli.demo")

    assert ran.returncode == 1
    assert "ModuleNotFoundError" in ran.stderr
    assert "pip install" not in ran.stderr


def test_it_runs_as_a_module() -> None:
    ran = subprocess.run([*MODULE, "--version"], capture_output=True, text=True, check=True)

    assert ran.stdout.startswith("swarmdb ")


@pytest.mark.parametrize(("distribution", "shown"), [("pytest", pytest.__version__), ("no-such", "(not installed)")])
def test_the_version_is_that_of_the_installed_package(
    distribution: str, shown: str, swarmdb: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: version(distribution))

    assert swarmdb("--version").out.startswith(f"swarmdb {shown}, schema 2.1.0, SQLite 3.")


def test_help_lists_every_command_in_80_columns(swarmdb: Command) -> None:
    ran = swarmdb("--help")

    assert ran.status == 0
    assert all(f" {command} " in ran.out for command in COMMANDS)
    assert max(map(len, ran.out.splitlines())) <= 80


@pytest.mark.parametrize("group", [[], ["memory"]])
def test_alone_it_shows_its_help(group: list[str], swarmdb: Command) -> None:
    ran = swarmdb(*group)

    assert ran.status == 2
    assert "Usage: swarmdb" in ran.out


def test_the_shell_completes_the_words_of_the_enums(swarmdb: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_SWARMDB_COMPLETE", "complete_bash")
    for words, completed in {
        "events --type ": "spawn complete error",
        "agents --status s": "spawned",
        "memory get s-1 ": "semantic episodic context_hint",
    }.items():
        monkeypatch.setenv("COMP_WORDS", f"swarmdb {words}")
        monkeypatch.setenv("COMP_CWORD", str(words.count(" ") + 1))

        assert swarmdb().out.split() == completed.split()


def test_an_interrupt_while_it_loads_leaves_no_traceback(swarmdb: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(app, "run", interrupted)
    ran = swarmdb("status")

    assert (ran.status, ran.out, ran.err) == (130, "", "")


@pytest.mark.parametrize("command", ["events", "events --json", "status", "--help"])
def test_a_reader_that_closes_the_pipe_sees_no_traceback(command: str, path: Path) -> None:
    with SwarmDB(path) as db:
        db.insert_event({"event_type": "spawn", "agent_id": "a", "agent_type": "t"})
    reading, writing = os.pipe()
    environment = {**os.environ, "MOAI_DB_PATH": str(path)}
    with subprocess.Popen([*MODULE, *command.split()], stdout=writing, stderr=subprocess.PIPE, env=environment) as ran:
        os.close(writing)
        os.close(reading)
        _, err = ran.communicate()

    assert (ran.returncode, err) == (1, b"")


def test_a_letter_that_the_terminal_does_not_know_is_shown_by_its_code(path: Path) -> None:
    with SwarmDB(path) as db:
        db.store_memory("s", "semantic", "greeting", "ol\u00e1 \u65e5\u672c")
    get = [*MODULE, "memory", "get", "s", "semantic", "greeting", "--db", str(path)]
    ran = subprocess.run(get, capture_output=True, check=True, env={**os.environ, "PYTHONIOENCODING": "latin-1"})

    assert ran.stdout == b"ol\xe1 \\u65e5\\u672c\n"


def test_a_closed_standard_output_is_no_failure(path: Path) -> None:
    SwarmDB(path).close()
    command = f"exec {sys.executable} -m moai_flow.memory status --db {path} >&-"
    ran = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)

    assert (ran.returncode, ran.stderr) == (0, "")
