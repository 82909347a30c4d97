"""A hook of a coding agent: it records when a subagent starts and stops.

Coding agents can run a command at such moments, and pass it JSON on standard input. Each call is a process of its own,
so it opens the store, writes, and ends; old rows are removed along the way.

Try it: ``echo '{"hook_event_name": "SubagentStart", "agent_id": "a1", "agent_type": "Explore"}' | python hook.py``
"""

import json
import sys

from moai_flow.memory import AgentNotFoundError, SwarmDB


def record(db: SwarmDB, hook: dict[str, str]) -> None:
    """Write down what the hook tells."""
    agent_id, agent_type = hook["agent_id"], hook.get("agent_type") or "subagent"
    with db.transaction():
        if hook["hook_event_name"] == "SubagentStart":
            db.register_agent(agent_id, agent_type, "running", {"session": hook.get("session_id", "")})
            db.insert_event({"event_type": "spawn", "agent_id": agent_id, "agent_type": agent_type})
            return
        try:
            db.update_agent_status(agent_id, "complete")
        except AgentNotFoundError:  # It was started before the hook was set up.
            db.register_agent(agent_id, agent_type, "complete")
        db.insert_event({"event_type": "complete", "agent_id": agent_id, "agent_type": agent_type})


def main() -> None:
    """Read the hook's JSON, and record it."""
    hook = json.load(sys.stdin)
    with SwarmDB(busy_timeout=2) as db:
        record(db, hook)
        agent = db.get_agent(hook["agent_id"])
        print(f"{hook['agent_id']}: {agent.status if agent else 'unknown'}", file=sys.stderr)


if __name__ == "__main__":
    main()
