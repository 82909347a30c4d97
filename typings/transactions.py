"""Transactions: raw SQL, and typed sessions."""

from typing import Any, assert_type

from sqlmodel import Session, col, select

from moai_flow.memory import AgentEvent, AgentStatus, RawConnection, RawCursor, RegisteredAgent, SwarmDB


def raw(db: SwarmDB) -> None:
    with db.transaction() as connection:
        assert_type(connection, RawConnection)
        cursor = assert_type(connection.cursor(), RawCursor)
        cursor.execute("DELETE FROM agent_events WHERE agent_id = ?", ("a",))
        cursor.executemany("DELETE FROM agent_events WHERE agent_id = ?", [("a",), ("b",)])
        assert_type(cursor.rowcount, int)
        assert_type(cursor.lastrowid, Any)
        assert_type(connection.execute("SELECT 1"), RawCursor)
        assert_type(cursor.fetchone(), Any)
        assert_type(cursor.fetchmany(10), list[Any])
        assert_type(cursor.fetchall(), list[Any])
        for row in cursor:
            assert_type(row, Any)
        cursor.close()


def own_connection(db: SwarmDB) -> None:
    connection = assert_type(db._get_connection(), RawConnection)  # pyright: ignore[reportPrivateUsage]
    connection.commit()
    connection.rollback()


def typed(db: SwarmDB) -> None:
    with db.session() as session:
        assert_type(session, Session)
        agent = assert_type(session.get(RegisteredAgent, "a"), RegisteredAgent | None)
        if agent:
            agent.status = AgentStatus.RUNNING
    with db.session(readonly=True) as session:
        recent = select(AgentEvent).order_by(col(AgentEvent.timestamp).desc())
        assert_type(session.exec(recent).first(), AgentEvent | None)


def mistakes(db: SwarmDB) -> None:
    db.transaction().execute("SELECT 1")  # type: ignore[attr-defined]
    db.session(True)  # type: ignore[call-arg]  # noqa: FBT003
    with db.transaction() as connection:
        connection.execute(7)  # type: ignore[arg-type]
    with db.session() as session:
        session.get(RegisteredAgent, "a").status = AgentStatus.RUNNING  # type: ignore[union-attr]
