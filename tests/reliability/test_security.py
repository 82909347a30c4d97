"""Who may read what SwarmDB writes, and what reaches the database as SQL."""

import ast
import os
import sqlite3
import stat
import tomllib
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import moai_flow.memory
from conftest import REPOSITORY
from moai_flow.memory import StorageError, SwarmDB
from moai_flow.memory.restoring import restore_backup

PACKAGE = Path(moai_flow.memory.__file__).parent
EVENT: Any = {"event_type": "spawn", "agent_id": "a", "agent_type": "t"}


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(params=[0o000, 0o022], ids=["umask 000", "umask 022"])
def umask(request: pytest.FixtureRequest) -> Iterator[None]:
    before = os.umask(request.param)
    yield
    os.umask(before)


# Files


@pytest.mark.usefixtures("umask")
def test_what_is_made_is_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "swarm.db"
    with SwarmDB(path) as db:
        db.insert_event(EVENT)
        assert {file.name: mode(file) for file in path.parent.iterdir()} == {
            "swarm.db": 0o600,
            "swarm.db-shm": 0o600,
            "swarm.db-wal": 0o600,
        }
    assert mode(path.parent) == mode(path.parent.parent) == 0o700


@pytest.mark.usefixtures("umask")
@pytest.mark.parametrize("query", ["", "?mode=rwc&uri=true"])
def test_so_is_what_a_url_names(path: Path, query: str) -> None:
    with SwarmDB(url=f"sqlite:///file:{path}?uri=true" if not query else f"sqlite:///file:{path}{query}"):
        assert mode(path) == 0o600


def test_a_url_that_only_reads_makes_nothing(path: Path) -> None:
    with pytest.raises(StorageError):
        SwarmDB(url=f"sqlite:///file:{path}?mode=ro&uri=true")
    assert not path.exists()


def test_a_file_and_a_folder_that_exist_keep_their_permissions(tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o770)
    path = folder / "swarm.db"
    path.touch()
    path.chmod(0o660)
    with SwarmDB(path) as db:
        db.insert_event(EVENT)
        assert [mode(file) for file in (folder, path, Path(f"{path}-wal"))] == [0o770, 0o660, 0o660]


@pytest.mark.usefixtures("umask")
@pytest.mark.parametrize("source", [0o600, 0o660, 0o644])
def test_a_backup_may_be_read_by_those_who_may_read_the_database(path: Path, tmp_path: Path, source: int) -> None:
    target = tmp_path / "made" / "copy.db"
    with SwarmDB(path) as db:
        path.chmod(source)
        db.backup(target)
        assert mode(target) == source
        assert mode(target.parent) == 0o700
        target.chmod(0o666)
        db.backup(target, overwrite=True)
        assert mode(target) == source


@pytest.mark.usefixtures("umask")
def test_a_backup_of_what_is_in_memory_is_for_its_owner(tmp_path: Path) -> None:
    with SwarmDB(":memory:") as db:
        assert mode(db.backup(tmp_path / "copy.db")) == 0o600


@pytest.mark.usefixtures("umask")
def test_the_copy_before_a_migration_may_be_read_by_those_who_may_read_the_file(path: Path) -> None:
    SwarmDB(path).close()
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE schema_info SET value = '2.0.0' WHERE key = 'version'")
    path.chmod(0o640)
    SwarmDB(path).close()

    assert [(copy.name, mode(copy)) for copy in path.parent.glob("*.bak")] == [("swarm.db.2.0.0.bak", 0o640)]


@pytest.mark.usefixtures("umask")
def test_a_link_to_a_file_that_does_not_exist_makes_it_for_its_owner(tmp_path: Path) -> None:
    link, target = tmp_path / "link.db", tmp_path / "target.db"
    link.symlink_to(target)
    with SwarmDB(link) as db:
        db.insert_event(EVENT)
        assert mode(target) == 0o600
        assert mode(Path(f"{target}-wal")) == 0o600
        assert link.is_symlink()


def test_a_loop_of_links_is_a_storage_error_and_stays(path: Path, tmp_path: Path) -> None:
    loop, saved = tmp_path / "a", tmp_path / "saved.db"
    loop.symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(loop)
    with SwarmDB(path) as db:
        db.backup(saved)
        calls: list[Callable[[], object]] = [
            lambda: SwarmDB(loop),
            lambda: db.backup(loop),
            lambda: db.backup(loop, overwrite=True),
            lambda: restore_backup(loop, tmp_path / "new.db"),
            lambda: restore_backup(saved, loop, overwrite=True),
        ]
        for call in calls:
            with pytest.raises(StorageError, match="Too many levels of symbolic links"):
                call()
    assert loop.is_symlink()


def test_a_backup_through_a_link_replaces_the_link_and_not_what_it_leads_to(path: Path, tmp_path: Path) -> None:
    victim, link = tmp_path / "victim", tmp_path / "copy.db"
    victim.write_bytes(b"precious")
    link.symlink_to(victim)
    with SwarmDB(path) as db:
        db.backup(link, overwrite=True)
    assert victim.read_bytes() == b"precious"
    assert not link.is_symlink()


# SQL

#: Where SQL is put together at run time, and out of what. Anything new has to be looked at, and noted here.
PUT_TOGETHER = {
    ("backends", "SQLite.impatient"): "the busy timeout that SQLite itself told, as a number",
    ("backends", "PostgreSQL.end_reading"): "the name of a block's savepoint",
    ("engine", "_for_file"): "the page cache, as a number",
    ("migrations", "_check_columns"): "the name of a table of ours",
    ("operations.maintenance", "_vacuum_on_server"): "the names of our tables",
    ("scope", "Block.begin"): "the name of its savepoint",
    ("scope", "Block._undo"): "the name of its savepoint",
    ("transfer", "<module>"): "the names of our tables",
    ("transfer", "_server_writer"): "the names of a table of ours and of its columns",
}
_VERBS = (
    "ALTER ", "ATTACH ", "BEGIN", "COPY ", "CREATE ", "DELETE ", "DROP ", "INSERT ", "LOCK ", "PRAGMA ", "REINDEX",
    "ROLLBACK", "SAVEPOINT", "SELECT ", "SET ", "UPDATE ", "VACUUM", "WITH ",
)  # fmt: skip


class _Builder(ast.NodeVisitor):
    """Finds text that begins as SQL does and is not a constant."""

    def __init__(self) -> None:
        self.found: set[str] = set()
        self._names: list[str] = []

    def _inside(self, node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self._names.append(node.name)
        self.generic_visit(node)
        self._names.pop()

    visit_ClassDef = visit_FunctionDef = visit_AsyncFunctionDef = _inside  # noqa: N815

    def _note(self, first: ast.AST) -> None:
        if isinstance(first, ast.Constant) and isinstance(first.value, str) and first.value.startswith(_VERBS):
            self.found.add(".".join(self._names) or "<module>")

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        if any(isinstance(part, ast.FormattedValue) for part in node.values):
            self._note(node.values[0])
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        if isinstance(node.op, ast.Add | ast.Mod):
            self._note(node.left)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Attribute) and node.func.attr in ("format", "join", "replace"):
            self._note(node.func.value)
        self.generic_visit(node)


def builders(source: str) -> set[str]:
    finder = _Builder()
    finder.visit(ast.parse(source))
    return finder.found


@pytest.mark.parametrize(
    "expression",
    [
        'f"SELECT {x}"',
        '"DELETE FROM " + x',
        '"UPDATE %s" % x',
        '"INSERT INTO {}".format(x)',
        '"SELECT ?".replace("?", x)',
    ],
)
def test_sql_that_is_put_together_is_found(expression: str) -> None:
    assert builders(f"def run(x):\n    return {expression}") == {"run"}


def test_no_sql_is_put_together_but_of_our_own_names_and_numbers() -> None:
    found = {
        (".".join(module.relative_to(PACKAGE).with_suffix("").parts), place)
        for module in PACKAGE.rglob("*.py")
        for place in builders(module.read_text())
    }
    assert found == PUT_TOGETHER.keys()


def test_the_rules_against_injection_are_on() -> None:
    lint = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["ruff"]["lint"]
    assert "S" in lint["select"]
    assert [rule for rule in lint["ignore"] if rule.startswith("S")] == ["S101"]
    for places, rules in lint["per-file-ignores"].items():
        assert places == "tests/**" or not any(rule.startswith("S") for rule in rules)
    silenced = [
        line for module in PACKAGE.rglob("*.py") for line in module.read_text().splitlines() if "noqa: S6" in line
    ]
    assert silenced == []


def test_sql_in_a_value_is_a_value_like_any_other(db: SwarmDB) -> None:
    evil = "'; DROP TABLE agent_events; --"
    db.insert_event({"event_type": "spawn", "agent_id": evil, "agent_type": evil, "metadata": {evil: evil}})
    db.store_memory(evil, "semantic", evil, evil)

    assert [event.metadata_ for event in db.get_events(evil)] == [{evil: evil}]
    assert db.get_events("' OR '1'='1") == []
    assert [memory.value for memory in db.list_memories(evil, prefix="'; DROP")] == [evil]
    assert db.list_memories(evil, prefix="%") == []
    assert db.check().ok
