"""A hook of MkDocs: writes the reference of the command line from the commands themselves, as Typer documents them."""

import re
import subprocess
import sys

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

_TYPER = [sys.executable, "-m", "typer", "moai_flow.memory.cli.app", "utils", "docs", "--name", "swarmdb"]
_GUIDE = "../guides/command-line.md"


def on_files(files: Files, *, config: MkDocsConfig) -> None:
    """Add the page to the site."""
    files.append(File.generated(config, "reference/command-line.md", content=_page()))


def _page() -> str:
    page = subprocess.run(_TYPER, check=True, capture_output=True, encoding="utf-8").stdout  # noqa: S603 (our own words)
    sections = re.split(r"^(#+) `(.*)`\n", page, flags=re.MULTILINE)[1:]
    texts = dict(zip(sections[1::3], sections[2::3], strict=True))
    lines = ["# The command line", "", f"How the commands are used is in the [guide]({_GUIDE})."]
    for level, command, text in zip(sections[::3], texts, texts.values(), strict=True):
        if command != "swarmdb":
            lines += [f"{level} `{command}`"]
        lines += [_line(line, command, texts) for line in text.splitlines()]
    return "\n".join(lines)


def _line(line: str, group: str, texts: dict[str, str]) -> str:
    # Typer cuts what a command does to 45 letters. Its section has it in full.
    if entry := re.match(r"\* `([a-z]+)`: ", line):
        command = f"{group} {entry[1]}"
        return f"* [`{entry[1]}`](#{command.replace(' ', '-')}): {texts[command].strip().partition(chr(10))[0]}"
    if line.startswith("$ "):
        return re.sub(r"\{([A-Z_]+)\}", r"\1", line)  # What is required stands bare, as in the guide.
    return line.replace(" <int range>`", " <int>`")  # The range follows.
