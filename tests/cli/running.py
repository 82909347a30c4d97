"""Running the command as a shell would, in this process."""

import json
import os
import pty
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from moai_flow.memory.__main__ import main


@dataclass(frozen=True)
class Ran:
    """What a command left behind."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        assert (self.err, self.status) == ("", 0)
        return json.loads(self.out)


class Command:
    """Calls ``swarmdb`` with arguments."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self._capsys = capsys
        self._monkeypatch = monkeypatch
        for variable, value in {"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"}.items():
            monkeypatch.setenv(variable, value)

    def __call__(self, *arguments: object) -> Ran:
        self._monkeypatch.setattr(sys, "argv", ["swarmdb", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = self._capsys.readouterr()
        code = ended.value.code
        if isinstance(code, str):  # The interpreter prints it, and ends with 1.
            return Ran(1, out, f"{err}{code}\n")
        return Ran(code or 0, out, err)


def on_terminal(command: list[str], folder: Path, *, is_all: bool = False, **environment: str) -> tuple[bytes, bytes]:
    """Return what a program shows on a terminal, and what it writes to standard output.

    The terminal is its standard error; with *is_all*, its standard output as well.
    """
    shown, terminal = pty.openpty()
    usual = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    variables = {**usual, "COLUMNS": "80", "TERM": "xterm", **environment}
    stdout = terminal if is_all else subprocess.PIPE
    with subprocess.Popen(command, cwd=folder, stdout=stdout, stderr=terminal, env=variables) as process:
        os.close(terminal)
        seen = b""
        with suppress(OSError):  # Linux's way to say that the other side is closed.
            while piece := os.read(shown, 65536):
                seen += piece
        os.close(shown)
        answer = b"" if process.stdout is None else process.stdout.read()
    assert process.returncode == 0
    return seen, answer
