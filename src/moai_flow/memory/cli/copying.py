"""What `swarmdb copy` shows: how far it is, and then what it copied."""

from rich.progress import TaskID

from moai_flow.memory import SwarmDB
from moai_flow.memory.cli import show
from moai_flow.memory.transfer import CopyReport, Progress, copy_database


def copied(source: SwarmDB, target: SwarmDB, *, resume: bool, batch_size: int) -> CopyReport:
    """Copy a database, with a progress bar for each table where somebody can see it."""
    console = show.console(stderr=True)  # Standard output is for the answer.
    bars: dict[str, TaskID] = {}
    with show.progress(console, is_seen=console.is_interactive) as progress:

        def tell(step: Progress) -> None:
            name = f"{step.activity} {step.table}"
            if name not in bars:
                bars[name] = progress.add_task(name, total=step.total)
            progress.update(bars[name], completed=step.done)

        return copy_database(source, target, resume=resume, batch_size=batch_size, progress=tell)


def report(done: CopyReport) -> None:
    """Print what was copied."""
    show.table(
        "Copied and verified",
        [show.text("table"), show.number("rows"), show.number("new"), show.name("checksum")],
        ((table.table, table.rows, table.copied, table.checksum) for table in done.tables),
    )
