"""Several processes on one file: no server, no locks of your own.

Run it: ``python processes.py``
"""

import multiprocessing
import os

from moai_flow.memory import SwarmDB

PATH = "processes.db"


def work(number: int) -> None:
    """What each process does: open the file for itself, and write."""
    with SwarmDB(PATH) as db, db.track_agent(f"process-{number}", "worker", {"pid": os.getpid()}):
        db.insert_events(
            {"event_type": "spawn", "agent_id": f"process-{number}-{child}", "agent_type": "child"}
            for child in range(25)
        )


def main() -> None:
    """Start four processes, and count what they wrote."""
    processes = [multiprocessing.get_context("spawn").Process(target=work, args=(number,)) for number in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    with SwarmDB(PATH) as db:
        print(f"{sum(1 for _ in db.iter_events(event_type='spawn'))} spawn events")
        print(f"{len(db.list_agents('complete'))} processes completed")


if __name__ == "__main__":
    main()
