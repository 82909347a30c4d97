"""What is on disk: the specification's schema to the column, plus indexes."""

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine

from moai_flow.memory import SwarmDB
from moai_flow.memory.models import TABLES, Record, table_of

SPECIFIED = """
CREATE TABLE agent_events (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    event_id TEXT UNIQUE NOT NULL,
    event_type TEXT NOT NULL,
    agent_id TEXT NOT NULL,
    agent_type TEXT NOT NULL,
    timestamp TEXT NOT NULL,
    metadata TEXT,
    created_at TEXT DEFAULT CURRENT_TIMESTAMP
);
CREATE INDEX idx_agent_events_agent_id ON agent_events(agent_id);
CREATE INDEX idx_agent_events_event_type ON agent_events(event_type);
CREATE INDEX idx_agent_events_timestamp ON agent_events(timestamp);
CREATE TABLE agent_registry (
    agent_id TEXT PRIMARY KEY,
    agent_type TEXT NOT NULL,
    status TEXT NOT NULL,
    spawn_time REAL NOT NULL,
    complete_time REAL,
    duration_ms INTEGER,
    metadata TEXT,
    last_updated TEXT DEFAULT CURRENT_TIMESTAMP
);
CREATE INDEX idx_agent_registry_status ON agent_registry(status);
CREATE INDEX idx_agent_registry_agent_type ON agent_registry(agent_type);
CREATE TABLE session_memory (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    session_id TEXT NOT NULL,
    memory_type TEXT NOT NULL,
    key TEXT NOT NULL,
    value TEXT,
    timestamp TEXT NOT NULL,
    ttl_hours INTEGER,
    created_at TEXT DEFAULT CURRENT_TIMESTAMP
);
CREATE INDEX idx_session_memory_session_id ON session_memory(session_id);
CREATE INDEX idx_session_memory_memory_type ON session_memory(memory_type);
CREATE INDEX idx_session_memory_key ON session_memory(key);
CREATE TABLE task_metrics (
    task_id TEXT NOT NULL,
    agent_id TEXT NOT NULL,
    duration_ms INTEGER,
    result TEXT NOT NULL,
    tokens_used INTEGER DEFAULT 0,
    files_changed INTEGER DEFAULT 0,
    timestamp DATETIME DEFAULT CURRENT_TIMESTAMP,
    PRIMARY KEY (task_id, timestamp)
);
CREATE INDEX idx_task_metrics_agent ON task_metrics(agent_id, timestamp);
CREATE INDEX idx_task_metrics_time ON task_metrics(timestamp);
CREATE INDEX idx_task_metrics_result ON task_metrics(result, timestamp);
CREATE TABLE agent_metrics (
    metric_id INTEGER PRIMARY KEY AUTOINCREMENT,
    agent_id TEXT NOT NULL,
    metric_type TEXT NOT NULL,
    value REAL NOT NULL,
    metadata TEXT,
    timestamp DATETIME DEFAULT CURRENT_TIMESTAMP
);
CREATE INDEX idx_agent_metrics_agent ON agent_metrics(agent_id, metric_type, timestamp);
CREATE INDEX idx_agent_metrics_type ON agent_metrics(metric_type, timestamp);
CREATE TABLE swarm_metrics (
    metric_id INTEGER PRIMARY KEY AUTOINCREMENT,
    swarm_id TEXT NOT NULL,
    metric_type TEXT NOT NULL,
    value REAL NOT NULL,
    metadata TEXT,
    timestamp DATETIME DEFAULT CURRENT_TIMESTAMP
);
CREATE INDEX idx_swarm_metrics_swarm ON swarm_metrics(swarm_id, metric_type, timestamp);
CREATE INDEX idx_swarm_metrics_type ON swarm_metrics(metric_type, timestamp);
CREATE TABLE schema_info (
    key TEXT PRIMARY KEY,
    value TEXT NOT NULL,
    updated_at TEXT DEFAULT CURRENT_TIMESTAMP
);
"""

ADDED = {
    "idx_agent_events_agent_time",
    "idx_agent_events_type_time",
    "idx_agent_registry_active",
    "idx_session_memory_entry",
    "idx_agent_metrics_agent_time",
    "idx_agent_metrics_time",
    "idx_swarm_metrics_swarm_time",
    "idx_swarm_metrics_time",
}


@pytest.fixture
def specified() -> Any:
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.executescript(SPECIFIED)
        yield connection


def indexes(connection: Any, table: str) -> dict[str, Any]:
    return {
        name: (unique, origin, partial, connection.execute(f"PRAGMA index_info({name})").fetchall())
        for _, name, unique, origin, partial in connection.execute(f"PRAGMA index_list({table})").fetchall()
    }


@pytest.mark.parametrize("table", [str(model.__tablename__) for model in TABLES])
def test_a_new_table_is_the_specified_one_but_for_added_indexes(path: Path, specified: Any, table: str) -> None:
    SwarmDB(path).close()

    with closing(sqlite3.connect(path)) as made:
        columns = f"PRAGMA table_info({table})"
        assert made.execute(columns).fetchall() == specified.execute(columns).fetchall()

        of_new, of_specified = indexes(made, table), indexes(specified, table)
        assert {name: of_new.get(name) for name in of_specified} == of_specified
        assert of_new.keys() - of_specified.keys() <= ADDED


def test_a_new_database_has_the_specified_tables_and_no_others(path: Path, specified: Any) -> None:
    SwarmDB(path).close()

    with closing(sqlite3.connect(path)) as made:
        names = "SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name"
        assert made.execute(names).fetchall() == specified.execute(names).fetchall()
        for table in ("agent_events", "session_memory", "agent_metrics", "swarm_metrics"):
            (sql,) = made.execute("SELECT sql FROM sqlite_master WHERE name = ?", (table,)).fetchone()
            assert "AUTOINCREMENT" in sql


def test_numbers_of_deleted_rows_are_not_given_again(db: SwarmDB) -> None:
    first = db.store_memory("s", "semantic", "k", 1)
    db.delete_memory("s", "semantic", "k")

    assert db.store_memory("s", "semantic", "k", 2) == first + 1


def test_the_models_and_a_new_file_agree(path: Path) -> None:
    SwarmDB(path).close()

    assert differences(path) == []


def differences(path: Path) -> list[Any]:
    """Return how a file's schema differs from the models, as Alembic sees it."""
    engine = create_engine(f"sqlite:///{path}")
    with engine.connect() as connection:
        ours = {table_of(model).name for model in TABLES}
        context = MigrationContext.configure(
            connection, opts={"include_name": lambda name, kind, parents: kind != "table" or name in ours}
        )
        found = compare_metadata(context, Record.metadata)
    engine.dispose()
    return list(found)


def test_a_migrated_file_agrees_with_the_models(legacy: Path) -> None:
    SwarmDB(legacy).close()

    assert differences(legacy) == []


def test_the_applications_own_metadata_is_left_alone() -> None:
    from sqlmodel import SQLModel

    assert not {str(model.__tablename__) for model in TABLES} & SQLModel.metadata.tables.keys()
