"""Multi-threaded coordination: a pool of workers that share one SwarmDB, and never do a task twice.

Run it: ``python threads.py``
"""

from concurrent.futures import ThreadPoolExecutor

from moai_flow.memory import SwarmDB

TASKS = [f"task-{number:02}" for number in range(20)]


def next_task(db: SwarmDB) -> str | None:
    """Take the next task: reading and writing are one step, so no other worker gets the same."""
    with db.transaction():
        taken = db.get_memory("run-1", "context_hint", "taken", as_type=int, default=0)
        if taken == len(TASKS):
            return None
        db.store_memory("run-1", "context_hint", "taken", taken + 1)
        return TASKS[taken]


def work(db: SwarmDB, agent_id: str) -> int:
    """Do tasks until there are none left, and return how many it were."""
    done = 0
    with db.track_agent(agent_id, "worker") as agent:
        while (task_id := next_task(db)) is not None:
            with db.track_task(task_id, agent_id) as task:
                task.tokens_used = 100
            done += 1
            agent.heartbeat()
        agent.metadata["done"] = done
    return done


def main() -> None:
    """Run four workers, and see that each task was done once."""
    with SwarmDB("threads.db") as db, ThreadPoolExecutor(4) as pool:
        done = sum(pool.map(lambda number: work(db, f"worker-{number}"), range(4)))
        tasks = {metric.task_id for metric in db.get_task_metrics(limit=100)}
        print(f"{done} tasks done, {len(tasks)} different ones")
        print(f"{len(db.get_active_agents())} agents still active")


if __name__ == "__main__":
    main()
