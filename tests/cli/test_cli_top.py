"""`swarmdb top`, on a terminal and without one."""

import io
import re
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import cast

import pytest
from rich.cells import cell_len
from rich.console import Console

from cli.running import Command, Terminal, execute
from conftest import Clock, url_of
from moai_flow.memory import SwarmDB, TaskResult
from moai_flow.memory.cli import show
from moai_flow.memory.cli.top import Screen, look

LONG_ID = "461ba4f0-564c-4e18-9279-ac88383a584c"
TOP = [sys.executable, "-m", "moai_flow.memory", "top"]
WORKER = """
import sys
from moai_flow.memory import SwarmDB, TaskResult

url, name = sys.argv[1:]
with SwarmDB(url=url) as db, db.track_agent(name, "expert-backend") as agent:
    with db.track_task("task", name) as task:
        task.tokens_used = 50
    print("at work", flush=True)
    for line in sys.stdin:
        agent.heartbeat()
"""


@pytest.fixture(params=["file", "postgresql"])
def url(request: pytest.FixtureRequest, path: Path) -> str:
    return url_of(request.param, path, request)


def rows(lines: list[str]) -> list[list[str]]:
    """Return the cells of a screen's table, of which none has a blank inside."""
    head = next(number for number, line in enumerate(lines) if line.startswith("agent "))
    return [line.split() for line in lines[head + 1 :] if line]


@pytest.mark.usefixtures("interruptible")
def test_a_worker_that_was_killed_is_shown_as_stale_and_on_top(url: str) -> None:
    with SwarmDB(url=url) as db:
        db.register_agent("ended", "expert-frontend")
        db.update_agent_status("ended", "complete")
        for number in range(5):
            db.store_task_metric(f"t-{number}", "living", 1, "success" if number else "timeout")
        options = ["--db", url, "--interval", "0.1", "--stale-after", "2"]
        command = [sys.executable, "-c", WORKER, url, "killed"]
        with (
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as worker,
            Terminal([*TOP, *options], columns=100) as terminal,
        ):
            assert worker.stdout is not None
            worker.stdout.readline()
            db.register_agent("living", "expert-backend", "running")
            before = rows(terminal.until("living"))
            worker.kill()
            while True:  # Somebody is alive, and somebody is not.
                db.heartbeat("living")
                after = terminal.until("agents ")
                if "stale" in after[1]:
                    break
            status = terminal.interrupt()

    assert status == 0
    assert [(row[0], row[1], row[2]) for row in before] == [
        ("living", "expert-backend", "running"),
        ("killed", "expert-backend", "running"),
        ("ended", "expert-frontend", "complete"),
    ]
    assert [(row[0], row[2], *row[5:]) for row in rows(after)] == [
        ("killed", "stale", "0.2", "-", "10.0"),
        ("living", "running", "1.0", "0.2", "-"),
        ("ended", "complete", "-", "-", "-"),
    ]
    assert after[1] == "agents       2 running, 1 complete; 1 stale"
    assert after[2] == "each minute  1.2 tasks, 0.2 failures, 10.0 tokens, over the last 5 minutes"
    assert terminal.seen.startswith(b"\x1b[?1049h")
    assert terminal.seen.endswith(b"\x1b[?1049l")
    assert b"\x1b[?25h" in terminal.seen
    assert b"Traceback" not in terminal.seen


@pytest.mark.usefixtures("interruptible")
def test_the_screen_is_filled_to_its_size_and_follows_it(path: Path) -> None:
    with SwarmDB(path) as db, db.transaction():
        for number in range(300):
            db.register_agent(f"{number:036}" if number % 2 else "設計" * 18 + f"{number:04}", "検査" * 20, "running")
    with Terminal([*TOP, "--db", str(path), "--interval", "3600"]) as terminal:
        small = terminal.until("more")
        terminal.resize(160, 40)
        large = terminal.until("more")
        terminal.resize(40, 8)
        tiny = terminal.until("more")
        assert terminal.interrupt() == 0

    assert (small[-1], len(small)) == ("and 283 more", 24)
    assert (large[-1], len(large)) == ("and 267 more", 40)
    assert (tiny[-1], len(tiny)) == ("and 299 more", 8)
    for lines, columns in ((small, 80), (large, 160), (tiny, 40)):
        assert max(map(cell_len, lines)) <= columns
    # A table is as wide as it may be, and each agent is on one line.
    assert {cell_len(line) for line in small[4:-1]} == {80}
    assert {len(row) for row in rows(small[:-1])} == {8}


@pytest.mark.usefixtures("interruptible")
def test_no_more_agents_are_watched_than_were_asked_for(store: Path) -> None:
    with Terminal([*TOP, "--db", str(store), "--limit", "1"]) as terminal:
        lines = terminal.until("and 1 more")
        assert terminal.interrupt() == 0

    assert [row[0] for row in rows(lines)] == ["a-2", "and"]


@pytest.mark.usefixtures("interruptible")
def test_a_look_that_fails_is_said_and_not_the_end(store: Path) -> None:
    with Terminal([*TOP, "--db", str(store), "--interval", "0.1"]) as terminal:
        assert "a-2" in "".join(terminal.until("a-2"))
        execute(store, "ALTER TABLE agent_registry RENAME TO elsewhere")
        failed = terminal.until("not read at")
        execute(store, "ALTER TABLE elsewhere RENAME TO agent_registry")
        while "not read" in (line := terminal.until("agents ")[3]):
            pass
        assert terminal.interrupt() == 0

    assert "no such table: agent_registry" in failed[3]
    assert "a-2" in "".join(failed)
    assert line == ""


@pytest.mark.usefixtures("interruptible")
def test_a_database_that_is_busy_is_shown_so_until_it_is_not(postgres_url: str) -> None:
    with SwarmDB(url=postgres_url) as db:
        db.register_agent("a-1", "x", "running")
    with SwarmDB(url=postgres_url) as db, Terminal([*TOP, "--db", postgres_url, "--interval", "0.1"]) as terminal:
        terminal.until("a-1")
        with db.session() as session:
            session.connection().exec_driver_sql("LOCK TABLE agent_registry")
            assert "a-1" in "".join(terminal.until("not read at"))
        while "not read" in terminal.until("agents ")[3]:
            pass
        assert terminal.interrupt() == 0


def test_sigterm_gives_the_screen_back(store: Path) -> None:
    with Terminal([*TOP, "--db", str(store)]) as terminal:
        terminal.until("a-2")
        terminal.process.send_signal(signal.SIGTERM)
        while terminal.read():
            pass

        assert terminal.process.wait() == 128 + signal.SIGTERM
        assert terminal.seen.endswith(b"\x1b[?1049l")


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(("environment", "is_colourful"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_colour_is_left_out_where_nobody_wants_it(
    *, environment: dict[str, str], is_colourful: bool, store: Path
) -> None:
    with Terminal([*TOP, "--db", str(store)], environment) as terminal:
        terminal.until("a-2")
        terminal.interrupt()

    assert bool(re.search(rb"\x1b\[[0-9;]*3[0-7]m", terminal.seen)) == is_colourful


def test_a_terminal_that_can_not_be_written_over_gets_one_look(store: Path) -> None:
    for command, environment in ((TOP, {"TERM": "dumb"}), ([*TOP, "--once"], {})):
        with Terminal([*command, "--db", str(store)], environment) as terminal:
            while terminal.read():
                pass
            assert terminal.process.wait() == 0
        assert b"a-2" in terminal.seen
        assert b"\x1b[?1049h" not in terminal.seen


def test_a_pipe_gets_one_table_of_whole_names(swarmdb: Command, path: Path) -> None:
    long = "設計" * 50
    with SwarmDB(path) as db:
        db.register_agent(long, "expert-backend", "running")
        db.register_agent("[red]x[/]\x1b[2J:bomb:\n", "t", "running")
        for _ in range(3):
            db.store_task_metric("t", long, 1, "failure", tokens_used=10_000_000)
    ran = swarmdb("top", "--db", path)

    assert (ran.status, ran.err) == (0, "")
    assert "\x1b" not in ran.out
    lines = ran.out.splitlines()
    assert lines[0].endswith(f" UTC  {path}")
    assert lines[1:4] == [
        "agents       2 running",
        "each minute  0.6 tasks, 0.6 failures, 6.0M tokens, over the last 5 minutes",
        "",
    ]
    assert [(row[:3], row[5:]) for row in rows(lines)] == [
        ([long, "expert-backend", "running"], ["0.6", "0.6", "6.0M"]),
        (["[red]x[/]\\x1b[2J:bomb:\\n", "t", "running"], ["-", "-", "-"]),
    ]
    assert swarmdb("top", "--db", path, "--limit", "1").out.splitlines()[-1] == "and 1 more"


def test_an_empty_store_has_nobody_at_work(swarmdb: Command, path: Path) -> None:
    SwarmDB(path).close()
    ran = swarmdb("top", "--db", path, "--once")

    assert ran.out.splitlines()[1:] == [
        "agents       none",
        "each minute  - tasks, - failures, - tokens, over the last 5 minutes",
        "",
        "no agent is at work, and none has ended within the last 5 minutes",
    ]


def test_who_ended_long_ago_is_counted_but_not_shown(swarmdb: Command, path: Path, clock: Clock) -> None:
    with SwarmDB(path, clock=clock) as db:  # Long before now.
        db.register_agent("old-1", "x", "complete")
        db.register_agent("old-2", "x", "error")
        db.register_agent("old-3", "x")
    with SwarmDB(path) as db:
        db.register_agent("new-1", "x", "error")
        db.register_agent("new-2", "x", "complete")
        db.register_agent("new-3", "x", "running")
        execute(path, "UPDATE agent_registry SET status = 'paused' WHERE agent_id = 'old-1'")
    lines = swarmdb("top", "--db", path).out.splitlines()

    assert lines[1] == "agents       1 spawned, 1 running, 1 complete, 2 error, 1 paused; 1 stale"
    assert [(row[0], row[2]) for row in rows(lines)] == [
        ("old-3", "stale"),
        ("new-3", "running"),
        ("new-1", "error"),
        ("new-2", "complete"),
    ]


def test_those_at_work_are_shown_busiest_first(swarmdb: Command, path: Path) -> None:
    with SwarmDB(path) as db:
        for agent, tasks, failures in (("a", 0, 0), ("b", 2, 0), ("c", 2, 1), ("d", 3, 0), ("e", 2, 0)):
            db.register_agent(agent, "x", "running")
            for number in range(tasks):
                db.store_task_metric(f"{agent}-{number}", agent, 1, "failure" if number < failures else "success")
    assert [row[0] for row in rows(swarmdb("top", "--db", path).out.splitlines())] == ["d", "c", "b", "e", "a"]


def test_a_timeout_is_a_failure_and_a_cancelled_task_is_none(swarmdb: Command, path: Path) -> None:
    with SwarmDB(path) as db:
        db.register_agent("a", "x", "running")
        for number, result in enumerate(TaskResult):
            db.store_task_metric(f"t-{number}", "a", 1, result)
        db.store_task_metric("t", "not registered", 1, "success")
    lines = swarmdb("top", "--db", path).out.splitlines()

    assert lines[2] == "each minute  1.0 tasks, 0.4 failures, - tokens, over the last 5 minutes"
    assert [row[5:] for row in rows(lines)] == [["0.8", "0.4", "-"]]


def test_only_the_last_five_minutes_count(swarmdb: Command, path: Path) -> None:
    now = datetime.now(UTC)
    with SwarmDB(path) as db:
        db.register_agent("a", "x", "running")
        for minutes in (2, 6, 60):
            db.store_task_metric(f"t-{minutes}", "a", 1, "failure", timestamp=now - timedelta(minutes=minutes))
    lines = swarmdb("top", "--db", path).out.splitlines()

    assert lines[2].startswith("each minute  0.2 tasks, 0.2 failures")
    assert [row[5:7] for row in rows(lines)] == [["0.2", "0.2"]]


@pytest.mark.parametrize(
    ("tokens", "shown"), [(1, "0.2"), (499, "99.8"), (500, "100"), (4_999_990, "999,998"), (5_000_000, "1.0M")]
)
def test_a_rate_is_as_exact_as_there_is_room_for(tokens: int, shown: str, swarmdb: Command, path: Path) -> None:
    with SwarmDB(path) as db:
        db.register_agent("a", "x", "running")
        db.store_task_metric("t", "a", 1, "success", tokens_used=tokens)

    assert rows(swarmdb("top", "--db", path).out.splitlines())[0][7] == shown


def test_how_old_an_agent_is_and_when_it_was_last_heard_of_are_two_columns(swarmdb: Command, path: Path) -> None:
    now = datetime.now(UTC)
    with SwarmDB(path, clock=lambda: now - timedelta(hours=3, minutes=1)) as db:
        db.register_agent("a", "x")
    with SwarmDB(path, clock=lambda: now - timedelta(hours=1, minutes=1)) as db:
        db.update_agent_status("a", "running")

    def shown(*options: str) -> list[str]:
        ((_, _, state, age, last_heard, *_),) = rows(swarmdb("top", "--db", path, *options).out.splitlines())
        return [state, age, last_heard]

    assert shown("--stale-after", "7200") == ["running", "3h01m", "1h01m"]
    assert shown("--stale-after", "3600") == ["stale", "3h01m", "1h01m"]


def test_of_many_that_ended_the_newest_are_read(swarmdb: Command, path: Path) -> None:
    with SwarmDB(path) as db, db.transaction():
        for number in range(230):
            db.register_agent(f"a-{number}", "x", "complete")
    lines = swarmdb("top", "--db", path).out.splitlines()

    assert lines[-1] == "and 30 more"
    assert [row[0] for row in rows(lines[:-1])] == [f"a-{number}" for number in range(229, 29, -1)]


def test_what_moves_the_cursor_is_shown_by_its_code(path: Path) -> None:
    evil = "\x1b[2J\u202e"
    with SwarmDB(path) as db:
        db.register_agent(evil, evil)
        execute(path, "UPDATE agent_registry SET status = ?", evil)
        db.register_agent(f"{evil}at work", evil)
        screen = Screen(evil, None)
        screen.last = look(db, evil, timedelta(minutes=1))
    screen.problem = f"not read: {evil}"
    terminal = Console(width=200, file=io.StringIO())
    terminal.print(*screen.parts(200, None))
    shown = cast(io.StringIO, terminal.file).getvalue()

    assert all(line.isprintable() for line in shown.split("\n"))
    assert shown.count("\\x1b[2J\\u202e") == 5


def test_ages_are_in_their_two_largest_units() -> None:
    for seconds, shown in ((-1, "0s"), (59, "59s"), (60, "1m00s"), (3599, "59m59s"), (3600, "1h00m"), (86400, "1d00h")):
        assert show.span(timedelta(seconds=seconds)) == shown


@pytest.mark.parametrize(
    ("name", "width", "shown"),
    [
        (LONG_ID, 36, LONG_ID),
        (LONG_ID, 35, "461ba4f0-564c-4e1…9279-ac88383a584c"),
        (LONG_ID, 2, "4…"),
        (LONG_ID, 1, "…"),
        ("設計担当者", 10, "設計担当者"),
        ("設計担当者", 9, "設計…当者"),
        ("設計担当者", 7, "設…者"),
    ],
)
def test_a_name_that_is_cut_keeps_both_ends(name: str, width: int, shown: str) -> None:
    assert show.shortened(name, width) == shown


@pytest.mark.parametrize(
    "option", ["--interval=0", "--interval=inf", "--interval=nan", "--stale-after=0", "--stale-after=1e3", "--limit=0"]
)
def test_what_makes_no_sense_is_wrong_usage(option: str, swarmdb: Command, store: Path) -> None:
    ran = swarmdb("top", "--db", store, option)

    assert (ran.status, ran.out) == (2, "")
    assert option.partition("=")[0] in ran.err
