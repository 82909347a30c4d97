"""That the benchmark measures what it says: every public operation, and the same work on both sides."""

import inspect
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from benchmarks import copying, server
from benchmarks.dataset import build_pair, content
from benchmarks.measuring import Measurement, compare
from benchmarks.operations import CASES, Case
from benchmarks.raw import TABLES, RawSwarm
from benchmarks.report import write_json, write_markdown
from conftest import REPOSITORY, Clock
from moai_flow.memory import CheckReport, MetricBucket, SwarmDB, SwarmSummary, TaskSummary
from moai_flow.memory.models import Record, new_id
from moai_flow.memory.types import decode_time
from postgres import Server

ROWS = 1000
TIMES = {"timestamp", "created_at", "last_updated"}

#: What is given back by chance, or is of another kind on the raw side.
OF_ITS_OWN = {"insert_event", "insert_events", "backup", "session", "size_bytes", "cleanup"}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return build_pair(tmp_path_factory.mktemp("built"), ROWS)


@pytest.fixture
def pair(built: tuple[Path, Path], tmp_path: Path) -> Iterator[tuple[SwarmDB, RawSwarm]]:
    ours, raw = (tmp_path / path.name for path in built)
    for source, target in zip(built, (ours, raw), strict=True):
        target.write_bytes(source.read_bytes())
    clock = Clock()
    clock.now = datetime.fromisoformat("2026-01-01T00:00:00.5+00:00")
    with SwarmDB(ours, clock=clock) as db, closing(RawSwarm(raw, clock=clock)) as floor:
        yield db, floor


def plain(result: Any) -> Any:
    """Return what both sides should agree on."""
    match result:
        case CheckReport():
            return list(result.integrity)
        case TaskSummary() | MetricBucket() | SwarmSummary():
            return rounded(asdict(result))
        case dict() if result.keys() & {"measured", "value", "figures"} and "metric_id" not in result:
            return rounded(result)
        case Record() | dict() if "agent_id" in result or "session_id" in result or "swarm_id" in result:
            row = {name: value for name, value in dict(result).items() if name != "event_id"}
            return {name: as_time(value) if name in TIMES else value for name, value in row.items()}
        case list():
            return [plain(item) for item in result]
        case datetime() | str():
            return as_time(result)
    return result


def rounded(value: Any) -> Any:
    """Return a summary without what a sum of floats leaves to the order of the rows."""
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    return float(f"{value:.12g}") if isinstance(value, float) else as_time(value)


def as_time(value: Any) -> Any:
    try:
        return decode_time(value) if isinstance(value, str) else value
    except ValueError:
        return value


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_both_sides_do_the_same_work(
    case: Case, pair: tuple[SwarmDB, RawSwarm], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "monotonic_ns", lambda: 0)  # Both sides measure how long a block takes.
    ours, raw = pair
    numbers = range(3 if case.calls > 1 else 1)
    for store in pair:
        if case.prepare is not None:
            case.prepare(store, numbers, ROWS)
    before = content(raw.path)
    for number in numbers:
        mine, other = case.call(ours, number, ROWS), case.call(raw, number, ROWS)
        if case.method not in OF_ITS_OWN:
            assert plain(mine) == plain(other)
            assert mine != []

    after = content(raw.path)
    assert content(ours.db_path) == after
    # Whether it is a write is what decides on which durability it is measured.
    assert (after != before) == (case.writes and case.method != "vacuum")


@pytest.fixture(scope="module")
def servers(postgres_server: Server) -> Iterator[tuple[SwarmDB, server.RawServer]]:
    urls = [server.fill(postgres_server.create_database(), ROWS, new_id) for _ in range(2)]
    with SwarmDB(url=urls[0]) as db, closing(server.RawServer(urls[1])) as floor:
        yield db, floor
    for url in urls:
        postgres_server.drop_database(url)


# Reading comes first, while both hold the same moments.
ON_SERVER = sorted((case for case in CASES if case.name in server.BARS), key=lambda case: case.writes)


@pytest.mark.parametrize("case", ON_SERVER, ids=lambda case: case.name)
def test_both_sides_do_the_same_work_on_a_server(case: Case, servers: tuple[SwarmDB, server.RawServer]) -> None:
    ours, raw = servers
    for number in range(3):
        mine, other = plain(case.call(ours, number, ROWS)), plain(case.call(raw, number, ROWS))
        if isinstance(mine, dict):
            mine, other = ({**row, "last_updated": None} for row in (mine, other))
        if case.method not in OF_ITS_OWN | {"store_task_metric"}:
            assert mine == other
    with ours.transaction() as one:
        counts = "SELECT count(*) FROM {}"
        for table in TABLES:
            count = counts.format(table)
            assert one.execute(count).fetchone()[0] == raw.raw.execute(count.encode()).fetchone()["count"]  # type: ignore[index]


def test_both_sides_copy_the_same(built: tuple[Path, Path], postgres_server: Server, tmp_path: Path) -> None:
    file, _ = built
    urls = [postgres_server.create_database() for _ in range(2)]
    back = [tmp_path / name for name in ("ours.db", "raw.db")]
    try:
        for url, there in zip(urls, (copying.by_swarmdb, copying.by_copy), strict=True):
            SwarmDB(url=url).close()
            there(file, url)
        for path, url, copied in zip(back, urls, (copying.by_swarmdb, copying.by_copy_back), strict=True):
            SwarmDB(path).close()
            copied(url, path)
    finally:
        for url in urls:
            postgres_server.drop_database(url)

    assert content(back[0]) == content(back[1]) == content(file)


def test_every_public_operation_is_measured() -> None:
    operations = {name for name, _ in inspect.getmembers(SwarmDB) if not name.startswith("_")}

    # db_path asks no database, closing is a part of what opening is measured with, and marks have no raw twin.
    assert operations - {case.method for case in CASES} == {"close", "db_path", "retention", "last_cleanup"}


def test_the_raw_side_has_the_same_settings(pair: tuple[SwarmDB, RawSwarm]) -> None:
    ours, raw = pair
    for name in ("journal_mode", "synchronous", "cache_size", "foreign_keys", "page_size", "busy_timeout"):
        with ours.transaction() as connection:
            assert connection.execute(f"PRAGMA {name}").fetchone()[0] == raw.raw.execute(f"PRAGMA {name}").fetchone()[0]


def test_the_ratio_is_the_median_of_the_rounds() -> None:
    took = {"ours": iter([9.0, 1.0, 4.0, 9.0]), "theirs": iter([1.0, 1.0, 2.0, 1.0])}
    found = compare("x", lambda: next(took["ours"]), lambda: next(took["theirs"]), rounds=3, calls=2, at_most=1.9)

    assert found.ratio == 2.0
    assert (found.ours_us, found.theirs_us) == (2e6, 0.5e6)  # The first pair is a warm-up.
    assert found.spread == (1.5, 5.5)
    assert not found.is_met


def test_tables_have_a_column_for_each_size_and_a_row_for_each_operation(tmp_path: Path) -> None:
    def measured(rows: int, ratio: float, against: str = "sqlite3") -> Measurement:
        return Measurement("get", against, rows, "", 1, 12.4, 10.0, ratio, (ratio, ratio), 1.8)

    found = [measured(10, 1.25), measured(2000, 1.5), measured(0, 1.07, "another library")]
    write_markdown(found, tmp_path / "table.md")
    write_json(found, tmp_path / "figures.json")

    assert (tmp_path / "table.md").read_text().splitlines() == [
        "| Operation | Durability | 10 rows | 2,000 rows | µs a call | At most |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
        "| get |  | 1.25 | 1.50 | 12 | 1.8 |",
        "",
        "| Operation | Against | Durability | Ratio | µs a call | µs a call there |",
        "| --- | --- | --- | ---: | ---: | ---: |",
        "| get | another library |  | **1.07** | 12 | 10 |",
    ]
    assert [figure["ratio"] for figure in json.loads((tmp_path / "figures.json").read_text())["measurements"]] == [
        1.25,
        1.5,
        1.07,
    ]


def test_the_command_measures_and_tells_by_its_status_whether_the_bars_were_met(tmp_path: Path) -> None:
    target = tmp_path / "figures.json"
    command = ["-m", "tests.benchmarks", "--rows", "500", "--rounds", "2", "--only", "get_agent", "--folder"]
    ran = subprocess.run(
        [sys.executable, *command, str(tmp_path), "--json", str(target)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )

    found = json.loads(target.read_text())["measurements"]
    assert [measurement["name"] for measurement in found] == ["get_agent", "get_agent_metrics, newest 100"]
    assert found[0]["ours_us"] > found[0]["theirs_us"] * 0.1 > 0
    assert ran.returncode == (0 if all(measurement["is_met"] for measurement in found) else 1), ran.stderr
    assert "get_agent" in ran.stdout
    assert list(tmp_path.iterdir()) == [target]
