"""What the tests of the command may ask for."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli.running import Command
from moai_flow.memory import EventType, SwarmDB


@pytest.fixture
def swarmdb(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    """The command, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return Command(capsys, monkeypatch)


@pytest.fixture
def store(path: Path) -> Path:
    """The file of a store that has a little of everything."""
    with SwarmDB(path) as db:
        db.register_agent("a-1", "expert-backend", metadata={"model": "small"})
        db.register_agent("a-2", "expert-frontend")
        db.update_agent_status("a-1", "complete", duration_ms=1500)
        for kind, day in ((EventType.SPAWN, 1), (EventType.ERROR, 2), (EventType.COMPLETE, 3)):
            db.insert_event(
                {
                    "event_type": kind,
                    "agent_id": "a-1",
                    "agent_type": "expert-backend",
                    "timestamp": f"2025-11-0{day}T12:00:00Z",
                    "metadata": {"day": day},
                }
            )
        db.store_memory("s-1", "semantic", "language", "python")
        db.store_memory("s-1", "context_hint", "tone", {"terse": True}, ttl_hours=24)
        db.store_task_metric("t-1", "a-1", 12, "success")
    return path


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Take interrupts, and have children take them, even where the tests run in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
