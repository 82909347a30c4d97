"""A report as an image: tasks and failures by the hour, drawn as SVG without any further library.

Run it: ``python report.py``; it writes ``report.svg``.
"""

from datetime import UTC, datetime, timedelta
from pathlib import Path

from moai_flow.memory import MetricBucket, SwarmDB, TaskMetricData, TaskResult

START = datetime(2026, 1, 1, tzinfo=UTC)
WIDTH, HEIGHT, MARGIN = 720, 240, 40


def metrics() -> list[TaskMetricData]:
    """Make up a day of work: more by day than by night, and a bad hour."""
    made: list[TaskMetricData] = []
    for hour in range(24):
        for number in range(4 + 10 * (8 <= hour < 20)):
            result: TaskResult = TaskResult.FAILURE if hour == 14 and number % 2 else TaskResult.SUCCESS
            made.append(
                {
                    "task_id": f"task-{hour}-{number}",
                    "agent_id": f"agent-{number % 3}",
                    "duration_ms": 800 + 90 * number + 40 * hour,
                    "result": result,
                    "timestamp": START + timedelta(hours=hour, minutes=number),
                }
            )
    return made


def draw(tasks: list[MetricBucket], p95: list[MetricBucket]) -> str:
    """Return an SVG: a bar for the tasks of each hour, a line for the 95th percentile of their durations."""
    most, longest = max(bucket.count for bucket in tasks), max(bucket.value or 0 for bucket in p95)
    step, height = (WIDTH - 2 * MARGIN) / len(tasks), HEIGHT - 2 * MARGIN
    bars = [
        f'<rect x="{MARGIN + step * at + 2:.1f}" y="{HEIGHT - MARGIN - height * bucket.count / most:.1f}" '
        f'width="{step - 4:.1f}" height="{height * bucket.count / most:.1f}" fill="#9fa8da"/>'
        for at, bucket in enumerate(tasks)
    ]
    points = " ".join(
        f"{MARGIN + step * (at + 0.5):.1f},{HEIGHT - MARGIN - height * (bucket.value or 0) / longest:.1f}"
        for at, bucket in enumerate(p95)
    )
    labels = [
        f'<text x="{MARGIN + step * (at + 0.5):.1f}" y="{HEIGHT - 24}" text-anchor="middle">{bucket.start:%H}</text>'
        for at, bucket in enumerate(tasks)
        if at % 3 == 0
    ]
    title = f"Tasks an hour (bars, up to {most}), p95 of their duration (line, up to {longest:,.0f} ms)"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-size="12">',
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
            f'<g font-family="sans-serif"><text x="{MARGIN}" y="24">{title}</text>',
            *bars,
            f'<polyline points="{points}" fill="none" stroke="#c62828" stroke-width="2"/>',
            *labels,
            "</g></svg>\n",
        ]
    )


def main() -> None:
    """Ask for two series, and draw them."""
    with SwarmDB(":memory:") as db:
        db.store_task_metrics(metrics())
        tasks = db.metric_series("duration_ms", bucket=timedelta(hours=1), agg="count")
        p95 = db.metric_series("duration_ms", bucket=timedelta(hours=1), agg="p95")
        Path("report.svg").write_text(draw(tasks, p95), encoding="utf-8")
        summary = db.summarize_tasks()
        print(f"{summary.count} tasks, {summary.success_rate:.0%} of them a success; p95 {summary.p95_ms:,.0f} ms")
        worst = min(db.metric_series("success_rate", bucket=timedelta(hours=1)), key=lambda bucket: bucket.value or 0)
        print(f"the worst hour began at {worst.start:%H:%M}")


if __name__ == "__main__":
    main()
