"""The facade: one object that opens the database and offers everything that `operations` can do."""

import os
import weakref
from collections.abc import Callable
from datetime import UTC, datetime
from types import TracebackType
from typing import Self, cast

from sqlalchemy import Engine
from sqlalchemy.engine import URL

from moai_flow.memory import inputs
from moai_flow.memory.backends import translating
from moai_flow.memory.connections import Connections, Limit
from moai_flow.memory.engine import PAGE_CACHE_MIB, Durability, Settings, create, locate, locate_engine, shown_place
from moai_flow.memory.errors import InvalidInputError
from moai_flow.memory.migrations import bring_up_to_date
from moai_flow.memory.operations.maintenance import MaintenanceOperations
from moai_flow.memory.operations.memory import MemoryOperations
from moai_flow.memory.operations.retention import RetentionOperations, RetentionPolicy
from moai_flow.memory.operations.summaries import SummaryOperations
from moai_flow.memory.scope import RawConnection
from moai_flow.memory.statements import Programs
from moai_flow.memory.tracking import Tracking
from moai_flow.memory.types import utc_now

#: How many idle connections stay open: enough for the threads of one program, none where the pool is the caller's.
_KEPT, _KEPT_OF_CALLER = 16, 0

#: SQLite counts the busy timeout in milliseconds and the page cache in KiB, both in 32 bits.
_LONGEST_TIMEOUT = 2_147_483
_LARGEST_CACHE = 2_097_151


class SwarmDB(Tracking, MemoryOperations, SummaryOperations, RetentionOperations, MaintenanceOperations):
    """Everything a swarm remembers, behind one object.

    One object serves all threads of a process. After a fork the child uses it on, with connections of its own, unless
    the parent was in the middle of something with the file; of a database in memory it has a copy. As a context
    manager it closes itself.

    Examples:
        >>> with SwarmDB(":memory:") as db:
        ...     agent = db.register_agent("agent-1", "expert-backend")
        ...     db.update_agent_status("agent-1", "running").status
        <AgentStatus.RUNNING: 'running'>
    """

    def __init__(
        self,
        db_path: str | os.PathLike[str] | None = None,
        *,
        url: str | URL | None = None,
        engine: Engine | None = None,
        durability: Durability = "normal",
        busy_timeout: float = 30.0,
        page_cache_mib: int = PAGE_CACHE_MIB,
        statement_timeout: float | None = None,
        pool_size: int = 10,
        retention: RetentionPolicy | None = None,
        clock: Callable[[], datetime] = utc_now,
    ) -> None:
        """Open the database, and make it if it does not exist: the file, and folders on the way, for their owner alone.

        A database of an older program is brought to this version first, and a copy of its file is left beside it as
        ``<file>.<old version>.bak``.

        Args:
            db_path: Its file, or ``":memory:"`` for one that lives as long as this object. Default: the environment's
                ``SWARMDB_URL`` or ``MOAI_DB_PATH``, else ``.moai/memory/swarm.db`` under the current directory.
            url: An SQLAlchemy URL instead, such as ``sqlite:///swarm.db`` or ``postgresql://user@host/database``. Of
                SQLite's own parameters it may have ``mode`` and ``immutable``: ``sqlite:///file:swarm.db?mode=ro``.
            engine: An SQLAlchemy engine instead. It keeps its own settings, gets no listeners, and is not disposed;
                but a fork closes its pool's idle connections to a file.
            durability: What an acknowledged write survives: ``"normal"`` a crash of the program, ``"full"`` a power
                loss as well, for the price of a disk flush at each commit. With ``"normal"``, a power loss may take
                the last commits, and leaves the file sound.
            busy_timeout: How long a call waits for another writer, in seconds, before it raises `BusyError`. On
                PostgreSQL, how long it waits for a lock, and for a connection of the pool.
            page_cache_mib: How much of the file each open connection may keep in memory, in MiB; 16 unless given. More
                makes bulk work on large files faster; as many connections are open as there are threads inside calls
                at once. It is SQLite's.
            statement_timeout: How long the server may work on one statement, in seconds. Default: as the server says.
                It is PostgreSQL's.
            pool_size: How many connections to the server may be open at once. It is PostgreSQL's.
            retention: How long rows are kept before they are removed by themselves. It is written into the database,
                for whoever uses it from then on. Default: as the database says, which is 30 days in a new one, and
                for ever in one that an older program made.
            clock: Returns the present moment, aware of its zone, in the years 2 to 9998. For tests.

        Raises:
            InvalidInputError: If a parameter can't be accepted, or more than one says where the database is.
            SchemaError: If the database is of a newer version, or has tables of these names that are not SwarmDB's.
            BusyError: If another program keeps the database locked for longer than *busy_timeout*.
            StorageError: If the database can't be reached or opened, is none, or can't be brought up to date; or if
                its file was emptied or removed while its log is there, which SQLite would delete.
        """
        places = {"db_path": db_path, "url": url, "engine": engine}
        given = [name for name, place in places.items() if place is not None]
        for extra in given[1:]:
            raise InvalidInputError(
                extra, shown_place(places[extra]), f"nothing, since {given[0]} says where the database is"
            )
        if durability not in ("normal", "full"):
            raise InvalidInputError("durability", durability, "one of 'normal', 'full'")
        busy_timeout = inputs.number(busy_timeout, field="busy_timeout")
        if not 0 <= busy_timeout <= _LONGEST_TIMEOUT:
            raise InvalidInputError("busy_timeout", busy_timeout, f"seconds from 0 to {_LONGEST_TIMEOUT}")
        page_cache_mib = inputs.whole(page_cache_mib, field="page_cache_mib", least=1)
        if page_cache_mib > _LARGEST_CACHE:
            raise InvalidInputError("page_cache_mib", page_cache_mib, f"MiB from 1 to {_LARGEST_CACHE}")
        if statement_timeout is not None:
            statement_timeout = inputs.number(statement_timeout, field="statement_timeout")
            if not 0.001 <= statement_timeout <= _LONGEST_TIMEOUT:
                raise InvalidInputError(
                    "statement_timeout", statement_timeout, f"seconds from 0.001 to {_LONGEST_TIMEOUT}"
                )
        pool_size = inputs.whole(pool_size, field="pool_size", least=1)
        if retention is not None and not isinstance(retention, RetentionPolicy):
            raise InvalidInputError("retention", retention, "a RetentionPolicy, or None for the database's own")
        self._clock = clock if clock is utc_now else inputs.checked_clock(clock)
        self._cleanup_seen = self._cleanup_due = datetime.min.replace(tzinfo=UTC)
        self._location = locate(db_path, url) if engine is None else locate_engine(engine)
        where = str(self._location)
        file = self._location.path
        log_of = None if file is None else self._location
        if engine is None:
            settings = self._adapted(Settings(durability, busy_timeout, page_cache_mib, statement_timeout))
            own = create(self._location, settings)
            limit = Limit(pool_size, busy_timeout) if self._location.is_on_server else None
            anchored = self._location.is_in_memory
            self._connections = Connections(
                own, where, kept=_KEPT, file=file, watched=True, anchored=anchored, limit=limit, log_of=log_of
            )
        else:
            self._connections = Connections(engine, where, kept=_KEPT_OF_CALLER, file=file, log_of=log_of)
        # Runs at close(), when nobody uses the object any more, or when the interpreter ends, whichever comes first.
        self._finalizer = weakref.finalize(self, self._connections.close)
        held = self._connections.take()
        self._programs = Programs(held.connection.dialect, where)
        try:
            with translating(where):
                bring_up_to_date(
                    held, self._location, wal_wait=busy_timeout if engine is None else None, now=self._clock()
                )
        except BaseException:
            self._connections.discard(held)
            self.close()
            raise
        self._connections.give(held)
        if retention is not None:
            try:
                self._set_retention(retention)
            except BaseException:
                self.close()
                raise

    def _adapted(self, settings: Settings) -> Settings:
        """Return how connections are opened: the settings as given, unless a subclass knows better."""
        return settings

    def _get_connection(self) -> RawConnection:
        """Return this thread's own driver connection, in the driver's own implicit transaction mode.

        It is for reading with raw SQL, and for programs that were written for it; `transaction` is the better door.
        It is the same at each call. Inside a transaction it is the transaction's. What it has not committed when the
        thread dies is rolled back, and domain methods refuse to write beside what it has not committed.

        Returns:
            The connection. On SQLite it is a `sqlite3.Connection` with `sqlite3.Row` rows.

        Raises:
            StorageError: If the database can't be opened.
            ClosedError: After `close`.
        """
        block = self._own_block()
        return cast(RawConnection, self._connections.pinned() if block is None else block.held.raw)

    def close(self) -> None:
        """Close the database. Calls that other threads have under way end as they would; later ones are refused.

        A second call does nothing. Transactions that are open end as they would, too.
        """
        self._finalizer()

    def __enter__(self) -> Self:
        """Return the database itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the database."""
        self.close()

    def __repr__(self) -> str:
        state = ", closed" if self._connections.closed else ""
        return f"{type(self).__name__}({str(self._location)!r}{state})"
