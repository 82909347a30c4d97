"""The commands for what sessions remember."""

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from cli.running import Command, Ran
from moai_flow.memory import SessionMemory, SwarmDB
from moai_flow.memory.models import columns

SILENT = Ran(0, "", "")


def store_raw(path: Path, memory_type: str, value: str) -> None:
    """Store a value as another program might."""
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(
            "INSERT INTO session_memory (session_id, memory_type, key, value, timestamp)"
            " VALUES ('old', ?, 'k', ?, '2025-11-01T12:00:00')",
            (memory_type, value),
        )


def test_memory_is_listed_by_type_and_key(swarmdb: Command, store: Path) -> None:
    memories = swarmdb("memory", "list", "s-1", "--db", store, "--json").json

    assert [(memory["memory_type"], memory["key"]) for memory in memories] == [
        ("context_hint", "tone"),
        ("semantic", "language"),
    ]
    assert list(memories[0]) == [column.name for column in columns(SessionMemory)]
    assert '{"terse": true}' in swarmdb("memory", "list", "s-1", "--db", store).out


def test_a_table_has_the_beginning_of_a_value_and_json_all_of_it(swarmdb: Command, path: Path) -> None:
    with SwarmDB(path) as db:
        db.store_memory("s", "semantic", "short", "q" * 198)  # 200 letters as JSON.
        db.store_memory("s", "semantic", "long", "w" * 1000)
    table = swarmdb("memory", "list", "s", "--db", path).out
    (long, short) = swarmdb("memory", "list", "s", "--db", path, "--json").json

    assert (table.count("q"), table.count("w"), table.count("…")) == (198, 199, 1)
    assert (short["value"], long["value"]) == ("q" * 198, "w" * 1000)


@pytest.mark.parametrize(
    ("options", "keys"),
    [(["--type", "semantic"], ["language"]), (["--prefix", "to"], ["tone"]), (["--prefix", "T"], [])],
)
def test_memory_is_filtered(options: list[str], keys: list[str], swarmdb: Command, store: Path) -> None:
    memories = swarmdb("memory", "list", "s-1", *options, "--db", store, "--json").json

    assert [memory["key"] for memory in memories] == keys


def test_a_value_is_printed_as_text_or_as_json(swarmdb: Command, store: Path) -> None:
    get = ["memory", "get", "s-1"]

    assert swarmdb(*get, "semantic", "language", "--db", store).out == "python\n"
    assert swarmdb(*get, "semantic", "language", "--db", store, "--json").json == "python"
    assert swarmdb(*get, "context_hint", "tone", "--db", store).json == {"terse": True}


@pytest.mark.parametrize("value", ["null", "-12.5", '"text"', '{"a": [1, true, "é"]}'])
def test_a_value_comes_back_as_it_was_set(value: str, swarmdb: Command, path: Path) -> None:
    address = ["s", "semantic", "k", "--db", str(path)]

    assert swarmdb("memory", "set", *address, "--", value) == SILENT
    assert swarmdb("memory", "get", *address, "--json").json == json.loads(value)


@pytest.mark.parametrize("text", ["{", "", "1", "null"])
def test_text_need_not_be_quoted_as_json(text: str, swarmdb: Command, path: Path) -> None:
    assert swarmdb("memory", "set", "s", "semantic", "k", text, "--text", "--db", path) == SILENT

    with SwarmDB(path) as db:
        assert db.get_memory("s", "semantic", "k") == text


def test_a_value_may_expire(swarmdb: Command, path: Path) -> None:
    assert swarmdb("memory", "set", "s", "semantic", "k", "1", "--ttl-hours", "2", "--db", path) == SILENT

    assert swarmdb("memory", "list", "s", "--db", path, "--json").json[0]["ttl_hours"] == 2


def test_setting_makes_the_database_where_it_is_expected(swarmdb: Command, tmp_path: Path) -> None:
    assert swarmdb("memory", "set", "s", "semantic", "k", "1") == SILENT

    assert (tmp_path / ".moai" / "memory" / "swarm.db").exists()
    assert swarmdb("memory", "get", "s", "semantic", "k").json == 1


def test_a_key_that_is_deleted_is_gone(swarmdb: Command, store: Path) -> None:
    address = ["s-1", "semantic", "language", "--db", store]

    assert swarmdb("memory", "delete", *address) == SILENT
    for command in ("get", "delete"):
        assert swarmdb("memory", command, *address) == Ran(
            1, "", "swarmdb: no semantic memory of session 's-1' has the key 'language'\n"
        )


def test_a_kind_that_only_an_older_program_knew_is_found(swarmdb: Command, store: Path) -> None:
    assert swarmdb("memory", "get", "old", "procedural", "k", "--db", store).status == 2

    store_raw(store, "procedural", "[1]")

    assert swarmdb("memory", "get", "old", "procedural", "k", "--db", store).json == [1]
    assert len(swarmdb("memory", "list", "old", "--type", "procedural", "--db", store, "--json").json) == 1
    assert swarmdb("memory", "delete", "old", "procedural", "k", "--db", store) == SILENT


@pytest.mark.parametrize(
    ("stored", "printed"),
    [('{"score": NaN, "limits": [Infinity]}', {"score": None, "limits": [None]}), ('"\\ud800"', "\ud800")],
)
def test_what_another_program_stored_is_printed_as_valid_json(
    stored: str, printed: object, swarmdb: Command, store: Path
) -> None:
    store_raw(store, "semantic", stored)

    assert swarmdb("memory", "get", "old", "semantic", "k", "--db", store, "--json").json == printed
    assert swarmdb("memory", "list", "old", "--db", store).status == 0


@pytest.mark.parametrize(("value", "options"), [("NaN", []), ("1", ["--ttl-hours", "0"])])
def test_what_is_refused_leaves_no_new_database(
    value: str, options: list[str], swarmdb: Command, tmp_path: Path
) -> None:
    ran = swarmdb("memory", "set", "s", "semantic", "k", value, "--db", tmp_path / "new.db", *options)

    assert ran.status == 1
    assert not (tmp_path / "new.db").exists()
