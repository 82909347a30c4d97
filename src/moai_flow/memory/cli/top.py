"""What `swarmdb top` shows: a swarm at work, what needs attention first."""

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from types import FrameType
from typing import Literal, TypeAlias

from rich.cells import cell_len
from rich.console import Console, ConsoleDimensions, ConsoleOptions, RenderResult
from rich.live import Live
from rich.table import Table
from rich.text import Text
from sqlalchemy import func
from sqlmodel import col, select

from moai_flow.memory import (
    AgentStatus,
    AgentSummary,
    BusyError,
    RegisteredAgent,
    StorageError,
    SwarmDB,
    TaskResult,
)
from moai_flow.memory.backends import translating
from moai_flow.memory.cli import show

#: How far back rates are counted, and ended agents shown.
WINDOW = timedelta(minutes=5)
_MINUTES = WINDOW / timedelta(minutes=1)

#: How many ended agents are read.
_MOST_ENDED = 200

#: How soon a terminal of another size is noticed, in seconds.
_BLINK = 0.1

_TITLE = "swarmdb top  "
_FAILED = (TaskResult.FAILURE, TaskResult.TIMEOUT)
_STALE = "stale"
_STYLES = {_STALE: "bold red", "running": "green", "spawned": "cyan", "error": "red", "complete": "dim"}

#: How many lines are above the first agent's.
_LINES_ABOVE = 6

#: How little of a type is shown where there is no room, in cells.
_NARROW_TYPE = 12


@dataclass(frozen=True)
class Rates:
    """What was done within the window."""

    tasks: int = 0
    failures: int = 0
    tokens: int = 0

    @classmethod
    def of(cls, *agents: AgentSummary) -> "Rates":
        """Return what some agents did together. A task that was cancelled has not failed."""
        return cls(
            sum(agent.count for agent in agents),
            sum(agent.results.get(result, 0) for agent in agents for result in _FAILED),
            sum(agent.tokens_used for agent in agents),
        )


@dataclass(frozen=True)
class Seen:
    """An agent as it was seen.

    Attributes:
        agent: Its row.
        state: Its status, or that it is stale.
        rates: What it did.
    """

    agent: RegisteredAgent
    state: str
    rates: Rates


@dataclass(frozen=True)
class Look:
    """What one look at the database saw.

    Attributes:
        at: When that was, in UTC.
        states: How many agents are registered in each state.
        stale: How many of them are at work by their row, but have not been heard of for long.
        agents: Those to show, what needs attention first.
        unread: How many more have ended within the window.
        rates: What all did.
    """

    at: datetime
    states: dict[str, int]
    stale: int
    agents: list[Seen]
    unread: int
    rates: Rates


def look(db: SwarmDB, name: str, stale_after: timedelta) -> Look:
    """Look at a swarm: stale agents, longest silent first, then those at work, busiest first, then the ended ones.

    Raises:
        SwarmDBError: If the database can't be read.
    """
    # What a session raises is SQLAlchemy's own.
    with translating(name), db.session(readonly=True) as session:
        now = datetime.now(UTC)
        by_status = select(RegisteredAgent.status, func.count()).group_by(col(RegisteredAgent.status))
        states = dict(session.exec(by_status).all())
        stale = db.find_stale_agents(stale_after)
        active = db.get_active_agents()
        has_ended = (
            col(RegisteredAgent.status).in_([AgentStatus.COMPLETE, AgentStatus.ERROR]),
            col(RegisteredAgent.complete_time) >= (now - WINDOW).timestamp(),
        )
        count_of_ended = session.exec(select(func.count()).select_from(RegisteredAgent).where(*has_ended)).one()
        newest_end_first = (col(RegisteredAgent.complete_time).desc(), col(RegisteredAgent.agent_id))
        newest = select(RegisteredAgent).where(*has_ended).order_by(*newest_end_first).limit(_MOST_ENDED)
        ended = list(session.exec(newest).all())
        summaries = db.summarize_agents(since=now - WINDOW)
    rates = {summary.agent_id: Rates.of(summary) for summary in summaries}

    def seen(agent: RegisteredAgent, state: str) -> Seen:
        return Seen(agent, state, rates.get(agent.agent_id, Rates()))

    silent = {agent.agent_id for agent in stale}
    at_work = [seen(agent, agent.status) for agent in active if agent.agent_id not in silent]
    at_work.sort(key=lambda one: (-one.rates.tasks, -one.rates.failures, one.agent.agent_id))
    ended.sort(key=lambda agent: agent.status != AgentStatus.ERROR)
    agents = [seen(agent, _STALE) for agent in stale] + at_work + [seen(agent, agent.status) for agent in ended]
    return Look(now, states, len(stale), agents, count_of_ended - len(ended), Rates.of(*summaries))


class Screen:
    """What was seen, as large as there is room for.

    Attributes:
        last: What was seen; None before the first look.
        problem: Why nothing newer was.
        size: For which size it was drawn last.
    """

    def __init__(self, name: str, limit: int | None) -> None:
        self._name = name
        self._limit = limit
        self.last: Look | None = None
        self.problem: str | None = None
        self.size: ConsoleDimensions | None = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        self.size = options.size
        yield from self.parts(*options.size)

    def parts(self, width: int | None, height: int | None) -> Iterator[Text | Table]:
        """Yield what is to be shown within a width and a height; None is as much as it takes."""
        last = self.last
        at = "" if last is None else f"{last.at:%Y-%m-%d %H:%M:%S} UTC  "
        name = show.visible(self._name)
        if width is not None:
            name = show.shortened(name, width - len(_TITLE) - len(at))
        yield _line((_TITLE, "bold"), at, name)
        if last is not None:
            yield _line("agents       ", *_states(last))
            yield _line("each minute  ", *_rates(last.rates))
        yield _line((show.visible(self.problem or ""), "bold red"))
        if last is None:
            return
        room = len(last.agents) if height is None else max(height - _LINES_ABOVE, 1)
        if height is not None and len(last.agents) + last.unread > room:
            room -= 1  # The last line says how many there are.
        shown = last.agents[: room if self._limit is None else min(room, self._limit)]
        if shown:
            yield _table(shown, last.at, width)
        if not last.agents:
            yield _line("no agent is at work, and none has ended within the last 5 minutes")
        elif more := len(last.agents) + last.unread - len(shown):
            yield _line(f"and {more:,} more")


def once(db: SwarmDB, name: str, limit: int | None, stale_after: timedelta) -> None:
    """Print one look: as wide as a terminal is, or else as wide as it has to be.

    Raises:
        SwarmDBError: If the database can't be read.
    """
    screen = Screen(name, limit)
    screen.last = look(db, name, stale_after)
    terminal = show.console()
    if terminal.is_terminal:
        terminal.print(*screen.parts(terminal.width, None), sep="\n")
        return
    for part in screen.parts(None, None):
        width = part.cell_len if isinstance(part, Text) else part.width
        show.console(width=width or 1).print(part)


def watch(db: SwarmDB, name: str, limit: int | None, stale_after: timedelta, interval: float) -> None:
    """Show a swarm until ctrl-C, looking at it every *interval* seconds. A look that fails is said, and not the end.

    Raises:
        SwarmDBError: If a row can't be decoded.
    """
    console = show.console()
    screen = Screen(name, limit)
    live = Live(screen, console=console, screen=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
    with _ended_by_signals():
        try:
            live.start()
            while True:
                try:
                    screen.last, screen.problem = look(db, name, stale_after), None
                except (BusyError, StorageError) as error:
                    reason = " ".join(str(error).removeprefix(f"{name}: ").split())
                    screen.problem = f"not read at {datetime.now(UTC):%H:%M:%S}: {reason}"
                live.refresh()
                _wait(live, screen, interval)
        except KeyboardInterrupt:
            pass  # There is no other way to end it.
        finally:
            live.stop()


def is_live() -> bool:
    """Return whether standard output is a terminal that can be written over."""
    return sys.stdout is not None and sys.stdout.isatty() and show.console().is_interactive


def _wait(live: Live, screen: Screen, seconds: float) -> None:
    """Wait, and redraw the screen meanwhile where the terminal is no longer of the size that it was drawn for."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(left, _BLINK))
        if live.console.size != screen.size:
            live.refresh()


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Have SIGTERM raise, so that the screen is given back, as it is after ctrl-C."""

    def end(number: int, _frame: FrameType | None) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# How it looks

#: A column: its heading, to which side its cells are, and these.
_Shown: TypeAlias = tuple[str, Literal["left", "right"], list[Text]]


def _line(*parts: str | tuple[str, str]) -> Text:
    return Text.assemble(*parts, no_wrap=True, overflow="ellipsis")


def _states(seen: Look) -> Iterator[str | tuple[str, str]]:
    listed = [status for status in AgentStatus if status in seen.states]
    counts = [f"{seen.states[status]:,} {show.visible(status)}" for status in [*listed, *seen.states.keys() - listed]]
    yield ", ".join(counts) or "none"
    if seen.stale:
        yield "; "
        yield f"{seen.stale:,} stale", _STYLES[_STALE]


def _rates(rates: Rates) -> Iterator[str | tuple[str, str]]:
    yield f"{_rate(rates.tasks)} tasks, "
    yield f"{_rate(rates.failures)} failures", "bold red" if rates.failures else ""
    yield f", {_rate(rates.tokens)} tokens, over the last 5 minutes"


def _table(agents: list[Seen], now: datetime, width: int | None) -> Table:
    """Return a line for each agent. Where there is no room for the whole of their ids and types, those are cut."""
    fixed: list[_Shown] = [
        ("state", "left", [Text(one.state, _STYLES.get(one.state, "")) for one in agents]),
        ("age", "right", [Text(show.span(now - one.agent.spawned_at)) for one in agents]),
        ("last\nheard", "right", [Text(show.span(now - one.agent.last_updated)) for one in agents]),
        ("tasks\n/min", "right", [Text(_rate(one.rates.tasks)) for one in agents]),
        ("fails\n/min", "right", [_failures(one.rates) for one in agents]),
        ("tokens\n/min", "right", [Text(_rate(one.rates.tokens)) for one in agents]),
    ]
    taken = sum(1 + max(_width(heading), *map(cell_len, map(str, cells))) for heading, _, cells in fixed)
    names = [show.visible(one.agent.agent_id) for one in agents]
    types = [show.visible(one.agent.agent_type) for one in agents]
    widest = [max(_width(heading), *map(cell_len, cells)) for heading, cells in (("agent", names), ("type", types))]
    if width is not None:
        widest = _shared(widest, width - taken - 1)
    columns: list[_Shown] = [
        ("agent", "left", [Text(show.shortened(name, widest[0])) for name in names]),
        ("type", "left", [Text(show.shortened(name, widest[1])) for name in types]),
        *fixed,
    ]
    grid = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), width=sum(widest) + 1 + taken, header_style="bold")
    for heading, justify, _ in columns:
        grid.add_column(heading, justify=justify, vertical="bottom", no_wrap=True)
    for cells in zip(*(cells for _, _, cells in columns), strict=True):
        grid.add_row(*cells)
    return grid


def _width(heading: str) -> int:
    return max(map(len, heading.split("\n")))


def _shared(widest: list[int], room: int) -> list[int]:
    """Return how wide ids and types are in what room there is: as they are, or else most of it for the ids."""
    names, types = widest
    if names + types <= room:
        return widest
    types = min(types, max(room - names, min(_NARROW_TYPE, room // 3)))
    return [max(room - types, 1), max(types, 1)]


def _failures(rates: Rates) -> Text:
    return Text(_rate(rates.failures), "red" if rates.failures else "")


def _rate(count: int) -> str:
    """Return how many that is in a minute, on average over the window."""
    rate = count / _MINUTES
    if not count:
        return "-"
    if rate >= 1e6:
        return f"{rate / 1e6:,.1f}M"
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}"
