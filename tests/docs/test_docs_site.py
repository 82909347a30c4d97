"""The site is built without a warning, names everything public, and needs nothing from elsewhere."""

import html
import inspect
import re
import runpy
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import moai_flow.memory
from conftest import REPOSITORY
from moai_flow.memory import AgentMetricData, EventData, SwarmDB, SwarmMetricData, TaskMetricData
from moai_flow.memory.models import TABLES, Record, columns, table_of

PACKAGE = "moai_flow.memory."
METHODS = [name for name, _ in inspect.getmembers(SwarmDB) if not name.startswith("_")]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    return folder


@pytest.fixture(scope="module")
def inventory(site: Path) -> set[str]:
    header, _, body = (site / "objects.inv").read_bytes().partition(b"using zlib.\n")
    assert header
    return {line.split(" ")[0] for line in zlib.decompress(body).decode().splitlines()}


def commands() -> Iterator[tuple[str, set[str]]]:
    """Yield each command with its options."""
    from typer.main import get_command

    from moai_flow.memory.cli.app import app

    pending: list[tuple[str, Any]] = [("swarmdb", get_command(app))]
    while pending:
        path, command = pending.pop()
        for name, child in getattr(command, "commands", {}).items():
            pending.append((f"{path} {name}", child))
        if not hasattr(command, "commands"):
            yield path, {option for parameter in command.params for option in parameter.opts if option.startswith("--")}


def test_the_reference_has_every_public_name(inventory: set[str]) -> None:
    assert {name for name in moai_flow.memory.__all__ if PACKAGE + name not in inventory} == set()


def test_the_reference_has_every_public_method(inventory: set[str]) -> None:
    assert "get_agent" in METHODS
    assert {name for name in METHODS if f"{PACKAGE}SwarmDB.{name}" not in inventory} == set()


def test_the_reference_shows_the_real_signature_of_every_awaited_method(site: Path, inventory: set[str]) -> None:
    assert {name for name in METHODS if f"{PACKAGE}AsyncSwarmDB.{name}" not in inventory} == set()

    page = html.unescape(re.sub(r"<[^>]+>", "", (site / "reference" / "asyncio" / "index.html").read_text()))
    for name in METHODS:
        method = getattr(SwarmDB, name)
        if not isinstance(method, property) and name != "close":
            parameters = [parameter for parameter in inspect.signature(method).parameters if parameter != "self"]
            shown = re.findall(rf"\b{name}\(([^)]*)\)", page)
            assert any(all(parameter in signature for parameter in parameters) for signature in shown), name
    assert "page_cache_mib: int" in page
    assert "*arguments" not in page


@pytest.mark.parametrize("model", TABLES)
def test_the_reference_has_every_column_and_what_it_means(site: Path, model: type[Record]) -> None:
    page = (site / "reference" / "models" / "index.html").read_text()
    shown = html.unescape(page)

    for name, field in model.model_fields.items():
        assert f"<code>{name}</code>" in page
        assert str(field.description) in shown


@pytest.mark.parametrize("model", TABLES)
def test_the_schema_page_has_every_column_and_index(model: type[Record]) -> None:
    page = (REPOSITORY / "docs" / "reference" / "schema.md").read_text()
    section = page.partition(f"\n## {model.__tablename__}\n")[2].partition("\n## ")[0]

    assert re.findall(r"^\| `(\w+)` \| [A-Z]", section, re.MULTILINE) == [column.name for column in columns(model)]
    for index in table_of(model).indexes:
        on = ", ".join(f"`{column.name}`" for column in index.columns)
        assert f"| `{index.name}` | {on} |" in section


@pytest.mark.parametrize("shape", [EventData, TaskMetricData, AgentMetricData, SwarmMetricData])
def test_the_reference_has_every_key_of_an_input(shape: Any) -> None:
    page = (REPOSITORY / "docs" / "reference" / "inputs.md").read_text()
    section = page.partition(f"::: {PACKAGE}{shape.__name__}\n")[2].partition("\n:::")[0]

    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == list(shape.__annotations__)
    assert set(re.findall(r"^\| `(\w+)` .*\| yes \|", section, re.MULTILINE)) == shape.__required_keys__


def test_the_reference_has_every_command_and_option(site: Path) -> None:
    page = (site / "reference" / "command-line" / "index.html").read_text()
    sections = {section.partition('"')[0]: section for section in re.split(r"<h[23] id=\"", page)}

    paths = [path for path, _ in commands()]
    assert "swarmdb memory set" in paths
    for path, options in commands():
        section = sections[path.replace(" ", "-")]
        assert options - set(re.findall(r"(?:<code>|, )(--[a-z-]+)", section)) == set()


def test_the_guide_of_the_command_line_has_every_command() -> None:
    page = (REPOSITORY / "docs" / "guides" / "command-line.md").read_text()

    assert set(re.findall("^## (.*)", page, re.MULTILINE)) == {path for path, _ in commands()}


def test_every_promise_of_the_readme_names_tests_that_are_there() -> None:
    readme, page = (REPOSITORY / name for name in ("README.md", "docs/guides/reliability.md"))
    section = page.read_text().partition("which test would notice\n")[2].partition("\n## ")[0]
    tests = dict(re.findall(r"^\| (\w[\w ]*) \| (`.*) \|$", section, re.MULTILINE))

    promises = readme.read_text().partition("[start:guarantees]")[2].partition("[end:guarantees]")[0]
    assert list(tests) == re.findall(r"^\| (\w[\w ]*) \|", promises, re.MULTILINE)[1:]
    for named in tests.values():
        for file, name in re.findall(r"`(tests/.*?)`: `(.*?)`", named):
            assert f"\ndef {name}(" in (REPOSITORY / file).read_text()


#: What the page of errors says of all calls.
_OF_ALL = {"StorageError", "ClosedError", "InvalidInputError"}


def test_the_page_of_errors_says_of_each_call_what_it_raises() -> None:
    page = (REPOSITORY / "docs" / "guides" / "errors.md").read_text()
    section = page.partition("## What one call raises\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.*) \| (.*)\|$", section, re.MULTILINE)

    documented = {
        call: set(re.findall("`([A-Z].*?)`", errors)) for calls, errors in rows for call in re.findall("`(.*?)`", calls)
    }
    assert documented == {name: _raised(name) - _OF_ALL for name in METHODS if name != "close"}


def _raised(name: str) -> set[str]:
    _, _, section = (inspect.getdoc(getattr(SwarmDB, name)) or "").partition("\nRaises:\n")
    return set(re.findall(r"^    (\w+):", section.partition("\n\n")[0], re.MULTILINE))


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    loaded = re.compile(r"<(?:script|img|iframe|source)[^>]*src=\"?(?:https?:)?//|<link[^>]*href=\"?(?:https?:)?//")
    imported = re.compile(r"(?:@import|url\()\s*[\"']?(?:https?:)?//")

    assert [page for page in site.rglob("*.html") if loaded.search(page.read_text())] == []
    assert [sheet for sheet in site.rglob("*.css") if imported.search(sheet.read_text())] == []


def test_what_builds_the_site_is_not_part_of_it(site: Path) -> None:
    assert list(site.rglob("*.py")) == []


def test_the_page_for_contributors_has_every_module() -> None:
    page = (REPOSITORY / "docs" / "contributing.md").read_text()
    rows = re.findall(r"^\| (`.*?) \|", page.partition("## The checks\n")[0], re.MULTILINE)
    package = REPOSITORY / "src" / "moai_flow" / "memory"
    modules = {path.stem for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}

    assert {name for row in rows for name in re.findall("`(.*?)`", row)} == modules - {"__init__", "__main__"}


def test_llms_txt_has_every_guide_and_no_dead_link(site: Path) -> None:
    links = re.findall(r"\]\(([^)]+)\)", (site / "llms.txt").read_text())

    assert {link for link in links if not (site / link / "index.html").exists()} == set()
    guides = {f"guides/{page.stem}/" for page in (REPOSITORY / "docs" / "guides").glob("*.md")}
    assert guides - set(links) == set()


def test_the_picture_of_the_tables_is_up_to_date() -> None:
    drawn = runpy.run_path(str(REPOSITORY / "docs" / "_extensions" / "tables.py"))

    assert drawn["TARGET"].read_text() == drawn["draw"]()
