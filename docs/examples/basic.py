"""Basic usage: an agent's life, its memory and its metrics, in one file.

Run it: ``python basic.py``
"""

from moai_flow.memory import SwarmDB


def main() -> None:
    """Record an agent, and read back what is known about it."""
    with SwarmDB("basic.db") as db:
        db.register_agent("agent-1", "expert-backend", metadata={"priority": "high"})
        db.insert_event(
            {
                "event_type": "spawn",
                "agent_id": "agent-1",
                "agent_type": "expert-backend",
                "metadata": {"prompt": "Design the API"},
            }
        )
        db.update_agent_status("agent-1", "running")
        db.store_memory("session-1", "semantic", "framework", {"name": "fastapi", "version": 1})
        db.store_task_metric("task-1", "agent-1", 1200, "success", tokens_used=900, files_changed=2)
        agent = db.update_agent_status("agent-1", "complete", duration_ms=1500)

        print(f"{agent.agent_id} is {agent.status} after {agent.duration_ms} ms")
        for event in db.get_events(agent_id="agent-1"):
            print(f"{event.event_type}: {event.metadata_['prompt']}")
        print(db.get_memory("session-1", "semantic", "framework"))
        summary = db.summarize_tasks("agent-1")
        print(f"{summary.count} task, {summary.tokens_used} tokens")


if __name__ == "__main__":
    main()
