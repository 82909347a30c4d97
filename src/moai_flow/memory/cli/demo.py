"""What `swarmdb demo` shows: how far a swarm is, and then what the database has about it."""

from collections import defaultdict
from collections.abc import Collection
from pathlib import PurePosixPath

from sqlalchemy import func
from sqlmodel import col, select

from moai_flow.memory import AgentEvent, AgentStatus, EventType, MemoryType, SwarmDB, TaskMetric
from moai_flow.memory.cli import show
from moai_flow.memory.cli.swarm import AGENT_TYPE, Finding, Plan, at_work

_ERRORS, _SLOWEST, _KINDS = 10, 5, 10


def watch(db: SwarmDB, plan: Plan) -> None:
    """Run a swarm to its end, with a progress bar where somebody can see it."""
    console = show.console()
    with show.progress(console, is_seen=console.is_interactive) as bar, at_work(db, plan) as progress:
        files = bar.add_task("Files", total=len(plan.files))
        for done in progress:
            bar.update(files, completed=done)


def report(db: SwarmDB, plan: Plan) -> bool:
    """Print what the database has about a run, and return whether all agents completed."""
    ours = set(plan.agents)
    our_events = col(AgentEvent.agent_id).in_(plan.agents)
    our_tasks = col(TaskMetric.agent_id).in_(plan.agents)
    with db.session(readonly=True) as session:  # One snapshot, so that the tables agree.
        newest_first = [agent for agent in db.list_agents(agent_type=AGENT_TYPE) if agent.agent_id in ours]
        tasks = select(TaskMetric.agent_id, func.count()).where(our_tasks).group_by(col(TaskMetric.agent_id))
        files = dict(session.exec(tasks).all())
        by_type = select(AgentEvent.event_type, func.count()).where(our_events).group_by(col(AgentEvent.event_type))
        events = dict(session.exec(by_type).all())
        errors = session.exec(
            select(AgentEvent)
            .where(our_events, col(AgentEvent.event_type) == EventType.ERROR)
            .order_by(col(AgentEvent.timestamp), col(AgentEvent.id))
            .limit(_ERRORS)
        ).all()
        slowest = session.exec(
            select(TaskMetric)
            .where(our_tasks)
            .order_by(col(TaskMetric.duration_ms).desc(), col(TaskMetric.task_id))
            .limit(_SLOWEST)
        ).all()
        findings = {memory.key: Finding(**memory.value) for memory in db.list_memories(plan.run, MemoryType.SEMANTIC)}

    show.table(
        "Agents",
        [show.text("agent"), show.text("status"), show.number("files"), show.number("ms")],
        (
            (agent.agent_id, agent.status, files.get(agent.agent_id, 0), agent.duration_ms)
            for agent in reversed(newest_first)
        ),
    )
    show.table(
        "Events",
        [show.text("type"), show.number("events")],
        ((event_type, events.get(event_type, 0)) for event_type in EventType),
    )
    show.table(
        "Errors" if len(errors) < _ERRORS else f"The first {_ERRORS} errors",
        [show.text("agent"), show.text("file"), show.text("reason")],
        ((error.agent_id, error.metadata_["file"], error.metadata_["reason"]) for error in errors),
    )
    show.table(
        "Slowest files",
        [show.text("file"), show.number("ms"), show.text("result")],
        ((task.task_id, task.duration_ms, task.result) for task in slowest),
    )
    _show_findings(findings)
    return all(agent.status == AgentStatus.COMPLETE for agent in newest_first)


def _show_findings(findings: dict[str, Finding]) -> None:
    kinds: defaultdict[str, list[Finding]] = defaultdict(list)
    for file, finding in findings.items():
        kinds[PurePosixPath(file).suffix or "(no suffix)"].append(finding)
    largest_first = sorted(kinds.items(), key=lambda kind: (-sum(found.size_bytes for found in kind[1]), kind[0]))
    rows = [(kind, *_sums(found)) for kind, found in largest_first[:_KINDS]]
    if rows:
        rows.append(("all files", *_sums(findings.values())))
    show.table(
        "Findings", [show.text("kind"), *map(show.number, ("files", "lines", "words", "bytes", "longest line"))], rows
    )


def _sums(findings: Collection[Finding]) -> tuple[int, int, int, int, int]:
    return (
        len(findings),
        sum(finding.lines for finding in findings),
        sum(finding.words for finding in findings),
        sum(finding.size_bytes for finding in findings),
        max(finding.longest_line for finding in findings),
    )
