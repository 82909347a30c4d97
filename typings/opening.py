"""Opening and closing a store."""

from datetime import UTC, datetime
from pathlib import Path
from typing import assert_type

from sqlalchemy import Engine, create_engine
from sqlalchemy.engine import URL, make_url

from moai_flow.memory import Durability, SwarmDB


def places() -> None:
    assert_type(SwarmDB(), SwarmDB)
    SwarmDB("swarm.db")
    SwarmDB(db_path=Path("swarm.db"))
    SwarmDB(":memory:")
    SwarmDB(url="sqlite:///swarm.db")
    url: URL = make_url("sqlite:///swarm.db")
    SwarmDB(url=url)
    engine: Engine = create_engine(url)
    SwarmDB(engine=engine)


def settings() -> None:
    durability: Durability = "full"
    SwarmDB(durability=durability, busy_timeout=2, page_cache_mib=64, clock=lambda: datetime.now(UTC))


def context() -> None:
    with SwarmDB() as db:
        assert_type(db, SwarmDB)
    assert_type(db.close(), None)


def mistakes() -> None:
    SwarmDB(42)  # type: ignore[arg-type]
    SwarmDB("swarm.db", "sqlite:///swarm.db")  # type: ignore[call-arg]
    SwarmDB(durability="fast")  # type: ignore[arg-type]
    SwarmDB(busy_timeout="30")  # type: ignore[arg-type]
    SwarmDB(clock=datetime(2025, 11, 30))  # type: ignore[arg-type]  # noqa: DTZ001
    SwarmDB(path="swarm.db")  # type: ignore[call-arg]
