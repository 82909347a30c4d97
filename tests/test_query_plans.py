"""What SQLite does for each query: it searches an index, and the index has the order already."""

from itertools import combinations
from typing import Any

import pytest

from moai_flow.memory import AgentMetric, SwarmDB, SwarmMetric, TaskMetric
from moai_flow.memory.operations import agents, events, memory, metrics, retention, summaries
from moai_flow.memory.statements import Statement


def sets_of(*names: str) -> list[frozenset[str]]:
    return [frozenset(some) for size in range(len(names) + 1) for some in combinations(names, size)]


def plan(db: SwarmDB, statement: Statement) -> list[str]:
    program = db._programs[statement]
    with db.transaction() as raw:
        return [step[3] for step in raw.execute(f"EXPLAIN QUERY PLAN {program.sql}", [None] * len(program._slots))]


EVENT_FILTERS = sets_of("agent_id", "event_type", "since", "until")
PAGES: list[tuple[frozenset[str], Statement]] = [
    *((names, events._newest(names)) for names in EVENT_FILTERS),
    *((names, events._newest(names | {"before_time", "before_id"})) for names in EVENT_FILTERS),
    *((names, events._page(names)) for names in EVENT_FILTERS),
    *((names, events._page(names | {"after_time", "after_id"})) for names in EVENT_FILTERS if "since" not in names),
]


@pytest.mark.parametrize(("names", "statement"), PAGES)
def test_pages_of_events_are_read_in_the_order_of_an_index(
    local_db: SwarmDB, names: frozenset[str], statement: Statement
) -> None:
    first, *rest = plan(local_db, statement)

    if "agent_id" in names:
        assert first.startswith("SEARCH agent_events USING INDEX idx_agent_events_agent_time (agent_id=?")
    elif "event_type" in names:
        assert first.startswith("SEARCH agent_events USING INDEX idx_agent_events_type_time (event_type=?")
    else:
        # With a limit, and without a bound in time, it begins at the end of the index.
        assert first.startswith(
            ("SEARCH agent_events USING INDEX idx_agent_events_timestamp", "SCAN agent_events USING INDEX idx_agent_")
        )
    assert not [step for step in rest if "TEMP B-TREE" in step or "SCAN" in step]


@pytest.mark.parametrize("names", [names for names in EVENT_FILTERS if names & {"since", "until"}])
def test_a_bound_in_time_is_searched_for(local_db: SwarmDB, names: frozenset[str]) -> None:
    for statement in (events._newest(names), events._page(names)):
        first = plan(local_db, statement)[0]
        assert ("timestamp>?" in first, "timestamp<?" in first) == ("since" in names, "until" in names)


@pytest.mark.parametrize("names", EVENT_FILTERS)
def test_the_next_page_is_searched_for_where_the_last_one_ended(local_db: SwarmDB, names: frozenset[str]) -> None:
    assert "timestamp<?" in plan(local_db, events._newest(names | {"before_time", "before_id"}))[0]
    assert "timestamp>?" in plan(local_db, events._page(names - {"since"} | {"after_time", "after_id"}))[0]


@pytest.mark.parametrize("names", sets_of("types", "agent_ids", "exclude_agent"))
def test_a_watcher_reads_by_the_primary_key_from_its_position_on(local_db: SwarmDB, names: frozenset[str]) -> None:
    first, *rest = plan(local_db, events._after(names))

    assert first == "SEARCH agent_events USING INTEGER PRIMARY KEY (rowid>? AND rowid<?)"
    # What it looks for is a list, made once for a page; what it finds is in order.
    assert {step.partition(" ")[0] for step in rest} == ({"LIST", "SCAN"} if names & {"types", "agent_ids"} else set())
    assert all("VIRTUAL TABLE" in step for step in rest if step.startswith("SCAN"))


def test_the_end_of_the_log_is_found_by_its_key(local_db: SwarmDB) -> None:
    assert plan(local_db, events._LAST_ID) == ["SEARCH agent_events"]


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        (agents._BY_ID, ["SEARCH agent_registry USING INDEX sqlite_autoindex_agent_registry_1 (agent_id=?)"]),
        (agents._FINISH, ["SEARCH agent_registry USING INDEX sqlite_autoindex_agent_registry_1 (agent_id=?)"]),
        (agents._RESUME, ["SEARCH agent_registry USING INDEX sqlite_autoindex_agent_registry_1 (agent_id=?)"]),
        (agents._DELETE, ["SEARCH agent_registry USING INDEX sqlite_autoindex_agent_registry_1 (agent_id=?)"]),
        (agents._BEAT, ["SEARCH agent_registry USING INDEX sqlite_autoindex_agent_registry_1 (agent_id=?)"]),
        (agents._BEAT_SPAWN, ["SEARCH agent_registry USING INDEX sqlite_autoindex_agent_registry_1 (agent_id=?)"]),
        (agents._FINISH_SPAWN, ["SEARCH agent_registry USING INDEX sqlite_autoindex_agent_registry_1 (agent_id=?)"]),
        (agents._FINISH_SILENT, ["SEARCH agent_registry USING INDEX sqlite_autoindex_agent_registry_1 (agent_id=?)"]),
        (
            agents._IS_REGISTERED,
            ["SEARCH agent_registry USING COVERING INDEX sqlite_autoindex_agent_registry_1 (agent_id=?)"],
        ),
        (
            metrics._IS_TAKEN,
            ["SEARCH task_metrics USING COVERING INDEX sqlite_autoindex_task_metrics_1 (task_id=? AND timestamp=?)"],
        ),
        # The index holds only agents that have not ended.
        (agents._ACTIVE, ["SCAN agent_registry USING INDEX idx_agent_registry_active"]),
        (
            memory._LATEST,
            ["SEARCH session_memory USING INDEX idx_session_memory_entry (session_id=? AND memory_type=? AND key=?)"],
        ),
        (
            memory._HISTORY,
            ["SEARCH session_memory USING INDEX idx_session_memory_entry (session_id=? AND memory_type=? AND key=?)"],
        ),
        (
            memory._DELETE,
            [
                "SEARCH session_memory USING INDEX idx_session_memory_entry "
                "(session_id=? AND memory_type=? AND key=? AND id<?)"
            ],
        ),
        (
            retention._DELETE_OLDEST["events"],
            [
                "SEARCH agent_events USING INTEGER PRIMARY KEY (rowid=?)",
                "LIST SUBQUERY 1",
                "SEARCH agent_events USING COVERING INDEX idx_agent_events_timestamp (timestamp>? AND timestamp<?)",
            ],
        ),
    ],
)
def test_one_row_or_key_is_found_by_its_index(local_db: SwarmDB, statement: Statement, expected: list[str]) -> None:
    assert plan(local_db, statement) == expected


@pytest.mark.parametrize("names", sets_of("memory_type", "prefix"))
def test_the_keys_of_a_session_are_found_in_an_index_alone(local_db: SwarmDB, names: frozenset[str]) -> None:
    steps = plan(local_db, memory._latest_of_each(names))

    assert [step for step in steps if "SCAN" in step] == []
    assert [step for step in steps if "COVERING INDEX idx_session_memory_entry (session_id=?" in step] != []
    # What is sorted is the answer itself, a row for each key.
    assert [step for step in steps if "TEMP B-TREE" in step] == ["USE TEMP B-TREE FOR ORDER BY"]


METRIC_FILTERS: list[tuple[Any, frozenset[str]]] = [
    *((TaskMetric, names) for names in sets_of("task_id", "agent_id", "result", "since", "until")),
    *((AgentMetric, names) for names in sets_of("agent_id", "metric_type", "since", "until")),
    *((SwarmMetric, names) for names in sets_of("swarm_id", "metric_type", "since", "until")),
]


@pytest.mark.parametrize(("model", "names"), METRIC_FILTERS)
def test_metrics_are_read_in_the_order_of_an_index(local_db: SwarmDB, model: Any, names: frozenset[str]) -> None:
    first, *rest = plan(local_db, metrics._newest(model, names))

    assert first.startswith("SEARCH" if names else "SCAN")
    assert " USING INDEX " in first
    # Tasks of the same microsecond are put in order among themselves, all others come in it.
    assert set(rest) <= ({"USE TEMP B-TREE FOR RIGHT PART OF ORDER BY"} if model is TaskMetric else set())
    for owner in ("task_id", "agent_id", "swarm_id"):
        if owner in names and not (owner == "agent_id" and "task_id" in names):
            assert f"({owner}=?" in first


def reads(db: SwarmDB, statement: Statement, table: str) -> list[str]:
    return [step for step in plan(db, statement) if step.startswith((f"SEARCH {table}", f"SCAN {table}"))]


SERIES = ("tokens_used", "agent_metrics", "swarm_metrics")


@pytest.mark.parametrize("names", [names for names in sets_of("agent_id", "since", "until") if names])
@pytest.mark.parametrize("percent", [None, 95])
def test_summaries_of_tasks_read_only_what_they_are_about(
    local_db: SwarmDB, names: frozenset[str], percent: int | None
) -> None:
    statements = [summaries._tasks(names, by_agent=False), summaries._series("duration_ms", names, percent)]
    if "agent_id" not in names:
        statements.append(summaries._tasks(names, by_agent=True))
    for statement in statements:
        found = reads(local_db, statement, "task_metrics")
        assert found
        for step in found:
            index = "idx_task_metrics_agent (agent_id=?" if "agent_id" in names else "idx_task_metrics_time ("
            assert step.startswith(f"SEARCH task_metrics USING INDEX {index}")
            assert ("timestamp>?" in step, "timestamp<?" in step) == ("since" in names, "until" in names)


@pytest.mark.parametrize("names", sets_of("since", "until"))
def test_summaries_of_agents_and_swarms_read_only_what_they_are_about(local_db: SwarmDB, names: frozenset[str]) -> None:
    about = [
        ("agent_metrics", summaries._series("agent_metrics", names | {"agent_id", "metric_type"}, 50)),
        ("agent_metrics", summaries._series("agent_metrics", names | {"metric_type"}, 50)),
        ("swarm_metrics", summaries._series("swarm_metrics", names | {"swarm_id", "metric_type"}, None)),
        ("swarm_metrics", summaries._swarm(names | {"swarm_id"})),
    ]
    for table, statement in about:
        found = reads(local_db, statement, table)
        assert found
        assert [step for step in found if not step.startswith("SEARCH ") or " INDEX idx_" not in step] == []


@pytest.mark.parametrize("figure", SERIES)
@pytest.mark.parametrize("names", sets_of("since", "until"))
def test_where_a_series_begins_and_ends_is_found_at_the_ends_of_an_index(
    local_db: SwarmDB, figure: str, names: frozenset[str]
) -> None:
    owner = summaries._FIGURES[figure].owner
    of_type = set() if figure == "tokens_used" else {"metric_type"}
    for filters in (names | of_type, names | of_type | {owner}):
        steps = plan(local_db, summaries._edges(figure, filters))
        assert [step for step in steps if "TEMP B-TREE" in step] == []
        assert all(" USING INDEX " in step for step in steps if "metrics" in step)
