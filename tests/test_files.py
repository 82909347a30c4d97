"""How files are made and put in place: privately, as a whole, for good, and never over what is there."""

import errno
import os
import stat
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from moai_flow.memory import StorageError
from moai_flow.memory.files import OpenedFile, flush_folder, make_file, make_folder, put_in_place


def test_a_file_is_not_made_over_or_through_what_is_there(tmp_path: Path) -> None:
    there, link = tmp_path / "there", tmp_path / "link"
    there.write_bytes(b"mine")
    there.chmod(0o640)
    link.symlink_to(tmp_path / "nowhere")
    for path in (there, link):
        with pytest.raises(FileExistsError):
            make_file(path, 0o644)

    assert there.read_bytes() == b"mine"
    assert stat.S_IMODE(there.stat().st_mode) == 0o640
    assert not (tmp_path / "nowhere").exists()


def test_many_may_make_a_folder_at_once(tmp_path: Path) -> None:
    barrier = threading.Barrier(4)

    def make(folder: Path) -> None:
        barrier.wait()
        make_folder(folder)

    with ThreadPoolExecutor(4) as pool:
        for number in range(100):
            list(pool.map(make, [tmp_path / str(number) / "deep" / "deeper"] * 4))


# Putting in place


def no_hard_links(source: object, target: object, **_: object) -> None:
    raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))  # As Linux says it where a file system has none.


def finished(folder: Path, content: bytes = b"new") -> Path:
    path = folder / f"{content.decode()}.tmp"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("links", [True, False])
def test_what_is_put_in_place_has_that_name_alone(
    links: bool,  # noqa: FBT001
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not links:
        monkeypatch.setattr(os, "link", no_hard_links)
    descriptors = list(Path("/proc/self/fd").glob("*"))  # None where there is no such folder.
    for overwrite in (False, True):
        put_in_place(finished(tmp_path), tmp_path / "target", overwrite=overwrite)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"target": b"new"}
    assert len(list(Path("/proc/self/fd").glob("*"))) == len(descriptors)


@pytest.mark.parametrize("links", [True, False])
def test_what_is_there_stays_unless_it_is_to_be_replaced(
    links: bool,  # noqa: FBT001
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not links:
        monkeypatch.setattr(os, "link", no_hard_links)
    there, to_nowhere = tmp_path / "there", tmp_path / "link"
    there.write_bytes(b"mine")
    to_nowhere.symlink_to(tmp_path / "nowhere")
    for target in (there, to_nowhere):
        with pytest.raises(FileExistsError):
            put_in_place(finished(tmp_path), target, overwrite=False)

    assert there.read_bytes() == b"mine"
    assert to_nowhere.is_symlink()
    put_in_place(finished(tmp_path), there, overwrite=True)
    assert there.read_bytes() == b"new"


def test_what_was_there_a_moment_ago_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "target"

    def link_late(source: object, target: Path, **_: object) -> None:
        target.touch()
        try:
            link(source, target)  # type: ignore[arg-type]
        finally:
            target.unlink()

    link = os.link
    monkeypatch.setattr(os, "link", link_late)
    with pytest.raises(FileExistsError):
        put_in_place(finished(tmp_path), target, overwrite=False)
    assert not target.exists()


def test_of_several_that_come_at_once_one_gets_the_place(tmp_path: Path) -> None:
    barrier = threading.Barrier(4)

    def put(number: int, target: Path) -> bool:
        path = finished(target.parent, str(number).encode())
        barrier.wait()
        try:
            put_in_place(path, target, overwrite=False)
        except FileExistsError:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        for number in range(200):
            folder = tmp_path / str(number)
            folder.mkdir()
            got = list(pool.map(put, range(4), [folder / "target"] * 4))
            assert sum(got) == 1
            assert (folder / "target").read_bytes() == str(got.index(True)).encode()


@pytest.mark.parametrize("overwrite", [True, False])
def test_the_name_is_flushed_once_it_is_given(
    overwrite: bool,  # noqa: FBT001
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flushed: list[tuple[os.stat_result, list[str]]] = []
    fsync = os.fsync

    def note(descriptor: int) -> None:
        fsync(descriptor)
        flushed.append((os.fstat(descriptor), [path.name for path in tmp_path.iterdir()]))

    monkeypatch.setattr(os, "fsync", note)
    put_in_place(finished(tmp_path), tmp_path / "target", overwrite=overwrite)

    ((what, names),) = flushed
    assert os.path.samestat(what, tmp_path.stat())
    assert names == ["target"]


IN_A_LETTER_BOX = """
import os, sys
from pathlib import Path
from moai_flow.memory import StorageError
from moai_flow.memory.files import put_in_place
if os.geteuid() == 0:
    os.setuid(65534)
folder = Path(sys.argv[1])
(folder / "new").touch()
folder.chmod(0o300)
put_in_place(folder / "new", folder / "target", overwrite=False)
folder.chmod(0o700)
print(os.listdir(folder))
"""


def test_a_folder_that_may_be_written_but_not_listed_does() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        place = Path(folder) / "place"
        place.mkdir()
        if os.geteuid() == 0:
            Path(folder).chmod(0o755)
            os.chown(place, 65534, 65534)
        program = [sys.executable, "-c", IN_A_LETTER_BOX, str(place)]
        ran = subprocess.run(program, capture_output=True, text=True, check=False)
    if "PermissionError" in ran.stderr and "site-packages" in ran.stderr:
        pytest.skip("nobody may not read Python's packages here")
    assert (ran.stdout, ran.stderr) == ("['target']\n", "")


def test_a_folder_that_is_gone_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        flush_folder(tmp_path / "nowhere")


# Whether a file is still there


def test_a_file_is_looked_at_again_within_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.touch()
    opened = OpenedFile(path)
    finished(tmp_path).replace(path)
    opened.check()
    with pytest.raises(StorageError, match="replaced while it was open"):
        opened.check(now=True)
    later = time.monotonic() + 1
    with monkeypatch.context() as context:
        context.setattr(time, "monotonic", lambda: later)
        with pytest.raises(StorageError, match="replaced while it was open"):
            opened.check()
