"""The command that writes a table for other programs."""

import csv
import errno
import io
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from cli.running import Command, on_terminal
from conftest import url_of
from moai_flow.memory import SwarmDB
from moai_flow.memory.cli import exporting
from moai_flow.memory.models import TABLES, Record, table_of
from moai_flow.memory.types import JSONObjectText, JSONText, Plain

EXPORT = [sys.executable, "-m", "moai_flow.memory", "export"]
TABLE_NAMES = [str(model.__tablename__) for model in TABLES]
HOSTILE = [
    'line\nbreak, "quoted"\r\n',
    "=1+1",
    "@SUM(A1)",
    "+1",
    "-1",
    "\ttab",
    "\rreturn",
    "'",
    "\U0001f41d \u65e5\u672c \u2028\u0085\u00a0",
    " \x01\x7f\\ %s {} ",
    "null",
    "2025-11-30",
]
DEEP: list[Any] = []
for _ in range(150):
    DEEP = [DEEP]


def fill(db: SwarmDB) -> None:
    """Store what is hard to write down."""
    for number, text in enumerate(HOSTILE):
        metadata = {text: text, "big": 2**70 + number, "float": 0.1 + number, "none": None, "yes": True}
        db.insert_event(
            {"event_type": "spawn", "agent_id": text, "agent_type": f"{text}{number}", "metadata": metadata}
        )
        db.register_agent(text, text, metadata=metadata)
        db.store_memory(text, "semantic", text, text)
        db.store_task_metric(text, text, 2**62 + number, "success", tokens_used=number)
    for value in (None, -5, 1e22, "", "=1", 2**70, DEEP, {"a": [1, {"b": "c  d"}]}):
        db.store_memory("s", "context_hint", "k", value, ttl_hours=3)
    for figure in (0.1, 1e300, 5e-324, -1.0, 1 / 3, 2.0**53):
        db.store_agent_metric("a", "duration", figure)
        db.store_swarm_metric("s", "health", figure)
    with db.transaction() as connection:  # Words that the enums do not list.
        connection.execute("UPDATE agent_events SET event_type = '=of another \"program\"' WHERE id = 2")
        connection.execute("UPDATE agent_registry SET status = 'lost', spawn_time = 0.1 WHERE agent_id = '=1+1'")
        connection.execute("UPDATE session_memory SET memory_type = 'other' WHERE id = 2")
        connection.execute("UPDATE task_metrics SET result = '@lost', duration_ms = NULL WHERE agent_id = '=1+1'")


@pytest.fixture(params=["file", "postgresql"])
def place(request: pytest.FixtureRequest, path: Path) -> str:
    """The URL of an empty database of each kind that a command can open."""
    return url_of(request.param, path, request)


def rows_of(place: str, model: type[Record]) -> list[dict[str, Any]]:
    """Return a table's rows as a session reads them, by key, with times as text."""
    table = table_of(model)
    with SwarmDB(url=place) as db, db.session(readonly=True) as session:
        rows = [dict(row) for row in session.scalars(select(model).order_by(*table.primary_key.columns))]
    for row in rows:
        for column, value in row.items():
            if isinstance(value, datetime):
                row[column] = value.isoformat(timespec="microseconds")
    return rows


def lines(text: str) -> list[Any]:
    """Return the objects of JSON lines: their only line ends are those between them."""
    assert text == "" or text.endswith("\n")
    return [json.loads(line) for line in text.split("\n")[:-1]]


def exported(swarmdb: Command, *arguments: object) -> str:
    ran = swarmdb("export", *arguments)
    assert (ran.status, ran.err) == (0, "")
    return ran.out


@pytest.mark.parametrize("model", TABLES, ids=TABLE_NAMES)
def test_json_lines_hold_what_the_facade_reads(swarmdb: Command, place: str, model: type[Record]) -> None:
    with SwarmDB(url=place) as db:
        fill(db)
    read = lines(exported(swarmdb, model.__tablename__, "--db", place))

    assert read == rows_of(place, model) != []
    assert [list(row) for row in read] == [table_of(model).columns.keys()] * len(read)


@pytest.mark.parametrize("model", TABLES, ids=TABLE_NAMES)
def test_csv_holds_what_the_facade_reads(swarmdb: Command, place: str, model: type[Record]) -> None:
    with SwarmDB(url=place) as db:
        fill(db)
    text = exported(swarmdb, model.__tablename__, "--format", "csv", "--db", place)
    names, *rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    json_columns = {
        column.name for column in table_of(model).columns if isinstance(column.type, JSONObjectText | JSONText)
    }

    assert names == table_of(model).columns.keys()
    expected = rows_of(place, model)
    assert len(rows) == len(expected) > 0
    for cells, row in zip(rows, expected, strict=True):
        for name, cell in zip(names, cells, strict=True):
            if name in json_columns:
                assert json.loads(cell) == row[name]
                assert cell == json.dumps(row[name], ensure_ascii=False, separators=(",", ":")) or "1e" in cell
            else:
                assert cell == ("" if row[name] is None else str(row[name]))
    assert text.endswith("\r\n")
    assert exported(swarmdb, model.__tablename__, "--format", "csv", "--since", "2999-01-01", "--db", place) == (
        ",".join(names) + "\r\n"
    )


def test_formulas_are_escaped_in_text_alone(swarmdb: Command, place: str) -> None:
    with SwarmDB(url=place) as db:
        fill(db)
    for model in TABLES:
        command = ["export", model.__tablename__, "--format", "csv", "--db", place]
        plain, escaped = (
            list(csv.reader(io.StringIO(swarmdb(*command, *option).out, newline="")))
            for option in ([], ["--escape-formulas"])
        )
        texts = [
            hasattr(column.type, "vocabulary") or isinstance(column.type, Plain) for column in table_of(model).columns
        ]
        for row, changed in zip(plain, escaped, strict=True):
            assert changed == [
                f"'{cell}" if is_text and cell[:1] in {"=", "+", "-", "@", "\t", "\r"} else cell
                for cell, is_text in zip(row, texts, strict=True)
            ]
        assert (plain == escaped) == (model.__tablename__ in {"agent_metrics", "swarm_metrics", "schema_info"})


def test_a_zero_has_no_sign(swarmdb: Command, place: str) -> None:
    with SwarmDB(url=place) as db:
        db.store_agent_metric("a", "duration", -0.0)

    assert '"value":0.0,' in exported(swarmdb, "agent_metrics", "--db", place)
    assert ",duration,0.0," in exported(swarmdb, "agent_metrics", "--format", "csv", "--db", place)


def execute(path: Path, statement: str, *values: object) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(statement, values)


@pytest.mark.parametrize(
    ("stored", "written"),
    [
        (
            '{ "a" :\n[1.10, 1e400,\t123456789012345678901234567890] }',
            '{"a":[1.10,1e400,123456789012345678901234567890]}',
        ),
        ('{"NaN": NaN, "-Infinity \\" NaN": [Infinity, -Infinity]}', '{"NaN":null,"-Infinity \\" NaN":[null,null]}'),
        ('{"a":[NaN,-Infinity],"b":"NI"}', '{"a":[null,null],"b":"NI"}'),
        *((f'{{"a":{number},"b":"NI"}}', '{"a":null,"b":"NI"}') for number in ("NaN", "Infinity", "-Infinity")),
        ('{"a": "\\ud800 \\u0000 \\\\"}', '{"a":"\\ud800 \\u0000 \\\\"}'),
        (None, "{}"),
    ],
)
def test_json_of_other_programs_is_kept_to_the_letter(
    stored: str | None, written: str, swarmdb: Command, store: Path
) -> None:
    execute(store, "UPDATE agent_events SET metadata = ? WHERE id = 2", stored)
    out = exported(swarmdb, "agent_events", "--db", store)
    table = exported(swarmdb, "agent_events", "--format", "csv", "--db", store)

    assert f'"metadata":{written},"created_at"' in out.split("\n")[1]
    assert list(csv.reader(io.StringIO(table, newline="")))[2][-2] == written


def test_what_raw_sql_left_out_reads_as_it_does_elsewhere(swarmdb: Command, store: Path) -> None:
    execute(store, "UPDATE task_metrics SET tokens_used = NULL, duration_ms = NULL")
    execute(store, "UPDATE session_memory SET value = NULL")
    execute(store, "INSERT INTO agent_metrics (agent_id, metric_type, value) VALUES ('a', 'duration', 9e999)")
    (task,) = lines(exported(swarmdb, "task_metrics", "--db", store))
    (metric,) = lines(exported(swarmdb, "agent_metrics", "--db", store))

    assert (task["tokens_used"], task["duration_ms"], metric["value"]) == (0, None, None)
    assert {row["value"] for row in lines(exported(swarmdb, "session_memory", "--db", store))} == {None}
    assert ",context_hint,tone,,20" in exported(swarmdb, "session_memory", "--format", "csv", "--db", store)
    (cells,) = csv.DictReader(io.StringIO(exported(swarmdb, "task_metrics", "--format", "csv", "--db", store)))
    assert (cells["tokens_used"], cells["duration_ms"]) == ("0", "")


@pytest.mark.parametrize(
    ("options", "days"),
    [
        (["--since", "2025-11-02T12:00:00Z"], [2, 3]),
        (["--until", "2025-11-02T12:00:00Z"], [1]),
        (["--since", "2025-11-02T21:00:00+09:00", "--until", "2025-11-02T12:00:00.000001Z"], [2]),
        (["--since", "2025-11-04"], []),
    ],
    ids=str,
)
def test_events_of_a_period(
    options: list[str], days: list[int], swarmdb: Command, store: Path, postgres_url: str
) -> None:
    assert swarmdb("copy", store, postgres_url).status == 0
    for place in (store, postgres_url):
        found = lines(exported(swarmdb, "agent_events", *options, "--db", place))
        assert [event["metadata"]["day"] for event in found] == days


@pytest.mark.parametrize("model", TABLES, ids=TABLE_NAMES)
def test_every_table_knows_when_its_rows_were_written(swarmdb: Command, place: str, model: type[Record]) -> None:
    with SwarmDB(url=place) as db:
        fill(db)
    rows = rows_of(place, model)
    time = next(name for name in ("timestamp", "last_updated", "updated_at") if name in rows[0])
    moments = sorted({row[time] for row in rows})
    middle = moments[len(moments) // 2]

    since = lines(exported(swarmdb, model.__tablename__, "--since", middle, "--db", place))
    until = lines(exported(swarmdb, model.__tablename__, "--until", middle, "--db", place))
    assert since == [row for row in rows if row[time] >= middle] != []
    assert until == [row for row in rows if row[time] < middle]


def test_a_file_is_written_whole_and_said_to_be(swarmdb: Command, store: Path, tmp_path: Path) -> None:
    for options in (["--output", "events.jsonl"], ["-o", "events.jsonl", "--overwrite"]):
        assert exported(swarmdb, "agent_events", *options, "--db", store) == f"3 rows in {tmp_path}/events.jsonl\n"
    assert Path("events.jsonl").read_text() == exported(swarmdb, "agent_events", "--db", store)
    umask = os.umask(0)
    os.umask(umask)
    assert Path("events.jsonl").stat().st_mode & 0o777 == 0o666 & ~umask
    assert sorted(file.name for file in tmp_path.iterdir()) == ["events.jsonl", "swarm.db"]


def test_one_row_is_not_many_and_none_is_said_in_words(swarmdb: Command, store: Path, tmp_path: Path) -> None:
    for table, said in (("task_metrics", "1 row"), ("swarm_metrics", "no rows")):
        assert (
            exported(swarmdb, table, "-o", f"{table}.jsonl", "--db", store) == f"{said} in {tmp_path}/{table}.jsonl\n"
        )


def test_who_reads_the_file_that_is_replaced_reads_all_of_it(swarmdb: Command, store: Path) -> None:
    Path("events").write_text("older")
    with Path("events").open() as reader:
        exported(swarmdb, "agent_events", "-o", "events", "--overwrite", "--db", store)

        assert reader.read() == "older"
    assert len(lines(Path("events").read_text())) == 3


def test_a_link_is_followed(swarmdb: Command, store: Path) -> None:
    Path("link").symlink_to("events.jsonl")
    exported(swarmdb, "agent_events", "-o", "link", "--db", store)
    exported(swarmdb, "agent_events", "-o", "link", "--overwrite", "--db", store)

    assert Path("link").is_symlink()
    assert len(lines(Path("events.jsonl").read_text())) == 3


@pytest.mark.parametrize("output", ["swarm.db", "swarm.db-wal", "link.db"])
def test_a_database_that_is_opened_by_a_link_is_not_written_over(output: str, swarmdb: Command, store: Path) -> None:
    Path("link.db").symlink_to(store)
    before = store.read_bytes()
    ran = swarmdb("export", "agent_events", "-o", output, "--overwrite", "--db", "link.db")

    assert (ran.status, ran.out) == (1, "")
    assert "not the database itself" in ran.err
    assert store.read_bytes() == before


def test_the_rows_are_flushed_before_the_file_gets_its_name(
    swarmdb: Command, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[tuple[int, bool]] = []
    fsync = os.fsync

    def note(descriptor: int) -> None:
        fsync(descriptor)
        flushed.append((os.fstat(descriptor).st_size, (tmp_path / "events").exists()))

    monkeypatch.setattr(os, "fsync", note)
    exported(swarmdb, "agent_events", "-o", "events", "--db", store)

    assert flushed[0] == (Path("events").stat().st_size, False)
    assert [is_named for _, is_named in flushed[1:]] == [True]  # Then the folder, with the name.


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["-o", "there.jsonl"], "there.jsonl exists; --overwrite replaces it"),
        (["-o", "nowhere/events.jsonl"], "nowhere/events.jsonl: it can't be written: No such file or directory"),
        (["-o", "there.jsonl/events.jsonl"], "it can't be written: Not a directory"),
        (["-o", ".", "--overwrite"], "not of a folder"),
        (["-o", "pipe", "--overwrite"], "expected the path of a file"),
        (["-o", "swarm.db", "--overwrite"], "not the database itself"),
        (["-o", "swarm.db-wal", "--overwrite"], "not the database itself"),
        (["-o", "swarm.db-shm"], "not the database itself"),
        (["-o", "swarm.db-journal"], "not the database itself"),
        (["-o", "loop", "--overwrite"], "loop: "),
        (["-o", ""], "the path of a file"),
        (["-o", "x" * 300], "name too long"),
        (["--since", "yesterday"], "since: got 'yesterday'"),
        (["--until", "2025-13-01"], "until: got '2025-13-01'"),
    ],
    ids=str,
)
def test_what_can_not_be_done_is_said_in_one_line_and_leaves_nothing(
    options: list[str], said: str, swarmdb: Command, store: Path, tmp_path: Path
) -> None:
    Path("there.jsonl").write_text("mine")
    Path("loop").symlink_to("loop")
    os.mkfifo("pipe")
    before = store.read_bytes()
    ran = swarmdb("export", "agent_events", *options, "--db", store)

    assert (ran.status, ran.out) == (1, "")
    assert ran.err.startswith("swarmdb: ")
    assert said.casefold() in ran.err.casefold()
    assert ran.err.count("\n") == 1
    assert Path("there.jsonl").read_text() == "mine"
    assert store.read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["loop", "pipe", "swarm.db", "there.jsonl"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes into any folder")
def test_a_folder_that_may_not_be_written_is_said_to_be_one(swarmdb: Command, store: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir(mode=0o500)
    ran = swarmdb("export", "agent_events", "-o", folder / "events.jsonl", "--db", store)

    assert (ran.status, ran.out) == (1, "")
    assert "Permission denied" in ran.err
    assert ran.err.count("\n") == 1
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "TABLE"),
        (["agents"], "agent_events, agent_registry, session_memory, task_metrics, agent_metrics, swarm_metrics"),
        (["agent_events", "--format", "xml"], "'jsonl', 'csv'"),
        (["agent_events", "--escape-formulas"], "--format csv"),
        (["agent_events", "--overwrite"], "--output"),
    ],
    ids=str,
)
def test_wrong_usage_ends_with_2(arguments: list[str], said: str, swarmdb: Command, store: Path) -> None:
    ran = swarmdb("export", *arguments, "--db", store)

    assert (ran.status, ran.out) == (2, "")
    assert said in re.sub(r"[\s\u2502|]+", " ", ran.err)


def test_the_shell_completes_tables(swarmdb: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    words = {"_SWARMDB_COMPLETE": "complete_bash", "COMP_WORDS": "swarmdb export agent_", "COMP_CWORD": "2"}
    for name, value in words.items():
        monkeypatch.setenv(name, value)

    assert swarmdb().out.split() == ["agent_events", "agent_registry", "agent_metrics"]


def test_no_database_is_made(swarmdb: Command, tmp_path: Path) -> None:
    ran = swarmdb("export", "agent_events", "--db", "nowhere.db", "-o", "events.jsonl")

    assert (ran.status, ran.out) == (1, "")
    assert ran.err.startswith("swarmdb: no database at ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "fault", ["metadata = '{'", "agent_id = CAST(x'ff' AS TEXT)", "timestamp = 'once'", "agent_type = x'00'"]
)
@pytest.mark.parametrize("format_", ["jsonl", "csv"])
def test_a_row_that_can_not_be_read_ends_it_and_leaves_no_file(
    fault: str, format_: str, swarmdb: Command, store: Path, tmp_path: Path
) -> None:
    execute(store, f"UPDATE agent_events SET {fault} WHERE id = 2")
    for options in ([], ["-o", "events"]):
        ran = swarmdb("export", "agent_events", "--format", format_, *options, "--db", store)

        assert ran.status == 1
        assert ran.err.startswith(f"swarmdb: agent_events.{fault.partition(' ')[0]} of the row with id=2: ")
        assert "swarmdb check --quarantine" in ran.err
        assert ran.err.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["swarm.db"]


def test_a_time_that_no_datetime_holds_ends_it_on_a_server(swarmdb: Command, store: Path, postgres_url: str) -> None:
    assert swarmdb("copy", store, postgres_url).status == 0
    with SwarmDB(url=postgres_url) as db, db.transaction() as connection:
        connection.execute("UPDATE agent_events SET timestamp = 'infinity' WHERE id = 3")
    ran = swarmdb("export", "agent_events", "-o", "events", "--db", postgres_url)

    assert (ran.status, ran.out) == (1, "")
    assert ran.err.startswith("swarmdb: agent_events.timestamp of the row with id=3: ")
    assert not Path("events").exists()


def then(act: Callable[[], None]) -> Callable[..., bytes]:
    """Return an encoder that does something else first."""
    usual = exporting.Lines.encode

    def encode(*arguments: Any) -> bytes:
        act()
        return usual(*arguments)

    return encode


def test_an_interrupt_leaves_no_file(
    swarmdb: Command, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    present: list[str] = []

    def interrupt() -> None:
        present.extend(file.name for file in tmp_path.iterdir() if file.suffix == ".tmp")
        raise KeyboardInterrupt

    monkeypatch.setattr(exporting.Lines, "encode", then(interrupt))
    ran = swarmdb("export", "agent_events", "-o", "events", "--db", store)

    assert (ran.status, ran.out, ran.err) == (130, "", "")
    assert len(present) == 1
    assert not list(tmp_path.glob("events*"))


def test_a_full_disk_leaves_no_file(
    swarmdb: Command, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill_disk() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(exporting.Lines, "encode", then(fill_disk))
    ran = swarmdb("export", "agent_events", "-o", "events", "--db", store)

    assert (ran.status, ran.out) == (1, "")
    assert ran.err == f"swarmdb: {tmp_path}/events: it can't be written: No space left on device\n"
    assert not list(tmp_path.glob("events*"))


def test_a_file_that_somebody_makes_meanwhile_is_theirs(
    swarmdb: Command, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting.Lines, "encode", then(lambda: (tmp_path / "events").touch()))
    ran = swarmdb("export", "agent_events", "-o", "events", "--db", store)

    assert (ran.status, ran.out) == (1, "")
    assert "exists; --overwrite replaces it" in ran.err
    assert (tmp_path / "events").read_bytes() == b""
    assert len(list(tmp_path.glob("events*"))) == 1


def test_what_others_write_meanwhile_is_not_in_it(
    swarmdb: Command, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with SwarmDB(url=place) as db:
        db.insert_events([{"event_type": "spawn", "agent_id": "a", "agent_type": "t"}] * 1200)

    def write() -> None:
        with SwarmDB(url=place) as db:
            db.insert_event({"event_type": "error", "agent_id": "b", "agent_type": "t"})
            db.cleanup_old_events(0)

    monkeypatch.setattr(exporting.Lines, "encode", then(write))
    assert [row["id"] for row in lines(exported(swarmdb, "agent_events", "--db", place))] == list(range(1, 1201))


# As a process of its own


@pytest.fixture
def many(place: str) -> str:
    """A database with more events than a pipe holds."""
    with SwarmDB(url=place) as db:
        db.insert_events([{"event_type": "spawn", "agent_id": "a", "agent_type": "t"}] * 5000)
    return place


@pytest.mark.parametrize("format_", ["jsonl", "csv"])
def test_a_reader_that_closes_the_pipe_sees_no_traceback(many: str, format_: str) -> None:
    command = [*EXPORT, "agent_events", "--format", format_, "--db", many]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as ran:
        assert ran.stdout is not None
        assert ran.stdout.readline()
        ran.stdout.close()
        assert ran.stderr is not None
        err = ran.stderr.read()

    assert (ran.returncode, err) == (1, b"")


def test_an_interrupt_ends_it_with_130(many: str) -> None:
    with subprocess.Popen(
        [*EXPORT, "agent_events", "--db", many], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as ran:
        assert ran.stdout is not None
        assert ran.stdout.read(1) == b"{"  # It stands at a full pipe, or soon will.
        ran.send_signal(signal.SIGINT)
        _, err = ran.communicate()

    assert (ran.returncode, err) == (130, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_standard_output_that_is_full_is_said_to_be(many: str) -> None:
    with Path("/dev/full").open("wb") as full:
        ran = subprocess.run([*EXPORT, "schema_info", "--db", many], stdout=full, stderr=subprocess.PIPE, check=False)

    assert ran.returncode == 1
    assert ran.stderr == b"swarmdb: [Errno 28] No space left on device\n"


def test_a_closed_standard_output_is_no_failure(many: str) -> None:
    command = 'exec "$@" >&-'
    arguments = ["sh", "-c", command, "sh", *EXPORT, "agent_events", "--db", many]
    ran = subprocess.run(arguments, stderr=subprocess.PIPE, check=False)

    assert (ran.returncode, ran.stderr) == (0, b"")


def test_the_encoding_is_utf_8_whatever_the_terminal_has(path: Path) -> None:
    with SwarmDB(path) as db:
        db.store_memory("s", "semantic", "k", "ol\u00e1 \U0001f41d")
    for form in ("jsonl", "csv"):
        command = [*EXPORT, "session_memory", "--format", form, "--db", path]
        ran = subprocess.run(
            command, capture_output=True, check=True, env={**os.environ, "PYTHONIOENCODING": "latin-1"}
        )

        assert "ol\u00e1 \U0001f41d".encode() in ran.stdout


PEAK = """
import sys
from moai_flow.memory.__main__ import main
try:
    main()
finally:
    with open("/proc/self/status") as status:
        sys.stderr.write(next(line.split()[1] for line in status if line.startswith("VmHWM")))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells the peak of one program")
@pytest.mark.parametrize("options", [[], ["--format", "csv"], ["--since", "2000-01-01"]], ids=str)
def test_the_rows_are_not_held(place: str, options: list[str]) -> None:
    rows, size = 20_000, 4000
    with SwarmDB(url=place) as db:
        db.insert_events(
            [{"event_type": "spawn", "agent_id": "a", "agent_type": "t", "metadata": {"text": "x" * size}}] * rows
        )

    def peak(table: str) -> int:
        command = [sys.executable, "-c", PEAK, "export", table, *options, "--db", place]
        ran = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=True)
        return int(ran.stderr) * 1024

    assert peak("agent_events") - peak("schema_info") < rows * size / 2


COLOUR = re.compile(rb"\x1b\[[0-9;]*3[0-9]")


def test_a_terminal_shows_progress_beside_what_is_written_elsewhere(store: Path, tmp_path: Path) -> None:
    command = [*EXPORT, "agent_events", "--db", str(store)]
    shown, answer = on_terminal(command, tmp_path)

    assert b"export agent_events" in shown
    assert b"3/3" in shown
    assert COLOUR.search(shown)
    assert len(lines(answer.decode())) == 3

    shown, _ = on_terminal([*command, "-o", "events", "--since", "2025-11-02"], tmp_path, is_all=True)
    assert b"2/2" in shown
    assert f"2 rows in {tmp_path}/events".encode() in shown


def test_progress_has_no_colour_where_none_is_wanted(store: Path, tmp_path: Path) -> None:
    command = [*EXPORT, "agent_events", "--db", str(store)]
    shown, _ = on_terminal(command, tmp_path, NO_COLOR="1")

    assert b"3/3" in shown
    assert not COLOUR.search(shown)


def test_rows_on_the_terminal_are_not_written_over(store: Path, tmp_path: Path) -> None:
    shown, _ = on_terminal([*EXPORT, "agent_events", "--db", str(store)], tmp_path, is_all=True)

    assert len(lines(shown.decode().replace("\r\n", "\n"))) == 3


def test_without_a_terminal_there_is_no_progress(store: Path) -> None:
    ran = subprocess.run([*EXPORT, "agent_events", "--db", store], capture_output=True, check=True)

    assert ran.stderr == b""
