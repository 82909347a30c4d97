"""`swarmdb events --follow`: nothing is missed, and nothing comes twice."""

import json
import select
import signal
import subprocess
import sys
import threading
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from cli.running import Command, Terminal, execute
from conftest import url_of
from moai_flow.memory import EventData, EventType, SwarmDB
from moai_flow.memory.cli.following import followed

EVENTS = [sys.executable, "-m", "moai_flow.memory", "events"]
WRITER = """
import sys
from moai_flow.memory import SwarmDB

url, name = sys.argv[1:]
with SwarmDB(url=url) as db:
    for number in range(50):
        event = {"event_type": "spawn", "agent_id": name, "agent_type": "x", "metadata": {"number": number}}
        if number % 5:
            db.insert_event(event)
        else:
            db.insert_events([event])
"""

pytestmark = pytest.mark.usefixtures("interruptible")


@pytest.fixture(params=["file", "postgresql"])
def url(request: pytest.FixtureRequest, path: Path) -> str:
    return url_of(request.param, path, request)


def event(
    agent: str,
    kind: EventType = EventType.SPAWN,
    *,
    agent_type: str = "x",
    timestamp: str | None = None,
    metadata: dict[str, Any] | None = None,
) -> EventData:
    made: EventData = {"event_type": kind, "agent_id": agent, "agent_type": agent_type, "metadata": metadata}
    if timestamp is not None:
        made["timestamp"] = timestamp
    return made


class Follower:
    """`swarmdb events --follow`, whose standard output is a pipe."""

    def __init__(self, url: str, *options: str) -> None:
        command = [*EVENTS, "--db", url, "--follow", *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def __enter__(self) -> "Follower":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def lines(self, number: int) -> list[str]:
        assert self.process.stdout is not None
        return [self.process.stdout.readline().rstrip("\n") for _ in range(number)]

    def interrupt(self) -> tuple[int, str, str]:
        self.process.send_signal(signal.SIGINT)
        out, err = self.process.communicate()
        return self.process.returncode, out, err


def test_events_of_other_processes_come_once_and_in_order(url: str) -> None:
    with SwarmDB(url=url) as db:
        for number in range(20):
            db.insert_event(event("before", metadata={"number": number}))
        with Follower(url, "--json") as follower, ExitStack() as writers:
            first = [json.loads(line) for line in follower.lines(1)]
            for name in ("a", "b", "c"):
                writers.enter_context(subprocess.Popen([sys.executable, "-c", WRITER, url, name]))
            rest = [json.loads(line) for line in follower.lines(9 + 150)]
            ended = follower.interrupt()
        stored = [(stored.id, stored.event_id) for stored in db.iter_events()]

    shown = first + rest
    assert ended == (130, "", "")
    assert [one["metadata"]["number"] for one in shown[:10]] == list(range(10, 20))
    assert [(one["id"], one["event_id"]) for one in shown] == sorted(stored)[10:]
    for name in ("a", "b", "c"):
        assert [one["metadata"]["number"] for one in shown if one["agent_id"] == name] == list(range(50))


def test_an_event_that_is_committed_while_following_begins_is_not_missed(postgres_url: str) -> None:
    shown: list[str] = []
    has_begun = threading.Event()

    def follow() -> None:
        with SwarmDB(url=postgres_url) as watching:
            for one in followed(watching, None, None, 10, None):
                shown.append(one.agent_id)
                has_begun.set()
                if one.agent_id == "last":
                    return

    with SwarmDB(url=postgres_url) as db, SwarmDB(url=postgres_url) as other:
        follower = threading.Thread(target=follow)
        with db.transaction():
            db.insert_event(event("committed late"))
            other.insert_event(event("committed"))
            follower.start()
            # It has found that somebody is writing.
            looks = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%pg_locks%' AND pid <> pg_backend_pid()"
            has_looked = False
            while not has_looked and not has_begun.is_set():
                with other.session(readonly=True) as session:
                    has_looked = bool(session.connection().execute(text(looks)).scalar_one())
            other.insert_event(event("meanwhile"))
        has_begun.wait()
        db.insert_event(event("last"))
        follower.join()

    assert shown == ["committed late", "committed", "meanwhile", "last"]


def test_filters_hold_for_what_was_and_for_what_comes(url: str) -> None:
    with SwarmDB(url=url) as db:
        for agent in ("a", "b"):
            for kind in EventType:
                db.insert_event(event(agent, kind))
        with Follower(url, "--json", "--agent", "a", "--type", "error", "--limit", "5") as follower:
            (old,) = follower.lines(1)
            for agent in ("b", "a"):
                for kind in EventType:
                    db.insert_event(event(agent, kind, metadata={"is": "new"}))
            (new,) = follower.lines(1)
            assert follower.interrupt() == (130, "", "")

    assert [(one["agent_id"], one["event_type"]) for one in map(json.loads, (old, new))] == [("a", "error")] * 2
    assert json.loads(new)["metadata"] == {"is": "new"}


def test_only_events_since_a_time(url: str) -> None:
    with SwarmDB(url=url) as db:
        for day in (28, 29, 30):
            db.insert_event(event(f"old-{day}", timestamp=f"2025-11-{day}T10:00:00Z"))
        with Follower(url, "--since", "2025-11-29T10:00:00Z") as follower:
            old = follower.lines(2)
            db.insert_event(event("earlier", timestamp="2025-11-01T10:00:00Z"))
            db.insert_event(event("later", timestamp="2025-12-01T10:00:00Z"))
            db.insert_event(event("just then", timestamp="2025-11-29T10:00:00Z"))
            new = follower.lines(2)
            assert follower.interrupt() == (130, "", "")

    assert [line.split()[3] for line in old + new] == ["old-29", "old-30", "later", "just"]


@pytest.mark.parametrize("limit", [0, 10])
def test_an_empty_log_and_none_to_begin_with(limit: int, url: str) -> None:
    with SwarmDB(url=url) as db:
        if not limit:
            db.insert_event(event("before"))
        events = followed(db, None, None, limit, None)
        db.insert_event(event("first"))
        db.insert_event(event("second"))

        assert [one.agent_id for one in islice(events, 2)] == ["first", "second"]


def test_none_to_begin_with_is_not_the_usual_number(path: Path) -> None:
    with SwarmDB(path) as db:
        db.insert_event(event("before"))
        with Follower(f"sqlite:///{path}", "--json", "--limit", "0") as follower:
            assert follower.process.stdout is not None
            while not select.select([follower.process.stdout], [], [], 0.1)[0]:
                db.insert_event(event("after"))
            (line,) = follower.lines(1)

    assert json.loads(line)["agent_id"] == "after"


def test_lines_are_aligned_and_hold_no_control_characters(path: Path) -> None:
    names = ["設計者", "461ba4f0-564c-4e18-9279-ac88383a584c", "[red]x\x1b[2J", "b"]
    with SwarmDB(path) as db:
        for second, name in enumerate(names):
            moment = f"2025-11-30T10:00:0{second}Z"
            db.insert_event(event(name, EventType.ERROR, timestamp=moment, metadata={"why": "\x9b[red]\n"}))
        db.insert_event(event("c", timestamp="2025-11-30T10:00:04Z"))
        with Follower(str(path)) as follower:
            lines = follower.lines(5)

    assert lines == [
        '2025-11-30 10:00:00Z  error     設計者  x  {"why": "\\x9b[red]\\n"}',
        '2025-11-30 10:00:01Z  error     461ba4f0-564c-4e18-9279-ac88383a584c  x  {"why": "\\x9b[red]\\n"}',
        '2025-11-30 10:00:02Z  error     [red]x\\x1b[2J                         x  {"why": "\\x9b[red]\\n"}',
        '2025-11-30 10:00:03Z  error     b                                     x  {"why": "\\x9b[red]\\n"}',
        "2025-11-30 10:00:04Z  spawn     c                                     x",
    ]


def test_in_a_pipe_a_line_has_all_of_its_names_and_ends_where_they_do(path: Path) -> None:
    long = "expert-backend-" * 8
    with SwarmDB(path) as db:
        db.insert_events([event("a", agent_type=long), event("b")])
        with Follower(str(path)) as follower:
            lines = follower.lines(2)

    assert [line.rpartition("spawn")[2] for line in lines] == [f"     a  {long}", "     b  x"]


def test_a_word_of_another_program_does_not_move_the_cursor(path: Path) -> None:
    with SwarmDB(path) as db:
        db.insert_event(event("a", timestamp="2025-11-30T10:00:00Z"))
    execute(path, "UPDATE agent_events SET event_type = ?", "\x1b[2J")
    with Follower(str(path)) as follower:
        assert follower.lines(1) == ["2025-11-30 10:00:00Z  \\x1b[2J   a  x"]


def test_on_a_terminal_the_type_gives_way_and_errors_are_red(path: Path) -> None:
    with SwarmDB(path) as db:
        db.insert_event(event("461ba4f0-564c-4e18-9279-ac88383a584c", EventType.ERROR, agent_type="t" * 40))
    colours: list[tuple[dict[str, str], bytes]] = [({"NO_COLOR": "1"}, b"\x1b[1merror"), ({}, b"\x1b[1;31merror")]
    for environment, begin in colours:
        with Terminal([*EVENTS, "--db", str(path), "-f"], environment) as terminal:
            while b"\n" not in terminal.seen:
                terminal.read()
            assert terminal.interrupt() == 130
        assert b"461ba4f0-564c-4e18-9279-ac88383a584c  ttttt\xe2\x80\xa6tttt\r\n" in terminal.seen
        assert begin in terminal.seen
        assert b"Traceback" not in terminal.seen
        assert b"Aborted" not in terminal.seen


def test_a_pipe_that_nobody_reads_any_more_ends_it_quietly(path: Path) -> None:
    for options in ([], ["--json"]):
        with SwarmDB(path) as db:
            db.insert_event(event("first"))
            with Follower(str(path), *options) as follower:
                follower.lines(1)
                assert follower.process.stdout is not None
                assert follower.process.stderr is not None
                follower.process.stdout.close()
                while follower.process.poll() is None:
                    db.insert_event(event("next"))
                assert (follower.process.returncode, follower.process.stderr.read()) == (1, "")
                follower.process.stderr.close()


@pytest.mark.parametrize(("agent", "limit"), [("a", 10), (None, 0)])
def test_a_last_event_that_can_not_be_read_disturbs_nobody_who_does_not_see_it(
    agent: str | None, limit: int, path: Path
) -> None:
    with SwarmDB(path) as db:
        db.insert_events([event("a"), event("b")])
        with db.transaction() as conn:
            conn.execute("UPDATE agent_events SET metadata = '{' WHERE agent_id = 'b'")
        events = followed(db, agent, None, limit, None)
        db.insert_event(event("a", EventType.COMPLETE))
        found = [one.event_type for one in islice(events, 2 if limit else 1)]

    assert found == ["spawn", "complete"][-len(found) :]
    assert found[-1] == "complete"


def test_a_row_that_can_not_be_read_ends_it(path: Path, swarmdb: Command) -> None:
    with SwarmDB(path) as db:
        db.insert_event(event("bad"))
    execute(path, "UPDATE agent_events SET metadata = 'not JSON'")
    ran = swarmdb("events", "-f", "--db", path)

    assert (ran.status, ran.out) == (1, "")
    assert ran.err.startswith("swarmdb: agent_events.metadata of the row with id=1: ")


def test_an_end_makes_no_sense(swarmdb: Command, store: Path) -> None:
    ran = swarmdb("events", "--follow", "--until", "2025-11-30", "--db", store)

    assert (ran.status, ran.out) == (2, "")
    assert "--until" in ran.err
