"""The same calls on both databases: the same answers, in the same order, and the same errors."""

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import islice
from typing import Any, get_args

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from conftest import Clock
from moai_flow.memory import (
    AgentEvent,
    AgentMetricType,
    AgentOrder,
    Aggregate,
    EventCursor,
    RetentionPolicy,
    SwarmDB,
    SwarmDBError,
    SwarmMetricType,
)
from moai_flow.memory.models import Record, new_id
from postgres import Server

# Few names, so that calls meet each other's rows; and some that sort differently by code point and by language, that
# mean something to SQL, or that can't be stored.
NAMES = st.sampled_from(["a", "B", "ä", "Z_", "z%", "'; --", "𝄞", "%s", ":x", "", "no\0", "lone\ud800"])
GOOD_NAMES = st.sampled_from(["a", "B", "ä", "Z_", "z%", "'; --", "𝄞", "%s", ":x"])
WORDS = {
    "event_type": st.sampled_from(["spawn", "complete", "error", "started"]),
    "status": st.sampled_from(["spawned", "running", "complete", "error", "runing"]),
    "memory_type": st.sampled_from(["semantic", "episodic", "context_hint", "other"]),
    "result": st.sampled_from(["success", "failure", "timeout", "cancelled", "lost"]),
    "metric": st.sampled_from(["duration", "throughput", "health"]),
}
NUMBERS = st.one_of(st.integers(-1, 3), st.sampled_from([2**31, 2**53 + 1, 2**63 - 1, 2**63]))
FLOATS = st.one_of(st.floats(), st.integers(-5, 5).map(float))
MOMENTS = st.one_of(
    st.datetimes(datetime(2025, 11, 29), datetime(2025, 12, 1), timezones=st.just(UTC)),  # noqa: DTZ001 (bounds are naive)
    st.sampled_from([datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)]),
    st.sampled_from(["2025-11-30T10:00:00+05:30", "soon", "2025-11-30"]),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
OBJECTS = st.none() | st.dictionaries(st.text(max_size=3), JSON, max_size=3)
ENDS = st.sampled_from([None, ValueError, TimeoutError])
MADE_ID = len(new_id())
LIMITS = st.sampled_from([-1, 0, 1, 3, 100])


def maybe(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | strategy


def comparable(answer: Any) -> Any:
    """Return what both databases have to agree on: not the ids that are made by chance, nor numbers of rows."""
    match answer:
        case Record():
            values = dict(answer)
            if len(values.get("event_id", "")) == MADE_ID:
                del values["event_id"]
            return type(answer).__name__, {
                name: repr(value) for name, value in values.items() if name not in {"id", "metric_id"}
            }
        case list() | tuple():
            return [comparable(item) for item in answer]
    return repr(answer)


class SameOnBoth(RuleBasedStateMachine):
    """Each step is done on both stores, and what comes of it compared."""

    server: Server

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.stack = ExitStack()
        self.url = self.server.create_database()
        self.stack.callback(self.server.drop_database, self.url)
        urls = ("sqlite://", self.url)
        self.stores = [self.stack.enter_context(SwarmDB(url=url, clock=self.clock)) for url in urls]
        self.made = 0

    def teardown(self) -> None:
        self.stack.close()

    def both(self, call: Callable[[SwarmDB], Any]) -> None:
        answers: list[tuple[Any, ...]] = []
        for store in self.stores:
            try:
                answers.append(("returned", comparable(call(store))))
            except SwarmDBError as error:
                facts = getattr(error, "field", None), getattr(error, "expected", None)
                answers.append((type(error).__name__, *facts))
        assert answers[0] == answers[1]

    @rule(hours=st.sampled_from([0.001, 1, 25]))
    def time_passes(self, hours: float) -> None:
        self.clock.advance(hours=hours)

    # Events

    @rule(event_type=WORDS["event_type"], agent_id=NAMES, moment=maybe(MOMENTS), metadata=OBJECTS, again=st.booleans())
    def insert_event(self, event_type: Any, agent_id: str, moment: Any, metadata: Any, *, again: bool) -> None:
        self.made += not again
        event: Any = {"event_type": event_type, "agent_id": agent_id, "agent_type": "t", "metadata": metadata}
        if moment is not None:
            event["timestamp"] = moment
        self.both(lambda store: store.insert_event(event, event_id=f"e-{self.made}"))

    @rule(agent_ids=st.lists(NAMES, max_size=4))
    def insert_events(self, agent_ids: list[str]) -> None:
        now = self.clock()

        def insert(store: SwarmDB) -> int:
            events = [
                AgentEvent.model_validate(
                    {
                        "event_type": "spawn",
                        "agent_id": name,
                        "agent_type": "t",
                        "timestamp": now,
                        "event_id": f"b-{self.made}-{at}",
                    }
                )
                for at, name in enumerate(agent_ids)
            ]
            return len(store.insert_events(events))

        self.made += 1
        self.both(insert)

    @rule(
        agent_id=maybe(NAMES),
        event_type=maybe(WORDS["event_type"]),
        since=maybe(MOMENTS),
        until=maybe(MOMENTS),
        limit=LIMITS,
    )
    def get_events(self, agent_id: Any, event_type: Any, since: Any, until: Any, limit: int) -> None:
        self.both(lambda store: store.get_events(agent_id, event_type, limit, since=since, until=until))
        self.both(lambda store: list(store.iter_events(agent_id, event_type, since=since, until=until, batch_size=2)))

    @rule(agent_id=maybe(GOOD_NAMES), until=maybe(MOMENTS), size=st.integers(1, 3))
    def page_through_events(self, agent_id: Any, until: Any, size: int) -> None:
        def pages(store: SwarmDB) -> list[AgentEvent]:
            found: list[AgentEvent] = []
            while page := store.get_events(agent_id, limit=size, until=until, before=found[-1] if found else None):
                found += page
            return found

        self.both(pages)

    @rule(moment=MOMENTS, number=NUMBERS)
    def page_from_anywhere(self, moment: Any, number: int) -> None:
        self.both(lambda store: len(store.get_events(before=EventCursor(moment, number), limit=0)))

    @rule(
        types=maybe(st.lists(WORDS["event_type"], max_size=3)),
        agent_ids=maybe(NAMES | st.lists(NAMES, max_size=3)),
        exclude_agent=maybe(NAMES),
        skipped=st.integers(-1, 3),
    )
    def watch_events(self, types: Any, agent_ids: Any, exclude_agent: Any, skipped: int) -> None:
        def watched(store: SwarmDB) -> list[AgentEvent]:
            everything = sorted(store.iter_events(), key=lambda event: event.id or 0)
            after = everything[skipped - 1].id if 0 < skipped <= len(everything) else min(skipped, 0)
            watcher = store.watch_events(after, types=types, agent_ids=agent_ids, exclude_agent=exclude_agent)
            wanted = [
                event
                for event in everything
                if (event.id or 0) > (after or 0)
                and (types is None or event.event_type in types)
                and (agent_ids is None or event.agent_id in ([agent_ids] if isinstance(agent_ids, str) else agent_ids))
                and event.agent_id != exclude_agent
            ]
            found = list(islice(watcher, len(wanted)))  # It would wait for one more.
            assert [event.id for event in found] == [event.id for event in wanted]
            return found

        self.both(watched)

    # Agents

    @rule(agent_id=NAMES, status=WORDS["status"], metadata=OBJECTS)
    def register_agent(self, agent_id: str, status: Any, metadata: Any) -> None:
        self.both(lambda store: store.register_agent(agent_id, "t", status, metadata))

    @rule(agent_id=NAMES, status=WORDS["status"], duration=maybe(NUMBERS))
    def update_agent_status(self, agent_id: str, status: Any, duration: Any) -> None:
        self.both(lambda store: store.update_agent_status(agent_id, status, duration))

    @rule(agent_id=NAMES)
    def heartbeat(self, agent_id: str) -> None:
        self.both(lambda store: store.heartbeat(agent_id))

    @rule(minutes=st.sampled_from([-1, 0, 1, 90]), reason=maybe(NAMES))
    def give_up_silent_agents(self, minutes: int, reason: Any) -> None:
        span = timedelta(minutes=minutes)
        self.both(lambda store: store.find_stale_agents(span))
        self.both(lambda store: store.mark_stale_agents(span, reason))

    @rule(agent_id=NAMES, metadata=OBJECTS, said=OBJECTS, ends=ENDS, respawns=st.booleans())
    def track_agent(self, agent_id: str, metadata: Any, said: Any, ends: Any, *, respawns: bool) -> None:
        def track(store: SwarmDB) -> object:
            try:
                with store.track_agent(agent_id, "tracked", metadata) as agent:
                    agent.metadata = said
                    if respawns:
                        store.delete_agent(agent_id)
                        store.register_agent(agent_id, "again", "complete")
                    alive = agent.heartbeat()
                    if ends is not None:
                        raise ends("why\0")
            except (ValueError, TimeoutError) as error:
                if isinstance(error, SwarmDBError):
                    raise
                return [note.partition(": got")[0] for note in getattr(error, "__notes__", ())]
            return alive

        self.both(track)

    @rule(task=NAMES, agent=NAMES, result=maybe(WORDS["result"]), tokens=NUMBERS, ends=ENDS)
    def track_task(self, task: str, agent: str, result: Any, tokens: int, ends: Any) -> None:
        def track(store: SwarmDB) -> object:
            tracked = store.track_task(task, agent)
            try:
                with tracked:
                    if result is not None:
                        tracked.result = result
                    tracked.tokens_used = tokens
                    if ends is not None:
                        raise ends
            except (ValueError, TimeoutError) as error:
                if isinstance(error, SwarmDBError):
                    raise
            return tracked.timestamp, tracked.result, tracked.tokens_used

        self.both(track)

    @rule(agent_id=NAMES, status=maybe(WORDS["status"]))
    def read_agents(self, agent_id: str, status: Any) -> None:
        self.both(lambda store: store.get_agent(agent_id))
        self.both(lambda store: store.get_active_agents())
        self.both(lambda store: store.list_agents(status))

    @rule(agent_id=NAMES)
    def delete_agent(self, agent_id: str) -> None:
        self.both(lambda store: store.delete_agent(agent_id))

    # Memory

    @rule(session=NAMES, kind=WORDS["memory_type"], key=NAMES, value=JSON, ttl=maybe(NUMBERS))
    def store_memory(self, session: str, kind: Any, key: str, value: Any, ttl: Any) -> None:
        self.both(lambda store: store.store_memory(session, kind, key, value, ttl) > 0)

    @rule(session=NAMES, kind=maybe(WORDS["memory_type"]), key=NAMES, prefix=maybe(NAMES))
    def read_memory(self, session: str, kind: Any, key: str, prefix: Any) -> None:
        self.both(lambda store: store.get_memory(session, kind or "semantic", key, default="absent"))
        self.both(lambda store: store.get_memory(session, kind or "semantic", key, as_type=int))
        self.both(lambda store: store.list_memories(session, kind, prefix))
        self.both(lambda store: store.memory_history(session, kind or "semantic", key))

    @rule(session=GOOD_NAMES, kind=WORDS["memory_type"], key=GOOD_NAMES)
    def delete_memory(self, session: str, kind: Any, key: str) -> None:
        self.both(lambda store: store.delete_memory(session, kind, key))

    # Metrics

    @rule(
        task=NAMES, agent=NAMES, duration=maybe(NUMBERS), result=WORDS["result"], tokens=NUMBERS, moment=maybe(MOMENTS)
    )
    def store_task_metric(self, task: str, agent: str, duration: Any, result: Any, tokens: int, moment: Any) -> None:
        self.both(lambda store: store.store_task_metric(task, agent, duration, result, tokens, timestamp=moment))

    @rule(owner=NAMES, metric=WORDS["metric"], value=FLOATS, metadata=OBJECTS, moment=maybe(MOMENTS))
    def store_figures(self, owner: str, metric: Any, value: float, metadata: Any, moment: Any) -> None:
        self.both(lambda store: store.store_agent_metric(owner, metric, value, metadata, moment) > 0)
        self.both(lambda store: store.store_swarm_metric(owner, metric, value, metadata, moment) > 0)

    @rule(
        batch=st.lists(st.tuples(GOOD_NAMES, WORDS["result"], maybe(NUMBERS), maybe(MOMENTS)), max_size=5),
        extra=st.booleans(),
    )
    def store_task_metrics(self, batch: list[tuple[Any, ...]], *, extra: bool) -> None:
        rows: list[Any] = [
            {"task_id": task, "agent_id": task, "result": result, "duration_ms": duration, "timestamp": moment}
            for task, result, duration, moment in batch
        ]
        if extra and rows:
            rows[-1]["other"] = 1
        self.both(lambda store: store.store_task_metrics(rows))
        moments: list[Any] = [
            {**row, "duration_ms": None, "result": "success"} for row in rows if row["timestamp"] != "soon"
        ]
        self.both(lambda store: store.store_task_metrics(moments))

    @rule(batch=st.lists(st.tuples(GOOD_NAMES, WORDS["metric"], FLOATS, OBJECTS, maybe(MOMENTS)), max_size=4))
    def store_batches_of_figures(self, batch: list[tuple[Any, ...]]) -> None:
        batches: dict[str, Callable[..., int]] = {
            "agent_id": SwarmDB.store_agent_metrics,
            "swarm_id": SwarmDB.store_swarm_metrics,
        }
        for owner, store_metrics in batches.items():
            names = (owner, "metric_type", "value", "metadata", "timestamp")
            rows: list[Any] = [dict(zip(names, figure, strict=True)) for figure in batch]
            self.both(partial(store_metrics, metrics=rows))

    @rule(
        owner=maybe(NAMES),
        result=maybe(WORDS["result"]),
        metric=maybe(WORDS["metric"]),
        since=maybe(MOMENTS),
        limit=LIMITS,
    )
    def read_metrics(self, owner: Any, result: Any, metric: Any, since: Any, limit: int) -> None:
        self.both(lambda store: store.get_task_metrics(None, owner, result, since=since, limit=limit))
        self.both(lambda store: store.get_task_metrics(owner, since=since, limit=limit))
        self.both(lambda store: store.get_agent_metrics(owner, metric, since=since, limit=limit))
        self.both(lambda store: store.get_swarm_metrics(owner, metric, since=since, limit=limit))

    # Summaries

    @rule(owner=NAMES, result=st.sampled_from(["success", "failure"]), duration=maybe(NUMBERS), since=maybe(MOMENTS))
    def summarize(self, owner: str, result: Any, duration: Any, since: Any) -> None:
        self.both(lambda store: store.store_task_metric(owner, owner, duration, result))
        self.both(lambda store: store.summarize_tasks(owner, since=since))
        self.both(lambda store: store.summarize_tasks(until=since))
        self.both(lambda store: store.summarize_swarm(owner, since=since))

    @rule(
        order_by=st.sampled_from([*get_args(AgentOrder), "results"]),
        descending=st.booleans(),
        limit=maybe(LIMITS),
        since=maybe(MOMENTS),
        until=maybe(MOMENTS),
    )
    def summarize_agents(self, order_by: Any, *, descending: bool, limit: Any, since: Any, until: Any) -> None:
        self.both(
            lambda store: store.summarize_agents(
                since=since, until=until, order_by=order_by, descending=descending, limit=limit
            )
        )

    @rule(
        metric=st.sampled_from(
            ["duration_ms", "tokens_used", "success_rate", "throughput", *AgentMetricType, *SwarmMetricType]
        ),
        bucket=st.sampled_from([timedelta(hours=1), timedelta(days=7), timedelta(days=36525), timedelta(0)]),
        agg=st.sampled_from([*get_args(Aggregate), "p90"]),
        of=maybe(NAMES),
        since=maybe(MOMENTS),
        until=maybe(MOMENTS),
    )
    def metric_series(self, metric: Any, bucket: timedelta, agg: Any, of: Any, since: Any, until: Any) -> None:
        self.both(lambda store: store.metric_series(metric, bucket=bucket, agg=agg, of=of, since=since, until=until))

    # Transactions and maintenance

    @rule(name=GOOD_NAMES, fails=st.booleans())
    def a_block_in_a_block(self, name: str, *, fails: bool) -> None:
        def blocks(store: SwarmDB) -> object:
            with store.transaction():
                store.register_agent(name, "outer")
                try:
                    with store.session():
                        store.register_agent(name, "inner")
                        store.store_memory(name, "semantic", "k", 1)
                        if fails:
                            raise KeyError
                except KeyError:
                    pass
                try:
                    store.insert_event({"event_type": "spawn", "agent_id": name, "agent_type": "t"}, event_id="twice")
                    store.insert_event({"event_type": "spawn", "agent_id": name, "agent_type": "t"}, event_id="twice")
                except SwarmDBError:
                    pass
                return store.get_agent(name)

        self.both(blocks)

    @rule(days=st.sampled_from([-1, 0, 1, 10**9]))
    def clean_up(self, days: int) -> None:
        self.both(lambda store: store.cleanup_old_events(days))

    @rule(days=st.sampled_from([None, 0, 1, 10**9]), dry_run=st.booleans())
    def clean_up_all(self, days: int | None, *, dry_run: bool) -> None:
        def cleaned(store: SwarmDB) -> object:
            report = store.cleanup(days, dry_run=dry_run)
            return [table.rows for table in report.tables], store.retention, store.last_cleanup is None

        self.both(cleaned)

    @rule()
    def clean_up_agents(self) -> None:
        self.both(lambda store: store.cleanup(policy=RetentionPolicy(agents=timedelta())))

    @rule()
    def check(self) -> None:
        self.both(lambda store: store.check().ok)


@pytest.mark.timeout(600)
def test_both_databases_answer_the_same(postgres_server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SameOnBoth, "server", postgres_server, raising=False)
    monkeypatch.setattr(time, "monotonic_ns", lambda: 0)  # Each store measures how long a block takes.
    examples = int(os.environ.get("MOAI_TEST_EXAMPLES", "40"))
    run_state_machine_as_test(
        SameOnBoth,
        settings=settings(
            max_examples=examples,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            print_blob=True,
        ),
    )
