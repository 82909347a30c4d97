"""What is made of several operations: following tasks and agents to their end, and giving up those fallen silent."""

import asyncio
import concurrent.futures
import re
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timedelta
from types import TracebackType
from typing import Any, Self

from moai_flow.memory import inputs
from moai_flow.memory.enums import AgentStatus, EventType, TaskResult, TaskResultLike
from moai_flow.memory.errors import InvalidInputError, SwarmDBError
from moai_flow.memory.models import RegisteredAgent
from moai_flow.memory.operations.agents import AgentOperations
from moai_flow.memory.operations.events import EventOperations
from moai_flow.memory.operations.metrics import MetricOperations
from moai_flow.memory.types import encode_iso

#: How much of an exception's message an event keeps, in characters.
LONGEST_MESSAGE = 2000


class Tracking(EventOperations, AgentOperations, MetricOperations):
    """Following tasks and agents from begin to end, and giving up those that have fallen silent."""

    def track_task(self, task_id: str, agent_id: str) -> "TrackedTask":
        """Measure a ``with`` block, and record it as one finished task when it is left.

        How it is left is the task's result:

        - a return is a ``success``, or what the block set as `TrackedTask.result`;
        - `TimeoutError` is a ``timeout``;
        - being cancelled (`asyncio.CancelledError`, `concurrent.futures.CancelledError`), `KeyboardInterrupt`,
          `SystemExit` and the closing of a generator are ``cancelled``;
        - any other exception is a ``failure``;
        - an exception group is what all its exceptions are, or a ``failure`` if they differ.

        The exception goes on unchanged. Nothing is held open and nothing is written before the block is left. The
        metric is part of the transaction that is open where the block is left, if there is one, so if that is rolled
        back, by the same exception for example, the metric is gone.

        Args:
            task_id: The task.
            agent_id: The agent that does it.

        Returns:
            A context manager, for one use, that gives itself.

        Raises:
            InvalidInputError: On entering, if an id can't be accepted.
            SwarmDBError: On leaving, what `store_task_metric` raises. If an exception is on its way, that one goes on,
                with a note of what could not be stored.
        """
        return TrackedTask(self, task_id, agent_id)

    def track_agent(self, agent_id: str, agent_type: str, metadata: dict[str, Any] | None = None) -> "TrackedAgent":
        """Register an agent for as long as a ``with`` block lasts.

        Entering registers it as ``running``, and writes its ``spawn`` event, in one transaction. Leaving sets it to
        ``complete`` or ``error``, with its duration, and writes the event of that name, in one transaction. The
        metadata of an ``error`` event says what was raised: ``outcome`` is ``failure``, ``timeout`` or ``cancelled``
        by the rules of `track_task`, ``error_type`` the exception's type, and ``error_message`` its message, cut to
        2,000 characters.

        If the agent was registered anew meanwhile, or deleted, leaving writes the event and no more. If it was marked
        as stale meanwhile, leaving sets the true state.

        The exception goes on unchanged. Nothing is held open during the block. Each of the two transactions is part of
        the one that is open at that moment, if there is one, and is gone if that is rolled back.

        Args:
            agent_id: The agent's id. One that is registered already is respawned.
            agent_type: What kind of agent it is.
            metadata: A JSON object to keep with it and with its ``spawn`` event.

        Returns:
            A context manager, for one use, that gives itself.

        Raises:
            InvalidInputError: On entering, if a value can't be accepted; on leaving, if `TrackedAgent.metadata` can't.
                Then the end is stored without it.
            SwarmDBError: On entering, what `register_agent` raises. On leaving, what `insert_event` raises, but if an
                exception is on its way, that one goes on, with a note of what could not be stored.
        """
        return TrackedAgent(self, agent_id, agent_type, metadata)

    def mark_stale_agents(self, older_than: timedelta, reason: str | None = None) -> list[RegisteredAgent]:
        """Set the agents that `find_stale_agents` finds to ``error``, and write an ``error`` event for each.

        The event's metadata says why: ``reason``, ``last_updated`` (ISO-8601 text in UTC) and ``silent_seconds``.
        Each agent is marked in a transaction of its own, or in the caller's if one is open. An agent that is heard of
        in between stays as it is, and of several processes that mark at the same time, one marks it.

        Args:
            older_than: For how long they have to be silent, greater than zero.
            reason: What the events are to say. Default: ``stale``.

        Returns:
            The agents that this call has marked, as they are now, longest silent first.

        Raises:
            InvalidInputError: If a value can't be accepted.
            BusyError: If another writer keeps the database for longer than the busy timeout. The agents that were
                marked before stay so, here and with the other errors, unless the caller's transaction is rolled back.
            CorruptDataError: If a stored value of an active agent can't be decoded.
            StorageError: If the database can't be written.
            ClosedError: After `close`.
        """
        why = "stale" if reason is None else inputs.text(reason, field="reason")
        marked: list[RegisteredAgent] = []
        for silent in self._silent(older_than):
            seen = silent.agent
            with self._block(alone=False):
                now = self._clock()
                ended = self._finish_silent(silent, now)
                for agent in ended:
                    metadata = {
                        "reason": why,
                        "last_updated": encode_iso(seen.last_updated),
                        "silent_seconds": (now - seen.last_updated).total_seconds(),
                    }
                    self._append_event(EventType.ERROR, agent.agent_id, agent.agent_type, now, metadata)
            marked += ended
        return marked

    def _spawn(self, agent_id: str, agent_type: str, metadata: dict[str, Any] | None) -> RegisteredAgent:
        with self._block(alone=False):
            agent = self.register_agent(agent_id, agent_type, "running", metadata)
            self._append_event(EventType.SPAWN, agent_id, agent_type, agent.last_updated, agent.metadata_)
        return agent

    def _end(
        self, agent: RegisteredAgent, status: AgentStatus, event: EventType, duration_ms: int, metadata: dict[str, Any]
    ) -> None:
        now = self._clock()
        with self._block(alone=False):
            self._finish_spawn(agent.agent_id, agent.spawn_time, status, now, duration_ms)
            self._append_event(event, agent.agent_id, agent.agent_type, now, metadata)


class _Tracked:
    """A block that is measured once."""

    _began: int | None = None
    _duration_ms: int | None = None

    @property
    def duration_ms(self) -> int | None:
        """How long the block took, in milliseconds; None until it is left."""
        return self._duration_ms

    def _begin(self) -> None:
        if self._began is not None:
            raise RuntimeError(f"{self!r} has been entered before; each block needs one of its own")
        self._began = time.monotonic_ns()

    def _end(self) -> int:
        if self._began is None:
            raise RuntimeError(f"{self!r} has not been entered")
        if self._duration_ms is None:  # Who records it elsewhere, and later, ends it before.
            self._duration_ms = (time.monotonic_ns() - self._began) // 1_000_000
        return self._duration_ms

    def _store(self, error: BaseException | None, store: Callable[[], None]) -> None:
        """Call *store*, whose failure must not take the place of the *error* by which the block is left."""
        try:
            store()
        except SwarmDBError as failure:
            if error is None:
                raise
            error.add_note(f"The end of {self!r} could not be stored: {type(failure).__name__}: {failure}")


class TrackedTask(_Tracked):
    """A task under way, from `SwarmDB.track_task`.

    Set `tokens_used` and `files_changed` inside the block, and `result` where a failure raises nothing. It is a plain
    object: any thread or coroutine may use it.
    """

    def __init__(self, db: Tracking, task_id: str, agent_id: str) -> None:
        self._db = db
        self._task_id = task_id
        self._agent_id = agent_id
        self._tokens_used = 0
        self._files_changed = 0
        self._result: TaskResult | None = None
        self._timestamp: datetime | None = None

    @property
    def task_id(self) -> str:
        """The task."""
        return self._task_id

    @property
    def agent_id(self) -> str:
        """The agent that does it."""
        return self._agent_id

    @property
    def tokens_used(self) -> int:
        """How many tokens it used. Setting what is no such number raises `InvalidInputError`."""
        return self._tokens_used

    @tokens_used.setter
    def tokens_used(self, value: int) -> None:
        self._check_open()
        self._tokens_used = inputs.whole(value, field="tokens_used")

    @property
    def files_changed(self) -> int:
        """How many files it changed. Setting what is no such number raises `InvalidInputError`."""
        return self._files_changed

    @files_changed.setter
    def files_changed(self, value: int) -> None:
        self._check_open()
        self._files_changed = inputs.whole(value, field="files_changed")

    @property
    def result(self) -> TaskResult | None:
        """How it ended; inside the block, what was set, or None.

        Set inside the block, it is the result if the block is left without an exception. Setting another word than
        those of `TaskResult` raises `InvalidInputError`.
        """
        return self._result

    @result.setter
    def result(self, value: TaskResultLike) -> None:
        self._check_open()
        self._result = inputs.parse(TaskResult, value, field="result")

    @property
    def timestamp(self) -> datetime | None:
        """The time under which it is kept, in UTC: with the task's id, its key. None until it is."""
        return self._timestamp

    def _check_open(self) -> None:
        if self._duration_ms is not None:
            raise RuntimeError(f"{self!r} has ended, and is recorded as it was then")

    def __enter__(self) -> Self:
        """Begin to measure."""
        inputs.text(self._task_id, field="task_id")
        inputs.text(self._agent_id, field="agent_id")
        self._begin()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Record the task."""
        self._end()
        if error is not None or self._result is None:
            self._result = _outcome(error)
        self._store(error, self._record)

    def _record(self) -> None:
        assert self._result is not None
        self._timestamp = self._db.store_task_metric(
            self._task_id, self._agent_id, self._duration_ms, self._result, self._tokens_used, self._files_changed
        )

    def __repr__(self) -> str:
        return f"track_task({self._task_id!r}, {self._agent_id!r})"


class TrackedAgent(_Tracked):
    """An agent at work, from `SwarmDB.track_agent`. It is a plain object: any thread or coroutine may use it."""

    def __init__(self, db: Tracking, agent_id: str, agent_type: str, metadata: dict[str, Any] | None) -> None:
        self._db = db
        self._agent_id = agent_id
        self._agent_type = agent_type
        self._given = metadata
        self._metadata: dict[str, Any] = {}
        self._spawned: RegisteredAgent | None = None

    @property
    def agent_id(self) -> str:
        """The agent's id."""
        return self._agent_id

    @property
    def agent_type(self) -> str:
        """What kind of agent it is."""
        return self._agent_type

    @property
    def metadata(self) -> dict[str, Any]:
        """What the event at its end is to say: an empty dict, to be filled inside the block with JSON.

        Setting what is no dict raises `InvalidInputError`. What it holds is checked at the end.
        """
        return self._metadata

    @metadata.setter
    def metadata(self, value: dict[str, Any]) -> None:
        self._metadata = inputs.json_object(value, field="metadata")

    def heartbeat(self) -> bool:
        """Say that the agent is alive, now, as `SwarmDB.heartbeat` does, and only of the agent of this block.

        Returns:
            Whether the agent is to go on. False says that it has ended by its row, or that another one was registered
            under its id since; then the row is left alone.

        Raises:
            AgentNotFoundError: If the agent was deleted.
            BusyError: If another writer keeps the database for longer than the busy timeout.
            StorageError: If the database can't be written.
            ClosedError: After `close`.
        """
        spawned = self._entered()
        return self._db._beat_of_spawn(spawned.agent_id, spawned.spawn_time)

    def _entered(self) -> RegisteredAgent:
        if self._spawned is None:
            raise RuntimeError(f"{self!r} has not been entered")
        return self._spawned

    def __enter__(self) -> Self:
        """Register the agent."""
        inputs.text(self._agent_id, field="agent_id")
        inputs.text(self._agent_type, field="agent_type")
        self._begin()
        self._spawned = self._db._spawn(self._agent_id, self._agent_type, self._given)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Set the agent's end."""
        spawned, duration_ms = self._entered(), self._end()

        def end() -> None:
            what = (AgentStatus.COMPLETE, EventType.COMPLETE) if error is None else (AgentStatus.ERROR, EventType.ERROR)
            about = {} if error is None else _description(error)
            try:
                self._db._end(spawned, *what, duration_ms, {**self._metadata, **about})
            except InvalidInputError:  # Of what the block has put into its metadata; the end is true without that.
                self._db._end(spawned, *what, duration_ms, about)
                raise

        self._store(error, end)

    def __repr__(self) -> str:
        return f"track_agent({self._agent_id!r}, {self._agent_type!r})"


_CANCELLATIONS = (
    asyncio.CancelledError,
    concurrent.futures.CancelledError,
    KeyboardInterrupt,
    SystemExit,  # Even with status 0: the block has not come to its end.
    GeneratorExit,
)


def _outcome(error: BaseException | None) -> TaskResult:
    """Return what the exception by which a block was left says about its work."""
    if error is None:
        return TaskResult.SUCCESS
    if isinstance(error, BaseExceptionGroup):
        outcomes = {_outcome(inner) for inner in error.exceptions}
        return outcomes.pop() if len(outcomes) == 1 else TaskResult.FAILURE
    if isinstance(error, TimeoutError):
        return TaskResult.TIMEOUT
    return TaskResult.CANCELLED if isinstance(error, _CANCELLATIONS) else TaskResult.FAILURE


def _description(error: BaseException) -> dict[str, str]:
    """Return what an event says about *error*."""
    message = ""
    with suppress(Exception):  # It is the exception's own code, and whatever it does, the agent's end is stored.
        message = str(error)
    return {
        "outcome": _outcome(error).value,
        "error_type": type(error).__name__,
        "error_message": _storable(message),
    }


def _storable(text: str) -> str:
    """Return *text*, cut where it is long, without what not every database keeps."""
    if len(text) > LONGEST_MESSAGE:
        text = text[: LONGEST_MESSAGE - 1] + "\N{HORIZONTAL ELLIPSIS}"
    return re.sub("[\0\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", text)
