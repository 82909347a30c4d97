"""What `swarmdb events --follow` shows: the newest events, and then each one as it is committed."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import chain

from rich.cells import cell_len
from rich.text import Text
from sqlalchemy import func
from sqlmodel import col, select

from moai_flow.memory import AgentEvent, CorruptDataError, EventType, SwarmDB, inputs
from moai_flow.memory.cli import show

#: How often a look is taken, in seconds.
POLL = 0.25

#: How far a column of names grows: as much as a UUID takes.
_WIDEST = 36

#: What a line has before the names, and how little a terminal shows of a type, in cells.
_BEFORE, _NARROW_TYPE = 32, 8

_STYLES = {EventType.ERROR: "bold red", EventType.COMPLETE: "green"}


def follow(
    db: SwarmDB, agent: str | None, kind: EventType | None, limit: int, since: str | None, *, as_json: bool
) -> None:
    """Print the newest events, oldest first, and then each new one, for ever."""
    show_event = show.as_json_line if as_json else lines()
    for event in followed(db, agent, kind, limit, since):
        show_event(event)


def followed(
    db: SwarmDB, agent: str | None, kind: EventType | None, limit: int, since: str | None
) -> Iterator[AgentEvent]:
    """Yield the newest events, at most *limit*, oldest first, and then each that is committed, in the order of ids."""
    first = inputs.moment_filter(since, field="since")
    position = _settled(db)
    new = db.watch_events(position, types=kind, agent_ids=agent, poll=POLL)
    newest = db.get_events(agent, kind, limit, since=first)
    # What was committed between the two is new, though it was read with the others.
    old = (event for event in reversed(newest) if event.id is not None and event.id <= position)
    return chain(old, (event for event in new if first is None or event.timestamp >= first))


def _settled(db: SwarmDB) -> int:
    """Return the id of the last event, once none can appear before it any more.

    On PostgreSQL one still may: of a transaction that is open. An event that comes from a watcher has waited for those.
    """
    with db.session(readonly=True) as session:
        last = session.exec(select(func.max(col(AgentEvent.id)))).one()
    if last is None:
        return 0
    with suppress(CorruptDataError):  # It has waited as well, and whether that event is to be read is not known yet.
        next(db.watch_events(last - 1, poll=POLL))
    return last


def lines() -> Callable[[AgentEvent], None]:
    """Return what prints an event on one line. Columns stay aligned while their texts are no wider than any before."""
    console = show.console()
    widths = [0, 0]

    def show_event(event: AgentEvent) -> None:
        names = [show.visible(event.agent_id), show.visible(event.agent_type)]
        if console.is_terminal:  # The type gives way there, so that no column has to.
            agent_width = max(widths[0], min(cell_len(names[0]), _WIDEST))
            names[1] = show.shortened(names[1], max(console.width - _BEFORE - agent_width - 2, _NARROW_TYPE))
        widths[:] = [max(width, min(cell_len(name), _WIDEST)) for width, name in zip(widths, names, strict=True)]
        text = Text.assemble(
            f"{event.timestamp:%Y-%m-%d %H:%M:%SZ}  ",
            (f"{show.visible(event.event_type):8}", _STYLES.get(event.event_type, "")),
            *(f"  {name}{' ' * (width - cell_len(name))}" for name, width in zip(names, widths, strict=True)),
            f"  {show.visible(show.brief(event.metadata_))}" if event.metadata_ else "",
        )
        text.rstrip()
        console.print(text, soft_wrap=True)

    return show_event
