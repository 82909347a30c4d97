"""A hook of MkDocs: writes the reference of the command line from the commands themselves, as Typer documents them."""

import re
import subprocess
import sys

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

_TYPER = [sys.executable, "-m", "typer", "moai_flow.memory.cli.app", "utils", "docs", "--name", "swarmdb"]


def on_files(files: Files, *, config: MkDocsConfig) -> None:
    """Add the page to the site."""
    files.append(File.generated(config, "reference/command-line.md", content=_page()))


def _page() -> str:
    page = subprocess.run(_TYPER, check=True, capture_output=True, encoding="utf-8").stdout  # noqa: S603 (our own words)
    group, lines = "swarmdb", []
    for line in page.splitlines():
        if heading := re.match(r"#+ `(.*)`", line):
            group = heading[1]
        # Typer cuts what a command does to 45 letters. Its section has it in full.
        if command := re.match(r"\* `([a-z]+)`: ", line):
            line = f"* [`{command[1]}`](#{f'{group} {command[1]}'.replace(' ', '-')})"
        lines.append(line)
    return "\n".join(lines)
