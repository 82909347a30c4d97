"""Transaction patterns: all or nothing, savepoints, raw SQL and typed sessions.

Run it: ``python transactions.py``
"""

from sqlmodel import col, select

from moai_flow.memory import AgentEvent, ConflictError, RegisteredAgent, SwarmDB


def all_or_nothing(db: SwarmDB) -> None:
    """An exception undoes the whole block."""
    try:
        with db.transaction():
            db.register_agent("agent-1", "expert-backend")
            raise RuntimeError("no budget left")
    except RuntimeError as error:
        print(f"rolled back: {error}; {len(db.list_agents())} agents")


def savepoint(db: SwarmDB) -> None:
    """An inner block that fails, and is caught, leaves the outer one whole."""
    with db.transaction():
        db.register_agent("agent-1", "expert-backend")
        db.insert_event({"event_type": "spawn", "agent_id": "agent-1", "agent_type": "expert-backend"}, event_id="e-1")
        try:
            with db.transaction():
                db.register_agent("agent-2", "expert-frontend")
                db.insert_event({"event_type": "spawn", "agent_id": "agent-2", "agent_type": "x"}, event_id="e-1")
        except ConflictError:
            print("e-1 is taken: agent-2 is not registered")
    print([agent.agent_id for agent in db.list_agents()])


def raw_and_typed(db: SwarmDB) -> None:
    """Raw SQL, a typed session and calls of SwarmDB in one transaction."""
    with db.session() as session, db.transaction() as connection:
        connection.execute("UPDATE agent_registry SET agent_type = ? WHERE agent_id = ?", ("architect", "agent-1"))
        agent = session.get(RegisteredAgent, "agent-1", populate_existing=True)
        if agent is not None:
            print(f"{agent.agent_id} is an {agent.agent_type}")
        session.add(
            AgentEvent.model_validate({"event_type": "error", "agent_id": "agent-1", "agent_type": "architect"})
        )
    with db.session(readonly=True) as session:
        events = select(AgentEvent).order_by(col(AgentEvent.id))
        print([event.event_type.value for event in session.exec(events)])


def main() -> None:
    """Show each pattern."""
    with SwarmDB(":memory:") as db:
        all_or_nothing(db)
        savepoint(db)
        raw_and_typed(db)


if __name__ == "__main__":
    main()
