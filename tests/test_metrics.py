"""Task, agent and swarm metrics."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import Clock
from moai_flow.memory import (
    AgentEvent,
    AgentMetric,
    AgentMetricData,
    AgentMetricType,
    EventType,
    InvalidInputError,
    RawConnection,
    SwarmDB,
    SwarmMetric,
    SwarmMetricData,
    SwarmMetricType,
    TaskMetric,
    TaskMetricData,
    TaskResult,
)


def test_a_task_metric_comes_back_typed(db: SwarmDB, clock: Clock) -> None:
    kept = db.store_task_metric("t", "a", 1200, "timeout", tokens_used=7, files_changed=2)

    assert kept == clock.now
    assert db.get_task_metrics() == [
        TaskMetric(
            task_id="t",
            agent_id="a",
            duration_ms=1200,
            result=TaskResult.TIMEOUT,
            tokens_used=7,
            files_changed=2,
            timestamp=clock.now,
        )
    ]


def test_a_duration_may_be_unknown(db: SwarmDB) -> None:
    db.store_task_metric("t", "a", None, "success")

    (found,) = db.get_task_metrics()
    assert (found.duration_ms, found.tokens_used, found.files_changed) == (None, 0, 0)


def test_metrics_of_a_task_at_the_same_time_take_the_next_free_microsecond(db: SwarmDB, clock: Clock) -> None:
    kept = [db.store_task_metric("t", "a", None, "success") for _ in range(3)]
    db.store_task_metric("other", "a", None, "success")

    assert kept == [clock.now + timedelta(microseconds=number) for number in range(3)]
    assert [found.timestamp for found in db.get_task_metrics(task_id="t")] == kept[::-1]
    assert db.get_task_metrics(task_id="other")[0].timestamp == clock.now


def test_times_with_and_without_a_fraction_are_in_order(local_db: SwarmDB) -> None:
    for text in ("10:00:00", "10:00:00.5", "10:00:01", "09:59:59.999999"):
        local_db.store_swarm_metric("s", "health", 1, timestamp=f"2025-11-30T{text}+00:00")

    with local_db.transaction() as conn:
        stored = [row["timestamp"] for row in conn.execute("SELECT timestamp FROM swarm_metrics ORDER BY timestamp")]
    assert stored == [
        "2025-11-30 09:59:59.999999",
        "2025-11-30 10:00:00",
        "2025-11-30 10:00:00.500000",
        "2025-11-30 10:00:01",
    ]
    assert [found.timestamp.second for found in local_db.get_swarm_metrics()] == [1, 0, 0, 59]


def test_agent_and_swarm_metrics_come_back_typed(db: SwarmDB, clock: Clock) -> None:
    first = db.store_agent_metric("a", "success_rate", 0.5, {"window": 10})
    second = db.store_agent_metric("a", AgentMetricType.THROUGHPUT, 3)
    swarm = db.store_swarm_metric("s", "latency", 12.5)

    newest, oldest = db.get_agent_metrics()
    assert (newest.metric_id, oldest.metric_id) == (second, first)
    assert (oldest.metric_type, oldest.value, oldest.metadata_) == (AgentMetricType.SUCCESS_RATE, 0.5, {"window": 10})
    assert (type(newest.value), newest.value, newest.timestamp) == (float, 3.0, clock.now)
    (found,) = db.get_swarm_metrics()
    assert (found.metric_id, found.swarm_id, found.metric_type) == (swarm, "s", SwarmMetricType.LATENCY)


def test_zero_has_no_sign_on_any_database(db: SwarmDB) -> None:
    db.store_agent_metric("a1", "throughput", -0.0)
    db.store_agent_metrics([{"agent_id": "a1", "metric_type": "throughput", "value": -0.0}])
    db.store_swarm_metric("s1", "health", -0.0)
    with db.session() as session:
        session.add(AgentMetric(agent_id="a1", metric_type=AgentMetricType.THROUGHPUT, value=-0.0))

    values = [metric.value for metric in db.get_agent_metrics("a1")] + [db.get_swarm_metrics("s1")[0].value]
    assert list(map(repr, values)) == ["0.0"] * 4


def test_metrics_are_filtered(db: SwarmDB) -> None:
    day = datetime(2025, 1, 1, tzinfo=UTC)
    for number, result in enumerate(TaskResult):
        db.store_task_metric(f"t{number}", f"a{number % 2}", number, result, timestamp=day + timedelta(days=number))
    for number, agent_type in enumerate(AgentMetricType):
        db.store_agent_metric(f"a{number % 2}", agent_type, number, timestamp=day + timedelta(days=number))
    for number, swarm_type in enumerate(SwarmMetricType):
        db.store_swarm_metric(f"s{number % 2}", swarm_type, number, timestamp=day + timedelta(days=number))

    assert [metric.task_id for metric in db.get_task_metrics()] == ["t3", "t2", "t1", "t0"]
    assert [metric.task_id for metric in db.get_task_metrics(agent_id="a1")] == ["t3", "t1"]
    assert [metric.task_id for metric in db.get_task_metrics(result="failure")] == ["t1"]
    assert [metric.task_id for metric in db.get_task_metrics("t2", "a0", TaskResult.TIMEOUT)] == ["t2"]
    since, until = day + timedelta(days=1), day + timedelta(days=3)
    assert [metric.task_id for metric in db.get_task_metrics(since=since, until=until)] == ["t2", "t1"]
    assert [metric.value for metric in db.get_agent_metrics(since=since, until=until)] == [2, 1]
    assert [metric.value for metric in db.get_agent_metrics("a1")] == [3, 1]
    assert [metric.value for metric in db.get_agent_metrics("a1", "success_rate")] == [1]
    assert [metric.value for metric in db.get_swarm_metrics(metric_type="health")] == [0]
    assert [metric.value for metric in db.get_swarm_metrics("s0", since=since, until=until)] == [2]
    assert [metric.value for metric in db.get_swarm_metrics(limit=1)] == [3]
    assert db.get_swarm_metrics(limit=0) == []
    assert db.get_task_metrics(task_id="") == []


def test_a_time_after_which_no_other_fits_is_refused(db: SwarmDB) -> None:
    last = datetime.max.replace(tzinfo=UTC)
    db.store_task_metric("t", "a", None, "success", timestamp=last)

    with pytest.raises(InvalidInputError, match="timestamp"):
        db.store_task_metric("t", "a", None, "success", timestamp=last)


def test_null_counts_read_as_zero(db: SwarmDB) -> None:
    with db.transaction() as conn:
        conn.execute(
            "INSERT INTO task_metrics (task_id, agent_id, result, tokens_used, files_changed) "
            "VALUES ('t', 'a', 'success', NULL, NULL)"
        )
        conn.execute("INSERT INTO agent_metrics (agent_id, metric_type, value) VALUES ('a', 'duration', 7)")

    (task,) = db.get_task_metrics()
    assert (task.tokens_used, task.files_changed) == (0, 0)
    (agent,) = db.get_agent_metrics()
    assert agent.metadata_ == {}
    assert abs(agent.timestamp - datetime.now(UTC)) < timedelta(minutes=1)


# Batches

US = timedelta(microseconds=1)


def task(task_id: str = "t", **more: Any) -> TaskMetricData:
    made: TaskMetricData = {"task_id": task_id, "agent_id": "a", "result": "success"}
    return {**made, **more}  # type: ignore[typeddict-item]


def test_a_batch_comes_back_typed(db: SwarmDB, clock: Clock) -> None:
    earlier = clock.now - timedelta(hours=1)
    kept = db.store_task_metrics(
        [
            task("t2", duration_ms=5, tokens_used=7, files_changed=2, timestamp="2025-11-30T09:00:00Z"),
            TaskMetric(task_id="t1", agent_id="b", result=TaskResult.TIMEOUT, timestamp=earlier),
            task("t3"),
        ]
    )
    of_agents = db.store_agent_metrics(
        [
            {"agent_id": "a", "metric_type": "duration", "value": 5, "metadata": {"window": 10}},
            AgentMetric(agent_id="b", metric_type=AgentMetricType.THROUGHPUT, value=0.5, timestamp=earlier),
        ]
    )
    health: SwarmMetricData = {"swarm_id": "s", "metric_type": "health", "value": 1, "timestamp": earlier}
    latency = SwarmMetric(swarm_id="r", metric_type=SwarmMetricType.LATENCY, value=2, metadata={"k": [1]})
    of_swarms = db.store_swarm_metrics([health, latency, health])

    assert kept == [earlier, earlier, clock.now]
    assert (of_agents, of_swarms) == (2, 3)
    newest, *rest = db.get_task_metrics()
    assert (newest.task_id, newest.duration_ms, newest.tokens_used, newest.files_changed) == ("t3", None, 0, 0)
    assert [(found.task_id, found.agent_id, found.result) for found in rest] == [
        ("t2", "a", TaskResult.SUCCESS),
        ("t1", "b", TaskResult.TIMEOUT),
    ]
    assert (rest[0].duration_ms, rest[0].tokens_used, rest[0].files_changed) == (5, 7, 2)
    assert [(found.agent_id, found.value, found.metadata_) for found in db.get_agent_metrics()] == [
        ("a", 5.0, {"window": 10}),
        ("b", 0.5, {}),
    ]
    assert [(found.swarm_id, found.metadata_) for found in db.get_swarm_metrics()] == [("r", {"k": [1]})] + [
        ("s", {})
    ] * 2


def test_an_empty_batch_writes_nothing(db: SwarmDB) -> None:
    assert db.store_task_metrics([]) == []
    assert (db.store_agent_metrics(iter(())), db.store_swarm_metrics([])) == (0, 0)


def test_a_stored_metric_is_added_again_as_a_new_one(db: SwarmDB, clock: Clock) -> None:
    db.store_agent_metric("a", "duration", 1)
    db.store_task_metric("t", "a", 1, "success")

    assert db.store_agent_metrics(db.get_agent_metrics()) == 1
    assert len({found.metric_id for found in db.get_agent_metrics()}) == 2
    assert db.store_task_metrics(db.get_task_metrics()) == [clock.now + US]


def test_equal_keys_of_a_batch_take_the_next_free_microseconds_in_the_order_given(db: SwarmDB, clock: Clock) -> None:
    now = clock.now
    db.store_task_metrics([task(timestamp=now + US), task("other")])

    kept = db.store_task_metrics(
        [task(), task(timestamp=now + 2 * US), task(), task("other"), task(), task("free"), task(timestamp=now - US)]
    )

    # As if each came after the one before it.
    assert kept == [now, now + 2 * US, now + 3 * US, now + US, now + 4 * US, now, now - US]
    assert sorted(found.timestamp for found in db.get_task_metrics(task_id="t")) == [
        now + number * US for number in range(-1, 5)
    ]


@given(
    before=st.lists(st.integers(0, 6), max_size=6),
    batch=st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 6)), max_size=12),
)
@settings(deadline=None)
def test_a_batch_keeps_the_keys_that_single_calls_would(before: list[int], batch: list[tuple[str, int]]) -> None:
    base = datetime(2025, 11, 30, tzinfo=UTC)
    answers = []
    for at_once in (True, False):
        with SwarmDB(":memory:") as store:
            for at in before:
                store.store_task_metric("a", "x", None, "success", timestamp=base + at * US)
            metrics = [task(task_id, timestamp=base + at * US) for task_id, at in batch]
            if at_once:
                answers.append(store.store_task_metrics(metrics))
            else:
                answers.append(
                    [
                        store.store_task_metric(one["task_id"], "x", None, "success", timestamp=one["timestamp"])
                        for one in metrics
                    ]
                )
    assert answers[0] == answers[1]


def test_many_metrics_of_one_task_and_time_are_spread_in_little_more_time(file_db: SwarmDB, clock: Clock) -> None:
    kept = file_db.store_task_metrics(task() for _ in range(20_000))  # By trying each, these were 200 million steps.

    assert kept[-1] == clock.now + 19_999 * US


BATCHES: list[tuple[str, Any]] = [
    ("store_task_metrics", task()),
    ("store_agent_metrics", {"agent_id": "a", "metric_type": "duration", "value": 1}),
    ("store_swarm_metrics", {"swarm_id": "a", "metric_type": "health", "value": 1}),
]


@pytest.mark.parametrize(("method", "good"), BATCHES)
@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"timestamp": "soon"}, "metrics[2].timestamp"),
        ({"model": "c"}, "metrics[2].model"),
        ({"result": "lost", "metric_type": "lost"}, None),
        ({"value": float("nan"), "tokens_used": -1}, None),
    ],
)
def test_one_bad_metric_refuses_the_batch_by_its_index(
    db: SwarmDB, method: str, good: dict[str, Any], change: dict[str, Any], field: str | None
) -> None:
    known = {"tokens_used"} | good.keys() if method == "store_task_metrics" else good.keys()
    change = change if field else {name: value for name, value in change.items() if name in known}

    with pytest.raises(InvalidInputError) as caught:
        getattr(db, method)([good, good, {**good, **change}, good])

    assert caught.value.field == (field or f"metrics[2].{next(iter(change))}")
    assert (db.get_task_metrics(), db.get_agent_metrics(), db.get_swarm_metrics()) == ([], [], [])


@pytest.mark.parametrize(("method", "good"), BATCHES)
def test_a_missing_key_or_another_thing_than_a_metric_is_refused(
    db: SwarmDB, method: str, good: dict[str, Any]
) -> None:
    store = getattr(db, method)
    for name in good:
        with pytest.raises(InvalidInputError, match=rf"^metrics\[0\]\.{name}: .*a dict with"):
            store([{key: value for key, value in good.items() if key != name}])
    for other in ("t", None, AgentEvent(event_type=EventType.SPAWN, agent_id="a", agent_type="t")):
        with pytest.raises(InvalidInputError, match=r"^metrics\[1\]\.metric: "):
            store([good, other])
    for no_list in (good, TaskMetric(task_id="t", agent_id="a", result=TaskResult.SUCCESS), 7):
        with pytest.raises(InvalidInputError, match=r"^metrics: "):
            store(no_list)


def test_metadata_that_no_json_can_say_refuses_the_batch(db: SwarmDB) -> None:
    good: AgentMetricData = {"agent_id": "a", "metric_type": "duration", "value": 1}
    with pytest.raises(InvalidInputError, match=r"^metrics\[1\]\.metadata\['k'\]: "):
        db.store_agent_metrics([good, {**good, "metadata": {"k": {1}}}])
    assert db.get_agent_metrics() == []


def test_a_time_after_which_no_other_fits_is_refused_in_a_batch(db: SwarmDB) -> None:
    last = datetime.max.replace(tzinfo=UTC)
    with pytest.raises(InvalidInputError, match=r"^metrics\[2\]\.timestamp: "):
        db.store_task_metrics([task("other"), task(timestamp=last), task(timestamp=last)])
    db.store_task_metric("t", "a", None, "success", timestamp=last)
    with pytest.raises(InvalidInputError, match=r"^metrics\[0\]\.timestamp: "):
        db.store_task_metrics([task(timestamp=last)])
    assert len(db.get_task_metrics()) == 1


def test_a_batch_is_part_of_the_callers_transaction(db: SwarmDB, clock: Clock) -> None:
    with pytest.raises(KeyError), db.transaction():
        db.store_task_metric("t", "a", None, "success")
        assert db.store_task_metrics([task("free"), task()]) == [clock.now, clock.now + US]
        assert db.store_agent_metrics([{"agent_id": "a", "metric_type": "duration", "value": 1}]) == 1
        raise KeyError

    assert (db.get_task_metrics(), db.get_agent_metrics()) == ([], [])
    with db.transaction():
        db.store_task_metrics([task()])
        db.store_task_metrics([task()])
    assert [found.timestamp for found in db.get_task_metrics()] == [clock.now + US, clock.now]


def test_batches_of_several_threads_that_want_the_same_keys_all_find_free_ones(db: SwarmDB, clock: Clock) -> None:
    barrier = threading.Barrier(4)

    def store(number: int) -> list[datetime]:
        batch = [task(f"t{at}") for at in range(50)] + [task("same")] * 50
        barrier.wait()
        # In another order each, they would wait for each other on a server if they were written like that.
        return db.store_task_metrics(batch if number % 2 else batch[::-1])

    with ThreadPoolExecutor(4) as pool:
        kept = list(pool.map(store, range(4)))

    assert sorted(time for mine in kept for time in mine if mine) == sorted(
        found.timestamp for found in db.get_task_metrics(limit=1000)
    )
    assert [found.timestamp for found in db.get_task_metrics(task_id="t7")][::-1] == [
        clock.now + number * US for number in range(4)
    ]
    assert len(db.get_task_metrics(task_id="same", limit=1000)) == 200


class Word(str):
    """A string that is not a plain one."""


ODD: list[Any] = [None, "", "a", Word("a"), "ä", "no\0", "lone\ud800", 7, True, ["a"], {"k": 1}]
ODD_NUMBERS: list[Any] = [None, 0, 5, -1, 2**63, 2**63 - 1, True, 1.0, "1", [1], float("nan"), float("inf"), 10**400]
WORDS: list[Any] = ["success", TaskResult.TIMEOUT, Word("failure"), "lost", TaskResult.read("lost"), None, ["success"]]
TIMES: list[Any] = [
    None,
    "2025-11-30T10:00:00Z",
    "soon",
    datetime(2025, 11, 30, tzinfo=timezone(timedelta(hours=9))),
    datetime(2025, 11, 30),  # noqa: DTZ001 (local time)
    7,
]
ODD_TASKS: dict[str, list[Any]] = {
    "task_id": ODD,
    "agent_id": ODD,
    "result": WORDS,
    "duration_ms": ODD_NUMBERS,
    "tokens_used": ODD_NUMBERS,
    "files_changed": ODD_NUMBERS,
    "timestamp": TIMES,
}
ODD_FIGURES: dict[str, list[Any]] = {
    "value": ODD_NUMBERS,
    "metadata": [None, {}, {"k": [1]}, {"k": {1}}, {1: 2}, [], "k", 0],
    "timestamp": TIMES,
}


def with_one_odd(plain: dict[str, Any], odd: dict[str, list[Any]]) -> st.SearchStrategy[dict[str, Any]]:
    changes = [{name: value} for name, values in odd.items() for value in values]
    return st.sampled_from([{}, {}, *changes]).map(lambda change: {**plain, **change})


TASKS = with_one_odd({"task_id": "t", "agent_id": "a", "result": "success"}, ODD_TASKS)
FIGURES = with_one_odd(
    {"agent_id": "a", "metric_type": "duration", "value": 1},
    {**ODD_FIGURES, "agent_id": ODD, "metric_type": [AgentMetricType.THROUGHPUT, Word("duration"), "lost", None, {}]},
)


@given(tasks=st.lists(TASKS, max_size=3), figures=st.lists(FIGURES, max_size=3))
@settings(deadline=None, max_examples=200)
def test_a_batch_takes_and_refuses_what_single_calls_do(tasks: list[Any], figures: list[Any]) -> None:
    clock = Clock()
    with SwarmDB(":memory:", clock=clock) as one, SwarmDB(":memory:", clock=clock) as many:

        def singly(call: Callable[..., object], metrics: list[Any]) -> str | None:
            for index, metric in enumerate(metrics):
                try:
                    call(**metric)
                except InvalidInputError as error:
                    return f"metrics[{index}].{error.field}"
            return None

        def at_once(call: Callable[[list[Any]], object], metrics: list[Any]) -> str | None:
            try:
                call(metrics)
            except InvalidInputError as error:
                return error.field
            return None

        with_durations = [{"duration_ms": None, **task} for task in tasks]
        refused = singly(one.store_task_metric, with_durations)
        assert at_once(many.store_task_metrics, tasks) == refused
        if refused is None:
            assert many.get_task_metrics() == one.get_task_metrics()
        refused = singly(one.store_agent_metric, figures)
        assert at_once(many.store_agent_metrics, figures) == refused
        if refused is None:
            assert many.get_agent_metrics() == one.get_agent_metrics()


@pytest.mark.parametrize(
    ("one", "plain", "odd"),
    [
        ("store_task_metric", {"task_id": "t", "agent_id": "a", "duration_ms": 1, "result": "success"}, ODD_TASKS),
        (
            "store_agent_metric",
            {"agent_id": "a", "metric_type": "duration", "value": 1},
            {**ODD_FIGURES, "agent_id": ODD, "metric_type": ["throughput", Word("duration"), "health", None, {}]},
        ),
        (
            "store_swarm_metric",
            {"swarm_id": "s", "metric_type": "health", "value": 1},
            {**ODD_FIGURES, "swarm_id": ODD, "metric_type": ["latency", Word("health"), "duration", None, {}]},
        ),
    ],
)
def test_a_batch_refuses_each_value_that_a_single_call_refuses(
    one: str, plain: dict[str, Any], odd: dict[str, list[Any]]
) -> None:
    refused = 0
    with SwarmDB(":memory:") as store:
        for name, value in ((name, value) for name, values in odd.items() for value in values):
            metric = {**plain, name: value}
            problem = None
            try:
                getattr(store, one)(**metric)
            except InvalidInputError as error:
                problem = f"metrics[1].{error}"
                refused += 1
            if problem is None:
                getattr(store, f"{one}s")([plain, metric])
            else:
                with pytest.raises(InvalidInputError) as caught:
                    getattr(store, f"{one}s")([plain, metric])
                assert str(caught.value) == problem

    assert refused > 15


def waiting_for_locks(raw: RawConnection) -> int:
    count = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    return int(raw.execute(count).fetchone()[0])


def test_batches_in_another_order_never_wait_for_each_other(postgres_url: str, clock: Clock) -> None:
    batches = [[task(name) for name in names] for names in ("amz", "zma")]
    stores = SwarmDB(url=postgres_url, clock=clock), SwarmDB(url=postgres_url, clock=clock)
    with stores[0] as db, stores[1] as watching, ThreadPoolExecutor(2) as pool:
        with pytest.raises(KeyError), db.transaction():
            db.store_task_metrics([task("m")])
            stored = [pool.submit(db.store_task_metrics, batch) for batch in batches]
            deadline = time.monotonic() + 60
            waiting = 0
            while waiting < 2 and time.monotonic() < deadline:
                with watching.transaction() as raw:
                    waiting = waiting_for_locks(raw)
            raise KeyError
        kept = [future.result() for future in stored]

    assert waiting == 2
    # Whoever came first has the time itself, and the other one the next.
    assert sorted(kept) == [[clock.now] * 3, [clock.now + US] * 3]
