"""What `swarmdb metrics` shows: what the metrics come to."""

import re
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

import typer

from moai_flow.memory import (
    AgentOrder,
    AgentSummary,
    FigureSummary,
    SwarmDB,
    SwarmDBError,
    SwarmSummary,
    TaskSummary,
)
from moai_flow.memory.cli import show

_UNITS = {"m": "minutes", "h": "hours", "d": "days"}
_LENGTH = re.compile("([0-9]{1,9})([mhd])")

#: Which columns give way where a terminal has no room for all, first to last.
_EXPENDABLE = ("files", "p99 ms", "mean ms", "max ms", "p50 ms", "tokens")
_EXPENDABLE_OF_SWARM = ("p99", "p50", "min", "max", "mean")


class By(StrEnum):
    """By which column agents are put in order."""

    AGENT = "agent"
    TASKS = "tasks"
    SUCCESS = "success"
    TOKENS = "tokens"
    FILES = "files"
    MEAN = "mean"
    P50 = "p50"
    P95 = "p95"
    P99 = "p99"
    MAX = "max"


_ORDERS: dict[By, AgentOrder] = {
    By.AGENT: "agent_id",
    By.TASKS: "count",
    By.SUCCESS: "success_rate",
    By.TOKENS: "tokens_used",
    By.FILES: "files_changed",
    By.MEAN: "mean_ms",
    By.P50: "p50_ms",
    By.P95: "p95_ms",
    By.P99: "p99_ms",
    By.MAX: "max_ms",
}

#: What is first where the least is.
_LEAST_FIRST = {By.AGENT: "by name", By.SUCCESS: "least success first"}


def ago(length: str, now: datetime) -> datetime:
    """Return the moment that is so long before *now*: ``30m``, ``1h`` or ``7d``.

    Raises:
        BadParameter: If it is no such length.
    """
    found = _LENGTH.fullmatch(length)
    try:
        if found is not None and (span := timedelta(**{_UNITS[found[2]]: int(found[1])})):
            return now - span
    except OverflowError:
        pass  # Before the year 1.
    raise typer.BadParameter(
        f"{length!r} is no number of minutes, hours or days, such as 30m, 1h or 7d.", param_hint="--last"
    )


def metrics(
    db: SwarmDB,
    *,
    agent: str | None,
    swarm: str | None,
    since: datetime | str | None,
    until: datetime | str | None,
    by: By,
    limit: int,
    as_json: bool,
) -> None:
    """Print what the metrics come to: of all agents or of one, and of a swarm where one is given.

    Raises:
        SwarmDBError: If *agent* is not known to the database, or the facade refuses a filter.
    """
    is_least_first = by in _LEAST_FIRST
    with db.session(readonly=True):  # One snapshot, so that the tables agree.
        tasks = db.summarize_tasks(agent, since=since, until=until)
        agents = (
            db.summarize_agents(since=since, until=until, order_by=_ORDERS[by], descending=not is_least_first)
            if agent is None
            else []
        )
        figures = None if swarm is None else db.summarize_swarm(swarm, since=since, until=until)
        if agent is not None and not tasks.count and not _is_known(db, agent):
            raise SwarmDBError(f"no agent {agent!r}: it has no metrics, and none is registered by this id")
    if as_json:
        answer: dict[str, Any] = {"tasks": vars(tasks)}
        if agent is None:
            answer["agents"] = [vars(summary) for summary in agents[:limit]]
        if figures is not None:
            answer["swarm"] = {
                "swarm_id": figures.swarm_id,
                "figures": {str(kind): vars(figure) for kind, figure in figures.figures.items()},
            }
        show.as_json(answer)
        return
    _show_tasks("Tasks" if agent is None else f"Tasks of {show.visible(agent)}", tasks)
    if agent is None:
        _show_agents(agents, by, limit)
    if figures is not None:
        _show_swarm(figures)


def _is_known(db: SwarmDB, agent: str) -> bool:
    return bool(
        (agent and db.get_agent(agent))
        or db.get_task_metrics(agent_id=agent, limit=1)
        or db.get_agent_metrics(agent, limit=1)
    )


def _show_tasks(title: str, tasks: TaskSummary) -> None:
    rows: list[tuple[object, ...]] = [
        (result, count, _share(count / tasks.count)) for result, count in tasks.results.items() if tasks.count
    ]
    show.table(title, [show.text("result"), show.number("tasks"), show.number("share")], rows)
    if not tasks.count:
        return
    show.facts(
        {
            "tasks": tasks.count,
            "success rate": _share(tasks.success_rate),
            "tokens used": tasks.tokens_used,
            "files changed": tasks.files_changed,
        }
    )
    show.table(
        "Durations in milliseconds",
        [show.number(heading) for heading in ("measured", "mean", "p50", "p95", "p99", "max")],
        [(tasks.measured, *_durations(tasks))] if tasks.measured else [],
    )


def _show_agents(agents: list[AgentSummary], by: By, limit: int) -> None:
    show.table(
        f"Agents, {_LEAST_FIRST.get(by, f'most {by} first')}",
        [
            show.name("agent"),
            *map(show.number, ("tasks", "success", "tokens", "files")),
            *map(show.number, ("mean ms", "p50 ms", "p95 ms", "p99 ms", "max ms")),
        ],
        (
            (
                agent.agent_id,
                agent.count,
                _share(agent.success_rate),
                agent.tokens_used,
                agent.files_changed,
                *_durations(agent),
            )
            for agent in agents[:limit]
        ),
        expendable=[heading for heading in _EXPENDABLE if heading.split()[0] != by],
    )
    if len(agents) > limit:
        show.line(f"and {len(agents) - limit:,} more; --limit says how many are shown")
        show.line("")


def _show_swarm(swarm: SwarmSummary) -> None:
    show.table(
        f"Swarm {show.visible(swarm.swarm_id)}",
        [
            show.name("type"),
            show.number("latest"),
            show.time("at (UTC)"),
            *map(show.number, ("figures", "mean", "min", "max", "p50", "p95", "p99")),
        ],
        ((kind, *_of_swarm(figure)) for kind, figure in swarm.figures.items()),
        expendable=_EXPENDABLE_OF_SWARM,
    )


def _of_swarm(figure: FigureSummary) -> tuple[object, ...]:
    values = (figure.mean, figure.minimum, figure.maximum, figure.p50, figure.p95, figure.p99)
    return (_value(figure.latest), figure.latest_at, figure.count, *map(_value, values))


def _durations(tasks: TaskSummary) -> tuple[str, ...]:
    return tuple(
        "-" if value is None else f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.1f}"
        for value in (tasks.mean_ms, tasks.p50_ms, tasks.p95_ms, tasks.p99_ms, tasks.max_ms)
    )


def _share(rate: float | None) -> str:
    """Return a share in percent, of which only all is 100."""
    if rate is None:
        return "-"
    return "100%" if rate == 1 else f"{min(rate, 0.999):.1%}"


def _value(value: float) -> str:
    """Return a figure of whatever unit, to four digits or to the whole."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"
