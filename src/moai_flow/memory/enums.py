"""The closed vocabularies of the schema: strict going in, tolerant coming out."""

from collections.abc import Callable
from enum import StrEnum
from typing import Literal, Self, TypeAlias, TypeVar


class Vocabulary(StrEnum):
    """A closed set of words that a column holds.

    Members are strings: ``EventType.SPAWN == "spawn"``. A row that another program wrote may hold a word that is
    not listed. It is read as a member of the same type that keeps its value, and `is_listed` tells the two apart.
    """

    @property
    def is_listed(self) -> bool:
        """Whether the vocabulary lists this word, rather than a row having brought it."""
        return self.value in type(self)._value2member_map_

    @classmethod
    def read(cls, value: str) -> Self:
        """Return the member for a stored *value*, whether it is listed or not."""
        listed = cls._value2member_map_.get(value)
        return listed if isinstance(listed, cls) else _unlisted(cls, value)

    def __reduce_ex__(self, protocol: object) -> tuple[Callable[[str], Self], tuple[str]]:
        # Enum pickles by calling the class, which refuses a word that it does not list.
        return type(self).read, (self.value,)


V = TypeVar("V", bound=Vocabulary)


def _unlisted(vocabulary: type[V], value: str) -> V:
    member = str.__new__(vocabulary, value)
    member._name_ = member._value_ = value
    return member


class EventType(Vocabulary):
    """What happened to an agent."""

    SPAWN = "spawn"  #: The agent was started.
    COMPLETE = "complete"  #: The agent finished its work.
    ERROR = "error"  #: The agent failed, or met a failure.


class AgentStatus(Vocabulary):
    """What an agent is doing."""

    SPAWNED = "spawned"  #: Registered, not yet at work.
    RUNNING = "running"  #: At work.
    COMPLETE = "complete"  #: Ended well.
    ERROR = "error"  #: Ended with a failure.

    @property
    def is_active(self) -> bool:
        """Whether an agent in this state may still do something: it is spawned or running."""
        return self in ACTIVE_STATUSES


class MemoryType(Vocabulary):
    """Which kind of memory a value belongs to."""

    SEMANTIC = "semantic"  #: Facts and knowledge.
    EPISODIC = "episodic"  #: What happened, and what was decided.
    CONTEXT_HINT = "context_hint"  #: Preferences and hints for the next session.


class TaskResult(Vocabulary):
    """How a task ended."""

    SUCCESS = "success"  #: The task did what it was asked.
    FAILURE = "failure"  #: The task failed.
    TIMEOUT = "timeout"  #: The task ran out of time; work may be partial.
    CANCELLED = "cancelled"  #: The task was stopped from outside; work may be partial.


class AgentMetricType(Vocabulary):
    """What a figure about one agent measures. Each metric's unit is its writer's choice but for those named here."""

    DURATION = "duration"  #: How long the agent took, in milliseconds.
    SUCCESS_RATE = "success_rate"  #: Share of its tasks that succeeded, from 0 to 1.
    ERROR_COUNT = "error_count"  #: How many errors it met.
    THROUGHPUT = "throughput"  #: Tasks for each unit of time.


class SwarmMetricType(Vocabulary):
    """What a figure about a whole swarm measures. Units are the writer's choice."""

    HEALTH = "health"  #: A score of the swarm's health.
    THROUGHPUT = "throughput"  #: Tasks for each unit of time.
    LATENCY = "latency"  #: How long something takes.
    RESOURCE = "resource"  #: How much of a resource is in use.


#: The states of an agent that may still do something.
ACTIVE_STATUSES = frozenset({AgentStatus.SPAWNED, AgentStatus.RUNNING})

# A parameter takes the member or the word: editors complete the words, and type checkers refuse any other.
EventTypeLike: TypeAlias = EventType | Literal["spawn", "complete", "error"]
AgentStatusLike: TypeAlias = AgentStatus | Literal["spawned", "running", "complete", "error"]
MemoryTypeLike: TypeAlias = MemoryType | Literal["semantic", "episodic", "context_hint"]
TaskResultLike: TypeAlias = TaskResult | Literal["success", "failure", "timeout", "cancelled"]
AgentMetricTypeLike: TypeAlias = AgentMetricType | Literal["duration", "success_rate", "error_count", "throughput"]
SwarmMetricTypeLike: TypeAlias = SwarmMetricType | Literal["health", "throughput", "latency", "resource"]
