"""Maintenance automation: what a nightly job may do. All of it is safe while others write.

Run it: ``python maintenance.py``
"""

from datetime import timedelta
from pathlib import Path

from moai_flow.memory import RetentionPolicy, SwarmDB

POLICY = RetentionPolicy(events=timedelta(days=90), agents=timedelta(days=7))


def main() -> None:
    """Give up dead agents, clean up, back up, check."""
    with SwarmDB("maintenance.db", retention=POLICY) as db:
        db.register_agent("agent-1", "expert-backend", "running")
        db.insert_event(
            {"event_type": "spawn", "agent_id": "a", "agent_type": "t", "timestamp": "2020-01-01T00:00:00Z"}
        )

        gone = db.mark_stale_agents(timedelta(minutes=10))
        print(f"{len(gone)} agents have fallen silent")
        report = db.cleanup()
        print(f"{report.rows} old rows removed")
        backup = db.backup(Path("backups") / "swarm.db", overwrite=True)
        print(f"backed up to {backup.name}")
        found = db.check()
        print("sound" if found.ok else f"damaged: {found.integrity or found.undecodable}")


if __name__ == "__main__":
    main()
