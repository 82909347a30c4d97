"""What it costs to begin: importing the package, and opening a file to read one row."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from sqlalchemy import bindparam, create_engine, select

from moai_flow.memory import RegisteredAgent, SwarmDB
from moai_flow.memory.models import table_of

from .dataset import agent
from .measuring import Measurement, compare, timed

_AGENTS = table_of(RegisteredAgent)
_BY_ID = select(_AGENTS).where(_AGENTS.c.agent_id == bindparam("agent_id"))


def measure_import(*, rounds: int) -> Measurement:
    """Compare importing the package with importing sqlmodel, each in a new interpreter."""
    return compare(
        "import moai_flow.memory",
        lambda: _importing("moai_flow.memory"),
        lambda: _importing("sqlmodel"),
        rounds=rounds,
        calls=1,
        against="import sqlmodel",
        at_most=1.1,
    )


def measure_opening(path: Path, *, rounds: int, rows: int) -> Measurement:
    """Compare opening a file and reading one agent with a new SQLAlchemy engine that runs one Core select."""
    name = agent(1, rows)

    def ours() -> None:
        with SwarmDB(path) as store:
            assert store.get_agent(name) is not None

    def core() -> None:
        engine = create_engine(f"sqlite:///{path}")
        with engine.connect() as connection:
            assert connection.execute(_BY_ID, {"agent_id": name}).one()
        engine.dispose()

    times = 20

    def repeated(work: Callable[[], None]) -> float:
        begun = time.perf_counter()
        for _ in range(times):
            work()
        return time.perf_counter() - begun

    return compare(
        "open a file, read one agent",
        lambda: repeated(ours),
        lambda: repeated(core),
        rounds=rounds,
        calls=times,
        rows=rows,
        against="create_engine and a Core select",
        at_most=1.4,
    )


def _importing(module: str) -> float:
    # With bytecode written, as on any machine where the program ran once before.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-c", f"import {module}"]
    return timed(lambda: subprocess.run(command, env=environment, check=True))
