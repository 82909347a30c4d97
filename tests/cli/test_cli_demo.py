"""`swarmdb demo`, from its first line to its last."""

import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from multiprocessing import resource_tracker, spawn
from pathlib import Path

import pytest
from sqlalchemy.engine import URL

from cli.running import Command
from moai_flow.memory import AgentStatus, SwarmDB
from moai_flow.memory.cli.demo import report
from moai_flow.memory.cli.swarm import AGENT_TYPE, Finding, Plan, interrupts_held_back

DEMO = [sys.executable, "-m", "moai_flow.memory", "demo"]
FEW = ["--processes", "2", "--threads", "1"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with something of everything."""
    made = tmp_path / "folder"
    (made / "src" / ".cache").mkdir(parents=True)
    (made / "src" / ".cache" / "skipped.py").write_text("skipped\n")
    (made / "src" / "program.py").write_text("def main():\n    pass\n")
    (made / "readme.md").write_text("# Title\n")
    (made / "image.png").write_bytes(b"\x89PNG\0\0")
    (made / "broken").symlink_to(made / "gone")
    return made


def only_demo_database(place: Path) -> Path:
    (found,) = (place / ".moai").glob("demo-*.db")
    return found


def test_the_tables_are_read_back_from_a_fresh_database(
    folder: Path, swarmdb: Command, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOAI_DB_PATH", str(store))
    before = store.read_bytes()
    ran = swarmdb("demo", folder, *FEW)

    assert (ran.status, ran.err) == (0, "")
    assert store.read_bytes() == before
    assert "\x1b" not in ran.out
    assert max(len(line) for line in ran.out.splitlines() if str(tmp_path) not in line) <= 80
    for shown in ("Agents", "Events", "Slowest files", "Findings", "src/program.py", "all files"):
        assert shown in ran.out
    assert "No such file or directory" in ran.out
    assert [line.split() for line in ran.out.partition("Findings")[2].splitlines()[3:7]] == [
        [".py", "1", "2", "3", "21", "11"],
        [".md", "1", "1", "2", "8", "7"],
        [".png", "1", "0", "0", "6", "0"],
        ["all", "files", "3", "3", "5", "35", "11"],
    ]

    database = only_demo_database(tmp_path)
    assert str(database) in ran.out
    with SwarmDB(database) as db:
        assert sorted(metric.task_id for metric in db.get_task_metrics()) == [
            "broken",
            "image.png",
            "readme.md",
            "src/program.py",
        ]
        assert [metric.task_id for metric in db.get_task_metrics(result="failure")] == ["broken"]
        assert [event.metadata_["file"] for event in db.get_events(event_type="error")] == ["broken"]
        assert [agent.status for agent in db.list_agents()] == ["complete"] * 2
        assert all(agent.duration_ms is not None for agent in db.list_agents())


def test_it_reads_the_current_folder_into_a_database_that_is_given(
    swarmdb: Command, store: Path, tmp_path: Path
) -> None:
    (tmp_path / "one.txt").write_text("one")
    for _ in range(2):
        ran = swarmdb("demo", "--db", "swarm.db", "--processes", "1", "--threads", "1")

        assert ran.status == 0
        # The table of agents has one row: those who were there before are not of this run.
        agents, _, rest = ran.out.partition("Agents")[2].partition("Events")
        assert agents.count("complete") == 1
        events = rest.partition("Errors: none")[0].split()
        assert events[-6:] == ["spawn", "1", "complete", "1", "error", "0"]
    assert not (tmp_path / ".moai").exists()
    with SwarmDB(store) as db:
        assert len(db.list_agents()) == 4
        # Dot-files are read as well: a tool that watches the tests may have left one.
        tasks = [metric.task_id for metric in db.get_task_metrics() if not metric.task_id.startswith(".")]
        assert sorted(tasks) == ["one.txt", "one.txt", "t-1"]


def test_each_run_has_a_fresh_database_unless_one_is_given(swarmdb: Command, tmp_path: Path) -> None:
    runs = [swarmdb("demo", *FEW) for _ in range(2)]

    databases = {str(path) for path in (tmp_path / ".moai").glob("demo-*.db")}
    assert {ran.out.partition("in the database:\n  ")[2].partition("\n")[0] for ran in runs} == databases
    assert len(databases) == 2


def test_the_report_shows_the_slowest_files_the_first_errors_and_the_largest_kinds(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with SwarmDB(path) as db:
        plan = Plan("run", URL.create("sqlite", database=str(path)), tmp_path, (), 1, 2)
        for agent_id in (*plan.agents, "run-of-others"):
            db.register_agent(agent_id, AGENT_TYPE, "complete" if agent_id == "run-1" else "running")
        for number in range(12):
            db.insert_event(
                {
                    "event_type": "error",
                    "agent_id": "run-1",
                    "agent_type": AGENT_TYPE,
                    "timestamp": datetime.now(UTC) - timedelta(minutes=number),
                    "metadata": {"file": f"bad-{number}", "reason": "gone"},
                }
            )
            db.store_task_metric(f"file-{number}", "run-2", 10 * number, "success")
            finding = Finding(100 + number, 1, 2, number, is_text=True)
            db.store_memory("run", "semantic", f"file.{number:02}", finding)
        db.store_memory("run", "semantic", "file", Finding(5000))
        db.store_task_metric("file-of-others", "run-of-others", 1000, "success")

        assert not report(db, plan)
        shown = [line.split() for line in capsys.readouterr().out.splitlines()]
        db.update_agent_status("run-2", "complete")
        assert report(db, plan)

    assert ["run-1", "complete", "0", "-"] in shown
    assert ["run-2", "running", "12", "-"] in shown
    assert ["The", "first", "10", "errors"] in shown
    assert [line[1] for line in shown if line[-1:] == ["gone"]] == [f"bad-{number}" for number in range(11, 1, -1)]
    assert [line[:2] for line in shown if line[-1:] == ["success"]] == [
        [f"file-{number}", str(10 * number)] for number in range(11, 6, -1)
    ]
    kinds = [line for line in shown if line[:1] and line[0].startswith((".", "(no", "all"))]
    assert kinds == [
        ["(no", "suffix)", "1", "0", "0", "5,000", "0"],
        *([f".{number:02}", "1", "1", "2", str(100 + number), str(number)] for number in range(11, 2, -1)),
        ["all", "files", "13", "12", "24", "6,266", "11"],
    ]


def test_an_empty_folder_is_said_to_be_one(swarmdb: Command, tmp_path: Path) -> None:
    ran = swarmdb("demo", *FEW)

    assert ran.status == 0
    assert f"2 agents in 2 processes\nno files in {tmp_path}\n" in ran.out
    assert "Findings: none" in ran.out
    assert ran.out.count("complete ") == 3


def test_a_name_that_is_no_unicode_is_shown_by_its_codes(swarmdb: Command, tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9[red].txt")).write_text("x")
    ran = swarmdb("demo", *FEW)

    assert ran.status == 0
    assert "caf\\xe9[red].txt" in ran.out


@pytest.mark.parametrize("folder_name", ["nowhere", "file"])
def test_what_is_no_folder_is_refused_before_anything_is_made(
    folder_name: str, swarmdb: Command, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    ran = swarmdb("demo", folder_name)

    assert (ran.status, ran.out) == (1, "")
    assert ran.err == f"swarmdb: folder: got '{folder_name}', expected a folder that exists\n"
    assert not (tmp_path / ".moai").exists()


def test_a_terminal_shows_a_progress_bar(folder: Path, tmp_path: Path) -> None:
    shown, terminal = pty.openpty()
    environment = {**os.environ, "COLUMNS": "80", "TERM": "xterm"}
    with subprocess.Popen([*DEMO, str(folder), *FEW], cwd=tmp_path, stdout=terminal, env=environment) as process:
        os.close(terminal)
        output = b""
        try:
            while piece := os.read(shown, 65536):
                output += piece
        except OSError:  # Linux's way to say that the other side is closed.
            pass
        os.close(shown)

    assert process.returncode == 0
    assert b"Files" in output
    assert b"4/4" in output


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_ends_every_agent(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for number in range(3000):
        (folder / f"{number}.txt").write_text("text\n")
    demo = [*DEMO, str(folder), "--db", str(tmp_path / "demo.db")]
    with SwarmDB(tmp_path / "demo.db") as db:
        with subprocess.Popen(demo, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            while not db.get_task_metrics(limit=1):
                assert process.poll() is None
                time.sleep(0.01)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate()

        assert process.returncode == 130
        assert f"swarmdb: interrupted; what was found until then is in {tmp_path / 'demo.db'}\n" in err
        assert "Traceback" not in err
        assert {agent.status for agent in db.list_agents()} == {"complete"}
        assert 0 < len(db.get_task_metrics(limit=3000)) < 3000


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_while_processes_start_waits_until_they_have() -> None:
    has_started = False
    with pytest.raises(KeyboardInterrupt), interrupts_held_back():
        os.kill(os.getpid(), signal.SIGINT)
        mask = subprocess.run(
            [sys.executable, "-c", "import signal; print(signal.pthread_sigmask(signal.SIG_BLOCK, ()))"],
            capture_output=True,
            text=True,
        ).stdout
        has_started = True

    assert has_started
    assert "SIGINT" in mask


def test_a_swarm_whose_processes_die_at_once_ends_with_1(
    swarmdb: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(1000):  # Their names are more than a pipe holds, and nobody reads them.
        (tmp_path / f"{number:0100}").touch()
    resource_tracker.ensure_running()
    python, dies_at_once = spawn.get_executable(), shutil.which("false")
    assert dies_at_once is not None
    spawn.set_executable(dies_at_once)
    try:
        ran = swarmdb("demo", *FEW)
    finally:
        spawn.set_executable(python)

    assert ran.status == 1
    assert ran.out.count("its process ended with exit code 1") == 2
    assert ran.err == "swarmdb: not every agent completed; the errors above say why\n"


def test_the_demo_runs_on_a_server(swarmdb: Command, tmp_path: Path, postgres_url: str) -> None:
    for number in range(20):
        (tmp_path / f"{number}.txt").write_text("a line\n")
    ran = swarmdb("demo", str(tmp_path), "--db", postgres_url)

    assert (ran.status, ran.err) == (0, "")
    with SwarmDB(url=postgres_url) as db:
        assert {agent.status for agent in db.list_agents()} == {AgentStatus.COMPLETE}
        assert len(db.get_task_metrics()) == 20
        assert {metric.result for metric in db.get_task_metrics()} == {"success"}
