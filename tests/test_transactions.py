"""Transactions: whose they are, what joins them, what ends them."""

import asyncio
import contextvars
import gc
import sqlite3
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import psycopg
import pytest
from sqlalchemy.exc import IntegrityError, InvalidRequestError
from sqlalchemy.orm.exc import DetachedInstanceError
from sqlmodel import col, select

from conftest import Clock
from moai_flow.memory import (
    AgentEvent,
    AgentStatus,
    BusyError,
    ClosedError,
    ConflictError,
    EventData,
    EventType,
    InvalidInputError,
    MemoryType,
    RegisteredAgent,
    SessionMemory,
    StorageError,
    SwarmDB,
    TransactionError,
)
from moai_flow.memory.backends import translating
from moai_flow.memory.scope import Block

DRIVER_ERRORS = (sqlite3.Error, psycopg.Error)
EVENT: EventData = {"event_type": "spawn", "agent_id": "a", "agent_type": "t"}


class OopsError(Exception):
    """What tests raise inside blocks."""


def agents(db: SwarmDB) -> set[str]:
    return {agent.agent_id for agent in db.list_agents()}


@pytest.fixture
def impatient(path: Path, clock: Clock) -> Iterator[SwarmDB]:
    """A store in a file that waits for nobody."""
    with SwarmDB(path, clock=clock, busy_timeout=0) as store:
        yield store


def test_domain_methods_join_a_transaction_and_share_its_fate(db: SwarmDB) -> None:
    with pytest.raises(OopsError), db.transaction() as conn:
        conn.execute(
            "INSERT INTO agent_registry (agent_id, agent_type, status, spawn_time) VALUES ('raw','t','error',1)"
        )
        db.register_agent("domain", "t")
        db.insert_events([EVENT, EVENT])
        db.store_memory("s", "semantic", "k", 1)
        db.delete_memory("s", "semantic", "k")
        assert agents(db) == {"raw", "domain"}
        assert len(db.get_events()) == 2
        raise OopsError

    assert agents(db) == set()
    assert db.get_events() == []


def test_what_a_block_did_is_committed_at_its_end(file_db: SwarmDB) -> None:
    with SwarmDB(file_db.db_path) as other:
        with file_db.transaction():
            file_db.register_agent("a", "t")
            assert agents(other) == set()
        assert agents(other) == {"a"}
        file_db.register_agent("b", "t")  # On the connection that the block had, and by itself again.
        assert agents(other) == {"a", "b"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError])
def test_any_exception_rolls_back(db: SwarmDB, error: type[BaseException]) -> None:
    with pytest.raises(error), db.transaction():
        db.register_agent("a", "t")
        raise error

    assert agents(db) == set()
    db.register_agent("b", "t")
    assert agents(db) == {"b"}


def interrupt_at(function: str) -> Callable[[FrameType, str, object], None]:
    """Return a profile function that interrupts a function of this name before its first line."""

    def interrupt(frame: FrameType, kind: str, argument: object) -> None:
        if kind == "call" and function in (frame.f_code.co_name, frame.f_code.co_qualname):
            raise KeyboardInterrupt  # Python then takes the profile function away.

    return interrupt


def test_a_block_that_nobody_can_end_any_more_is_undone_at_once(db: SwarmDB) -> None:
    opening = db.transaction()
    opening.__enter__()
    db.register_agent("a", "t")
    with db.transaction():
        db.register_agent("b", "t")
    del opening
    assert db._connections.local.blocks == []
    assert agents(db) == set()
    db.register_agent("c", "t")
    assert agents(db) == {"c"}


def test_an_inner_block_that_nobody_can_end_any_more_is_not_kept_by_the_outer(db: SwarmDB) -> None:
    with pytest.raises(TransactionError, match="ended inside"), db.transaction():
        inner = db.transaction()
        inner.__enter__()
        db.register_agent("a", "t")
        del inner
    assert agents(db) == set()
    db.register_agent("b", "t")
    assert agents(db) == {"b"}


def test_an_inner_block_that_nobody_can_end_is_not_kept_though_its_own_undoing_was_interrupted(
    db: SwarmDB, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    with pytest.raises(TransactionError, match="ended inside"), db.transaction():
        inner = db.transaction()
        inner.__enter__()
        db.register_agent("a", "t")
        sys.setprofile(interrupt_at("_abandon_at_last"))
        try:
            del inner
        finally:
            sys.setprofile(None)
        assert len(db._connections.local.blocks) == 2
    assert agents(db) == set()


def test_a_block_is_entered_once(db: SwarmDB) -> None:
    block = db.transaction()
    with block:
        db.register_agent("a", "t")
        with pytest.raises(RuntimeError, match="entered once"):
            block.__enter__()
    with pytest.raises(RuntimeError, match="entered once"):
        block.__enter__()
    assert agents(db) == {"a"}


@pytest.mark.parametrize("error", [None, OopsError()])
def test_a_block_is_left_once(file_db: SwarmDB, error: OopsError | None) -> None:
    block = file_db.transaction()
    with block:
        file_db.register_agent("a", "t")
    with file_db.transaction() as raw:
        file_db.register_agent("b", "t")
        with pytest.raises(TransactionError, match="left once"):
            block.__exit__(None if error is None else type(error), error, None)
        with file_db.transaction() as inner:
            assert inner is raw
    idle = file_db._connections._idle
    assert len(idle) == len({id(held) for held in idle})
    assert agents(file_db) == {"a", "b"}


def test_an_interrupted_block_is_over_though_somebody_still_has_it(db: SwarmDB) -> None:
    block = db.transaction()
    with suppress(KeyboardInterrupt), block:
        db.register_agent("a", "t")
        raise KeyboardInterrupt
    assert db._connections.local.blocks == []
    db.register_agent("b", "t")
    with pytest.raises(TransactionError, match="left once"):
        block.__exit__(None, None, None)
    assert agents(db) == {"b"}


def test_an_inner_block_that_cannot_be_undone_by_itself_is_undone_with_the_outer(db: SwarmDB) -> None:
    with pytest.raises(TransactionError, match="ended inside"), db.transaction():
        db.register_agent("a", "t")
        with suppress(OopsError), db.transaction() as raw:
            db.register_agent("b", "t")
            raw.execute("RELEASE SAVEPOINT swarmdb_1")
            raise OopsError
    assert agents(db) == set()
    db.register_agent("c", "t")
    assert agents(db) == {"c"}


def test_blocks_are_nested_as_deep_as_one_likes(db: SwarmDB) -> None:
    with ExitStack() as stack:
        for number in range(100):
            stack.enter_context(db.transaction())
            db.register_agent(f"{number}", "t")
        names = [block._savepoint for block in db._connections.local.blocks]
        assert len({name[:63] for name in names}) == 100  # More of a name PostgreSQL does not look at.
    assert len(agents(db)) == 100
    assert db._connections.local.blocks == []


@pytest.mark.parametrize("error", [GeneratorExit, asyncio.CancelledError])
def test_a_connection_is_used_again_after_what_leaves_generators_and_coroutines(
    file_db: SwarmDB, error: type[BaseException]
) -> None:
    file_db.register_agent("a", "t")
    held = file_db._connections._idle[-1]
    with pytest.raises(error), file_db.transaction():
        file_db.register_agent("b", "t")
        raise error
    try:
        raise error
    except error:
        file_db.heartbeat("a")
    assert file_db._connections._idle[-1] is held
    assert agents(file_db) == {"a"}


def test_a_connection_is_used_again_after_a_session_that_was_undone(file_db: SwarmDB) -> None:
    file_db.register_agent("a", "t")
    held = file_db._connections._idle[-1]
    with pytest.raises(OopsError), file_db.session() as session:
        session.add(RegisteredAgent(agent_id="b", agent_type="t"))
        session.flush()
        raise OopsError
    assert file_db._connections._idle[-1] is held
    assert agents(file_db) == {"a"}


def test_a_connection_is_used_again_after_a_block_that_could_not_begin(path: Path) -> None:
    with SwarmDB(path) as other, SwarmDB(path, busy_timeout=0) as db:
        held = db._connections._idle[-1]
        with other.transaction(), pytest.raises(BusyError), db.transaction():
            pass
        assert db._connections._idle[-1] is held


def test_a_connection_on_which_an_interrupt_came_is_not_used_again(file_db: SwarmDB) -> None:
    raws = []
    for error in (OopsError, KeyboardInterrupt, None):
        with suppress(OopsError, KeyboardInterrupt), file_db.transaction() as raw:
            raws.append(raw)
            if error is not None:
                raise error
    assert raws[0] is raws[1]
    assert raws[1] is not raws[2]


@pytest.mark.parametrize("step", ["leave", "_keep", "_settle", "take_back", "_end", "give", "abandon"])
def test_an_interrupt_at_any_step_of_the_end_of_a_block_leaves_no_connection_that_is_closed(
    db: SwarmDB, step: str
) -> None:
    db.register_agent("a", "t")
    try:
        with pytest.raises(KeyboardInterrupt), db.transaction():
            db.register_agent("b", "t")
            sys.setprofile(interrupt_at(step))
    finally:
        sys.setprofile(None)
    connections = db._connections
    assert connections.local.blocks == []
    assert all(held.is_open and not held.in_transaction for held in connections._idle)
    db.register_agent("c", "t")
    assert agents(db) in ({"a", "c"}, {"a", "b", "c"})


def interrupted(*_: object, **options: object) -> None:
    raise KeyboardInterrupt


def _plain(block: AbstractContextManager[object], work: Callable[[], object]) -> None:
    with block:
        work()


def _stacked(block: AbstractContextManager[object], work: Callable[[], object]) -> None:
    with ExitStack() as stack:
        stack.enter_context(block)
        work()


@pytest.mark.parametrize("step", ["_Ending.__call__", "Block.leave"])
@pytest.mark.parametrize("use", [_plain, _stacked])
@pytest.mark.parametrize("is_named", [False, True])
def test_a_block_that_an_interrupt_kept_from_being_ended_takes_no_more_writes(
    db: SwarmDB, step: str, use: Callable[[Any, Any], None], *, is_named: bool
) -> None:
    def work() -> None:
        db.register_agent("a", "t")
        sys.setprofile(interrupt_at(step))

    names = []
    gc.disable()  # An exception that went through an `ExitStack` waits for it.
    try:
        try:
            if is_named:
                names.append(db.transaction())
                use(names[0], work)
            else:
                use(db.transaction(), work)
        except KeyboardInterrupt:
            sys.setprofile(None)
            assert db._connections.local.blocks == []
            db.register_agent("b", "t")  # While the interrupt's traceback is still there.
        db.register_agent("c", "t")
    finally:
        sys.setprofile(None)
        gc.enable()
    names.clear()
    with db.transaction():
        db.register_agent("d", "t")
    assert agents(db) == {"b", "c", "d"}


def test_a_named_block_that_two_interrupts_kept_from_beginning_and_ending_takes_no_writes(
    db: SwarmDB, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = db.transaction()
    monkeypatch.setattr(Block, "leave", interrupted)
    monkeypatch.setattr(block, "_give", interrupted)
    try:
        with block:
            raise AssertionError
    except KeyboardInterrupt:
        assert db._connections.local.blocks == []
        db.register_agent("a", "t")
    monkeypatch.undo()
    db.register_agent("b", "t")
    del block
    assert agents(db) == {"a", "b"}


def test_an_interrupt_at_the_abandoning_of_a_block_does_not_keep_its_lock(
    file_db: SwarmDB, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: lost.append(unraisable.exc_type))
    monkeypatch.setattr(Block, "leave", interrupted)
    try:
        with pytest.raises(KeyboardInterrupt), file_db.transaction():
            file_db.register_agent("a", "t")
            sys.setprofile(interrupt_at("discard"))
    finally:
        sys.setprofile(None)
    assert lost == [KeyboardInterrupt]
    with closing(sqlite3.connect(file_db.db_path, timeout=0)) as other:
        other.execute("BEGIN IMMEDIATE")


def test_a_connection_of_a_single_call_on_which_an_interrupt_came_is_not_used_again(file_db: SwarmDB) -> None:
    file_db.register_agent("a", "t")
    held = file_db._connections._idle[-1]
    try:
        with pytest.raises(KeyboardInterrupt):
            sys.setprofile(interrupt_at("fetch"))
            file_db.list_agents()
    finally:
        sys.setprofile(None)
    assert not held.is_open
    assert held not in file_db._connections._idle


@pytest.mark.parametrize("step", ["_new_block", "take", "abandon_with", "begin", "lend"])
def test_an_interrupt_at_any_step_of_the_beginning_of_a_block_comes_out_as_itself(db: SwarmDB, step: str) -> None:
    db.register_agent("a", "t")
    sys.setprofile(interrupt_at(step))
    try:
        with pytest.raises(KeyboardInterrupt), db.transaction():
            pass
    finally:
        sys.setprofile(None)
    connections = db._connections
    assert connections.local.blocks == []
    assert all(held.is_open and not held.in_transaction for held in connections._idle)
    db.register_agent("b", "t")
    assert agents(db) == {"a", "b"}


def test_an_interrupt_after_an_inner_block_was_undone_leaves_the_outer_as_it_was(db: SwarmDB) -> None:
    def interrupt(frame: FrameType, kind: str, argument: object) -> None:
        caller = frame.f_back
        if kind == "call" and caller is not None and (caller.f_code.co_name, frame.f_code.co_name) == UNDONE:
            raise KeyboardInterrupt  # Python then takes the profile function away.

    with db.transaction():
        db.register_agent("a", "t")
        try:
            with pytest.raises(KeyboardInterrupt), db.transaction():
                db.register_agent("b", "t")
                sys.setprofile(interrupt)
                raise OopsError
        finally:
            sys.setprofile(None)
    assert agents(db) == {"a"}


#: Where the inner block has been undone.
UNDONE = ("_undo", "__exit__")


def test_what_a_signal_handler_reads_while_a_block_begins_is_no_part_of_it(file_db: SwarmDB) -> None:
    read: list[set[str]] = []

    def handle(frame: FrameType, kind: str, argument: object) -> None:
        if kind == "call" and frame.f_code.co_qualname == "SQLite.begin":
            sys.setprofile(None)
            read.append(agents(file_db))

    file_db.register_agent("a", "t")
    sys.setprofile(handle)
    try:
        with file_db.transaction():
            file_db.register_agent("b", "t")
    finally:
        sys.setprofile(None)
    assert read == [{"a"}]


def test_an_older_interrupt_is_not_mistaken_for_the_one_that_an_error_came_up_in() -> None:
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        try:
            raise OopsError
        except OopsError:
            with pytest.raises(StorageError, match="disk"), translating("here"):
                raise sqlite3.OperationalError("disk") from None


def test_an_interrupt_comes_out_as_itself_though_cleaning_up_after_it_fails() -> None:
    with pytest.raises(KeyboardInterrupt), translating("here"):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as interrupt:
            raise InvalidRequestError("This session is in the middle of something") from interrupt


def test_errors_of_another_kind_are_left_as_they_are() -> None:
    with pytest.raises(OopsError), translating("here"):
        raise OopsError


def test_an_error_in_the_handling_of_an_interrupt_is_not_mistaken_for_it(db: SwarmDB) -> None:
    db.insert_event(EVENT, "taken")
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        with pytest.raises(ConflictError), db.session() as session:
            session.add(AgentEvent(event_type=EventType.SPAWN, agent_id="a", agent_type="t", event_id="taken"))


def test_a_caught_failure_of_an_inner_block_undoes_only_that(db: SwarmDB) -> None:
    with db.transaction():
        db.register_agent("outer", "t")
        with pytest.raises(OopsError), db.transaction():
            db.register_agent("inner", "t")
            with db.session() as session:
                session.add(RegisteredAgent(agent_id="innermost", agent_type="t"))
            raise OopsError
        with db.session() as session:
            session.add(RegisteredAgent(agent_id="second", agent_type="t"))
        with pytest.raises(ConflictError):
            db.insert_events(
                [EVENT, AgentEvent(event_type=EventType.SPAWN, agent_id="a", agent_type="t", event_id="x")] * 2
            )
        db.register_agent("after", "t")

    assert agents(db) == {"outer", "second", "after"}
    assert db.get_events() == []


def test_rows_are_addressed_by_name_and_only_inside(local_db: SwarmDB) -> None:
    local_db.register_agent("a", "t")
    with local_db.transaction() as conn:
        row = conn.execute("SELECT * FROM agent_registry").fetchone()
        assert isinstance(row, sqlite3.Row)
        assert row["agent_id"] == "a"
        assert local_db.get_agent("a") is not None

    assert local_db.get_agent("a") is not None


def test_domain_methods_read_rows_of_their_own_whatever_a_block_wants_of_its_rows(local_db: SwarmDB) -> None:
    local_db.register_agent("a", "t")
    with local_db.transaction() as conn:
        conn.row_factory = lambda cursor, row: "mine"  # type: ignore[attr-defined]
        assert conn.execute("SELECT 1").fetchone() == "mine"
        assert agents(local_db) == {"a"}


def test_a_session_is_typed_and_joined(db: SwarmDB) -> None:
    with db.session() as session:
        session.add(RegisteredAgent(agent_id="a", agent_type="t", metadata={"k": [1]}))
        found = db.get_agent("a")  # The domain call sees what is pending.
        assert found is not None
        assert found.metadata_ == {"k": [1]}
        db.update_agent_status("a", "running")
        loaded = session.exec(select(RegisteredAgent).where(col(RegisteredAgent.status) == AgentStatus.RUNNING)).one()
        db.update_agent_status("a", "error")
        assert loaded.status is AgentStatus.ERROR  # The session sees what the domain call wrote.

    assert agents(db) == {"a"}


def test_a_session_that_is_first_used_in_an_inner_block_goes_on_after_it(db: SwarmDB) -> None:
    with db.session() as session:
        with db.transaction():
            session.add(RegisteredAgent(agent_id="a", agent_type="t"))
            db.register_agent("b", "t")
        session.add(RegisteredAgent(agent_id="c", agent_type="t"))
    assert agents(db) == {"a", "b", "c"}


def test_objects_of_a_session_stay_readable_after_it(db: SwarmDB) -> None:
    db.register_agent("a", "t")
    with db.session() as session:
        loaded = session.exec(select(RegisteredAgent)).one()

    assert loaded.agent_id == "a"


def test_a_session_edits_what_a_domain_method_returned(db: SwarmDB) -> None:
    db.register_agent("a", "t")
    db.register_agent("gone", "t")
    agent, gone = db.get_agent("a"), db.get_agent("gone")
    assert agent is not None
    with db.session() as session:
        session.add(agent)
        agent.agent_type = "other"
        session.delete(session.merge(gone))

    assert [(found.agent_id, found.agent_type) for found in db.list_agents()] == [("a", "other")]


def test_a_commit_of_the_session_is_final_only_with_the_block(db: SwarmDB) -> None:
    with pytest.raises(OopsError), db.session() as session:
        session.add(RegisteredAgent(agent_id="a", agent_type="t"))
        session.commit()
        session.add(RegisteredAgent(agent_id="b", agent_type="t"))
        session.commit()
        assert agents(db) == {"a", "b"}
        raise OopsError

    assert agents(db) == set()


def test_a_conflict_at_the_end_of_a_session_is_a_conflict_error(db: SwarmDB) -> None:
    db.register_agent("a", "t")
    with pytest.raises(ConflictError), db.session() as session:
        session.add(RegisteredAgent(agent_id="b", agent_type="t"))
        session.add(RegisteredAgent(agent_id="a", agent_type="other"))

    assert [(agent.agent_id, agent.agent_type) for agent in db.list_agents()] == [("a", "t")]


def test_a_conflict_before_a_domain_call_in_a_session_is_a_conflict_error(db: SwarmDB) -> None:
    db.register_agent("a", "t")
    with pytest.raises(ConflictError), db.session() as session:
        session.add(RegisteredAgent(agent_id="a", agent_type="other"))
        db.get_events()


def test_sessions_own_errors_pass_through(db: SwarmDB) -> None:
    db.register_agent("a", "t")
    with pytest.raises(IntegrityError), db.session() as session:
        session.add(RegisteredAgent(agent_id="a", agent_type="other"))
        session.flush()


def test_a_read_only_session_is_a_snapshot(file_db: SwarmDB) -> None:
    file_db.register_agent("a", "t")
    with SwarmDB(file_db.db_path, busy_timeout=0) as other, file_db.session(readonly=True) as session:
        other.register_agent("b", "t")  # It waits for nobody, and keeps nobody waiting.

        assert agents(file_db) == {"a"}
        assert len(session.exec(select(RegisteredAgent)).all()) == 1
        assert agents(other) == {"a", "b"}

    assert agents(file_db) == {"a", "b"}


def test_a_read_only_session_refuses_every_write(db: SwarmDB) -> None:
    with db.session(readonly=True):
        with pytest.raises(TransactionError, match="refuses writes"):
            db.register_agent("a", "t")
        with pytest.raises(TransactionError, match="refuses writes"), db.transaction():
            pass
        with pytest.raises(TransactionError, match="refuses writes"):
            db.insert_events([EVENT])
        with db.session(readonly=True):
            assert agents(db) == set()
        raw = db._get_connection()
        with pytest.raises(DRIVER_ERRORS, match=r"readonly|read-only"), db.session(readonly=True):
            raw.execute("DELETE FROM agent_registry")
    with pytest.raises(TransactionError, match="writes nothing"), db.session(readonly=True) as session:
        session.add(RegisteredAgent(agent_id="a", agent_type="t"))

    assert agents(db) == set()
    db.register_agent("b", "t")
    assert agents(db) == {"b"}


def test_a_read_only_block_in_a_damaged_file_ends_as_any_other(path: Path) -> None:
    with SwarmDB(path) as db:
        db.insert_event(EVENT)
    with closing(sqlite3.connect(path)) as raw:
        (root,) = raw.execute("SELECT rootpage FROM sqlite_master WHERE name = 'agent_events'").fetchone()
    content = bytearray(path.read_bytes())
    content[(root - 1) * 4096 : root * 4096] = bytes(4096)
    path.write_bytes(content)

    with SwarmDB(path) as db:
        blocks: list[AbstractContextManager[object]] = [db.session(readonly=True), db._block(readonly=True)]
        for block in blocks:
            with block, pytest.raises(StorageError, match="malformed"):
                db.get_events()  # After which a commit would fail as well.


def test_a_raw_end_inside_a_read_only_session_leaves_the_store_writable(db: SwarmDB) -> None:
    with pytest.raises(TransactionError, match="ended inside"), db.session(readonly=True):
        db.get_agent("x")
        db._get_connection().rollback()

    db.register_agent("a", "t")
    assert agents(db) == {"a"}


def test_a_read_only_session_inside_a_transaction_refuses_writes_until_it_ends(db: SwarmDB) -> None:
    with db.transaction() as conn:
        db.register_agent("a", "t")
        with db.session(readonly=True):
            assert agents(db) == {"a"}
            with pytest.raises(DRIVER_ERRORS, match=r"readonly|read-only"), db.session(readonly=True):
                conn.execute("DELETE FROM agent_registry")
        db.register_agent("b", "t")

    assert agents(db) == {"a", "b"}


@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_a_raw_end_inside_a_block_is_noticed(db: SwarmDB, end: str) -> None:
    with pytest.raises(TransactionError, match="ended inside"), db.transaction() as conn:
        conn.execute("INSERT INTO agent_registry (agent_id, agent_type, status, spawn_time) VALUES ('a','t','error',1)")
        getattr(conn, end)()

    assert agents(db) == ({"a"} if end == "commit" else set())
    db.register_agent("after", "t")
    assert "after" in agents(db)


@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_no_write_slips_out_after_a_raw_end(db: SwarmDB, end: str) -> None:
    with pytest.raises(TransactionError, match="ended inside"), db.transaction() as conn:
        getattr(conn, end)()
        conn.execute(
            "INSERT INTO agent_registry (agent_id, agent_type, status, spawn_time) VALUES ('raw','t','error',1)"
        )
        db.register_agent("domain", "t")
        with db.transaction():
            db.register_agent("nested", "t")

    assert agents(db) == set()


def test_a_block_whose_outer_block_has_ended_touches_nobody(file_db: SwarmDB) -> None:
    outer, inner = file_db.transaction(), file_db.transaction()
    outer.__enter__()
    inner.__enter__()
    file_db.register_agent("mine", "t")
    outer.__exit__(None, None, None)
    ended, proceed = threading.Event(), threading.Event()

    def use_the_connection() -> None:
        with file_db.transaction():
            file_db.register_agent("other", "t")
            ended.set()
            proceed.wait()

    other = threading.Thread(target=use_the_connection)
    other.start()
    ended.wait()
    with pytest.raises(TransactionError, match="ended inside"):
        file_db.register_agent("leaked", "t")
    assert not inner.__exit__(OopsError, OopsError(), None)  # The exception goes on.
    proceed.set()
    other.join()

    assert agents(file_db) == {"mine", "other"}


def test_what_a_domain_call_changed_is_readable_after_the_session(db: SwarmDB) -> None:
    for agent_id in ("a", "gone", "kept"):
        db.register_agent(agent_id, "t")
    with db.session() as session:
        agent, gone = session.get_one(RegisteredAgent, "a"), session.get_one(RegisteredAgent, "gone")
        event = AgentEvent(event_type=EventType.SPAWN, agent_id="a", agent_type="t")
        session.add(event)
        db.update_agent_status("a", "running")
        db.delete_agent("gone")

    assert (agent.agent_id, agent.status, event.agent_id) == ("a", "running", "a")
    with pytest.raises(DetachedInstanceError):
        gone.status  # noqa: B018 (its row is gone, and reading it again raises)
    assert agents(db) == {"a", "kept"}


def test_a_flush_that_failed_and_was_caught_is_told_apart_from_a_raw_end(db: SwarmDB) -> None:
    db.register_agent("a", "t")
    with pytest.raises(TransactionError, match="a flush of this session failed"), db.session() as session:
        session.add(RegisteredAgent(agent_id="a", agent_type="other"))
        with pytest.raises(ConflictError):
            db.get_events()
        db.register_agent("b", "t")

    assert agents(db) == {"a"}


def test_a_bad_value_of_a_session_is_named(db: SwarmDB) -> None:
    with pytest.raises(InvalidInputError, match="value: got nan"), db.session() as session:
        session.add(SessionMemory(session_id="s", memory_type=MemoryType.SEMANTIC, key="k", value=float("nan")))

    assert db.list_memories("s") == []


@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_a_domain_call_right_after_a_raw_end_is_refused(db: SwarmDB, end: str) -> None:
    with pytest.raises(TransactionError, match="ended inside"), db.transaction() as conn:
        getattr(conn, end)()
        for call in (lambda: db.register_agent("a", "t"), db.get_events, lambda: db.session().__enter__()):
            with pytest.raises(TransactionError, match="ended inside"):
                call()

    assert agents(db) == set()


def test_an_exception_after_a_raw_end_is_the_one_that_comes_out(db: SwarmDB) -> None:
    with pytest.raises(OopsError), db.transaction(), db.transaction() as conn:
        conn.commit()
        conn.execute("INSERT INTO agent_registry (agent_id, agent_type, status, spawn_time) VALUES ('a','t','error',1)")
        raise OopsError
    with pytest.raises(OopsError), db.session() as session:
        session.add(RegisteredAgent(agent_id="a", agent_type="t"))
        session.flush()
        db._get_connection().rollback()
        raise OopsError

    assert agents(db) == set()


def test_a_raw_end_inside_a_session_is_noticed(db: SwarmDB) -> None:
    with pytest.raises(TransactionError, match="ended inside"), db.session() as session:
        session.add(RegisteredAgent(agent_id="a", agent_type="t"))
        db._get_connection().rollback()

    assert agents(db) == set()


def test_a_raw_end_around_a_session_is_noticed_though_another_transaction_began(db: SwarmDB) -> None:
    with pytest.raises(TransactionError, match="ended inside"), db.transaction() as conn, db.session() as session:
        session.add(RegisteredAgent(agent_id="a", agent_type="t"))
        session.flush()
        conn.rollback()
        conn.execute("DELETE FROM agent_registry")

    assert agents(db) == set()


def test_a_connection_that_is_closed_inside_a_block_is_noticed(file_db: SwarmDB) -> None:
    with pytest.raises(TransactionError, match="ended inside"), file_db.transaction() as conn:
        file_db.register_agent("a", "t")
        conn.close()  # type: ignore[attr-defined]

    assert agents(file_db) == set()
    file_db.register_agent("b", "t")
    assert agents(file_db) == {"b"}


def test_a_second_writer_waits_and_then_gives_up(impatient: SwarmDB) -> None:
    refused: list[BaseException] = []

    def write() -> None:
        for call in (
            lambda: impatient.register_agent("b", "t"),
            lambda: impatient.insert_event(EVENT),
            lambda: impatient.insert_events([EVENT]),
            lambda: impatient.transaction().__enter__(),
        ):
            try:
                call()
            except BusyError as error:
                refused.append(error)

    with impatient.transaction():
        impatient.register_agent("a", "t")
        thread = threading.Thread(target=write)
        thread.start()
        thread.join()

    assert len(refused) == 4
    assert all(isinstance(error, sqlite3.OperationalError) for error in refused)
    assert agents(impatient) == {"a"}
    assert impatient.get_events() == []


def test_another_thread_does_not_join_even_with_a_copied_context(file_db: SwarmDB) -> None:
    seen: list[set[str]] = []
    with file_db.transaction():
        file_db.register_agent("a", "t")
        context = contextvars.copy_context()
        thread = threading.Thread(target=lambda: context.run(lambda: seen.append(agents(file_db))))
        thread.start()
        thread.join()

    assert seen == [set()]


def test_read_modify_write_loses_no_update(file_db: SwarmDB) -> None:
    file_db.register_agent("counter", "t", metadata={"count": 0})

    def count_up() -> None:
        for _ in range(25):
            with file_db.session() as session:
                agent = session.get_one(RegisteredAgent, "counter")
                agent.metadata_ = {"count": agent.metadata_["count"] + 1}

    threads = [threading.Thread(target=count_up) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    counter = file_db.get_agent("counter")
    assert counter is not None
    assert counter.metadata_ == {"count": 100}


def test_another_task_of_the_thread_is_refused_at_once_and_reads_what_is_committed(file_db: SwarmDB) -> None:
    async def holder(entered: asyncio.Event, leave: asyncio.Event) -> None:
        with file_db.transaction():
            file_db.register_agent("mine", "t")
            entered.set()
            await leave.wait()
            assert agents(file_db) == {"mine"}
            file_db.update_agent_status("mine", "running")

    async def main() -> None:
        entered, leave = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(holder(entered, leave))
        await entered.wait()
        async with asyncio.timeout(5):  # The busy timeout is 30 seconds.
            assert agents(file_db) == set()
            with pytest.raises(BusyError, match="another asyncio task of this thread"):
                file_db.register_agent("other", "t")
            with pytest.raises(BusyError, match="another asyncio task of this thread"), file_db.transaction():
                pass
            with file_db.session(readonly=True):
                assert agents(file_db) == set()
        leave.set()
        await task

    asyncio.run(main())

    assert agents(file_db) == {"mine"}


def test_in_memory_a_reading_task_is_refused_as_well() -> None:
    async def main() -> None:
        with db.transaction():
            async with asyncio.timeout(5):
                with pytest.raises(BusyError, match="another asyncio task of this thread"):
                    await asyncio.create_task(read())

    async def read() -> None:
        db.list_agents()

    with SwarmDB(":memory:") as db:
        asyncio.run(main())


@pytest.mark.parametrize("memory", ["memory", ""])
def test_nothing_waits_for_a_block_of_its_own_thread(path: Path, memory: str) -> None:
    async def main() -> None:
        with db.transaction():
            await asyncio.create_task(look_after())

    async def look_after() -> None:
        calls = [db.vacuum, *([lambda: db.backup(path.with_name("b.db")), db.size_bytes, db.check] if memory else [])]
        for call in calls:
            with pytest.raises(BusyError, match="another asyncio task of this thread"):
                call()

    with SwarmDB(":memory:" if memory else path) as db:
        asyncio.run(main())


def test_in_memory_nothing_is_read_beside_what_the_thread_has_open(path: Path) -> None:
    with SwarmDB(":memory:") as db:
        db._get_connection().execute("DELETE FROM agent_registry")
        for call in (db.list_agents, db.vacuum, lambda: db.backup(path), db.size_bytes):
            with pytest.raises(TransactionError, match="_get_connection"):
                call()
        db._get_connection().rollback()
        assert db.list_agents() == []


def test_tasks_of_a_thread_may_read_side_by_side(file_db: SwarmDB) -> None:
    file_db.register_agent("a", "t")

    async def read(others: asyncio.Barrier) -> int:
        with file_db.session(readonly=True):
            await others.wait()
            return len(agents(file_db))

    async def main() -> list[int]:
        barrier = asyncio.Barrier(3)
        return await asyncio.gather(*(read(barrier) for _ in range(3)))

    assert asyncio.run(main()) == [1, 1, 1]


def test_to_thread_inside_a_block_does_not_join_it(file_db: SwarmDB) -> None:
    async def main() -> set[str]:
        with file_db.transaction():
            file_db.register_agent("a", "t")
            return await asyncio.to_thread(agents, file_db)

    assert asyncio.run(main()) == set()


def test_a_block_may_end_in_another_thread(file_db: SwarmDB) -> None:
    block = file_db.transaction()
    block.__enter__()
    file_db.register_agent("a", "t")
    thread = threading.Thread(target=lambda: block.__exit__(None, None, None))
    thread.start()
    thread.join()

    assert agents(file_db) == {"a"}
    file_db.register_agent("b", "t")
    assert agents(file_db) == {"a", "b"}


def test_the_pinned_connection_is_the_same_for_a_thread_and_another_for_others(file_db: SwarmDB) -> None:
    mine = file_db._get_connection()
    others: list[object] = []
    thread = threading.Thread(target=lambda: others.append(file_db._get_connection()))
    thread.start()
    thread.join()

    assert file_db._get_connection() is mine
    assert others[0] is not mine


def test_the_pinned_connection_is_the_transactions_inside_one(db: SwarmDB) -> None:
    with db.transaction() as conn:
        assert db._get_connection() is conn


def test_what_the_pinned_connection_wrote_counts_once_it_is_committed(file_db: SwarmDB) -> None:
    conn = file_db._get_connection()
    conn.execute("INSERT INTO agent_registry (agent_id, agent_type, status, spawn_time) VALUES ('a','t','error',1)")
    assert agents(file_db) == set()
    conn.commit()
    assert agents(file_db) == {"a"}


def test_a_domain_write_beside_an_open_pinned_transaction_is_refused(file_db: SwarmDB) -> None:
    conn = file_db._get_connection()
    conn.execute("DELETE FROM agent_registry")
    for call in (
        lambda: file_db.register_agent("a", "t"),
        lambda: file_db.insert_event(EVENT),
        lambda: file_db.insert_events([EVENT]),
        lambda: file_db.session().__enter__(),
    ):
        with pytest.raises(TransactionError, match="_get_connection"):
            call()
    assert agents(file_db) == set()

    conn.rollback()
    file_db.register_agent("a", "t")
    assert agents(file_db) == {"a"}


def test_a_pinned_connection_that_was_closed_is_replaced(file_db: SwarmDB) -> None:
    conn = file_db._get_connection()
    conn.close()  # type: ignore[attr-defined]

    file_db.register_agent("a", "t")
    assert file_db._get_connection().execute("SELECT agent_id FROM agent_registry").fetchone()["agent_id"] == "a"


def test_the_pinned_connection_of_the_thread_that_closes_is_closed(file_db: SwarmDB) -> None:
    conn = file_db._get_connection()
    file_db.close()
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        conn.execute("SELECT 1")


def test_blocks_and_calls_after_close_are_refused(db: SwarmDB) -> None:
    with pytest.raises(ClosedError), db.transaction():
        db.register_agent("a", "t")
        db.close()
        db.register_agent("b", "t")
    for call in (db.get_events, db.vacuum, db._get_connection, lambda: db.session().__enter__()):
        with pytest.raises(ClosedError):
            call()


def test_a_block_that_is_open_at_close_commits(path: Path) -> None:
    db = SwarmDB(path)
    with db.transaction() as conn:
        db.register_agent("a", "t")
        db.close()
        conn.execute("UPDATE agent_registry SET agent_type = 'kept'")

    with SwarmDB(path) as again:
        assert [agent.agent_type for agent in again.list_agents()] == ["kept"]


def test_vacuum_and_backup_are_refused_in_a_block(db: SwarmDB, tmp_path: Path) -> None:
    with db.transaction():
        with pytest.raises(TransactionError, match="vacuum"):
            db.vacuum()
        with pytest.raises(TransactionError, match="backup"):
            db.backup(tmp_path / "copy.db")


def test_a_text_factory_that_is_set_in_a_block_ends_with_it(path: Path) -> None:
    with SwarmDB(path) as db:
        db.register_agent("a", "t")
        with db.transaction() as raw:
            raw.text_factory = bytes  # type: ignore[attr-defined]

        assert db.get_agent("a") is not None
        with db.transaction() as again:
            assert again is raw
            assert tuple(again.execute("SELECT agent_id FROM agent_registry").fetchone()) == ("a",)
