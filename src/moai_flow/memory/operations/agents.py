"""The registry: each agent's present state."""

from collections.abc import Iterable
from datetime import datetime, timedelta
from functools import cache
from typing import Any, NamedTuple

from sqlalchemy import Dialect, Executable, bindparam, delete, func, or_, select, type_coerce, update
from sqlmodel import col

from moai_flow.memory import inputs
from moai_flow.memory.enums import ACTIVE_STATUSES, AgentStatus, AgentStatusLike
from moai_flow.memory.errors import AgentNotFoundError, InvalidInputError
from moai_flow.memory.models import HAS_NOT_ENDED, RegisteredAgent, table_of, unsearched
from moai_flow.memory.scope import Scope
from moai_flow.memory.statements import Query, Statement, insert_for
from moai_flow.memory.types import AsStored

_AGENTS = table_of(RegisteredAgent)
_LAST_UPDATED = list(_AGENTS.columns.keys()).index("last_updated")

NEWEST_SPAWN_FIRST = (col(RegisteredAgent.spawn_time).desc(), col(RegisteredAgent.agent_id).desc())


def _upsert(dialect: Dialect) -> Executable:
    insertion = insert_for(dialect, _AGENTS)
    given = {column.name: insertion.excluded[column.name] for column in _AGENTS.columns if not column.primary_key}
    upsert = insertion.on_conflict_do_update(index_elements=[_AGENTS.c.agent_id], set_=given)
    clause: Executable = upsert.returning(*_AGENTS.columns)
    return clause


_REGISTER = Query(RegisteredAgent, _upsert)
_UPDATE = update(_AGENTS).where(_AGENTS.c.agent_id == bindparam("agent"))
_END = _UPDATE.values(
    status=bindparam("status"),
    complete_time=bindparam("complete_time"),
    duration_ms=func.coalesce(bindparam("duration_ms"), _AGENTS.c.duration_ms),
    last_updated=bindparam("last_updated"),
)
_FINISH = Query(RegisteredAgent, _END.returning(*_AGENTS.columns))
_IS_SPAWN = _AGENTS.c.spawn_time == bindparam("spawned")
_FINISH_SPAWN = Statement(_END.where(_IS_SPAWN), writes=_AGENTS)
_FINISH_SILENT = Query(
    RegisteredAgent,
    _END.where(
        _AGENTS.c.status == bindparam("seen_status"),
        # As it is stored: other programs write times in other ways.
        type_coerce(_AGENTS.c.last_updated, AsStored) == bindparam("seen_update"),
    ).returning(*_AGENTS.columns),
)
_BEAT = Statement(_UPDATE.where(HAS_NOT_ENDED).values(last_updated=bindparam("last_updated")), writes=_AGENTS)
_BEAT_SPAWN = Statement(
    _UPDATE.where(HAS_NOT_ENDED, _IS_SPAWN).values(last_updated=bindparam("last_updated")), writes=_AGENTS
)
_RESUME = Query(
    RegisteredAgent,
    _UPDATE.values(
        status=bindparam("status"), complete_time=None, duration_ms=None, last_updated=bindparam("last_updated")
    ).returning(*_AGENTS.columns),
)
_IS_REGISTERED = Statement(select(_AGENTS.c.agent_id).where(_AGENTS.c.agent_id == bindparam("agent")))
_BY_ID = Query(RegisteredAgent, select(_AGENTS).where(_AGENTS.c.agent_id == bindparam("agent_id")))
_ACTIVE = Query(
    RegisteredAgent,
    select(_AGENTS)
    .where(HAS_NOT_ENDED, or_(*(unsearched(_AGENTS.c.status) == status for status in sorted(ACTIVE_STATUSES))))
    .order_by(*NEWEST_SPAWN_FIRST),
)
_DELETE = Statement(delete(_AGENTS).where(_AGENTS.c.agent_id == bindparam("agent_id")), writes=_AGENTS)


@cache
def _filtered(names: frozenset[str]) -> Query[RegisteredAgent]:
    conditions: Iterable[Any] = (_AGENTS.c[name] == bindparam(name) for name in sorted(names))
    return Query(RegisteredAgent, select(_AGENTS).where(*conditions).order_by(*NEWEST_SPAWN_FIRST))


class Silent(NamedTuple):
    """An agent that has not been heard of, and its last update as the database has it."""

    agent: RegisteredAgent
    stored_update: Any


class AgentOperations(Scope):
    """Registering agents, and following their state."""

    def register_agent(
        self,
        agent_id: str,
        agent_type: str,
        status: AgentStatusLike = "spawned",
        metadata: dict[str, Any] | None = None,
    ) -> RegisteredAgent:
        """Register an agent, now.

        An id that is registered already is a respawn: it starts afresh, with a new spawn time, this metadata, and
        without completion time and duration.

        Args:
            agent_id: The agent's id.
            agent_type: What kind of agent it is.
            status: The state that it starts in.
            metadata: A JSON object to keep with it.

        Returns:
            The agent as registered.

        Raises:
            InvalidInputError: If a value can't be accepted.
            BusyError: If another writer keeps the database for longer than the busy timeout.
            StorageError: If the database can't be written.
            ClosedError: After `close`.
        """
        now = self._clock()
        state = inputs.parse(AgentStatus, status, field="status")
        row = {
            "agent_id": inputs.text(agent_id, field="agent_id"),
            "agent_type": inputs.text(agent_type, field="agent_type"),
            "status": state,
            "spawn_time": now.timestamp(),
            "complete_time": None if state.is_active else now.timestamp(),
            "duration_ms": None,
            "metadata": inputs.json_object(metadata, field="metadata"),
            "last_updated": now,
        }
        (agent,) = self._write_returning(_REGISTER, row)
        return agent

    def update_agent_status(
        self, agent_id: str, status: AgentStatusLike, duration_ms: int | None = None
    ) -> RegisteredAgent:
        """Set an agent's state, now.

        ``complete`` and ``error`` set its completion time. ``spawned`` and ``running`` clear it, and its duration.

        Args:
            agent_id: The agent's id.
            status: Its new state.
            duration_ms: How long it took, in milliseconds, with ``complete`` or ``error``. Left out, a duration that
                was given earlier stays.

        Returns:
            The agent as it is now.

        Raises:
            AgentNotFoundError: If no agent is registered under the id.
            InvalidInputError: If a value can't be accepted, or a duration comes with a state that is no end.
            BusyError: If another writer keeps the database for longer than the busy timeout.
            CorruptDataError: If another value in the agent's row can't be decoded. The new state is written.
            StorageError: If the database can't be written.
            ClosedError: After `close`.
        """
        now = self._clock()
        state = inputs.parse(AgentStatus, status, field="status")
        row = {"agent": inputs.text(agent_id, field="agent_id"), "status": state, "last_updated": now}
        if not state.is_active:
            duration = inputs.whole_or_none(duration_ms, field="duration_ms")
            updated = self._write_returning(_FINISH, {**row, **_ending(state, now, duration)})
        elif duration_ms is None:
            updated = self._write_returning(_RESUME, row)
        else:
            raise InvalidInputError(
                "duration_ms", duration_ms, f"None, since an agent that is {state.value} has not ended"
            )
        if not updated:
            raise AgentNotFoundError(agent_id)
        return updated[0]

    def heartbeat(self, agent_id: str) -> bool:
        """Say that an agent is alive, now: sets its ``last_updated``, and nothing else. No event is written.

        Args:
            agent_id: The agent's id.

        Returns:
            Whether the agent is to go on. False says that it has ended by its row, which is left alone: somebody
            finished it, or `mark_stale_agents` gave it up.

        Raises:
            AgentNotFoundError: If no agent is registered under the id.
            InvalidInputError: If *agent_id* is no text.
            BusyError: If another writer keeps the database for longer than the busy timeout.
            StorageError: If the database can't be written.
            ClosedError: After `close`.
        """
        return self._beat(_BEAT, {"agent": inputs.text(agent_id, field="agent_id")})

    def find_stale_agents(self, older_than: timedelta) -> list[RegisteredAgent]:
        """Return the agents that are spawned or running by their rows, and have not been heard of for long.

        What counts is ``last_updated``, which `register_agent`, `update_agent_status` and `heartbeat` set.

        Args:
            older_than: For longer than this, greater than zero.

        Returns:
            The agents, longest silent first; of two silent since the same time, the lesser id first.

        Raises:
            InvalidInputError: If *older_than* is no `timedelta` greater than zero.
            CorruptDataError: If a stored value of an active agent can't be decoded.
            StorageError: If the database can't be read.
            ClosedError: After `close`.
        """
        return [silent.agent for silent in self._silent(older_than)]

    def get_agent(self, agent_id: str) -> RegisteredAgent | None:
        """Return an agent, or None if none is registered under this id.

        Args:
            agent_id: The agent's id.

        Returns:
            The agent as it is now. The object does not follow later changes.

        Raises:
            InvalidInputError: If *agent_id* is no text.
            CorruptDataError: If a stored value can't be decoded.
            StorageError: If the database can't be read.
            ClosedError: After `close`.
        """
        found = self._rows(_BY_ID, {"agent_id": inputs.text(agent_id, field="agent_id")})
        return found[0] if found else None

    def get_active_agents(self) -> list[RegisteredAgent]:
        """Return the agents that are spawned or running.

        Returns:
            The agents, newest spawn first; of two spawned at the same time, the greater id first.

        Raises:
            CorruptDataError: If a stored value can't be decoded.
            StorageError: If the database can't be read.
            ClosedError: After `close`.
        """
        return self._rows(_ACTIVE, {})

    def list_agents(
        self, status: AgentStatusLike | None = None, agent_type: str | None = None
    ) -> list[RegisteredAgent]:
        """Return agents, finished ones as well.

        Args:
            status: Only agents in this state.
            agent_type: Only agents of this type.

        Returns:
            The agents, newest spawn first; of two spawned at the same time, the greater id first.

        Raises:
            InvalidInputError: If a filter can't be accepted.
            CorruptDataError: If a stored value can't be decoded.
            StorageError: If the database can't be read.
            ClosedError: After `close`.
        """
        filters = {
            "status": inputs.recognise_filter(AgentStatus, status, field="status"),
            "agent_type": inputs.text_filter(agent_type, field="agent_type"),
        }
        given = {name: value for name, value in filters.items() if value is not None}
        return self._rows(_filtered(frozenset(given)), given)

    def delete_agent(self, agent_id: str) -> bool:
        """Remove an agent from the registry. Its events and metrics stay.

        Args:
            agent_id: The agent's id.

        Returns:
            Whether there was one.

        Raises:
            InvalidInputError: If *agent_id* is no text.
            BusyError: If another writer keeps the database for longer than the busy timeout.
            StorageError: If the database can't be written.
            ClosedError: After `close`.
        """
        deleted = self._write(_DELETE, {"agent_id": inputs.text(agent_id, field="agent_id")})
        return bool(deleted.rowcount)

    # What `tracking` is made of.

    def _beat(self, statement: Statement, row: dict[str, Any]) -> bool:
        if self._write(statement, {**row, "last_updated": self._clock()}).rowcount:
            return True
        if not self._tuples(_IS_REGISTERED, row):
            raise AgentNotFoundError(row["agent"])
        return False

    def _beat_of_spawn(self, agent_id: str, spawn_time: float) -> bool:
        """Do what `heartbeat` does, if the agent has not been respawned."""
        return self._beat(_BEAT_SPAWN, {"agent": agent_id, "spawned": spawn_time})

    def _silent(self, older_than: timedelta) -> list[Silent]:
        longest = inputs.span(older_than, field="older_than")
        rows = self._tuples(_ACTIVE, {})
        now = self._clock()
        found = [
            Silent(agent, row[_LAST_UPDATED])
            for row, agent in zip(rows, self._decoder(_ACTIVE).decode(rows), strict=True)
            if now - agent.last_updated > longest
        ]
        return sorted(found, key=lambda silent: (silent.agent.last_updated, silent.agent.agent_id))

    def _finish_silent(self, silent: Silent, now: datetime) -> list[RegisteredAgent]:
        """End an agent with an error, if its row is as it was seen; else return nothing."""
        row = {"agent": silent.agent.agent_id, "seen_status": silent.agent.status, "seen_update": silent.stored_update}
        return self._write_returning(_FINISH_SILENT, {**row, **_ending(AgentStatus.ERROR, now, None)})

    def _finish_spawn(
        self, agent_id: str, spawn_time: float, status: AgentStatus, now: datetime, duration_ms: int
    ) -> None:
        """End an agent, if it is there and has not been respawned."""
        row = {"agent": agent_id, "spawned": spawn_time}
        self._write(_FINISH_SPAWN, {**row, **_ending(status, now, duration_ms)})


def _ending(status: AgentStatus, now: datetime, duration_ms: int | None) -> dict[str, Any]:
    return {"status": status, "complete_time": now.timestamp(), "duration_ms": duration_ms, "last_updated": now}
