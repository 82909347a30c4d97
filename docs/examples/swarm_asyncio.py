"""An asyncio program: many tasks, one loop that never waits for the disk, and a watcher.

Run it: ``python swarm_asyncio.py``
"""

import asyncio

from moai_flow.memory import AsyncSwarmDB, TaskResult


async def work(db: AsyncSwarmDB, agent_id: str) -> None:
    """Do three tasks, of which one runs out of time."""
    async with db.track_agent(agent_id, "worker") as agent:
        for number in range(3):
            try:
                async with db.track_task(f"{agent_id}-{number}", agent_id) as task, asyncio.timeout(0.05):
                    await asyncio.sleep(1 if number == 1 else 0)
                    task.tokens_used = 100
            except TimeoutError:
                await agent.heartbeat()


async def main() -> None:
    """Run ten workers, with a watcher beside them."""
    async with AsyncSwarmDB("asyncio.db") as db:
        ended: list[str] = []

        async def watch() -> None:
            async for event in db.watch_events(0, types="complete", poll=0.02):
                ended.append(event.agent_id)  # noqa: PERF401 (it never ends, and is to be seen meanwhile)

        watcher = asyncio.create_task(watch())
        async with asyncio.TaskGroup() as group:
            for number in range(10):
                group.create_task(work(db, f"worker-{number}"))
        while len(ended) < 10:
            await asyncio.sleep(0.01)
        watcher.cancel()
        summary = await db.summarize_tasks()
        print(f"{len(ended)} workers ended, {summary.count} tasks, {summary.results[TaskResult.TIMEOUT]} timeouts")


if __name__ == "__main__":
    asyncio.run(main())
