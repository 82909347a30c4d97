"""`swarmdb metrics`, from its tables to its JSON."""

import json
import sqlite3
import sys
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from cli.running import Command, on_terminal
from moai_flow.memory import SwarmDB, SwarmMetricType, TaskResult, TaskSummary
from moai_flow.memory.cli.figures import By, metrics

LONG_ID = "461ba4f0-564c-4e18-9279-ac88383a584c"
METRICS = [sys.executable, "-m", "moai_flow.memory", "metrics"]


@pytest.fixture(params=["file", "postgresql"])
def measured(request: pytest.FixtureRequest, path: Path) -> str:
    """The URL of a store with metrics of three agents and a swarm, of an hour in 2025 and of just now."""
    url = request.getfixturevalue("postgres_url") if request.param == "postgresql" else f"sqlite:///{path}"
    with SwarmDB(url=url) as db:
        tasks: list[tuple[str, int, TaskResult]] = [
            ("reviewer", 100, TaskResult.SUCCESS),
            ("reviewer", 200, TaskResult.SUCCESS),
            ("reviewer", 400, TaskResult.TIMEOUT),
            (LONG_ID, 1_500, TaskResult.FAILURE),
        ]
        for number, (agent, duration, result) in enumerate(tasks):
            at = f"2025-11-30T10:0{number}:00Z"
            db.store_task_metric(f"t-{number}", agent, duration, result, tokens_used=10, files_changed=2, timestamp=at)
        db.store_task_metric("t-new", "設計者", None, "success", tokens_used=1_000)
        for number in range(3):
            db.store_swarm_metric("swarm-1", "latency", number / 4, timestamp=f"2025-11-30T10:0{number}:00Z")
        db.store_agent_metric("only-figures", "throughput", 1)
        db.register_agent("idle", "expert-backend")
    return url


def test_everything_is_summed_up_in_tables(swarmdb: Command, measured: str) -> None:
    ran = swarmdb("metrics", "--db", measured, "--swarm", "swarm-1")

    assert (ran.status, ran.err) == (0, "")
    lines = [line.split() for line in ran.out.splitlines()]
    for line in (
        ["success", "3", "60.0%"],
        ["failure", "1", "20.0%"],
        ["timeout", "1", "20.0%"],
        ["cancelled", "0", "0.0%"],
        ["success", "rate", "60.0%"],
        ["tokens", "used", "1,040"],
        ["files", "changed", "8"],
        ["4", "550", "300", "1,335", "1,467", "1,500"],
        ["reviewer", "3", "66.7%", "30", "6", "233", "200", "380", "396", "400"],
        [LONG_ID, "1", "0.0%", "10", "2", "1,500", "1,500", "1,500", "1,500", "1,500"],
        ["設計者", "1", "100%", "1,000", "0", "-", "-", "-", "-", "-"],
        ["latency", "0.5", "2025-11-30", "10:02:00", "3", "0.25", "0", "0.5", "0.25", "0.475", "0.495"],
    ):
        assert line in lines


def test_json_has_what_the_facade_says(swarmdb: Command, measured: str) -> None:
    answer = swarmdb("metrics", "--db", measured, "--swarm", "swarm-1", "--json").json

    with SwarmDB(url=measured) as db:
        tasks, agents = db.summarize_tasks(), db.summarize_agents(order_by="count", descending=True)
        latency = db.summarize_swarm("swarm-1").figures[SwarmMetricType.LATENCY]
    assert answer["tasks"] == vars(tasks)
    assert answer["agents"] == [vars(agent) for agent in agents]
    assert answer["swarm"] == {
        "swarm_id": "swarm-1",
        "figures": {"latency": {**vars(latency), "latest_at": latency.latest_at.isoformat()}},
    }


@pytest.mark.parametrize(
    ("options", "agents"),
    [
        ([], ["reviewer", LONG_ID, "設計者"]),
        (["--limit", "1"], ["reviewer"]),
        (["--limit", "0"], []),
        (["--by", "agent"], [LONG_ID, "reviewer", "設計者"]),
        (["--by", "success"], [LONG_ID, "reviewer", "設計者"]),
        (["--by", "tokens"], ["設計者", "reviewer", LONG_ID]),
        (["--by", "files"], ["reviewer", LONG_ID, "設計者"]),
        *((["--by", column], [LONG_ID, "reviewer", "設計者"]) for column in ("mean", "p50", "p95", "p99", "max")),
        (["--last", "1h"], ["設計者"]),
        (["--last", "30m", "--by", "agent"], ["設計者"]),
        (["--last", "7d", "--until", "9999-01-01"], ["設計者"]),
        (["--since", "2025-11-30T10:02:00Z", "--until", "2025-12-01"], [LONG_ID, "reviewer"]),
        (["--until", "2025-11-30T10:00:00Z"], []),
    ],
    ids=" ".join,
)
def test_agents_are_those_of_the_window_in_the_order_asked_for(
    options: list[str], agents: list[str], swarmdb: Command, measured: str
) -> None:
    answer = swarmdb("metrics", "--db", measured, "--json", *options).json

    assert [agent["agent_id"] for agent in answer["agents"]] == agents


@pytest.mark.parametrize(
    ("options", "count"),
    [
        (["--since", "2025-11-30T10:01:00Z"], 2),
        (["--until", "2025-11-30T10:01:00Z"], 1),
        (["--since", "2025-11-30T10:01:00Z", "--until", "2025-11-30T10:02:00Z"], 1),
    ],
    ids=str,
)
def test_the_window_is_that_of_the_tasks_and_of_the_swarm_too(
    options: list[str], count: int, swarmdb: Command, measured: str
) -> None:
    of_swarm = swarmdb("metrics", "--db", measured, "--swarm", "swarm-1", "--json", *options).json
    of_one = swarmdb("metrics", "--db", measured, "--agent", "reviewer", "--json", *options).json

    assert of_swarm["swarm"]["figures"]["latency"]["count"] == count
    assert of_one["tasks"]["count"] == count
    assert of_swarm["tasks"]["count"] == sum(agent["count"] for agent in of_swarm["agents"])


def test_all_tables_show_one_moment(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Overtaken(SwarmDB):
        """Has another program write once the tasks have been summed up."""

        def summarize_tasks(self, *arguments: Any, **options: Any) -> TaskSummary:
            found = super().summarize_tasks(*arguments, **options)
            with SwarmDB(path) as other:
                other.store_task_metric("late", "late", 1, "success")
                other.store_swarm_metric("s", "health", 1)
            return found

    with Overtaken(path) as db:
        db.store_task_metric("t", "a", 1, "success")
        metrics(db, agent=None, swarm="s", since=None, until=None, by=By.AGENT, limit=20, as_json=True)

    answer = json.loads(capsys.readouterr().out)
    assert answer["tasks"]["count"] == 1
    assert [agent["agent_id"] for agent in answer["agents"]] == ["a"]
    assert answer["swarm"]["figures"] == {}


def test_an_agent_of_another_program_may_have_no_name(swarmdb: Command, store: Path) -> None:
    unknown = swarmdb("metrics", "--db", store, "--agent", "")
    with closing(sqlite3.connect(store)) as connection, connection:
        connection.execute("UPDATE task_metrics SET agent_id = ''")

    assert (unknown.status, unknown.out) == (1, "")
    assert unknown.err.startswith("swarmdb: no agent ''")
    assert swarmdb("metrics", "--db", store, "--agent", "", "--json").json["tasks"]["count"] > 0


@pytest.mark.parametrize(
    ("column", "agents"),
    [
        ("tasks", "dabc"),
        ("mean", "acbd"),
        ("p50", "acdb"),
        ("p95", "cbad"),
        ("p99", "bcad"),
        ("max", "dbca"),
    ],
)
def test_each_column_has_its_own_order(column: str, agents: str, swarmdb: Command, path: Path) -> None:
    durations = {"a": [100] * 10, "b": [1] * 9 + [500], "c": [10] * 8 + [300] * 2, "d": [5] * 99 + [1000]}
    with SwarmDB(path) as db:
        for agent, measured in durations.items():
            db.store_task_metrics(
                {"task_id": f"{agent}-{number}", "agent_id": agent, "duration_ms": duration, "result": "success"}
                for number, duration in enumerate(measured)
            )
    answer = swarmdb("metrics", "--by", column, "--db", path, "--json").json

    assert "".join(agent["agent_id"] for agent in answer["agents"]) == agents
    shown = swarmdb("metrics", "--by", column, "--db", path).out.partition(f"Agents, most {column} first")[2]
    assert [line.split()[0] for line in shown.splitlines()[3:7]] == list(agents)


def test_how_many_agents_are_not_shown_is_said(swarmdb: Command, measured: str) -> None:
    assert "\nand 2 more;" in swarmdb("metrics", "--db", measured, "--limit", "1").out
    assert " more;" not in swarmdb("metrics", "--db", measured, "--limit", "3").out


def test_twenty_agents_are_shown_unless_another_number_is_asked_for(swarmdb: Command, path: Path) -> None:
    with SwarmDB(path) as db:
        for number in range(25):
            db.store_task_metric("t", f"a-{number:02}", 1, "success")

    assert len(swarmdb("metrics", "--db", path, "--json").json["agents"]) == 20
    shown = swarmdb("metrics", "--db", path).out
    assert "a-19" in shown
    assert "a-20" not in shown
    assert "\nand 5 more;" in shown
    assert swarmdb("metrics", "--db", path, "--limit=-1").status == 2


def test_one_agents_metrics(swarmdb: Command, measured: str) -> None:
    ran = swarmdb("metrics", "--db", measured, "--agent", "reviewer")

    assert ran.out.startswith("Tasks of reviewer")
    assert "success rate   66.7%" in ran.out
    assert "Agents" not in ran.out
    answer = swarmdb("metrics", "--db", measured, "--agent", "reviewer", "--json").json
    assert answer.keys() == {"tasks"}
    assert answer["tasks"]["count"] == 3


@pytest.mark.parametrize("agent", ["idle", "only-figures", "reviewer"])
def test_an_agent_that_is_known_may_have_done_nothing(agent: str, swarmdb: Command, measured: str) -> None:
    ran = swarmdb("metrics", "--db", measured, "--agent", agent, "--last", "1h")

    assert (ran.status, ran.out) == (0, f"Tasks of {agent}: none\n\n")


def test_an_empty_store_has_nothing(swarmdb: Command, path: Path) -> None:
    SwarmDB(path).close()
    ran = swarmdb("metrics", "--db", path, "--swarm", "swarm-1")

    assert (ran.status, ran.err) == (0, "")
    assert ran.out == "Tasks: none\n\nAgents, most tasks first: none\n\nSwarm swarm-1: none\n\n"


def test_tasks_of_which_none_was_measured_have_no_durations(swarmdb: Command, path: Path) -> None:
    with SwarmDB(path) as db:
        db.store_task_metric("t", "a", None, "success")

    assert "Durations in milliseconds: none" in swarmdb("metrics", "--db", path).out


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.123456, "0.1235"),
        (-2.5, "-2.5"),
        (999.4, "999.4"),
        (1000.0, "1,000"),
        (1000.4, "1,000"),
        (-123456.7, "-123,457"),
        (999_999_999.0, "999,999,999"),
        (1e9, "1e+09"),
    ],
)
def test_a_figure_has_four_digits_or_is_whole(value: float, shown: str, swarmdb: Command, path: Path) -> None:
    with SwarmDB(path) as db:
        db.store_swarm_metric("s", "resource", value)
    out = swarmdb("metrics", "--swarm", "s", "--db", path).out
    (line,) = [line.split() for line in out.splitlines() if "resource" in line]

    assert [line[1], *line[5:]] == [shown] * 7


def test_only_all_is_a_hundred_percent(swarmdb: Command, path: Path) -> None:
    with SwarmDB(path) as db, db.transaction():
        for number in range(3_000):
            db.store_task_metric(f"t-{number}", "a", 1, "success" if number else "failure")

    assert "success rate   99.9%" in swarmdb("metrics", "--db", path).out


@pytest.mark.parametrize("length", ["", "1", "h", "0m", "-1h", "1.5h", "1w", "1h30m", "٣m", " 1h", "999999999d"])
def test_a_length_of_time_that_is_none_is_wrong_usage(length: str, swarmdb: Command, store: Path) -> None:
    ran = swarmdb("metrics", "--db", store, f"--last={length}")

    assert (ran.status, ran.out) == (2, "")
    assert "--last" in ran.err
    assert "30m, 1h or 7d" in " ".join(ran.err.replace("│", " ").split())


def test_two_beginnings_are_wrong_usage(swarmdb: Command, store: Path) -> None:
    ran = swarmdb("metrics", "--db", store, "--last", "1h", "--since", "2025-11-30")

    assert (ran.status, ran.out) == (2, "")
    assert "--since" in ran.err


def test_names_are_data(swarmdb: Command, path: Path) -> None:
    with SwarmDB(path) as db:
        db.store_task_metric("t", "[red]x[/]\x1b[2J:bomb:", 1, "success")
        db.store_swarm_metric("s\x1b[2J", "health", 1)
    ran = swarmdb("metrics", "--db", path, "--swarm", "s\x1b[2J")

    assert "\x1b" not in ran.out
    assert "[red]x[/]\\x1b[2J:bomb:" in ran.out
    assert "Swarm s\\x1b[2J" in ran.out


@pytest.mark.parametrize("columns", [80, 160])
def test_a_terminal_shows_as_many_columns_as_it_has_room_for(columns: int, path: Path) -> None:
    now = datetime.now(UTC)
    with SwarmDB(path) as db:
        for number, agent in enumerate((LONG_ID, "設計" * 9, "short")):
            moment = now - timedelta(minutes=number)
            db.store_task_metric("t", agent, 1_234_567, "success", tokens_used=12_345_678, timestamp=moment)
            db.store_swarm_metric("s", "resource", 123_456.7, timestamp=moment)
    command = [*METRICS, "--db", str(path), "--swarm", "s", "--by", "p99"]
    seen, _ = on_terminal(command, path.parent, is_all=True, COLUMNS=str(columns), NO_COLOR="1")

    shown = seen.decode()
    assert LONG_ID in shown
    assert "設計" * 9 in shown
    assert "p99 ms" in shown
    assert ("p50 ms" in shown, "files" in shown.partition("Agents")[2]) == (columns == 160, columns == 160)
    assert "p95 ms" in shown
    assert "…" not in shown
