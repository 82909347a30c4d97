"""What every test may ask for."""

import os
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from moai_flow.memory import SwarmDB
from postgres import postgres_server, postgres_url

__all__ = ["postgres_server", "postgres_url"]  # Fixtures, for every test.

# What it compares with is in an extra of its own.
collect_ignore = ["benchmarks/peers.py"]

REPOSITORY = Path(__file__).parents[1]
LEGACY = REPOSITORY.parent / "shared" / "data" / "legacy-2.0.0.db"

# Subprocesses of tests import the package from the checkout, installed or not.
os.environ["PYTHONPATH"] = str(REPOSITORY / "src")


class Clock:
    """A clock that stands until a test advances it."""

    def __init__(self) -> None:
        self.now = datetime(2025, 11, 30, 10, 0, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now

    def advance(self, **by: float) -> None:
        self.now += timedelta(**by)


@pytest.fixture(autouse=True)
def no_store_of_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SWARMDB_URL", "MOAI_DB_PATH"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "swarm.db"


@pytest.fixture
def file_db(path: Path, clock: Clock) -> Iterator[SwarmDB]:
    """An empty store in a file."""
    with SwarmDB(path, clock=clock) as store:
        yield store


@pytest.fixture(params=["file", "memory"])
def local_db(request: pytest.FixtureRequest, path: Path, clock: Clock) -> Iterator[SwarmDB]:
    """An empty store of each kind on SQLite, for what is SQLite's own."""
    with SwarmDB(path if request.param == "file" else ":memory:", clock=clock) as store:
        yield store


@pytest.fixture(params=["file", "memory", "postgresql"])
def db(request: pytest.FixtureRequest, path: Path, clock: Clock) -> Iterator[SwarmDB]:
    """An empty store of each kind."""
    with SwarmDB(url=url_of(request.param, path, request), clock=clock) as store:
        yield store


@pytest.fixture(params=["file", "memory", "postgresql"])
def url(request: pytest.FixtureRequest, path: Path) -> str:
    """Where an empty store of each kind can be opened."""
    return url_of(request.param, path, request)


@pytest.fixture(params=["file", "postgresql"])
def shared_url(request: pytest.FixtureRequest, path: Path) -> str:
    """Where an empty store of each kind can be opened that others can open as well."""
    return url_of(request.param, path, request)


def url_of(kind: str, path: Path, request: pytest.FixtureRequest) -> str:
    """Return the URL of an empty database of a kind; a server is only started for who asks for one."""
    if kind == "postgresql":
        return str(request.getfixturevalue("postgres_url"))
    return f"sqlite:///{path}" if kind == "file" else "sqlite://"


@pytest.fixture
def legacy(tmp_path: Path) -> Path:
    """A copy of a database that the original program wrote, at UTC+9."""
    if not LEGACY.exists():
        pytest.skip("the original program's database is not beside this checkout")
    copy = tmp_path / "legacy.db"
    shutil.copyfile(LEGACY, copy)
    return copy
