"""The commands: what they take, which call of the facade answers, and what they print."""

import io
import math
import sqlite3
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from importlib import metadata
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any, TypeVar
from uuid import uuid4

import typer
from sqlalchemy import func, inspect, type_coerce
from sqlmodel import Session as DatabaseSession
from sqlmodel import col, select

from moai_flow.memory import (
    AgentEvent,
    AgentStatus,
    CheckReport,
    CorruptDataError,
    EventType,
    InvalidInputError,
    MemoryType,
    RegisteredAgent,
    SessionMemory,
    StorageError,
    SwarmDB,
    SwarmDBError,
    inputs,
)
from moai_flow.memory.backends import is_damage, translating
from moai_flow.memory.cli import copying, exporting, figures, following, show
from moai_flow.memory.cli import top as screen
from moai_flow.memory.cli.demo import report, watch
from moai_flow.memory.cli.failures import in_one_line
from moai_flow.memory.cli.swarm import Plan, files_of
from moai_flow.memory.engine import Location, Settings, check_file_of_log, create, locate, log_bytes
from moai_flow.memory.enums import Vocabulary
from moai_flow.memory.files import belong_together
from moai_flow.memory.migrations import VERSION, found_version, server_ddl
from moai_flow.memory.models import TABLES
from moai_flow.memory.operations.maintenance import ADVICE_DAMAGE
from moai_flow.memory.restoring import restore_backup
from moai_flow.memory.transfer import BATCH_SIZE
from moai_flow.memory.types import AsStored, decode_json, decode_time

V = TypeVar("V", bound=Vocabulary)

#: How long a command waits for another writer, in seconds. Somebody sits in front of it.
BUSY_TIMEOUT = 5.0

_ABSENT = object()

_TABLES = {str(model.__tablename__): model for model in TABLES}

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)

Database = Annotated[
    str | None,
    typer.Option(
        "--db",
        metavar="FILE",
        help="The database, a file or an SQLite URL. Default: SWARMDB_URL, MOAI_DB_PATH, or .moai/memory/swarm.db.",
    ),
]
AsJSON = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else.")]
Session = Annotated[str, typer.Argument(metavar="SESSION", help="The session.")]
Kind = Annotated[
    str,
    typer.Argument(
        metavar="TYPE",
        help=f"Which kind of memory: {', '.join(MemoryType)}.",
        autocompletion=lambda: [word.value for word in MemoryType],
    ),
]
Key = Annotated[str, typer.Argument(metavar="KEY", help="Its name within session and type.")]


def _one_of(vocabulary: type[Vocabulary], option: str, text: str) -> Any:
    """Return an option for a word of a vocabulary, which the shell completes."""
    return typer.Option(
        option,
        metavar="WORD",
        help=f"{text}: {', '.join(vocabulary)}.",
        autocompletion=lambda: [word.value for word in vocabulary],
    )


def run() -> None:
    """Run the command. What can't be done ends it with one line and exit status 1."""
    # A terminal may not know a letter that a row holds: then it shows the letter's code.
    if isinstance(sys.stdout, io.TextIOWrapper):  # It is None where the shell has closed it.
        sys.stdout.reconfigure(errors="backslashreplace")
    with in_one_line():
        app(prog_name="swarmdb")


# Options that many commands share


def _locate(db: str | None) -> Location:
    location = locate(None, db) if db is not None and "://" in db else locate(db, None)
    if location.is_in_memory:
        raise InvalidInputError("db", str(location), "a database that is there after the command has ended")
    return location


@contextmanager
def _opened(db: str | None, *, create_missing: bool = False) -> Iterator[SwarmDB]:
    """Open the database that the user means. One that does not exist is only made where it is to be written."""
    location = _locate(db)
    if not create_missing:
        _check_exists(location)
    with SwarmDB(url=location.url, busy_timeout=BUSY_TIMEOUT) as store, translating(str(location)):
        yield store


def _check_exists(location: Location) -> None:
    check_file_of_log(location)
    if location.path is not None and not location.path.exists():
        raise StorageError(f"no database at {location}")
    # Opening a database of another program would add our tables to it.
    with translating(str(location)):
        tables = inspect(create(location, Settings(busy_timeout=BUSY_TIMEOUT))).get_table_names()
    if not _TABLES.keys() & tables:
        raise StorageError(f"no database at {location}: it has none of SwarmDB's tables")


def _recognised(db: SwarmDB, vocabulary: type[V], word: str, column: Any, parameter: str) -> V:
    """Return the member to look for. A word that is not listed is one if a row has it, as rows of older programs may.

    Raises:
        BadParameter: If it is neither.
    """
    member = vocabulary.read(word)
    if not member.is_listed:
        with db.session(readonly=True) as session:
            if session.exec(select(column).where(column == member).limit(1)).first() is None:
                raise typer.BadParameter(f"{word!r} is none of {', '.join(vocabulary)}.", param_hint=f"'{parameter}'")
    return member


def _recognised_filter(db: SwarmDB, vocabulary: type[V], word: str | None, column: Any, parameter: str) -> V | None:
    return None if word is None else _recognised(db, vocabulary, word, column, parameter)


def _show_version(wanted: bool) -> None:  # noqa: FBT001 (typer passes it by position)
    if wanted:
        try:
            installed = metadata.version("moai-flow-memory")
        except metadata.PackageNotFoundError:  # It runs from a checkout.
            installed = "(not installed)"
        show.line(f"swarmdb {installed}, schema {VERSION}, SQLite {sqlite3.sqlite_version}")
        raise typer.Exit


@app.callback()
def swarmdb(
    *,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """What a swarm of agents remembers: its events, its registry, its memory and its metrics."""


@app.command()
def demo(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", readable=False, help="The folder whose files the agents read.")
    ] = Path(),
    *,
    db: Annotated[
        str | None,
        typer.Option("--db", metavar="FILE", help="The database. Default: a fresh .moai/demo-<time>.db."),
    ] = None,
    processes: Annotated[int, typer.Option(min=1, max=16, help="How many processes work.")] = 2,
    threads: Annotated[int, typer.Option(min=1, max=16, help="How many agents each process runs.")] = 4,
) -> None:
    """Watch a real swarm: agents in several processes read a folder's files, and count what is in them."""
    if not folder.is_dir():
        raise InvalidInputError("folder", str(folder), "a folder that exists")
    location = _locate(f".moai/demo-{datetime.now().astimezone():%Y%m%d-%H%M%S-%f}.db" if db is None else db)
    started = perf_counter()
    with SwarmDB(url=location.url) as store, translating(str(location)):
        files = files_of(folder, database=location.path)
        plan = Plan(f"demo-{uuid4().hex[:8]}", location.url, folder.absolute(), files, processes, threads)
        agents = show.counted(len(plan.agents), "agent", "agents")
        show.line(f"{agents} in {show.counted(processes, 'process', 'processes')}")
        show.line(f"{show.counted(len(files), 'file', 'files')} in {plan.folder}")
        try:
            watch(store, plan)
        except KeyboardInterrupt:
            typer.echo(f"swarmdb: interrupted; what was found until then is in {location}", err=True)
            raise
        has_completed = report(store, plan)
    show.line(f"It took {perf_counter() - started:.1f} seconds. All of this is in the database:")
    show.line(f"  {location}")
    show.line("Look further, with --db and this path:")
    for command in ("events", f"agents {plan.agents[0]}", f"memory list {plan.run}"):
        show.line(f"  swarmdb {command}")
    if not has_completed:
        raise StorageError("not every agent completed; the errors above say why")


@app.command()
def status(*, db: Database = None, as_json: AsJSON = False) -> None:
    """Show what a database holds, and how large it is."""
    with _opened(db) as store, store.session(readonly=True) as session:
        rows = {name: session.exec(select(func.count()).select_from(model)).one() for name, model in _TABLES.items()}
        by_status = select(RegisteredAgent.status, func.count()).group_by(col(RegisteredAgent.status))
        agents = dict(session.exec(by_status).all())
        # As text: one time that can't be decoded hides nothing here. It is for check to complain.
        event_time = type_coerce(col(AgentEvent.timestamp), AsStored)
        about: dict[str, Any] = {
            "path": str(_locate(db)),
            "schema_version": store.schema_version,
            "size_bytes": store.size_bytes(),
            "wal_bytes": log_bytes(_locate(db)),
            **_software(session),
            "oldest_event": _moment(session.exec(select(func.min(event_time))).one()),
            "newest_event": _moment(session.exec(select(func.max(event_time))).one()),
            "retention": _retention(store),
            "last_cleanup": store.last_cleanup,
        }
    if as_json:
        show.as_json({**about, "rows": rows, "agents": agents})
        return
    kept = about["retention"]
    if isinstance(kept, dict):
        about["retention"] = "; ".join(f"{name.replace('_', ' ')}: {_age(days)}" for name, days in kept.items())
    show.facts({name.replace("_", " "): value for name, value in about.items()})
    show.table("Rows", [show.text("table"), show.number("rows")], rows.items())
    show.table("Agents", [show.text("status"), show.number("agents")], sorted(agents.items()))


def _age(days: float | None) -> str:
    return "for ever" if days is None else f"{days:g} days"


def _retention(store: SwarmDB) -> Any:
    """Return how many days each kind of row is kept before it is removed by itself."""
    try:
        policy = store.retention
    except CorruptDataError as error:
        return error.reason
    if policy.is_off:
        return "off: nothing is removed by itself"
    return {name: None if age is None else age / timedelta(days=1) for name, age in vars(policy).items()}


def _software(session: DatabaseSession) -> dict[str, str]:
    if session.connection().dialect.name == "postgresql":
        return {"postgresql_version": str(session.connection().exec_driver_sql("SHOW server_version").scalar_one())}
    return {"sqlite_version": sqlite3.sqlite_version}


def _moment(stored: Any) -> Any:
    if isinstance(stored, datetime):
        return stored.astimezone(UTC)
    try:
        return decode_time(stored)
    except (ValueError, TypeError):
        return stored


@app.command()
def agents(
    agent_id: Annotated[str | None, typer.Argument(metavar="AGENT_ID", help="Show this agent only.")] = None,
    *,
    status: Annotated[
        str | None,
        _one_of(AgentStatus, "--status", "Only agents in this state"),
    ] = None,
    agent_type: Annotated[str | None, typer.Option("--type", help="Only agents of this type.")] = None,
    db: Database = None,
    as_json: AsJSON = False,
) -> None:
    """List the registry's agents, newest spawn first, or show one."""
    if agent_id is not None and (status is not None or agent_type is not None):
        raise typer.BadParameter("one agent is shown whatever its state and type.", param_hint="AGENT_ID")
    with _opened(db) as store:
        if agent_id is not None:
            _show_agent(store, agent_id, as_json=as_json)
            return
        state = _recognised_filter(store, AgentStatus, status, col(RegisteredAgent.status), "--status")
        found = store.list_agents(state, agent_type)
    if as_json:
        show.as_json(found)
        return
    show.table(
        "Agents",
        [show.name("agent"), show.name("status"), show.time("spawned (UTC)"), show.number("ms")],
        (((agent.agent_id, agent.agent_type), agent.status, agent.spawned_at, agent.duration_ms) for agent in found),
    )


def _show_agent(store: SwarmDB, agent_id: str, *, as_json: bool) -> None:
    agent = store.get_agent(agent_id)
    if agent is None:
        raise SwarmDBError(f"no agent is registered as {agent_id!r}")
    if as_json:
        show.as_json(agent)
    else:
        times = {"spawn_time": agent.spawned_at, "complete_time": agent.completed_at}
        show.facts({name.replace("_", " "): value for name, value in {**dict(agent), **times}.items()})


@app.command()
def events(
    *,
    agent: Annotated[str | None, typer.Option(help="Only events of this agent.")] = None,
    event_type: Annotated[
        str | None,
        _one_of(EventType, "--type", "Only events of this type"),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(help="How many at most: 100, or with --follow 10 to begin with.", show_default=False),
    ] = None,
    since: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Only events at or after this time, in ISO-8601."),
    ] = None,
    until: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Only events before this time, in ISO-8601. Not with --follow."),
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Print the newest, oldest first, and then each new one as it comes.")
    ] = False,
    db: Database = None,
    as_json: AsJSON = False,
) -> None:
    """List events, newest first. A time without a zone is local time."""
    if follow and until is not None:
        raise typer.BadParameter("what is followed has no end; ctrl-C ends it.", param_hint="--until")
    with _opened(db) as store:
        kind = _recognised_filter(store, EventType, event_type, col(AgentEvent.event_type), "--type")
        if follow:
            following.follow(store, agent, kind, 10 if limit is None else limit, since, as_json=as_json)
            return
        found = store.get_events(agent, kind, 100 if limit is None else limit, since=since, until=until)
    if as_json:
        show.as_json(found)
        return
    show.table(
        "Events",
        [show.time("time (UTC)"), show.name("event"), show.name("agent"), show.text("metadata")],
        (
            (event.timestamp, event.event_type, (event.agent_id, event.agent_type), show.brief(event.metadata_))
            for event in found
        ),
    )


@app.command()
def metrics(
    *,
    agent: Annotated[str | None, typer.Option(metavar="ID", help="Only metrics of this agent.")] = None,
    swarm: Annotated[str | None, typer.Option(metavar="ID", help="The figures of this swarm as well.")] = None,
    since: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Only metrics at or after this time, in ISO-8601."),
    ] = None,
    until: Annotated[
        str | None, typer.Option(metavar="TIME", help="Only metrics before this time, in ISO-8601.")
    ] = None,
    last: Annotated[
        str | None,
        typer.Option(metavar="DURATION", help="Only metrics since so long ago: 30m, 1h or 7d. Not with --since."),
    ] = None,
    by: Annotated[figures.By, typer.Option(help="By which column agents are put in order.")] = figures.By.TASKS,
    limit: Annotated[int, typer.Option(min=0, help="How many agents at most.")] = 20,
    db: Database = None,
    as_json: AsJSON = False,
) -> None:
    """Show what the metrics come to: of all tasks, of each agent, of a swarm. A time without a zone is local time."""
    if last is not None and since is not None:
        raise typer.BadParameter("it says since when, as --since does.", param_hint="--last")
    begin = since if last is None else figures.ago(last, datetime.now(UTC))
    with _opened(db) as store:
        figures.metrics(store, agent=agent, swarm=swarm, since=begin, until=until, by=by, limit=limit, as_json=as_json)


@app.command()
def top(
    *,
    interval: Annotated[
        float, typer.Option(metavar="SECONDS", min=0.1, max=3600, help="How long it waits between two looks.")
    ] = 2,
    once: Annotated[bool, typer.Option("--once", help="Print one look, and end.")] = False,
    limit: Annotated[
        int | None, typer.Option(min=1, help="How many agents at most. Default: as many as fit.", show_default=False)
    ] = None,
    stale_after: Annotated[
        int,
        typer.Option(metavar="SECONDS", min=1, max=10**9, help="For how long a stale agent has not been heard of."),
    ] = 60,
    db: Database = None,
) -> None:
    """Watch a swarm at work, what needs attention first, until ctrl-C. Without a terminal it looks once."""
    if math.isnan(interval):  # Older versions of Typer find it to be within the bounds.
        raise typer.BadParameter("it is no number.", param_hint="--interval")
    silence = timedelta(seconds=stale_after)
    with _opened(db) as store:
        place = str(_locate(db))
        if once or not screen.is_live():
            screen.once(store, place, limit, silence)
        else:
            screen.watch(store, place, limit, silence, interval)


memory = typer.Typer(no_args_is_help=True)
app.add_typer(memory, name="memory", help="Read and write what sessions remember.")


@memory.command("list")
def list_memories(
    session_id: Session,
    *,
    memory_type: Annotated[
        str | None,
        _one_of(MemoryType, "--type", "Only this kind of memory"),
    ] = None,
    prefix: Annotated[str | None, typer.Option(help="Only keys that begin with this.")] = None,
    db: Database = None,
    as_json: AsJSON = False,
) -> None:
    """List what a session remembers, by type and key."""
    with _opened(db) as store:
        kind = _recognised_filter(store, MemoryType, memory_type, col(SessionMemory.memory_type), "--type")
        found = store.list_memories(session_id, kind, prefix)
    if as_json:
        show.as_json(found)
        return
    show.table(
        "Memory",
        [show.name("type"), show.text("key"), show.text("value"), show.time("expires (UTC)")],
        ((entry.memory_type, entry.key, show.brief(entry.value), entry.expires_at) for entry in found),
    )


@memory.command("get")
def get_memory(
    session_id: Session, memory_type: Kind, key: Key, *, db: Database = None, as_json: AsJSON = False
) -> None:
    """Print the value of a key: text as it is, everything else as JSON. With --json, text is JSON too."""
    with _opened(db) as store:
        kind = _recognised(store, MemoryType, memory_type, col(SessionMemory.memory_type), "TYPE")
        value = store.get_memory(session_id, kind, key, default=_ABSENT)
    if value is _ABSENT:
        raise _no_memory(session_id, memory_type, key)
    if isinstance(value, str) and not as_json:
        typer.echo(value)
    else:
        show.as_json(value)


@memory.command("set")
def set_memory(
    session_id: Session,
    memory_type: Annotated[MemoryType, typer.Argument(metavar="TYPE", help="Which kind of memory.")],
    key: Key,
    value: Annotated[
        str,
        typer.Argument(metavar="VALUE", help="A JSON value, after -- if it begins with a dash."),
    ],
    *,
    text: Annotated[bool, typer.Option("--text", help="VALUE is text, not JSON.")] = False,
    ttl_hours: Annotated[int | None, typer.Option(help="How many hours it lives. Default: for ever.")] = None,
    db: Database = None,
) -> None:
    """Store a value under a key. The database is made if it does not exist."""
    decoded = value if text else _decoded(value)
    with SwarmDB(":memory:") as rehearsal:  # What is refused must not leave a new database behind.
        rehearsal.store_memory(session_id, memory_type, key, decoded, ttl_hours)
    with _opened(db, create_missing=True) as store:
        store.store_memory(session_id, memory_type, key, decoded, ttl_hours)


@memory.command("delete")
def delete_memory(session_id: Session, memory_type: Kind, key: Key, *, db: Database = None) -> None:
    """Remove a key, with its whole history."""
    with _opened(db) as store:
        kind = _recognised(store, MemoryType, memory_type, col(SessionMemory.memory_type), "TYPE")
        if not store.delete_memory(session_id, kind, key):
            raise _no_memory(session_id, memory_type, key)


@app.command()
def cleanup(
    *,
    days: Annotated[
        int | None,
        typer.Option(help="Remove what is older than so many days, but no agents. Default: as its retention says."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Remove nothing, and show what would be removed.")] = False,
    db: Database = None,
    as_json: AsJSON = False,
) -> None:
    """Remove old events and metrics, and memory that was replaced or has expired."""
    with _opened(db) as store:
        done = store.cleanup(days, dry_run=dry_run)
    if as_json:
        show.as_json({"dry_run": done.dry_run, "tables": [vars(table) for table in done.tables]})
        return
    show.table(
        "Would be removed" if done.dry_run else "Removed",
        [show.text("table"), show.number("rows"), show.time("older than (UTC)")],
        ((table.table, table.rows, table.before) for table in done.tables),
    )


@app.command()
def migrate(
    *,
    db: Database = None,
    check: Annotated[
        bool, typer.Option("--check", help="Change nothing, and end with status 1 if there is something to do.")
    ] = False,
    sql: Annotated[
        bool, typer.Option("--sql", help="Print the SQL that makes an empty PostgreSQL database one of this version.")
    ] = False,
) -> None:
    """Bring a database to this version, or make one: what opening it does, for those whose programs may not."""
    location = _locate(db)
    if sql:
        for statement in server_ddl(location):
            typer.echo(f"{statement};\n".expandtabs(4))
        return
    if check:
        version = found_version(location)
        if version == VERSION:
            show.line(f"{location} has schema {VERSION}, as this program has")
            return
        found = "no schema yet" if version is None else f"schema {version}"
        raise StorageError(f"{location} has {found}, and {VERSION} is due: run swarmdb migrate")
    with SwarmDB(url=location.url, busy_timeout=BUSY_TIMEOUT) as store:
        show.line(f"{location} has schema {store.schema_version}")


@app.command()
def vacuum(*, db: Database = None) -> None:
    """Give the space of deleted rows back to the disk."""
    with _opened(db) as store:
        before = store.size_bytes()
        store.vacuum()
        show.line(f"{before:,} bytes before, {store.size_bytes():,} bytes now")


@app.command()
def backup(
    path: Annotated[str, typer.Argument(metavar="PATH", help="The file to write.")],
    *,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists.")] = False,
    db: Database = None,
    as_json: AsJSON = False,
) -> None:
    """Copy a database into a file, while others go on reading and writing."""
    with _opened(db) as store:
        own = _locate(db).path
        if not overwrite and own is not None and Path(path).is_file() and not belong_together(own, Path(path)):
            raise StorageError(f"{path} exists; --overwrite replaces it")
        target = store.backup(path, overwrite=overwrite)
    if as_json:
        show.as_json({"path": str(target), "size_bytes": target.stat().st_size})
    else:
        show.line(str(target))


@app.command()
def restore(
    path: Annotated[str, typer.Argument(metavar="BACKUP", help="The file that swarmdb backup wrote.")],
    *,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the database if it exists.")] = False,
    discard: Annotated[
        bool, typer.Option("--discard", help="Keep no copy of the database that is replaced: its rows are lost.")
    ] = False,
    db: Database = None,
    as_json: AsJSON = False,
) -> None:
    """Put a backup in the place of a database, which nobody may have open. What was there is kept beside it."""
    location = _locate(db)
    if location.path is None:
        raise StorageError(f"{location}: restore writes a file; a server's database is restored by pg_restore")
    if not Path(path).is_file():
        raise StorageError(f"no backup at {path}")
    if not overwrite and location.path.exists():
        raise StorageError(f"{location.path} exists; --overwrite replaces it")
    done = restore_backup(path, location.path, overwrite=overwrite, keep=not discard, busy_timeout=BUSY_TIMEOUT)
    if as_json:
        show.as_json({**vars(done), "path": str(done.path), "kept": None if done.kept is None else str(done.kept)})
        return
    show.line(str(done.path))
    if done.kept is not None:
        show.line(f"what was there before is {done.kept}")


@app.command()
def copy(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="The database to copy: a file or a URL.")],
    target: Annotated[
        str, typer.Argument(metavar="TARGET", help="Where to: a file or a URL. It is made if it does not exist.")
    ],
    *,
    resume: Annotated[
        bool,
        typer.Option(
            "--continue", help="Go on with a copy that was interrupted. Else a target that has rows is refused."
        ),
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="How many rows are written at once.")] = BATCH_SIZE,
    as_json: AsJSON = False,
) -> None:
    """Copy all rows into an empty database, between files and PostgreSQL as well, and verify the copy."""
    with _opened(source) as original, _opened(target, create_missing=True) as made:
        try:
            done = copying.copied(original, made, resume=resume, batch_size=batch_size)
        except KeyboardInterrupt:
            typer.echo("swarmdb: interrupted; with --continue, the same command goes on from here", err=True)
            raise
    if as_json:
        show.as_json({"tables": [{**vars(table), "rows": table.rows} for table in done.tables]})
    else:
        copying.report(done)


@app.command()
def export(
    table: Annotated[
        str,
        typer.Argument(metavar="TABLE", help=f"The table: {', '.join(_TABLES)}.", autocompletion=lambda: list(_TABLES)),
    ],
    *,
    form: Annotated[
        exporting.Format,
        typer.Option("--format", help="One JSON object a line, or CSV with a row of names first."),
    ] = exporting.Format.JSONL,
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", metavar="PATH", help="The file to write. Default: standard output."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists.")] = False,
    since: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Only rows written at or after this time, in ISO-8601."),
    ] = None,
    until: Annotated[
        str | None, typer.Option(metavar="TIME", help="Only rows written before this time, in ISO-8601.")
    ] = None,
    escape_formulas: Annotated[
        bool,
        typer.Option(
            "--escape-formulas",
            help="Put ' before text that a spreadsheet would run. It changes the data. Only for CSV.",
        ),
    ] = False,
    db: Database = None,
) -> None:
    """Write all rows of a table, by key, as JSON lines or CSV. A time without a zone is local time."""
    if table not in _TABLES:
        raise typer.BadParameter(f"{table!r} is none of {', '.join(_TABLES)}.", param_hint="TABLE")
    if escape_formulas and form is not exporting.Format.CSV:
        raise typer.BadParameter("it is for --format csv; nothing runs JSON.", param_hint="--escape-formulas")
    if overwrite and output is None:
        raise typer.BadParameter("it is for a file, which --output names.", param_hint="--overwrite")
    model = _TABLES[table]
    wanted = {"since": inputs.moment_filter(since, field="since"), "until": inputs.moment_filter(until, field="until")}
    bounds = {name: moment for name, moment in wanted.items() if moment is not None}
    encoding = (
        exporting.Lines(model)
        if form is exporting.Format.JSONL
        else exporting.Cells(model, escape_formulas=escape_formulas)
    )
    with _opened(db) as store:
        if output is None:
            with exporting.standard_output() as stream:
                exporting.write(store, model, encoding, stream, bounds)
            return
        target = exporting.target_of(output, _locate(db).path, overwrite=overwrite)
        with exporting.whole_file(target, overwrite=overwrite) as file:
            written = exporting.write(store, model, encoding, file, bounds)
        show.line(f"{show.counted(written, 'row', 'rows')} in {target}")


@app.command()
def check(
    *,
    quarantine: Annotated[
        bool, typer.Option("--quarantine", help="Move rows that can't be read into tables beside their own.")
    ] = False,
    db: Database = None,
    as_json: AsJSON = False,
) -> None:
    """Check that a database is sound and every row can be read. Exit status 1 says that it isn't so."""
    try:
        with _opened(db) as store:
            found = store.check(quarantine=quarantine)
    except StorageError as error:
        if not is_damage(error):
            raise
        raise StorageError(f"{error}. What to do, if it was a database of SwarmDB's: {ADVICE_DAMAGE}") from error
    if as_json:
        show.as_json({"ok": found.ok, **vars(found), "advice": found.advice})
    else:
        _show_check(found)
    if not found.ok:
        raise typer.Exit(1)


def _show_check(found: CheckReport) -> None:
    show.facts(
        {
            "sound": found.ok,
            "SQLite": found.sqlite_version,
            "rare bug of SQLite": "sqlite.org/wal.html#walresetbug"
            if found.has_wal_reset_bug
            else "not in this version",
            "moved into quarantine": found.quarantined,
            "log, in bytes": found.wal_bytes,
            "names of the file": found.hard_links,
        }
    )
    show.table("Damage to the file", [show.text("problem")], _first(((problem,) for problem in found.integrity), 0))
    if found.tables:
        show.table(
            "Tables that can't be used",
            map(show.text, ("table", "reason")),
            ((fault.table, fault.reason) for fault in found.tables),
        )
    show.table(
        "Values that can't be read",
        list(map(show.text, ("table", "column", "row", "reason"))),
        _first(((fault.table, fault.column, fault.row, fault.reason) for fault in found.undecodable), 2),
    )
    if found.kept:
        show.table(
            "Rows that could not be moved",
            [*map(show.text, ("table", "reason")), show.number("rows")],
            _first(((kept.table, kept.reason, kept.rows) for kept in found.kept), 1),
        )
    show.table(
        "Words outside the enums",
        [*map(show.text, ("table", "column", "word")), show.number("rows")],
        _first(((word.table, word.column, word.value, word.rows) for word in found.unlisted), 2),
    )
    show.table(
        "Times in another program's format",
        [*map(show.text, ("table", "column")), show.number("rows")],
        ((times.table, times.column, times.rows) for times in found.foreign_times),
    )
    show.table("What to do", [show.text("advice")], ([advice] for advice in found.advice))


#: How many findings of a kind `check` prints. One bad writer leaves the same in every row.
_FINDINGS = 5


def _first(rows: Iterable[tuple[Any, ...]], by: int) -> Iterator[tuple[Any, ...]]:
    """Yield the first of *rows* that are alike in so many first cells, and at the end how many more there are."""
    counts: Counter[tuple[Any, ...]] = Counter()
    row: tuple[Any, ...] = ()
    for row in rows:
        counts[row[:by]] += 1
        if counts[row[:by]] <= _FINDINGS:
            yield row
    for kind, number in counts.items():
        if number > _FINDINGS:
            more = f"{number - _FINDINGS:,} more: see --json"
            yield (*kind, more, *[""] * (len(row) - by - 1))


def _decoded(value: str) -> Any:
    try:
        return decode_json(value)
    except ValueError:
        raise InvalidInputError("VALUE", value, "JSON; --text stores it as text") from None


def _no_memory(session_id: str, memory_type: str, key: str) -> SwarmDBError:
    return SwarmDBError(f"no {memory_type} memory of session {session_id!r} has the key {key!r}")
