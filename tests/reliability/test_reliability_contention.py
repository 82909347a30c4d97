"""A short form of the contention."""

from pathlib import Path

from reliability import contention


def test_threads_and_processes_at_once_fail_in_nothing_and_lose_nothing(tmp_path: Path) -> None:
    figures = contention.run(tmp_path, seconds=4, threads=32, processes=16)

    assert {"write", "transaction", "read", "snapshot", "cleanup", "backup", "vacuum"} == figures.all.calls.keys()


def test_32_processes_open_a_fresh_file_at_once(tmp_path: Path) -> None:
    assert contention.open_at_once(tmp_path) > 0


def test_beside_a_long_reader_the_log_grows_and_shrinks_after_it(tmp_path: Path) -> None:
    figures = contention.long_reader(tmp_path, writes=500)

    assert figures.grown > figures.after
