"""What a power loss leaves, simulated: writers are stopped, and their file is copied without what may be lost."""

import multiprocessing
import os
import random
import shutil
import signal
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from moai_flow.memory import SwarmDB

from .units import check_integrity, demand, event

SPAWN = multiprocessing.get_context("spawn")

#: What a disk writes as a whole.
SECTOR = 512

#: At how many moments one database is copied, before the writers begin another: each copy is read as a whole.
_MOMENTS_OF_ONE = 20


@dataclass
class PowerFigures:
    """What the copies showed, by what was lost in them."""

    copies: dict[str, int] = field(default_factory=dict)
    #: How many commits that had been acknowledged were missing at most.
    most_lost: dict[str, int] = field(default_factory=dict)

    def note(self, loss: str, lost: int) -> None:
        """Count a copy."""
        self.copies[loss] = self.copies.get(loss, 0) + 1
        self.most_lost[loss] = max(self.most_lost.get(loss, 0), lost)

    def __str__(self) -> str:
        return "; ".join(
            f"{self.copies[loss]} copies with {loss}: all sound, and at most {self.most_lost[loss]} acknowledged "
            "commits missing"
            for loss in self.copies
        )


#: What is lost in a copy.
NOTHING, END_OF_LOG, TORN_END, UNFLUSHED = (
    "nothing lost",
    "the end of the log cut off",
    "the end of the log torn",
    "any unflushed sectors lost",
)


def has_compiler() -> bool:
    """Whether what is flushed can be recorded here."""
    return shutil.which("cc") is not None and Path("/proc/self/fd").exists()


def run(
    folder: Path,
    *,
    durability: Any = "normal",
    moments: int = 100,
    processes: int = 4,
    seed: int = 0,
    say: Callable[[str], None] = lambda _: None,
) -> PowerFigures:
    """Stop all writers at random moments, copy what the disk may have then, and open each copy.

    Raises:
        BreachError: If a copy is not sound, has a commit without all that came before it, or lacks one that it may not.
    """
    chance = random.Random(seed)
    figures = PowerFigures()
    done = 0
    while done < moments:
        some = min(_MOMENTS_OF_ONE, moments - done)
        done += some
        with TemporaryDirectory(dir=folder) as inner:
            acknowledged = _try_one(Path(inner), durability, some, processes, chance, figures)
        say(f"  moment {done}: {acknowledged:,} transactions in {some} moments")
    return figures


def _try_one(
    folder: Path, durability: Any, moments: int, processes: int, chance: random.Random, figures: PowerFigures
) -> int:
    """Try it with one database, add to *figures*, and return how many transactions were acknowledged."""
    path, durable = folder / "swarm.db", folder / "durable"
    durable.mkdir()
    SwarmDB(path).close()
    shutil.copyfile(path, durable / path.name)  # It was there long before.
    notes = [folder / f"acknowledged-{number}" for number in range(processes)]
    acknowledged = 0
    with _writing(path, durability, notes, durable):
        for moment in range(moments):
            time.sleep(chance.uniform(0.001, 0.08))
            with _stopped():
                acknowledged = _acknowledged(notes)
                for loss, copy in _copies(path, folder / f"copy-{moment}", durable, chance):
                    lost = acknowledged - _check(copy)
                    figures.note(loss, max(lost, 0))
                    if loss == NOTHING or (loss == UNFLUSHED and durability == "full"):
                        demand(lost <= 0, f"with {loss} nothing that was acknowledged is missing", lost)
                    shutil.rmtree(copy.parent)
    return acknowledged


# The writers

_running: list[Any] = []


@contextmanager
def _writing(path: Path, durability: Any, notes: list[Path], durable: Path) -> Iterator[None]:
    """Run writers, which record what they flush where that can be done."""
    before = {name: os.environ.get(name) for name in ("LD_PRELOAD", "SWARM_DURABLE")}
    if has_compiler():
        library = durable.parent / "syncs.so"
        source = Path(__file__).with_name("syncs.c")
        subprocess.run(["cc", "-shared", "-fPIC", "-O2", "-o", library, source, "-ldl"], check=True)
        os.environ.update(LD_PRELOAD=str(library), SWARM_DURABLE=str(durable))
    try:
        workers = [SPAWN.Process(target=_write, args=(path, durability, note), daemon=True) for note in notes]
        for worker in workers:
            worker.start()
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
    _running[:] = workers
    try:
        deadline = time.monotonic() + 60
        while not all(note.exists() and note.stat().st_size for note in notes):
            demand(time.monotonic() < deadline, "the writers write within a minute")
            time.sleep(0.01)
        yield
    finally:
        for worker in workers:
            worker.kill()
            worker.join()
        for worker in workers:
            demand(worker.exitcode == -9, "no writer fails", worker.exitcode)


def _write(path: Path, durability: Any, note: Path) -> None:
    descriptor = os.open(note, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    chance = random.Random(note.name)
    with SwarmDB(path, durability=durability) as db:
        while True:
            with db.transaction():
                number = db.get_memory("order", "semantic", "number", as_type=int, default=0) + 1
                db.store_memory("order", "semantic", "number", number)
                db.insert_events([event(str(number))] * 3)
                db.register_agent(str(number), "t")
                db.store_task_metric(str(number), "a", 1, "success")
            os.write(descriptor, f"{number}\n".encode())
            time.sleep(chance.expovariate(500))


@contextmanager
def _stopped() -> Iterator[None]:
    """Hold all writers in the middle of whatever they do."""
    for worker in _running:
        os.kill(worker.pid, signal.SIGSTOP)
    try:
        for worker in _running:
            while _state(worker.pid) not in "TZX":
                time.sleep(0.0005)
        yield
    finally:
        for worker in _running:
            os.kill(worker.pid, signal.SIGCONT)


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def _acknowledged(notes: list[Path]) -> int:
    """Return the last commit that was acknowledged. Commits are numbered in their order."""
    return max(int(line) for note in notes for line in note.read_text().splitlines()[-1:])


# The copies


def _copies(path: Path, folder: Path, durable: Path, chance: random.Random) -> Iterator[tuple[str, Path]]:
    """Yield copies of a file, each in a folder of its own, with what was lost in it. The index is never copied."""
    file, log = path.read_bytes(), _read(path.with_name("swarm.db-wal"))
    yield NOTHING, _stored(folder.with_name(f"{folder.name}-a"), file, log)
    # What a checkpoint may have moved into the file was flushed before, so the log has at least that.
    kept = min(_moved_bytes(path), len(log))
    cut = chance.randint(kept, len(log))
    yield END_OF_LOG, _stored(folder.with_name(f"{folder.name}-b"), file, log[:cut])
    torn = max(kept, cut - chance.randint(1, 4096))
    rubbish = bytes(cut - torn) if chance.random() < 0.5 else chance.randbytes(cut - torn)
    yield TORN_END, _stored(folder.with_name(f"{folder.name}-c"), file, log[:torn] + rubbish)
    if has_compiler():
        flushed_file, flushed_log = _read(durable / "swarm.db"), _read(durable / "swarm.db-wal")
        for letter in "de":
            # Sometimes nearly all of it reaches the disk, sometimes nearly nothing.
            share = chance.choice([0.0, 0.05, 0.5, 0.95, chance.random()])
            lossy = (_mixed(flushed_file, file, share, chance), _mixed(flushed_log, log, share, chance))
            yield UNFLUSHED, _stored(folder.with_name(f"{folder.name}-{letter}"), *lossy)


def _read(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


def _stored(folder: Path, file: bytes, log: bytes) -> Path:
    folder.mkdir()
    (folder / "swarm.db").write_bytes(file)
    if log:
        (folder / "swarm.db-wal").write_bytes(log)
    return folder / "swarm.db"


def _moved_bytes(path: Path) -> int:
    """Return how much of the log a checkpoint may have moved, as the index says: https://sqlite.org/walformat.html."""
    index = path.with_name("swarm.db-shm").read_bytes()
    (page_size,) = struct.unpack_from("=H", index, 14)
    done, tried = struct.unpack_from("=I", index, 96)[0], struct.unpack_from("=I", index, 128)[0]
    frames = max(done, tried)
    return int(32 + frames * (24 + page_size)) if frames else 0


def _mixed(flushed: bytes, written: bytes, share: float, chance: random.Random) -> bytes:
    """Return a file of which a *share* of the sectors that were written since the last flush have reached the disk."""
    length = len(written) if chance.random() < 0.5 else len(flushed)
    sectors = []
    for at in range(0, length, SECTOR):
        old, new = flushed[at : at + SECTOR], written[at : at + SECTOR]
        if old != new and chance.random() >= share:
            new = old
        sectors.append((new or old or bytes(SECTOR)).ljust(SECTOR, b"\0"))
    return b"".join(sectors)[:length]


# What is in them


def _check(copy: Path) -> int:
    """Demand that a copy is sound and has the first so many commits, each whole, and return how many."""
    check_integrity(copy)
    with SwarmDB(copy) as db:
        with db.session(readonly=True) as session:
            raw = session.connection()
            numbers = [
                [int(number) for (number,) in raw.exec_driver_sql(query)]
                for query in (
                    "SELECT agent_id FROM agent_events ORDER BY id",
                    "SELECT agent_id FROM agent_registry ORDER BY rowid",
                    "SELECT task_id FROM task_metrics ORDER BY rowid",
                )
            ]
        commits = db.get_memory("order", "semantic", "number", as_type=int, default=0)
    expected = list(range(1, commits + 1))
    demand(numbers[1] == expected, "no commit is there without those before it", commits, len(numbers[1]))
    demand(numbers[2] == expected, "no half of a transaction is there", commits, len(numbers[2]))
    demand(numbers[0] == [number for number in expected for _ in range(3)], "all rows of a commit are there", commits)
    return commits
