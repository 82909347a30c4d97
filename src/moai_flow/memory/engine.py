"""From where the caller wants the database to an SQLAlchemy engine with the right pragmas."""

import os
import sqlite3
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from stat import S_ISDIR
from typing import Any, Literal, TypeAlias
from urllib.parse import quote, unquote_to_bytes
from uuid import uuid4

from sqlalchemy import Engine, NullPool, SingletonThreadPool, StaticPool, create_engine, event, make_url
from sqlalchemy.engine import URL, ExceptionContext
from sqlalchemy.exc import ArgumentError

from moai_flow.memory.errors import InvalidInputError, StorageError
from moai_flow.memory.files import make_file, make_folder, size_of
from moai_flow.memory.patience import PORTION, Interrupts, patient_connections, patient_cursors
from moai_flow.memory.types import is_unicode

#: Where the database is if nothing says otherwise, under the current directory.
DEFAULT_PATH = Path(".moai/memory/swarm.db")

#: ``normal`` survives a crash of the program, ``full`` also a power loss.
Durability: TypeAlias = Literal["normal", "full"]
_SYNCHRONOUS: Mapping[str, str] = {"normal": "PRAGMA synchronous = NORMAL", "full": "PRAGMA synchronous = FULL"}

#: Beyond this, bulk work on files of a million rows was seen to gain nothing more.
PAGE_CACHE_MIB = 16

#: SQLite's log (the ``-wal`` file) begins again at its start when all of it is in the database, but by itself the file
#: never shrinks. Beyond this size it is cut when that happens: four times what it has when nobody keeps it from it.
LOG_LIMIT_MIB = 16

_POSTGRESQL = frozenset({"postgresql", "postgresql+psycopg"})
_MEMORY_NAMES = frozenset({"", ":memory:"})


@dataclass(frozen=True)
class Location:
    """Where a database is.

    Attributes:
        url: The SQLAlchemy URL that reaches it.
        path: Its file, absolute; None if it has none.
    """

    url: URL
    path: Path | None = None

    @property
    def is_on_server(self) -> bool:
        """Whether it is on a PostgreSQL server."""
        return self.url.get_backend_name() == "postgresql"

    @property
    def is_in_memory(self) -> bool:
        """Whether it is in memory, and lives as long as a connection to it."""
        return self.path is None and not self.is_on_server

    def __str__(self) -> str:
        if self.is_on_server:
            return without_secrets(self.url)
        return ":memory:" if self.path is None else str(self.path)


def without_secrets(url: URL) -> str:
    """Return *url* as it may be shown, without passwords, wherever it has them."""
    secret = {name: "***" for name in url.query if "pass" in name.lower()}
    return url.update_query_dict(secret).render_as_string(hide_password=True)


def shown_place(place: object) -> object:
    """Return what may be shown of what somebody gave for a database."""
    try:
        return without_secrets(make_url(place)) if isinstance(place, str | URL) and "://" in str(place) else place
    except (ArgumentError, ValueError):
        return NOT_SHOWN


#: What is shown of a value that may hold a password.
NOT_SHOWN = "something that is not shown, since it may hold a password"


def locate(db_path: str | os.PathLike[str] | None, url: str | URL | None) -> Location:
    """Return where the database is: as the caller says, or else the environment, or else `DEFAULT_PATH`.

    Raises:
        InvalidInputError: If the path or the URL can't name an SQLite or a PostgreSQL database.
    """
    if db_path is None and url is None:
        if found := os.environ.get("SWARMDB_URL"):
            return _from_url(found, "SWARMDB_URL")
        if found := os.environ.get("MOAI_DB_PATH"):
            return _from_path(found, "MOAI_DB_PATH")
        return _from_path(DEFAULT_PATH, "db_path")
    if url is not None:
        return _from_url(url, "url")
    assert db_path is not None
    return _from_path(db_path, "db_path")


def path_of_file(given: str | os.PathLike[str], *, field: str, of_home: bool = True) -> Path:
    """Return the absolute path of a file, which need not exist. By *of_home*, ``~`` stands for somebody's home.

    Raises:
        InvalidInputError: If *given* is no path, or a folder's.
        StorageError: If the system can't look there.
    """
    try:
        name = os.fspath(given)
    except TypeError:
        raise InvalidInputError(field, given, "a str or a Path") from None
    if not isinstance(name, str) or not name or "\0" in name:
        raise InvalidInputError(field, given, "the path of a file")
    try:
        path = (Path(name).expanduser() if of_home else Path(name)).absolute()
    except RuntimeError as error:
        raise InvalidInputError(field, name, f"a path that can be found ({error})") from None
    except OSError as error:
        raise StorageError(f"{name}: the current directory can't be found: {error}") from error
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return path
    except OSError as error:  # A loop of links, for one.
        raise StorageError(f"{name}: {error}") from error
    if S_ISDIR(mode):
        raise InvalidInputError(field, name, "the path of a file, not of a folder")
    return path


def log_bytes(location: Location) -> int | None:
    """Return the size of the log beside a database's file, in bytes; None if it has no file.

    Raises:
        StorageError: If the system can't look there.
    """
    if location.path is None:
        return None
    path = location.path.resolve()  # SQLite puts it beside the file itself, not beside a link to it.
    try:
        return path.with_name(f"{path.name}-wal").stat().st_size
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise StorageError(f"{location}: {error}") from error


def hard_links(location: Location) -> int | None:
    """Return how many names a database's file has; None if it has no file.

    Raises:
        StorageError: If the system can't look there.
    """
    if location.path is None:
        return None
    try:
        return location.path.stat().st_nlink
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise StorageError(f"{location}: {error}") from error


def check_file_of_log(location: Location) -> None:
    """Refuse a file that was emptied or removed while its log is there: SQLite would delete that, unread.

    Raises:
        StorageError: If it was.
    """
    if location.path is None or size_of(location.path):  # The usual case, at one look.
        return
    path = Path(os.path.realpath(location.path))
    # In this order: SQLite gives a new file its first page before it makes a log, and never takes that page away again.
    found = size_of(path.with_name(f"{path.name}-wal"))
    if not found or size_of(path):
        return
    raise StorageError(
        f"{location}: the file was emptied or removed, but its log is there: {path.name}-wal has {found:,} bytes, "
        "which may be rows that are nowhere else, and to open the file would delete it. Restore a backup, which keeps "
        "the log; copy the log elsewhere and read it, as the guide Reliability says; or move it away to begin anew"
    )


def _from_path(db_path: str | os.PathLike[str], field: str) -> Location:
    if str(db_path) == ":memory:":
        return _in_memory()
    if "://" in str(db_path):
        raise InvalidInputError(
            field, shown_place(str(db_path)), "the path of a file; a URL goes into url= or SWARMDB_URL"
        )
    path = path_of_file(db_path, field=field)
    return Location(URL.create("sqlite", database=str(path)), path)


def _from_url(url: str | URL, field: str) -> Location:
    accepted = "an SQLAlchemy URL such as 'sqlite:///swarm.db' or 'postgresql://user@host/database'"
    if isinstance(url, str) and not (is_unicode(url) and "\0" not in url):
        raise InvalidInputError(field, NOT_SHOWN, f"{accepted}, in Unicode")
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise InvalidInputError(field, NOT_SHOWN, accepted) from None
    if parsed.drivername in _POSTGRESQL:
        return Location(parsed.set(drivername="postgresql+psycopg"))
    if parsed.drivername not in ("sqlite", "sqlite+pysqlite"):
        raise InvalidInputError(field, without_secrets(parsed), accepted)
    database = parsed.database or ""
    if database in _MEMORY_NAMES:
        return _in_memory()
    if database.startswith("file:"):
        return _from_uri(parsed, field)
    if parsed.query:
        raise InvalidInputError(
            field, without_secrets(parsed), f"{accepted}; with parameters, 'sqlite:///file:swarm.db?mode=ro&uri=true'"
        )
    return _from_path(database, field)


#: What of SQLite's own parameters a URL may have, with their values: https://sqlite.org/uri.html
_URI_PARAMETERS: Mapping[str, frozenset[str]] = {
    "mode": frozenset({"ro", "rw", "rwc"}),
    "immutable": frozenset({"0", "1"}),
    "uri": frozenset({"true", "1"}),
}


def _from_uri(url: URL, field: str) -> Location:
    """Return where a URL leads that hands one of SQLite's own to it. What SQLite gets names the file by one path only.

    Raises:
        InvalidInputError: If it is for another host, is in memory, or has other parameters than `_URI_PARAMETERS`.
        StorageError: If the system can't look there.
    """
    name = name_in_uri(url.database or "")
    if name is None or name in _MEMORY_NAMES:
        raise InvalidInputError(
            field,
            without_secrets(url),
            "'sqlite:///file:' and a path without '?' and '#', or 'sqlite://' for one in memory",
        )
    if any(value not in _URI_PARAMETERS.get(parameter, ()) for parameter, value in url.query.items()):
        raise InvalidInputError(
            field, without_secrets(url), "no parameters but mode=ro, rw or rwc, immutable=0 or 1, and uri=true"
        )
    path = path_of_file(name, field=field, of_home=False)
    # A relative one would lead somewhere else once the current directory is another. Two slashes would name a host.
    exact = url.set(database=f"file:{quote(os.fsencode(path), safe='')}").update_query_dict({"uri": "true"})
    if url.query.get("immutable") == "1":
        exact = exact.update_query_dict({"mode": "ro"})  # By itself, SQLite would make a file that is missing.
    return Location(exact, path)


def name_in_uri(uri: str) -> str | None:
    """Return the path that SQLite would find in ``file:...``; None if it finds none on this machine, or more than that.

    See https://sqlite.org/uri.html.
    """
    path = uri.removeprefix("file:")
    host = ""
    if path.startswith("//"):
        host, slash, path = path[2:].partition("/")
        path = slash + path
    if host not in ("", "localhost") or "#" in uri or "?" in uri:
        return None
    return os.fsdecode(unquote_to_bytes(os.fsencode(path)))


def _in_memory() -> Location:
    # Every connection to the same name sees the same database, which lives as long as one of them is open.
    return Location(URL.create("sqlite", database=f"file:/{uuid4()}", query={"vfs": "memdb", "uri": "true"}), None)


#: Parameters of SQLAlchemy's URLs that it hands to `sqlite3.connect`, besides ``uri``.
_OF_DRIVER = ("timeout", "isolation_level", "detect_types", "check_same_thread", "cached_statements")


def locate_engine(engine: Engine) -> Location:
    """Return where a caller's own *engine* leads.

    Raises:
        InvalidInputError: If it is for another database or driver, or hands the same connection to several users.
        StorageError: If the system can't look there.
    """
    drivers = ("sqlite", "pysqlite"), ("postgresql", "psycopg")
    if not isinstance(engine, Engine) or (engine.dialect.name, engine.dialect.driver) not in drivers:
        shown = engine if isinstance(engine, Engine) else shown_place(engine)
        raise InvalidInputError("engine", shown, "an SQLAlchemy engine for SQLite, or for PostgreSQL with psycopg 3")
    shares = isinstance(engine.pool, StaticPool | SingletonThreadPool)
    # What the driver takes of a URL is its owner's affair; what SQLite takes says where the database is.
    url = engine.url.difference_update_query(_OF_DRIVER)
    if engine.dialect.name == "sqlite" and "uri" not in url.query:
        try:
            (database,), _ = engine.dialect.create_connect_args(engine.url)  # Neither ~ nor file: is special in it.
        except OSError as error:
            raise StorageError(f"{without_secrets(url)}: the current directory can't be found: {error}") from error
        url = url.set(database=database)
    location = Location(engine.url) if engine.dialect.name == "postgresql" else locate(None, url)
    # In memory, each connection of such a pool would be another database, or all users would share one connection.
    if location.is_in_memory or shares:
        raise InvalidInputError(
            "engine",
            engine,
            "an engine for a file or a server, with a connection for each user; db_path=':memory:' for memory",
        )
    return replace(location, url=engine.url)


@dataclass(frozen=True)
class Settings:
    """How connections are opened.

    Attributes:
        durability: What a commit survives.
        busy_timeout: How long a statement waits for a lock, in seconds.
        page_cache_mib: SQLite's page cache, in MiB for each connection.
        statement_timeout: How long a statement may run on PostgreSQL, in seconds; None for any time.
        interrupts: Who may end statements that wait or work. None: nobody.
    """

    durability: Durability = "normal"
    busy_timeout: float = 30.0
    page_cache_mib: int = PAGE_CACHE_MIB
    statement_timeout: float | None = None
    interrupts: Interrupts | None = None


_USUAL = Settings()


def create(location: Location, settings: Settings = _USUAL) -> Engine:
    """Return an engine for *location*, whose folder is made if it is missing.

    Raises:
        StorageError: If the folder can't be made, the file was emptied or removed beside its log, or PostgreSQL's
            driver is not installed.
    """
    return _for_server(location, settings) if location.is_on_server else _for_file(location, settings)


def _for_file(location: Location, settings: Settings) -> Engine:
    check_file_of_log(location)
    if location.path is not None and "uri" not in location.url.query:
        try:
            make_folder(location.path.parent)
        except OSError as error:
            raise StorageError(f"{location}: its folder can't be made: {error}") from error
    if location.path is not None and location.url.query.get("mode", "rwc") == "rwc":
        # By itself, SQLite lets everybody read what it makes. Its log and index get the permissions of the database.
        with suppress(OSError, RuntimeError):  # It exists, or opening it will tell why it can't be made.
            make_file(location.path.resolve())
    # Connections are kept by `connections`; they move between threads, one at a time.
    options: dict[str, Any] = {"timeout": settings.busy_timeout, "check_same_thread": False}
    if settings.interrupts is not None:
        options["factory"] = patient_connections(settings.busy_timeout, settings.interrupts)
        options["timeout"] = min(settings.busy_timeout, PORTION)
    engine = create_engine(location.url, poolclass=NullPool, connect_args=options)
    synchronous = _SYNCHRONOUS[settings.durability]
    # Negative means KiB, positive would be pages.
    cache_size = f"PRAGMA cache_size = {settings.page_cache_mib * -1024:d}"
    log_limit = f"PRAGMA journal_size_limit = {LOG_LIMIT_MIB * 1024 * 1024:d}"

    @event.listens_for(engine, "connect")
    def set_pragmas(raw: Any, record: object) -> None:
        raw.execute("PRAGMA foreign_keys = ON")
        raw.execute(synchronous)
        raw.execute(cache_size)
        if not location.is_in_memory:
            raw.execute(log_limit)

    # Interrupted, SQLAlchemy would close the connection with its statement under way: SQLite puts that off, and keeps
    # the lock. Whose transaction it is rolls back; and where a second interrupt comes before that, so does closing.

    @event.listens_for(engine, "handle_error")
    def keep_open(context: ExceptionContext) -> None:
        context.is_disconnect = False

    @event.listens_for(engine, "close")
    def roll_back(raw: Any, record: object) -> None:
        with suppress(sqlite3.Error):
            raw.rollback()

    return engine


def _for_server(location: Location, settings: Settings) -> Engine:
    usual = {"connect_timeout": "10", "application_name": "swarmdb"}
    url = location.url.update_query_dict({name: usual[name] for name in usual.keys() - location.url.query.keys()})
    url = url.update_query_dict({"client_encoding": "utf8"})  # SQLAlchemy itself asks first, and needs text.
    try:
        engine = create_engine(url, poolclass=NullPool)
    except ModuleNotFoundError as error:
        raise StorageError(
            f"{location}: PostgreSQL needs psycopg 3; install 'moai-flow-memory[postgres]' ({error})"
        ) from error
    # A role or a database may have others, by which values would change, or calls fail.
    parameters = {
        "TimeZone": "UTC",  # Only in it can the driver read the first and the last hours that a datetime holds.
        "DateStyle": "ISO",
        "extra_float_digits": "1",  # All digits that it takes to read the same float.
        "standard_conforming_strings": "on",
        "default_transaction_isolation": "read committed",  # Blocks say what they need; single statements need no more.
        "lock_timeout": str(max(1, round(settings.busy_timeout * 1000))),  # 0 would mean for ever.
    }
    if settings.statement_timeout is not None:
        parameters["statement_timeout"] = str(round(settings.statement_timeout * 1000))
    if settings.durability == "full":  # Else it is the server's choice, which may be as much.
        parameters["synchronous_commit"] = "on"
    names, values = list(parameters), list(parameters.values())
    cursors = None if settings.interrupts is None else patient_cursors(settings.interrupts)

    @event.listens_for(engine, "connect")
    def set_parameters(raw: Any, record: object) -> None:
        raw.execute(
            "SELECT set_config(name, value, false) FROM unnest(%s::text[], %s::text[]) AS s(name, value)",
            (names, values),
        )
        raw.commit()
        if cursors is not None:
            raw.cursor_factory, raw.server_cursor_factory = cursors

    return engine


_USED_SETTINGS = """
    SELECT current_setting('server_encoding'), current_setting('client_encoding'), current_setting('DateStyle'),
        current_setting('extra_float_digits')
"""


def check_settings(raw: Any, location: Location) -> None:
    """Refuse a server's database, or a caller's engine for it, from which values would not come back as they were.

    Raises:
        StorageError: If the database can't hold every text.
        InvalidInputError: If the engine's connections are set otherwise than ours, which never happens with our own.
    """
    encoding, client_encoding, style, digits = raw.execute(_USED_SETTINGS).fetchone()
    if encoding != "UTF8":
        raise StorageError(
            f"{location}: its encoding is {encoding}, which does not hold every text; make a database with "
            "CREATE DATABASE ... ENCODING 'UTF8' TEMPLATE template0"
        )
    for name, value, fits, wanted in (
        ("client_encoding", client_encoding, client_encoding == "UTF8", "UTF8"),
        ("DateStyle", style, style.startswith("ISO"), "ISO"),
        ("extra_float_digits", digits, int(digits) > 0, "1"),
    ):
        if not fits:
            raise InvalidInputError(
                "engine",
                f"{name} = {value}",
                f"connections with {name} = {wanted}, as by connect_args={{'options': '-c {name}={wanted}'}}",
            )
