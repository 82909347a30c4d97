"""The demo's swarm: which files its agents take, what they count, and how they end."""

import multiprocessing
import os
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy.engine import URL

from moai_flow.memory import BusyError, SwarmDB
from moai_flow.memory.cli import swarm
from moai_flow.memory.cli.swarm import (
    Finding,
    Plan,
    at_work,
    examine,
    files_of,
    in_transaction,
    printable,
    read_file,
    run_agent,
    take,
)


@pytest.fixture
def store(path: Path) -> Iterator[SwarmDB]:
    """An empty store by the clock of the processes, which would remove what is a year old."""
    with SwarmDB(path) as db:
        yield db


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "folder"
    made.mkdir()
    return made


def plan(db: SwarmDB, folder: Path, files: list[str], *, processes: int = 1, threads: int = 1) -> Plan:
    url = URL.create("sqlite", database=str(db.db_path))
    return Plan("run", url, folder, tuple(files), processes, threads)


# Which files


def test_files_are_found_at_every_level_but_not_in_dot_folders(folder: Path, path: Path) -> None:
    for name in ("b.txt", ".hidden", "a/c.txt", "a/b/d", ".git/config", "a/.cache/x"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()

    assert files_of(folder, database=path) == (".hidden", "a/b/d", "a/c.txt", "b.txt")
    assert files_of(folder / ".git", database=path) == ("config",)


def test_links_to_folders_are_not_followed_and_links_to_files_are(folder: Path, path: Path) -> None:
    (folder / "file").touch()
    (folder / "round").symlink_to(folder)
    (folder / "link").symlink_to(folder / "file")
    (folder / "broken").symlink_to(folder / "gone")

    assert files_of(folder, database=path) == ("broken", "file", "link")


def test_what_would_never_end_is_no_file(folder: Path, path: Path) -> None:
    os.mkfifo(folder / "pipe")
    (folder / "zero").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as unix_socket:
        unix_socket.bind(str(folder / "socket"))

        assert files_of(folder, database=path) == ()


def test_the_databases_own_files_are_left_alone(folder: Path) -> None:
    with SwarmDB(folder / "swarm.db") as db:
        (folder / "same.db").hardlink_to(db.db_path)
        (folder / "other.db").touch()

        assert files_of(folder, database=db.db_path) == ("other.db",)


def test_a_folder_that_can_not_be_listed_is_left_for_an_agent_to_complain_about(folder: Path, path: Path) -> None:
    name = "d" * 200
    inside = os.open(folder, os.O_RDONLY)
    for _ in range(30):  # Deeper than any path may be long.
        os.mkdir(name, dir_fd=inside)
        outside, inside = inside, os.open(name, os.O_RDONLY, dir_fd=inside)
        os.close(outside)
    os.close(inside)

    (deep,) = files_of(folder, database=path)
    with pytest.raises(OSError, match="too long"):
        examine(folder / deep)


def test_a_name_that_is_no_unicode_can_be_stored(folder: Path, store: SwarmDB) -> None:
    name = os.fsdecode(b"caf\xe9")

    assert printable(name) == "caf\\xe9"
    assert store.store_memory("s", "semantic", printable(name), 1)


# What is counted


@pytest.mark.parametrize(
    ("content", "counted"),
    [
        (b"", Finding(0, 0, 0, 0, is_text=True)),
        (b"one", Finding(3, 1, 1, 3, is_text=True)),
        (b"one two\n\nthree\n", Finding(15, 3, 3, 7, is_text=True)),
        ("ä ö\n".encode(), Finding(6, 1, 2, 3, is_text=True)),
        (b"one\r\ntwo\r\n", Finding(10, 2, 2, 3, is_text=True)),
        (b"abc\xff", Finding(4)),
        (b"abc\0", Finding(4)),
    ],
)
def test_lines_words_and_bytes_are_counted(content: bytes, counted: Finding, folder: Path) -> None:
    (folder / "file").write_bytes(content)

    assert examine(folder / "file") == counted


def test_a_long_line_is_read_in_pieces_and_counted_as_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "some words of several lengths, cut anywhere\nand a second line\n"
    (folder / "file").write_text(text)
    for length in range(1, 20):
        monkeypatch.setattr(swarm, "_PIECE", length)

        assert examine(folder / "file") == Finding(len(text), 2, 11, 43, is_text=True)


# How it ends


def test_every_file_is_read_once(folder: Path, store: SwarmDB) -> None:
    files = [f"{number}.txt" for number in range(60)]
    for file in files:
        (folder / file).write_text(file)
    whole = plan(store, folder, files, processes=2, threads=2)
    with at_work(store, whole) as progress:
        counts = list(progress)

    assert counts == sorted(counts)
    assert counts[-1] == 60
    metrics = store.get_task_metrics(limit=100)
    assert sorted(metric.task_id for metric in metrics) == sorted(files)
    assert {metric.result for metric in metrics} == {"success"}
    assert [agent.status for agent in store.list_agents()] == ["complete"] * 4
    places = {agent.agent_id: (agent.metadata_["process"], agent.metadata_["thread"]) for agent in store.list_agents()}
    assert places == {"run-1": (1, 1), "run-2": (1, 2), "run-3": (2, 1), "run-4": (2, 2)}
    for kind in ("spawn", "complete"):  # Each agent in one process only.
        assert sorted(event.agent_id for event in store.get_events(event_type=kind)) == sorted(places)
    assert sum(event.metadata_["read"] for event in store.get_events(event_type="complete")) == 60
    assert store.get_memory("run", "semantic", "7.txt", as_type=Finding) == Finding(5, 1, 1, 5, is_text=True)


def test_a_process_that_is_killed_keeps_nobody_waiting(folder: Path, store: SwarmDB) -> None:
    os.mkfifo(folder / "endless")  # Who opens it waits for a writer that never comes.
    (folder / "file").touch()
    whole = plan(store, folder, ["endless", "file"], processes=2)
    store.register_agent("of-another-run", swarm.AGENT_TYPE, "running", {"process": 1})
    store.store_task_metric("endless", "of-another-run", 1, "success")
    with at_work(store, whole) as progress:
        for done in progress:
            children = multiprocessing.active_children()
            if done == 1 and len(children) == 1:
                children[0].kill()

    assert {agent.agent_id for agent in store.get_active_agents()} == {"of-another-run"}
    assert sorted(agent.status for agent in store.list_agents()) == ["complete", "error", "running"]
    (error,) = store.get_events(event_type="error")
    assert error.metadata_ == {"file": "endless", "reason": "its process ended with exit code -9"}
    (metric,) = store.get_task_metrics("endless", error.agent_id)
    assert (metric.result, metric.duration_ms) == ("cancelled", None)


def test_an_interrupt_does_not_wait_long_for_a_file_that_never_ends(
    folder: Path, store: SwarmDB, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(swarm, "GRACE", 0.1)
    os.mkfifo(folder / "endless")
    whole = plan(store, folder, ["endless", "file"])
    with pytest.raises(KeyboardInterrupt), at_work(store, whole) as progress:
        for _ in progress:
            if store.list_agents("running"):
                raise KeyboardInterrupt

    assert multiprocessing.active_children() == []
    assert [agent.status for agent in store.list_agents()] == ["error"]
    assert store.get_task_metrics("file") == []


def test_a_process_that_fails_says_so_in_one_line(
    folder: Path, store: SwarmDB, capfd: pytest.CaptureFixture[str]
) -> None:
    (folder / "file").touch()
    here = plan(store, folder, ["file"], threads=2)
    (folder / "no.db").write_text("not a database" * 100)
    with at_work(store, replace(here, url=URL.create("sqlite", database=str(folder / "no.db")))) as progress:
        # The file that the first agent took has a result, so it is not in anybody's hand.
        assert take(store, here, "run-1") == "file"
        assert read_file(store, here, "run-1", "file")
        assert list(progress)[-1] == 1

    said = capfd.readouterr().err
    assert f"swarmdb: {folder / 'no.db'}: file is not a database\n" in said
    assert "Traceback" not in said
    assert [agent.status for agent in store.list_agents()] == ["error"] * 2
    assert [event.metadata_ for event in store.get_events(event_type="error")] == [
        {"file": None, "reason": "its process ended with exit code 1"}
    ] * 2
    assert [metric.result for metric in store.get_task_metrics()] == ["success"]


def test_an_agent_does_not_wait_long_for_one_that_never_comes(
    folder: Path, store: SwarmDB, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(swarm, "GRACE", 0.05)
    (folder / "file").touch()
    here = plan(store, folder, ["file", "gone"], threads=2)
    for agent_id in here.agents:
        store.register_agent(agent_id, swarm.AGENT_TYPE)
    run_agent(store, here, "run-1")

    (completed,) = store.get_events(event_type="complete")
    assert completed.metadata_ == {"read": 1, "unreadable": 1}
    (error,) = store.get_events(event_type="error")
    assert error.metadata_ == {"file": "gone", "reason": "No such file or directory"}
    (failure,) = store.get_task_metrics("gone")
    assert failure.result == "failure"
    assert failure.duration_ms is not None


def test_a_transaction_that_others_come_between_is_done_again_but_not_for_ever(
    store: SwarmDB, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(swarm, "ATTEMPTS", 3)
    tried: list[int] = []

    def busy_until(attempt: int) -> str:
        tried.append(store.store_memory("s", "semantic", "k", len(tried)))
        if len(tried) < attempt:
            raise BusyError("another transaction came between")
        return "done"

    assert in_transaction(store, lambda: busy_until(3)) == "done"
    assert len(tried) == 3
    assert [memory.value for memory in store.memory_history("s", "semantic", "k")] == [2]
    tried.clear()
    with pytest.raises(BusyError, match="came between"):
        in_transaction(store, lambda: busy_until(4))
    assert len(tried) == 3
    assert [memory.value for memory in store.memory_history("s", "semantic", "k")] == [2]
