"""What a user sees when something can't be done: one line, never a traceback."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from moai_flow.memory import SwarmDBError


@contextmanager
def in_one_line() -> Iterator[None]:
    """End the process with one line on stderr and exit status 1 if the block fails for a reason that can be named."""
    try:
        yield
    except (SwarmDBError, OSError) as error:
        from moai_flow.memory.cli.show import visible  # Which a swarm's processes do not load otherwise.

        # A message of SQLite's may quote the file, whoever made it.
        sys.exit(f"swarmdb: {visible(' '.join(str(error).splitlines()))}")
