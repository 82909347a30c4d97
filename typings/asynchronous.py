"""The facade for asyncio: the types of SwarmDB, awaited."""

from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, assert_type

from sqlmodel import Session, select

from moai_flow.memory import (
    AgentEvent,
    AgentSummary,
    AsyncConnection,
    AsyncCursor,
    AsyncSession,
    AsyncSwarmDB,
    AsyncTrackedAgent,
    CheckReport,
    CleanupReport,
    EventType,
    MetricBucket,
    RegisteredAgent,
    RetentionPolicy,
    SessionMemory,
    SwarmSummary,
    TaskMetric,
    TaskSummary,
    TrackedTask,
)


async def opening() -> None:
    async with AsyncSwarmDB("swarm.db", durability="full", pool_size=4) as db:
        assert_type(db, AsyncSwarmDB)
    assert_type(await AsyncSwarmDB().close(), None)


async def calls(db: AsyncSwarmDB) -> None:
    assert_type(
        await db.insert_event({"event_type": "spawn", "agent_id": "a", "agent_type": "t", "metadata": {"n": 1}}), str
    )
    assert_type(
        await db.insert_events([AgentEvent(event_type=EventType.SPAWN, agent_id="a", agent_type="t")]), list[str]
    )
    assert_type(await db.get_events("a", "error", limit=5), list[AgentEvent])
    assert_type(await db.register_agent("a", "t", "running", {"n": 1}), RegisteredAgent)
    assert_type(await db.update_agent_status("a", "complete", duration_ms=3), RegisteredAgent)
    assert_type(await db.get_agent("a"), RegisteredAgent | None)
    assert_type(await db.get_active_agents(), list[RegisteredAgent])
    assert_type(await db.heartbeat("a"), bool)
    assert_type(await db.find_stale_agents(timedelta(minutes=1)), list[RegisteredAgent])
    assert_type(await db.get_task_metrics(result="timeout"), list[TaskMetric])
    assert_type(await db.store_task_metrics([{"task_id": "t", "agent_id": "a", "result": "success"}]), list[datetime])
    assert_type(await db.summarize_tasks("a"), TaskSummary)
    assert_type(await db.summarize_agents(order_by="p95_ms"), list[AgentSummary])
    assert_type(await db.metric_series("duration_ms", bucket=timedelta(hours=1)), list[MetricBucket])
    assert_type(await db.summarize_swarm("s"), SwarmSummary)
    assert_type(await db.list_memories("s"), list[SessionMemory])
    assert_type(await db.cleanup(30, dry_run=True), CleanupReport)
    assert_type(await db.check(), CheckReport)
    assert_type(await db.backup("copy.db"), Path)
    assert_type(await db.schema_version, str)
    assert_type(await db.retention, RetentionPolicy)
    assert_type(await db.last_cleanup, datetime | None)
    assert_type(db.db_path, Path)


async def memory(db: AsyncSwarmDB) -> None:
    assert_type(await db.store_memory("s", "semantic", "k", {"any": ["JSON"]}, ttl_hours=1), int)
    assert_type(await db.get_memory("s", "semantic", "k"), Any)
    assert_type(await db.get_memory("s", "semantic", "k", as_type=int), int | None)
    assert_type(await db.get_memory("s", "semantic", "k", as_type=int, default=""), int | str)


async def iterating(db: AsyncSwarmDB) -> None:
    async for event in db.iter_events("a", batch_size=10):
        assert_type(event, AgentEvent)
    async for event in db.watch_events(after=0, types=["error"], poll=0.1):
        assert_type(event.cursor.id, int)


async def blocks(db: AsyncSwarmDB) -> None:
    async with db.transaction() as connection:
        assert_type(connection, AsyncConnection)
        cursor = assert_type(await connection.execute("SELECT ?", (1,)), AsyncCursor)
        assert_type(cursor.rowcount, int)
        assert_type(await cursor.fetchall(), list[Any])
        assert_type(await connection.run(lambda raw: raw.execute("SELECT 1").rowcount), int)
    async with db.session(readonly=True) as session:
        assert_type(session, AsyncSession)

        def load(inner: Session) -> list[AgentEvent]:
            return list(inner.exec(select(AgentEvent)).all())

        assert_type(await session.run(load), list[AgentEvent])
    async with db.track_task("t", "a") as task:
        assert_type(task, TrackedTask)
        task.tokens_used = 3
    async with db.track_agent("a", "t", {"n": 1}) as agent:
        assert_type(agent, AsyncTrackedAgent)
        assert_type(await agent.heartbeat(), bool)


async def mistakes(db: AsyncSwarmDB) -> None:
    AsyncSwarmDB(pool=4)  # type: ignore[call-arg]
    AsyncSwarmDB(pool_size="4")  # type: ignore[arg-type]
    await db.update_agent_status("a", "runing")  # type: ignore[arg-type]
    await db.insert_event({"event_type": "spawn", "agent_id": "a"})  # type: ignore[arg-type]
    await db.get_memory("s", "semantic", "k", as_typ=int)  # type: ignore[call-overload]
    await db.get_agent()  # type: ignore[call-arg]
    for _ in db.iter_events():  # type: ignore[attr-defined]
        pass
    with db.transaction():  # type: ignore[attr-defined]
        pass
    # A forgotten await, where the value is used.
    _ = db.get_agent("a").status  # type: ignore[attr-defined]
    _ = (await db.get_agent("a")).status  # type: ignore[union-attr]
    if db.get_active_agents():  # type: ignore[truthy-bool]
        pass
    db.heartbeat("a")  # type: ignore[unused-coroutine]
