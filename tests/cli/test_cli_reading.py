"""Commands that look into a database."""

import sqlite3
from pathlib import Path

import pytest

from cli.running import Command, execute
from moai_flow.memory import AgentEvent, RegisteredAgent, SwarmDB
from moai_flow.memory.models import columns

LONG_ID = "461ba4f0-564c-4e18-9279-ac88383a584c"


def insert_event(path: Path, event_type: str, timestamp: str, metadata: str = "{}") -> None:
    execute(
        path,
        "INSERT INTO agent_events (event_id, event_type, agent_id, agent_type, timestamp, metadata)"
        " VALUES (?, ?, 'old', 'original', ?, ?)",
        f"{event_type} {timestamp}",
        event_type,
        timestamp,
        metadata,
    )


# status


def test_status_counts_everything(swarmdb: Command, store: Path) -> None:
    status = swarmdb("status", "--db", store, "--json").json

    assert status["path"] == str(store)
    assert status["schema_version"] == "2.1.0"
    assert status["size_bytes"] > 0
    assert status["wal_bytes"] >= 0
    assert status["sqlite_version"] == sqlite3.sqlite_version
    assert status["rows"] == {
        "agent_events": 3,
        "agent_registry": 2,
        "session_memory": 2,
        "task_metrics": 1,
        "agent_metrics": 0,
        "swarm_metrics": 0,
        "schema_info": 2,
    }
    assert status["agents"] == {"complete": 1, "spawned": 1}
    assert status["oldest_event"] == "2025-11-01T12:00:00+00:00"
    assert status["newest_event"] == "2025-11-03T12:00:00+00:00"


def test_status_tells_how_large_the_log_is(swarmdb: Command, path: Path) -> None:
    with SwarmDB(path) as db:
        db.store_memory("s", "semantic", "k", "x" * 100_000)
        status = swarmdb("status", "--db", path, "--json").json

        assert status["wal_bytes"] == path.with_name("swarm.db-wal").stat().st_size > 100_000


def test_status_of_an_empty_store(swarmdb: Command, path: Path) -> None:
    SwarmDB(path).close()
    status = swarmdb("status", "--db", path, "--json").json

    assert (status["oldest_event"], status["newest_event"], status["agents"]) == (None, None, {})
    assert "Agents: none" in swarmdb("status", "--db", path).out


def test_status_shows_a_file_of_the_original_program(swarmdb: Command, legacy: Path) -> None:
    status = swarmdb("status", "--db", legacy, "--json").json

    assert (status["rows"]["agent_events"], status["rows"]["agent_registry"]) == (4, 2)
    assert status["rows"]["session_memory"] == 1
    assert status["oldest_event"] == "2025-11-29T10:11:29.953194+00:00"

    shown = swarmdb("status", "--db", legacy).out
    assert "2025-11-29 10:11:29" in shown
    assert "complete" in shown


def test_status_shows_a_time_that_is_none_as_it_is(swarmdb: Command, store: Path) -> None:
    insert_event(store, "spawn", "today")

    assert swarmdb("status", "--db", store, "--json").json["newest_event"] == "today"


@pytest.mark.parametrize("variable", ["MOAI_DB_PATH", "SWARMDB_URL"])
def test_the_environment_says_where_the_database_is(
    variable: str, swarmdb: Command, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, f"sqlite:///{store}" if variable == "SWARMDB_URL" else str(store))

    assert swarmdb("status", "--json").json["path"] == str(store)


def test_the_database_may_be_given_as_a_url(swarmdb: Command, store: Path) -> None:
    assert swarmdb("status", "--db", f"sqlite:///{store}", "--json").json["path"] == str(store)


# agents


def test_agents_are_listed_newest_spawn_first_with_every_column(swarmdb: Command, store: Path) -> None:
    agents = swarmdb("agents", "--db", store, "--json").json

    assert [agent["agent_id"] for agent in agents] == ["a-2", "a-1"]
    assert list(agents[1]) == [column.name for column in columns(RegisteredAgent)]
    assert agents[1]["metadata"] == {"model": "small"}
    assert agents[1]["duration_ms"] == 1500


@pytest.mark.parametrize(
    ("options", "found"),
    [
        (["--status", "spawned"], ["a-2"]),
        (["--type", "expert-backend"], ["a-1"]),
        (["--status", "spawned", "--type", "expert-backend"], []),
        (["--type", ""], []),
    ],
)
def test_agents_are_filtered(options: list[str], found: list[str], swarmdb: Command, store: Path) -> None:
    agents = swarmdb("agents", *options, "--db", store, "--json").json

    assert [agent["agent_id"] for agent in agents] == found


def test_one_agent_is_shown_whole(swarmdb: Command, store: Path) -> None:
    assert swarmdb("agents", "a-1", "--db", store, "--json").json["status"] == "complete"

    shown = swarmdb("agents", "a-1", "--db", store).out
    assert "expert-backend" in shown
    assert '{"model": "small"}' in shown
    assert "1,500" in shown
    facts = dict(line.split("  ", 1) for line in swarmdb("agents", "a-2", "--db", store).out.splitlines() if line)
    assert facts["complete time"].strip() == facts["duration ms"].strip() == "-"
    with SwarmDB(store) as db:
        agent = db.get_agent("a-2")
    assert agent is not None
    assert facts["spawn time"].strip() == f"{agent.spawned_at:%Y-%m-%d %H:%M:%S}"


def test_one_agent_takes_no_filters(swarmdb: Command, store: Path) -> None:
    assert swarmdb("agents", "a-1", "--status", "error", "--db", store).status == 2
    assert swarmdb("agents", "a-1", "--type", "t", "--db", store).status == 2


def test_tables_keep_an_id_whole_in_80_columns(swarmdb: Command, path: Path) -> None:
    with SwarmDB(path) as db:
        db.register_agent(LONG_ID, "expert-backend")
        db.insert_event(
            {
                "event_type": "complete",
                "agent_id": LONG_ID,
                "agent_type": "expert-backend",
                "metadata": {"prompt": "Design the interface " * 100},
            }
        )
    for command in ("agents", "events"):
        shown = swarmdb(command, "--db", path).out

        assert LONG_ID in shown
        assert "expert-backend" in shown
        assert max(map(len, shown.splitlines())) <= 80


# events


def test_events_are_a_json_array_newest_first_with_every_column(swarmdb: Command, store: Path) -> None:
    events = swarmdb("events", "--db", store, "--json").json

    assert [event["event_type"] for event in events] == ["complete", "error", "spawn"]
    assert list(events[0]) == [column.name for column in columns(AgentEvent)]
    assert events[0]["timestamp"] == "2025-11-03T12:00:00+00:00"
    assert events[0]["metadata"] == {"day": 3}


@pytest.mark.parametrize(
    ("options", "days"),
    [
        (["--agent", "a-1"], [3, 2, 1]),
        (["--agent", "a-2"], []),
        (["--type", "error"], [2]),
        (["--limit", "2"], [3, 2]),
        (["--limit", "0"], []),
        (["--since", "2025-11-02T12:00:00Z"], [3, 2]),
        (["--until", "2025-11-02T12:00:00Z"], [1]),
    ],
)
def test_events_are_filtered(options: list[str], days: list[int], swarmdb: Command, store: Path) -> None:
    events = swarmdb("events", *options, "--db", store, "--json").json

    assert [event["metadata"]["day"] for event in events] == days


def test_a_hundred_events_are_listed_unless_another_number_is_asked_for(swarmdb: Command, path: Path) -> None:
    with SwarmDB(path) as db:
        db.insert_events({"event_type": "spawn", "agent_id": "a", "agent_type": "t"} for _ in range(150))

    assert [event["id"] for event in swarmdb("events", "--db", path, "--json").json] == list(range(150, 50, -1))
    assert len(swarmdb("events", "--limit", "120", "--db", path, "--json").json) == 120


def test_events_of_a_type_that_only_an_older_program_knew_are_found(swarmdb: Command, store: Path) -> None:
    assert swarmdb("events", "--type", "decision", "--db", store).status == 2

    insert_event(store, "decision", "2025-11-04 12:00:00")

    found = swarmdb("events", "--type", "decision", "--db", store, "--json").json
    assert [event["event_type"] for event in found] == ["decision"]


def test_an_empty_answer_is_said_to_be_one(swarmdb: Command, store: Path) -> None:
    assert swarmdb("events", "--agent", "nobody", "--db", store).out == "Events: none\n\n"
    assert swarmdb("events", "--agent", "nobody", "--db", store, "--json").json == []


def test_what_would_move_the_cursor_is_shown_by_its_code(swarmdb: Command, path: Path) -> None:
    with SwarmDB(path) as db:
        db.register_agent("\x1b[2J[bold]:fire:\n", "t")

    assert "\\x1b[2J[bold]:fire:\\n" in swarmdb("agents", "--db", path).out
    assert swarmdb("agents", "--db", path, "--json").json[0]["agent_id"] == "\x1b[2J[bold]:fire:\n"


def test_nor_does_what_is_no_text_by_itself_or_stands_in_a_path(swarmdb: Command, path: Path, tmp_path: Path) -> None:
    with SwarmDB(path) as db:
        db.register_agent("\x9b2J", "t", metadata={"\u202e": "\x9b2J"})
    facts = swarmdb("agents", "\x9b2J", "--db", path).out
    execute(path, "UPDATE agent_registry SET spawn_time = 'soon'")
    check = swarmdb("check", "--db", path).out
    backup = swarmdb("backup", tmp_path / "\x1b[2J.db", "--db", path).out

    assert all(line.isprintable() for line in (facts + check).split("\n"))
    assert '{"\\u202e": "\\x9b2J"}' in facts
    assert '{"agent_id": "\\x9b2J"}' in check
    assert backup == f"{tmp_path}/\\x1b[2J.db\n"


@pytest.mark.parametrize("length", [36, 144])
def test_long_names_leave_room_for_the_rest(length: int, swarmdb: Command, path: Path) -> None:
    agent_id = "Z" * length
    with SwarmDB(path) as db:
        db.register_agent(agent_id, "expert-backend", "running")
        db.insert_event(
            {"event_type": "complete", "agent_id": agent_id, "agent_type": "t", "metadata": {"k": "v" * 80}}
        )

    agents, events = swarmdb("agents", "--db", path).out, swarmdb("events", "--db", path).out
    assert max(map(len, (agents + events).splitlines())) <= 80
    assert "running" in agents
    assert "complete" in events
    assert agents.count("Z") == events.count("Z") == length
    assert "\u2026" not in agents + events
